"""Allocations: how one share of zeros for a whole model is shared among its layers.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Needs = Literal["nothing", "norms", "scores"]


@dataclass(frozen=True)
class Seen:
    """A weight matrix of the dense model, with what the calibration says of it; both are None where no token came.

    `square_I` is the mean square of each input, (I,); `score` computes the pruner's importance of each weight, (O, I).
    """

    name: str
    block: int
    w_OI: Tensor
    square_I: Tensor | None = None
    score: Callable[[], Tensor] | None = None


class Allocation(Protocol):
    """A way to share zeros among layers."""

    @property
    def name(self) -> str:
        """The choice in the config group."""
        ...

    @property
    def needs(self) -> Needs:
        """What it looks at: nothing, the mean squares of the inputs, or the pruner's scores."""
        ...

    def ratios(self, look: Callable[[], Iterable[Seen]], sizes: Mapping[str, int], ratio: float) -> dict[str, float]:
        """The share of zeros of each layer in `sizes` (name to number of weights); their mean over weights is `ratio`.

        Each `look()` reads all matrices of the dense model from the disk, block by block; a matrix is not kept after
        the next is asked for. A share may be 0 or 1.
        """
        ...
