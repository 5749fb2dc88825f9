"""Pruners: which statistic of the inputs they want, and what they make of weight matrices.

Shapes: O outputs, I inputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from ssgr.products import finite
from ssgr.sparsity import Compare, Sparsity, check_compare

Statistic = Literal["none", "norm", "gram", "gradient"]


@dataclass(frozen=True)
class Moments:
    """Weighted means over the tokens that enter a layer: of x (I,), of x * x (I,), and of x x^T (I, I) if asked for.

    `tokens` is the sum of the weights. If asked for, `gradient_OI` is the mean over `rows` of the square of the gradient
    that the norm of a row's output of the block has with respect to the layer's weights.
    """

    tokens: float
    mean_I: Tensor
    square_I: Tensor
    gram_II: Tensor | None = None
    gradient_OI: Tensor | None = None
    rows: float = 0.0

    @property
    def variance_I(self) -> Tensor:
        """The variance of each input (I,)."""
        return (self.square_I - self.mean_I.square()).clamp(min=0)


@dataclass(frozen=True)
class Pruned:
    """A pruned matrix, float32, (O, I), with the damping that was used and the condition number it gave, if any."""

    w_OI: Tensor
    damping: float | None = None
    condition: float | None = None


class Pruner(Protocol):
    """A pruning method for linear layers."""

    @property
    def name(self) -> str:
        """The choice in the config group."""
        ...

    @property
    def statistic(self) -> Statistic:
        """What it needs of the inputs: nothing, mean and mean square of each, or also their Gram matrix or gradients."""
        ...

    @property
    def include(self) -> tuple[str, ...]:
        """Patterns of the layer names that are pruned; none stands for every linear layer of the blocks."""
        ...

    @property
    def exclude(self) -> tuple[str, ...]:
        """Patterns of layer names that stay dense."""
        ...

    def score(self, w_OI: Tensor, inputs: Moments | None) -> Tensor:
        """How much each weight matters (O, I), before any is gone: what a comparison over the whole model goes by."""
        ...

    @property
    def work(self) -> tuple[int, int]:
        """Bytes that `prune` takes beside what it is given, as measured: for each weight, and for each pair of inputs."""
        ...

    def prune(
        self, ws: Sequence[Tensor], inputs: Moments | None, sparsities: Sequence[Sparsity], names: Sequence[str]
    ) -> list[Pruned]:
        """Prune matrices (O, I) that have the same inputs and these names, each by a sparsity of its own."""
        ...


@dataclass(frozen=True)
class ByScore:
    """What pruners share that drop the weights of the lowest score and leave the others as they are."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    compare: Compare = "layer"
    statistic: ClassVar[Statistic] = "norm"
    work: ClassVar[tuple[int, int]] = (20, 0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", tuple(self.include))
        object.__setattr__(self, "exclude", tuple(self.exclude))
        check_compare(self.compare)

    def score(self, w_OI: Tensor, inputs: Moments | None) -> Tensor:
        """How much each weight matters (O, I)."""
        raise NotImplementedError

    def prune(
        self, ws: Sequence[Tensor], inputs: Moments | None, sparsities: Sequence[Sparsity], names: Sequence[str]
    ) -> list[Pruned]:
        """Prune matrices (O, I) that have the same inputs."""
        pairs = zip(ws, sparsities, strict=True)
        return [Pruned(w_OI * sparsity.keep(self.score(w_OI, inputs), self.compare)) for w_OI, sparsity in pairs]


def checked_gram(inputs: Moments | None, name: str) -> Tensor:
    """The Gram matrix of the inputs of layer `name` (I, I), in memory of its own.

    Raises:
        ValueError: it is not finite.
    """
    assert inputs is not None and inputs.gram_II is not None
    if not finite(inputs.gram_II):
        raise ValueError(
            f"{name}: the statistics of its inputs hold NaN or infinity; the model overflows on these rows: type "
            "model.dtype=float32"
        )
    return inputs.gram_II.clone()


def alive(h_II: Tensor) -> Tensor:
    """`h_II` with inputs that are always zero as independent ones of the usual size, in place: whatever the unit of the others,
    they change neither the mean of the diagonal nor its range."""
    diagonal_I = h_II.diagonal()
    usual = diagonal_I.sum() / diagonal_I.count_nonzero()  # NaN where all are always zero
    diagonal_I.masked_fill_(diagonal_I == 0, usual.nan_to_num(1.0))
    return h_II
