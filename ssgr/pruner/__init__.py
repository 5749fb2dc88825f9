"""Pruners: which statistic of the inputs they want, and what they make of a weight matrix.

Shapes: O outputs, I inputs, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from ssgr.sparsity import Sparsity

Statistic = Literal["none", "norm", "gram"]


@dataclass(frozen=True)
class Pruned:
    """A pruned matrix, float32, (O, I), with the damping that was used, if any."""

    w_OI: Tensor
    damping: float | None = None


class Pruner(Protocol):
    """A pruning method for one linear layer."""

    @property
    def name(self) -> str:
        """The choice in the config group."""
        ...

    @property
    def statistic(self) -> Statistic:
        """What it needs: nothing, the mean square of each input (I,), or the Gram matrix (I, I) mean_t w_t x_t x_t^T."""
        ...

    @property
    def exclude(self) -> tuple[str, ...]:
        """Patterns of layer names inside a block that stay dense."""
        ...

    def prune(self, w_OI: Tensor, statistic: Tensor | None, sparsity: Sparsity, name: str) -> Pruned:
        """Prune one matrix; `name` is for messages."""
        ...
