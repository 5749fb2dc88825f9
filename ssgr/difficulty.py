"""Difficulty of a problem under one model: the share of its attempts that went wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ssgr.records import Graded, Verdict


@dataclass(frozen=True)
class Difficulty:
    """A band [low, high) of the share of wrong attempts, in [0, 1].

    A share of exactly 0 (always solved) or 1 (never solved) lies in the band only if the option of that name says so.
    """

    name: str
    low: float
    high: float
    always_solved: bool
    never_solved: bool

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"difficulty={self.name}: low={self.low}, high={self.high} is no band; "
                "shares of wrong attempts need 0 <= low <= high <= 1, such as difficulty.low=0.5 difficulty.high=1"
            )

    @property
    def holds_all(self) -> bool:
        """Whether every problem lies in the band."""
        return self.low == 0 and self.high == 1 and self.always_solved and self.never_solved

    def holds(self, wrong: float | None) -> bool:
        """Whether a problem with this share of wrong attempts lies in the band; one without a share does where all do."""
        if wrong is None:
            return self.holds_all
        if wrong == 0:
            return self.always_solved
        if wrong == 1:
            return self.never_solved
        return self.low <= wrong < self.high


def wrong_shares(graded: Iterable[Graded]) -> dict[str, float]:
    """Share of attempts without a right answer, by problem id; what the grader failed on is not counted.

    A problem on which the grader failed every time has no share and is left out.
    """
    right: dict[str, int] = defaultdict(int)
    tried: dict[str, int] = defaultdict(int)
    for one in graded:
        if one.verdict is not Verdict.GRADER_FAILED:
            tried[one.trace.problem_id] += 1
            right[one.trace.problem_id] += one.verdict is Verdict.RIGHT
    return {problem: (n - right[problem]) / n for problem, n in tried.items()}
