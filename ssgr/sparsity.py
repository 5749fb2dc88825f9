"""Sparsity: from scores to a mask, unstructured or n:m.

Shapes: O outputs, I inputs, G groups of m inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

Compare: TypeAlias = Literal["row", "layer"]
_FEW = 1 << 14  # scores: of fewer the groups are sorted; of more all are compared at once (2:4: a third of the time)


def check_compare(compare: str) -> None:
    """See that `compare` is one of the sets in which weights may be compared.

    Raises:
        ValueError: it is not.
    """
    if compare not in get_args(Compare):
        raise ValueError(
            f"pruner.compare={compare!r}: weights are compared within a {' or a '.join(get_args(Compare))}"
        )


class Sparsity(Protocol):
    """A pattern of zeros."""

    @property
    def target(self) -> float:
        """Share of weights that are pruned."""
        ...

    @property
    def group(self) -> int | None:
        """Inputs that are compared with each other, or None for no fixed group."""
        ...

    def keep(self, score_OI: Tensor, compare: Compare) -> Tensor:
        """The mask of kept weights, bool (O, I): within each compared set the lowest scores go."""
        ...

    def at(self, ratio: float) -> Sparsity:
        """The same kind of pattern with another share of zeros, for one layer of many.

        Raises:
            ValueError: the pattern fixes its share.
        """
        ...


@dataclass(frozen=True)
class Unstructured:
    """Prune the share `ratio`, compared within each output row or over the whole layer."""

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(
                f"sparsity.ratio={self.ratio}: a share of weights to prune lies strictly between 0 and 1, "
                "such as sparsity.ratio=0.5"
            )

    @property
    def target(self) -> float:
        """Share of weights that are pruned."""
        return self.ratio

    @property
    def group(self) -> int | None:
        """None: any number of inputs may be compared."""
        return None

    def keep(self, score_OI: Tensor, compare: Compare) -> Tensor:
        """The mask of kept weights, bool (O, I); of all n weights round(n * ratio) go, of each row as many or one more.

        Where the share is no whole number of inputs, the rows that lose one more are those in which that one matters least.
        Of equal scores the first goes.
        """
        flat = score_OI if compare == "row" else score_OI.reshape(1, -1)
        each, more = divmod(round(score_OI.numel() * self.ratio), len(flat))
        most = each + (more > 0)
        if not most:
            return torch.ones_like(score_OI, dtype=torch.bool)
        last_O1 = _smallest(flat, most)  # the score of the last that may go
        count_O1 = torch.full_like(last_O1, most, dtype=torch.long)
        if more:
            count_O1[last_O1[:, 0].argsort(stable=True)[more:]] -= 1
        below, equal = flat < last_O1, flat == last_O1
        left_O1 = count_O1 - below.sum(1, keepdim=True)
        if flat.device.type != "cpu" or (equal.sum(1, keepdim=True) > left_O1).any():  # a GPU is not waited for
            equal &= equal.cumsum(1, dtype=torch.int32) <= left_O1
        return ~(below | equal).view_as(score_OI)

    def at(self, ratio: float) -> Unstructured:
        """The same with another ratio."""
        return Unstructured(ratio)


def _smallest(score_OI: Tensor, k: int) -> Tensor:
    """The k-th smallest score of each row, (O, 1)."""
    if (
        score_OI.device.type == "cpu" and score_OI.element_size() >= 4
    ):  # numpy's partition takes a third of topk's time there
        return torch.from_numpy(np.partition(score_OI.numpy(), k - 1, axis=1)[:, k - 1 : k].copy())
    return score_OI.topk(k, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)


@dataclass(frozen=True)
class NM:
    """Keep the n best of every m consecutive inputs."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(
                f"sparsity n:m = {self.n}:{self.m}: n of every m inputs are kept, with 0 < n < m, such as sparsity=n2m4"
            )

    @property
    def target(self) -> float:
        """Share of weights that are pruned."""
        return 1 - self.n / self.m

    @property
    def group(self) -> int | None:
        """m: masks are chosen within groups of m inputs."""
        return self.m

    def keep(self, score_OI: Tensor, compare: Compare) -> Tensor:
        """The mask of kept weights, bool (O, I); which of equal scores goes is not said.

        Raises:
            ValueError: m does not divide I.
        """
        outputs, inputs = score_OI.shape
        if inputs % self.m:
            raise ValueError(
                f"sparsity {self.n}:{self.m} does not divide a layer of {inputs} inputs: choose an m that does, "
                "or leave the layer out with pruner.exclude"
            )
        score_OGM = score_OI.reshape(outputs, inputs // self.m, self.m)
        if score_OI.numel() < _FEW:
            kept = score_OGM.topk(self.n, dim=2).indices
            return torch.zeros_like(score_OGM, dtype=torch.bool).scatter_(2, kept, True).view(outputs, inputs)
        score_MOG = score_OGM.movedim(2, 0).contiguous()
        better_MOG = torch.zeros_like(score_MOG, dtype=torch.int16)  # how many of its group come before each
        for i in range(1, self.m):
            better = score_MOG[:i] > score_MOG[i]
            better_MOG[i] += better.sum(0, dtype=torch.int16)
            better_MOG[:i] += ~better
        return (better_MOG < self.n).movedim(0, 2).reshape(outputs, inputs)

    def at(self, ratio: float) -> NM:
        """Itself: the pattern fixes the share.

        Raises:
            ValueError: another share is asked for.
        """
        if ratio != self.target:
            raise ValueError(
                f"sparsity {self.n}:{self.m} is the same in every layer: type allocation=uniform, or sparsity=u50"
            )
        return self
