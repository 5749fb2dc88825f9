"""OWL: outlier weighed layerwise sparsity (Yin et al., ICML 2024, arXiv 2310.05175).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import mul
from typing import ClassVar

import torch
from torch import Tensor

from ssgr.allocation import Needs, Seen

_HALVINGS = 100  # of an interval of at most 2: far below the spacing of float64


@dataclass(frozen=True)
class OWL:
    """Blocks with more outliers, weights whose |W_ij| ||X_j||_2 exceeds `m` times the mean of the block, lose less.

    The shares of zeros fall with the shares of outliers over a range of 2 `lamda`, and move together until their mean
    over weights is the wanted one, as in the published code (for blocks of one size; there the mean is over blocks).
    As the paper says, none lies further than `lamda` from the wanted one: where outliers are so uneven that one would
    (the published code lets it), or where it would leave [0, 1], it stays at that bound and the others make up for it.
    All layers of a block get the same. A block that no token came to counts as the mean of the others.
    """

    m: float = 5.0
    lamda: float = 0.08
    name: str = "owl"
    needs: ClassVar[Needs] = "norms"

    def __post_init__(self) -> None:
        if self.m <= 0 or not 0 <= self.lamda <= 1:
            raise ValueError(
                f"allocation: m={self.m} lamda={self.lamda}: give m > 0 and lamda from 0 to 1, such as 0.08"
            )

    def ratios(self, look: Callable[[], Iterable[Seen]], sizes: Mapping[str, int], ratio: float) -> dict[str, float]:
        """The share of zeros of each layer, by one look; the scores of one block, in float32, are held in memory."""
        block_of: dict[str, int] = {}
        outliers: dict[int, float | None] = {}
        wanted = (seen for seen in look() if seen.name in sizes)
        for block, matrices in groupby(wanted, key=lambda seen: seen.block):
            scores = []
            for seen in matrices:
                block_of[seen.name] = block
                if seen.square_I is not None:
                    scores.append((seen.w_OI.float().abs() * seen.square_I.float().sqrt()).flatten())
            outliers[block] = outlier_share(scores, self.m)
        assert block_of.keys() == sizes.keys(), "a layer to prune was never seen"
        if not sizes:
            return {}
        known = [share for share in outliers.values() if share is not None]
        usual, spread = (sum(known) / len(known), max(known) - min(known)) if known else (0.0, 0.0)
        fall = 2 * self.lamda / spread if spread else 0.0
        lower = [-fall * (usual if share is None else share) for share in outliers.values()]
        weights = [sum(sizes[name] for name, b in block_of.items() if b == block) for block in outliers]
        low, high = max(0.0, ratio - self.lamda), min(1.0, ratio + self.lamda)
        ratio_of = dict(zip(outliers, bounded(lower, weights, low, high, ratio), strict=True))
        return {name: ratio_of[block_of[name]] for name in sizes}


def outlier_share(scores: Sequence[Tensor], m: float) -> float | None:
    """The share of all `scores` that exceeds `m` times their mean; None where there are none."""
    count = sum(score.numel() for score in scores)
    if not count:
        return None
    limit = m * sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > limit).sum()) for score in scores) / count


def bounded(values: Sequence[float], weights: Sequence[int], low: float, high: float, mean: float) -> list[float]:
    """`values`, moved by one number and clipped to [low, high], such that their weighted mean is `mean`."""
    assert low <= mean <= high
    mean_of: Callable[[list[float]], float] = lambda xs: math.fsum(map(mul, xs, weights)) / sum(weights)
    shift = mean - mean_of(list(values))
    if low <= min(values) + shift and max(values) + shift <= high:
        return [value + shift for value in values]
    clipped: Callable[[float], list[float]] = lambda shift: [min(max(value + shift, low), high) for value in values]
    least, most = low - max(values), high - min(values)  # all at the lower bound, all at the upper
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        least, most = (middle, most) if mean_of(clipped(middle)) < mean else (least, middle)
    return clipped(most)
