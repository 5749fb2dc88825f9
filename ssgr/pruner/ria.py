"""RIA: relative importance and activations (Zhang et al., ICLR 2024, "Plug-and-Play").

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssgr.pruner import Pruned, Statistic
from ssgr.sparsity import Compare, Sparsity, check_compare


@dataclass(frozen=True)
class RIA:
    """Drop the smallest (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2 ** `power` (eq. 2 and 4).

    Compared over the whole layer, with power 0.5, as in the published code. Its channel permutation for n:m is not part
    of it: a permuted checkpoint is no longer a plain one.
    """

    exclude: tuple[str, ...] = ()
    compare: Compare = "layer"
    power: float = 0.5
    name: str = "ria"

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", tuple(self.exclude))
        check_compare(self.compare)
        if self.power < 0:
            raise ValueError(f"pruner.power={self.power}: give an exponent of at least 0, such as 0.5")

    @property
    def statistic(self) -> Statistic:
        """The mean square of each input."""
        return "norm"

    def prune(self, w_OI: Tensor, statistic: Tensor | None, sparsity: Sparsity, name: str) -> Pruned:
        """Prune one matrix (O, I) with the mean squares of its inputs (I,)."""
        assert statistic is not None
        size_OI = w_OI.abs()
        tiny = 1e-30  # a row or column of zeros has no importance, rather than 0 / 0
        share_OI = size_OI / size_OI.sum(0).clamp(min=tiny) + size_OI / size_OI.sum(1, keepdim=True).clamp(min=tiny)
        return Pruned(w_OI * sparsity.keep(share_OI * statistic.sqrt() ** self.power, self.compare))
