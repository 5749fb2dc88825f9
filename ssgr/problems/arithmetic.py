"""Generated arithmetic as problems: any count, any level, disjoint splits."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from ssgr import arithmetic
from ssgr.problems import Split, checked
from ssgr.records import Problem


@dataclass(frozen=True)
class ArithmeticProblems:
    """`calibration` and `test` problems, spread evenly over `levels` (operations a problem)."""

    levels: tuple[int, ...]
    calibration: int
    test: int
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        counts = (self.calibration, self.test)
        if not self.levels or not all(isinstance(n, int) and n > 0 for n in counts):
            raise ValueError(
                f"problems=arithmetic: levels={list(self.levels)} calibration={self.calibration} test={self.test}: give at "
                "least one level, and whole numbers of at least 1, without a point or exponent"
            )

    def read(self, split: Split) -> list[Problem]:
        """Draw the problems of `split`: levels in turn, no problem twice.

        Raises:
            ValueError: a level outside 1 to 8, or more problems than a level has.
        """
        return list(_drawn(self, split))


@lru_cache(8)
def _drawn(of: ArithmeticProblems, split: Split) -> tuple[Problem, ...]:
    """Kept, as the cells of a grid ask for the same ones, and a thousand take most of a second."""
    count = of.calibration if split == "calibration" else of.test
    rng = random.Random(f"{of.seed}/{split}")
    seen: set[str] = set()
    out: list[Problem] = []
    for i in range(count):
        level = of.levels[i % len(of.levels)]
        for _ in range(_PATIENCE):
            drawn = arithmetic.generate(level, split, rng)
            if arithmetic.text(drawn.tree) not in seen:
                break
        else:
            raise ValueError(
                f"problems.{split}={count}: level {level} has no more than about {i // len(of.levels)} different "
                f"problems in this split; ask for fewer, or for higher levels than {list(of.levels)}"
            )
        seen.add(arithmetic.text(drawn.tree))
        solution = " ".join(f"{a}{op}{b}={c}." for op, a, b, c, _ in arithmetic.steps(drawn.tree))
        name = f"arithmetic/{split}/{of.seed}/{i}"
        out.append(Problem(name, drawn.question, str(drawn.answer), "arithmetic", level, solution))
    return tuple(checked(out, "problems=arithmetic"))


_PATIENCE = 1000  # draws in a row that were all seen before: the level is used up
