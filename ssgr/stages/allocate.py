"""Allocate: how one share of zeros is dealt out to the matrices of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ssgr.allocation import Allocation, Seen
from ssgr.model.blocks import Matrix
from ssgr.pruner import Moments, Pruner
from ssgr.scope import Scope
from ssgr.sparsity import Sparsity
from ssgr.stages.activations import HELD_OUT
from ssgr.stages.solve import mixtures
from ssgr.stages.statistics import Statistics
from ssgr.stages.walk import Walk


@torch.no_grad()
def ratios(
    allocation: Allocation, walk: Walk, layers: Sequence[Mapping[str, Matrix]], statistics: Statistics | None,
    pruner: Pruner, sparsity: Sparsity, scope: Scope,
) -> dict[str, float]:  # fmt: skip
    """The share of zeros of every matrix, by its full name; their mean over weights is that of `sparsity`.

    Raises:
        ValueError: the pattern fixes the share of every layer, and the allocation wants others; or it would leave no weight
            in one.
    """
    sizes = {walk.full(i, n): m.shape[0] * m.shape[1] for i, own in enumerate(layers) for n, m in own.items()}
    statistic = "norm" if allocation.needs == "norms" else pruner.statistic

    def look() -> Iterator[Seen]:
        for i, _ in walk.filled(range(len(walk)), lambda i: None):
            owner, sums = statistics.block(i, walk.device, statistic == "gram") if statistics else ({}, {})
            known: dict[str, Moments | None] = {}
            for name, matrix in layers[i].items():
                whose = owner.get(name, name)
                if whose not in known:
                    mine = {s: t for (own, s), t in sums.items() if own == whose and not s.startswith(HELD_OUT)}
                    known = {
                        whose: mixtures(mine, scope, statistic)[0]
                    }  # of neighbours only: one Gram matrix at a time
                inputs, w_OI = known[whose], walk.weight_OI(i, matrix).to(walk.device, torch.float32)
                score = None if inputs is None and statistic != "none" else (lambda: pruner.score(w_OI, inputs))  # noqa: B023
                yield Seen(walk.full(i, name), i, w_OI, inputs.square_I if inputs else None, score)

    found = allocation.ratios(look, sizes, sparsity.target)
    for name, ratio in found.items():
        if ratio >= 1:
            raise ValueError(
                f"allocation={allocation.name} would leave no weight in {name}; type allocation=uniform, or a smaller "
                "sparsity.ratio"
            )
        if ratio not in (0, sparsity.target):
            sparsity.at(ratio)
    return found
