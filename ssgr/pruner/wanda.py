"""Wanda: pruning by weights and activations (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssgr.pruner import Pruned, Statistic
from ssgr.sparsity import Compare, Sparsity, check_compare


@dataclass(frozen=True)
class Wanda:
    """Drop the smallest |W_ij| * ||X_j||_2 (eq. 1), compared within each output row as published."""

    exclude: tuple[str, ...] = ()
    compare: Compare = "row"
    name: str = "wanda"

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", tuple(self.exclude))
        check_compare(self.compare)

    @property
    def statistic(self) -> Statistic:
        """The mean square of each input."""
        return "norm"

    def prune(self, w_OI: Tensor, statistic: Tensor | None, sparsity: Sparsity, name: str) -> Pruned:
        """Prune one matrix (O, I) with the mean squares of its inputs (I,)."""
        assert statistic is not None
        return Pruned(w_OI * sparsity.keep(w_OI.abs() * statistic.sqrt(), self.compare))
