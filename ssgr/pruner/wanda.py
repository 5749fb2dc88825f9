"""Wanda: pruning by weights and activations (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssgr.pruner import ByScore, Moments
from ssgr.sparsity import Compare


@dataclass(frozen=True)
class Wanda(ByScore):
    """Drop the smallest |W_ij| * ||X_j||_2 (eq. 1), compared within each output row as published."""

    compare: Compare = "row"
    name: str = "wanda"

    def score(self, w_OI: Tensor, inputs: Moments | None) -> Tensor:
        """|W_ij| * ||X_j||_2, (O, I); the norm is a root mean square, which orders alike."""
        assert inputs is not None
        return w_OI.abs() * inputs.square_I.sqrt()
