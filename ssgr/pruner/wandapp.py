"""Wanda++: Wanda with regional gradients (Yang et al., ACL Findings 2025, arXiv 2503.04992)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ssgr.pruner import ByScore, Moments, Statistic
from ssgr.sparsity import Compare


@dataclass(frozen=True)
class WandaPP(ByScore):
    """Drop the smallest (`alpha` G_ij + ||X_j||_2) |W_ij|, the regional gradient score, compared within each output row.

    G_ij is the root mean square over the rows of the gradient of ||f(X)||_2, the norm of the block's output, and ||X_j||_2
    that of the norm of input j in a row. `alpha` is 100 as published. The regional optimisation that the paper adds after
    pruning is not done. Experts of a mixture are not pruned this way: leave them out, or choose another pruner.

    Raises:
        ValueError: `alpha` is negative.
    """

    compare: Compare = "row"
    alpha: float = 100.0
    name: str = "wandapp"
    statistic: ClassVar[Statistic] = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise ValueError(f"pruner.alpha={self.alpha}: give the weight of the gradients, 0 or more, such as 100")

    def score(self, w_OI: Tensor, inputs: Moments | None) -> Tensor:
        """(alpha G_ij + ||X_j||_2) |W_ij|, (O, I)."""
        assert inputs is not None and inputs.gradient_OI is not None
        norm_I = (inputs.square_I * (inputs.tokens / inputs.rows)).sqrt()
        return (self.alpha * inputs.gradient_OI.sqrt() + norm_I) * w_OI.abs()
