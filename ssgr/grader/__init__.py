"""Graders: whether the answer part of a response gives the gold answer."""

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
        """Grade (gold answer, answer part) pairs, in order."""
        ...
