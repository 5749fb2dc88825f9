"""RIA: relative importance and activations (Zhang et al., ICLR 2024, "Plug-and-Play").

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssgr.pruner import ByScore, Moments

_TINY = 1e-30  # a row or column of zeros has no importance, rather than 0 / 0


@dataclass(frozen=True)
class RIA(ByScore):
    """Drop the smallest (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2 ** `power` (eq. 2 and 4).

    Compared over the whole layer, with power 0.5, as in the published code. Its channel permutation for n:m is not part
    of it: a permuted checkpoint is no longer a plain one.
    """

    power: float = 0.5
    name: str = "ria"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power < 0:
            raise ValueError(f"pruner.power={self.power}: give an exponent of at least 0, such as 0.5")

    def score(self, w_OI: Tensor, inputs: Moments | None) -> Tensor:
        """The relative importance with activations, (O, I)."""
        assert inputs is not None
        size_OI = w_OI.abs()
        share_OI = size_OI / size_OI.sum(0).clamp(min=_TINY) + size_OI / size_OI.sum(1, keepdim=True).clamp(min=_TINY)
        return share_OI * inputs.square_I.sqrt() ** self.power
