"""Solve: prune the matrices of one block from what was heard of their inputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssgr.allocation import Allocation
from ssgr.model.blocks import Matrix
from ssgr.products import finite
from ssgr.pruner import Moments, Pruned, Pruner, Statistic
from ssgr.records import LayerResult
from ssgr.scope import BOTH, Scope
from ssgr.sparsity import Compare, Sparsity
from ssgr.stages.activations import ALL, HELD_OUT
from ssgr.stages.collect import moments, relative_error, sharing
from ssgr.stages.statistics import Heard
from ssgr.stages.walk import Walk

_EMPTIED = 0.02  # share of the outputs of a layer: where so many lose all their weights, the setting is at fault
_log = logging.getLogger("ssgr")


@dataclass(frozen=True)
class Method:
    """How a model is pruned: by which pruner, into which pattern, how many zeros in each layer, on which tokens."""

    pruner: Pruner
    sparsity: Sparsity
    allocation: Allocation
    scope: Scope = BOTH


class Solver:
    """What prunes the matrices of a block from what was heard there."""

    def __init__(self, method: Method, ratios: Mapping[str, float], walk: Walk) -> None:
        self.method, self.ratios, self.walk, self.ranks = method, ratios, walk, walk.ranks

    def block(self, i: int, layers: dict[str, Matrix], heard: Heard) -> dict[str, LayerResult]:
        """Prune the matrices `layers` of block `i`; those that have the same inputs together, each group on one of the ranks."""
        owner, sums = heard
        groups = sharing(list(layers), owner)
        costs = [float(sum(layers[n].shape[0] * layers[n].shape[1] ** 2 for n in group)) for group in groups]
        found: dict[str, LayerResult] = {}
        with self.walk.clock.timed("solve"):
            dealt = list(zip(groups, self.ranks.deal(costs), strict=True))
            for group, rank in dealt:
                if rank == self.ranks.rank:
                    found |= self._group(i, [layers[n] for n in group], owner, sums)
            for group, rank in dealt:
                for name in group:
                    whole = self.walk.weight_OI(i, layers[name]).to(self.walk.device).contiguous()
                    self.ranks.give(whole, rank)
                    if rank != self.ranks.rank:
                        self.walk.replace(i, layers[name], whole)
                    found[name] = self.ranks.tell(found.get(name), rank)
        return found

    def _group(
        self, i: int, group: Sequence[Matrix], owner: Mapping[str, str],
        sums: Mapping[tuple[str, str], Mapping[str, Tensor]],
    ) -> dict[str, LayerResult]:  # fmt: skip
        """Prune matrices with the same inputs in float32; their weights are what the checkpoint will hold."""
        start, pruner, own = time.perf_counter(), self.method.pruner, owner.get(group[0].name)
        mine = {stream: parts for (whose, stream), parts in sums.items() if whose == own}
        seen, later = mixtures(mine, self.method.scope, pruner.statistic)
        names = [self.walk.full(i, matrix.name) for matrix in group]
        stored = [self.walk.weight_OI(i, matrix) for matrix in group]
        before = [w_OI.to(self.walk.device, torch.float32, copy=True) for w_OI in stored]
        targets = [self.ratios[name] for name in names]
        for inputs in (seen, later):
            if inputs and not finite(inputs.square_I):
                raise ValueError(
                    f"{names[0]}: what enters it holds NaN or infinity on the calibration rows; {self.walk.remedy}"
                )
        pruned = self._pruned(group, before, seen, targets, names)
        dtypes = [self.walk.layout.dtype(self.walk.full(i, matrix.parameter)) for matrix in group]
        rounded = [_rounded(new.w_OI, dtype, full) for new, dtype, full in zip(pruned, dtypes, names, strict=True)]
        each = (time.perf_counter() - start) / len(group)  # a GPU is done, since their numbers were looked at
        out = {}
        each_one = zip(group, names, stored, before, pruned, rounded, targets, strict=True)
        for matrix, full, stored_OI, old_OI, new, w_OI, target in each_one:
            if w_OI.dtype == torch.float64:  # solved in float32: what was only kept stays as it was
                w_OI = torch.where((w_OI == old_OI) & (w_OI != 0), stored_OI.to(w_OI.device), w_OI)
            self.walk.replace(i, matrix, w_OI)
            new_OI = w_OI.float()
            kept_O = new_OI.count_nonzero(1)
            zeros = 1 - int(kept_O.sum()) / new_OI.numel()
            out[matrix.name] = LayerResult(
                full,
                matrix.shape,
                target,
                zeros,
                seen.tokens if seen else 0.0,
                _error(old_OI, new_OI, seen),
                _error(old_OI, new_OI, later),
                _emptied(old_OI, kept_O, full, getattr(pruner, "compare", None)),
                new.condition,
                new.damping,
                each,
            )
        return out

    def _pruned(
        self, group: Sequence[Matrix], before: Sequence[Tensor], seen: Moments | None, targets: Sequence[float],
        names: Sequence[str],
    ) -> list[Pruned]:  # fmt: skip
        """Each matrix at its own share of zeros; one that met no token by magnitude, row by row; one with share 0 as it is."""
        pruner, sparsity = self.method.pruner, self.method.sparsity
        out = {i: Pruned(w_OI) for i, w_OI in enumerate(before) if targets[i] == 0}
        chosen = [i for i in range(len(before)) if i not in out]
        patterns = [sparsity.at(targets[i]) for i in chosen]
        if seen is None and pruner.statistic != "none":
            if any(matrix.expert is None for matrix in group):
                _log.warning(
                    "%s: nothing was seen to enter it, so it is pruned by magnitude: no token came, or the model uses its weight "
                    "without calling it; pruner.exclude leaves it dense", ", ".join(names),
                )  # fmt: skip
            pruned = [Pruned(before[i] * p.keep(before[i].abs(), "row")) for i, p in zip(chosen, patterns, strict=True)]
        else:
            pruned = (
                pruner.prune([before[i] for i in chosen], seen, patterns, [names[i] for i in chosen]) if chosen else []
            )
        out |= dict(zip(chosen, pruned, strict=True))
        return [out[i] for i in range(len(before))]


def mixtures(
    sums: Mapping[str, Mapping[str, Tensor]], scope: Scope, statistic: Statistic
) -> tuple[Moments | None, Moments | None]:
    """The moments of the calibration rows and of the held-out rows, from the sums of each stream."""
    parts: dict[bool, list[tuple[float, Mapping[str, Tensor]]]] = {False: [], True: []}
    for stream, own in sums.items():
        name = stream.removeprefix(HELD_OUT)
        parts[name != stream].append((1.0 if name == ALL else scope.weight(name), own))  # ALL is mixed already
    return moments(parts[False], statistic), moments(parts[True], statistic)


def _error(old_OI: Tensor, new_OI: Tensor, inputs: Moments | None) -> float | None:
    """The relative error of the outputs, from the Gram matrix where there is one, else from the column norms."""
    if inputs is None:
        return None
    return relative_error(old_OI, new_OI, inputs.square_I if inputs.gram_II is None else inputs.gram_II)


def _rounded(w_OI: Tensor, dtype: torch.dtype, full: str) -> Tensor:
    """`w_OI` as the checkpoint will hold it.

    Raises:
        ValueError: it is not finite there.
    """
    out = w_OI.to(dtype)
    if not finite(out):
        raise ValueError(f"{full}: its pruned weights hold NaN or infinity as {dtype}; raise pruner.damping")
    return out


def _emptied(old_OI: Tensor, kept_O: Tensor, full: str, compare: Compare | None) -> int:
    """How many outputs lost all of their weights, of which `kept_O` are left; `compare` is the pruner's, if it has one.

    Raises:
        ValueError: they are more than a few.
    """
    lost = kept_O == 0
    lost[lost.clone()] = (old_OI[lost] != 0).any(1)
    count = int(lost.sum())
    if count > _EMPTIED * len(lost):
        raise ValueError(
            f"{full}: {count} of its {len(lost)} outputs would lose all their weights, the first is row "
            f"{int(lost.nonzero()[0])}; type {'pruner.compare=row, ' if compare == 'layer' else ''}a smaller sparsity.ratio, or "
            "leave the layer out with pruner.exclude"
        )
    if count:
        _log.warning("%s: %d of its %d outputs lost all their weights", full, count, len(lost))
    return count
