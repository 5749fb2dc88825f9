"""Magnitude pruning (Han et al., arXiv 1506.02626)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ssgr.pruner import ByScore, Moments, Statistic


@dataclass(frozen=True)
class Magnitude(ByScore):
    """Drop the smallest |w|, compared over the whole layer by default; the calibration plays no part."""

    name: str = "magnitude"
    statistic: ClassVar[Statistic] = "none"

    def score(self, w_OI: Tensor, inputs: Moments | None) -> Tensor:
        """|w|, (O, I)."""
        return w_OI.abs()
