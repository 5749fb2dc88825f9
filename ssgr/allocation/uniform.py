"""Uniform: the same share of zeros everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ssgr.allocation import Needs, Seen


@dataclass(frozen=True)
class Uniform:
    """Every layer gets the share of the whole model."""

    name: str = "uniform"
    needs: ClassVar[Needs] = "nothing"

    def ratios(self, look: Callable[[], Iterable[Seen]], sizes: Mapping[str, int], ratio: float) -> dict[str, float]:
        """`ratio` for every layer; nothing is looked at."""
        return dict.fromkeys(sizes, ratio)
