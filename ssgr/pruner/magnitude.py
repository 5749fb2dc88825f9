"""Magnitude pruning (Han et al., arXiv 1506.02626)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssgr.pruner import Pruned, Statistic
from ssgr.sparsity import Compare, Sparsity, check_compare


@dataclass(frozen=True)
class Magnitude:
    """Drop the smallest |w|, compared over the whole layer by default; the calibration plays no part."""

    exclude: tuple[str, ...] = ()
    compare: Compare = "layer"
    name: str = "magnitude"

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", tuple(self.exclude))
        check_compare(self.compare)

    @property
    def statistic(self) -> Statistic:
        """None is needed."""
        return "none"

    def prune(self, w_OI: Tensor, statistic: Tensor | None, sparsity: Sparsity, name: str) -> Pruned:
        """Prune one matrix (O, I)."""
        return Pruned(w_OI * sparsity.keep(w_OI.abs(), self.compare))
