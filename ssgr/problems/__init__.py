"""Problems: where questions with known answers come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from ssgr.records import Problem

Split = Literal["calibration", "test"]


class Problems(Protocol):
    """A source of problems with disjoint splits."""

    def read(self, split: Split) -> list[Problem]:
        """The problems of `split`, in a fixed order, ids unique."""
        ...


def checked(problems: Sequence[Problem], where: str, hint: str = "") -> list[Problem]:
    """`problems`, once there are some and the ids are unique; `hint` is what to do where there are none.

    Raises:
        ValueError: there are no problems, or an id is given twice.
    """
    if not problems:
        raise ValueError(f"{where} holds no problems{hint}")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise ValueError(
                f"{where.rstrip(',')}: the problem id {problem.id!r} is given twice; ids must be unique: mend the rows, or type "
                "problems.columns.id=null to number them"
            )
        seen.add(problem.id)
    return list(problems)
