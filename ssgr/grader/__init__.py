"""Graders: whether a response gives the gold answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ssgr.records import Verdict


@dataclass(frozen=True)
class Grade:
    """What the grader says of a response, the answer that was found in it, and why the grader failed if it did."""

    verdict: Verdict
    answer: str | None = None
    why: str | None = None


class Grader(Protocol):
    """A way to compare answers."""

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (gold answer, response) pairs, in order."""
        ...


def answer_part(response: str, end_think: str | None = "</think>", required: bool = True) -> str | None:
    """What follows the last end-of-think tag; without the tag, None if it is `required`, else all of the response.

    A model that does not think has no tag (None or empty): all of the response is the answer part.
    """
    if not end_think:
        return response
    _, tag, after = response.rpartition(end_think)
    if tag:
        return after
    return None if required else response
