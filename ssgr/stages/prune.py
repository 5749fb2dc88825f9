"""Prune: walk the decoder block by block; each block sees the pruned output of the blocks before it.

One block at a time has weights: they come from the source's shards and go into shards of the same layout.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssgr import files
from ssgr.model import Model
from ssgr.model.blocks import (
    Matrix,
    NothingLeft,
    Tail,
    decoder_blocks,
    embeddings,
    matrices,
    names,
    output_layer,
    prunes_head,
)
from ssgr.model.checkpoint import Checkpoint
from ssgr.progress import Progress
from ssgr.pruner import Pruner, Statistic
from ssgr.records import CalibrationSet, LayerResult, PruneResult, to_json
from ssgr.sparsity import Sparsity
from ssgr.stages import activations, allocate, heap, journal, ranks
from ssgr.stages.activations import Batch, passages
from ssgr.stages.collect import Collector
from ssgr.stages.plan import REMEDY, Memory, plan
from ssgr.stages.pruned import CHECKPOINT, RESULT, read_result
from ssgr.stages.ranks import Ranks
from ssgr.stages.solve import Method, Solver
from ssgr.stages.statistics import Heard, Statistics
from ssgr.stages.steps import Owners, repeated, steps
from ssgr.stages.walk import Behind, Walk
from ssgr.store import peak_rss_mib

VERSION = 9
_log = logging.getLogger("ssgr")


@dataclass(frozen=True)
class Passing:
    """How the rows pass through the model.

    With propagate="pruned" a block sees them as the pruned blocks before it leave them, with "dense" as the dense model has
    them. With order="block" all matrices of a block are pruned by what enters them while the block is dense, as published;
    with "layer" each is pruned before it runs, so that the rows pass through a block once, and a matrix sees what the pruned
    ones before it in its block put out (experts, and pruners that need gradients, as with "block").

    Raises:
        ValueError: one of them is neither.
    """

    propagate: Literal["pruned", "dense"] = "pruned"
    order: Literal["layer", "block"] = "layer"

    def __post_init__(self) -> None:
        for option, valid in (("propagate", ("pruned", "dense")), ("order", ("layer", "block"))):
            if getattr(self, option) not in valid:
                raise ValueError(f"{option}={getattr(self, option)!r}: valid choices are {', '.join(valid)}")

    def heeded(self, statistic: Statistic) -> Passing | None:
        """What of it a prune by `statistic` heeds: where no row passes by, or a block is pruned whole, the order says nothing."""
        if statistic == "none":
            return None
        return self if self.propagate == "pruned" and statistic != "gradient" else Passing(self.propagate)


def prune(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    calibration: CalibrationSet | None,
    method: Method,
    memory: Memory,
    work: Path,
    passing: Passing = Passing(),
    statistics: Path | None = None,
) -> PruneResult:
    """Prune the matrices of the decoder blocks into `work`/checkpoint, in Hugging Face form.

    `statistics` is the folder of a finished `collect`: what dense propagation and allocations read. A prune that was killed
    continues at its first unfinished block, and ends with the same bytes.

    Raises:
        ValueError: the model cannot be pruned this way or does not fit, the calibration cannot be used, weights or
            activations are not finite, or the source changed since a killed prune began.
    """
    work.mkdir(parents=True, exist_ok=True)
    device = model.torch_device()
    count = memory.processes(device)
    given = (model, tokenizer, calibration, method, memory, work, passing, statistics)
    with activations.removed(work, memory.leads):
        ranks.run(count, work, device.type, _prune, *given, crew=memory.crew)
    return read_result(work / RESULT)


@torch.no_grad()
@heap.enough(REMEDY)
@heap.reused()
def _prune(
    own: Ranks, model: Model, tokenizer: PreTrainedTokenizerBase, calibration: CalibrationSet | None, method: Method,
    memory: Memory, work: Path, passing: Passing, statistics: Path | None,
) -> None:  # fmt: skip
    pruner = method.pruner
    walk = Walk(model, own, pruner.include, pruner.exclude)
    if walk.device.type == "cuda":
        torch.cuda.init()  # this may be the first that is asked of it
        torch.cuda.reset_peak_memory_stats(walk.device)
    stored = Statistics(statistics) if statistics else None
    check(walk.model, pruner, method.sparsity, stored is not None)
    layers = [_chosen(block, pruner) for block in walk.blocks]
    listens = calibration is not None and passing.propagate == "pruned" and pruner.statistic != "none"
    rows = passages(calibration, method.scope) if listens and calibration else []
    disk = walk.source.size - journal.written(work / CHECKPOINT)
    if pruner.statistic != "none" and not rows and not stored:
        raise ValueError(f"pruner={pruner.name} needs calibration rows, or what collect has stored of the dense model")
    pauses = bool(rows) and passing.order == "layer" and pruner.statistic != "gradient"
    needs = plan(walk, layers, pruner.statistic if rows else "none", rows, memory, work, disk, pruner, pauses)
    mapped, pauses = needs.mapped, all(own.every(needs.pauses))
    kept = journal.Journal(walk, work, work / CHECKPOINT)
    done = len(kept.done)
    allocated = (method.allocation, walk, layers, stored, pruner, method.sparsity, method.scope)
    solver = Solver(method, kept.ratios(lambda: allocate.ratios(*allocated)), walk)
    file = activations.file_of(work, own.rank)
    batches = walk.begin(rows, tokenizer, file if mapped else None) if rows and done < len(walk) else []
    ears = _Ears(walk, layers, batches, pruner.statistic, passing.order, None if rows else stored, pauses)
    source: Callable[[int], Checkpoint | None] = lambda i: kept.kept if i < done else None
    with Progress(f"prune {pruner.name}", len(walk), done, shown=own.rank == 0) as progress, Behind() as behind:
        for i, block in walk.filled(range(0 if rows and done < len(walk) else done, len(walk)), source):
            if i < done:  # the rows only pass through what a killed run left
                walk.advance(i, batches)
                continue
            found: dict[str, LayerResult] = {}
            for some, heard in ears.steps(i):
                found |= solver.block(i, some, heard)
            with walk.clock.timed("store"):
                behind.do(kept.keeping(i, block, layers[i], [found[name] for name in layers[i]]))
            ears.pass_on(i)
            with walk.clock.timed("store"):
                behind.wait()  # two blocks are in memory, this one and the next: never a third
            progress.step()
    with walk.clock.timed("store"):
        kept.finish()
    peaks = own.every(_peaks(walk.device))
    if own.rank == 0:
        files.write_json(work / RESULT, to_json(_result(walk, method, passing.propagate, kept, peaks)))


class _Ears:
    """What is heard of the matrices of a block before they are pruned."""

    def __init__(
        self, walk: Walk, layers: Sequence[dict[str, Matrix]], batches: Sequence[Batch], statistic: Statistic,
        order: str, stored: Statistics | None, pauses: bool,
    ) -> None:  # fmt: skip
        self.walk, self.layers, self.batches, self.statistic, self.stored = walk, layers, batches, statistic, stored
        self.order, self.listens, self.owners = order, stored is None and statistic != "none", Owners(walk)
        self.pauses = pauses  # inside a block, where it is pruned set by set, with all rows in memory

    def steps(self, i: int) -> Iterable[tuple[dict[str, Matrix], Heard]]:
        """The matrices of block `i` in the sets in which they are pruned, each with what enters it."""
        layers = self.layers[i]
        if not self.listens or not layers:
            return [(layers, self._looked_up(i))]
        if self._set_by_set(i):
            owner = self.owners.of(i, layers, self.batches)
            return (steps if self.pauses else repeated)(self.walk, i, layers, self.batches, self.statistic, owner)
        return [(layers, self._listened(i))]

    def pass_on(self, i: int) -> None:
        """Bring the rows to the block after `i`, if that was not done on the way and anything is left to hear."""
        passed = self.pauses and self.layers[i] and self._set_by_set(i)
        if self.listens and i + 1 < len(self.walk) and not passed:
            self.walk.advance(i, self.batches)

    def _set_by_set(self, i: int) -> bool:
        whole = self.order == "block" or self.statistic == "gradient"  # a gradient is that of the whole block's output
        return (
            not whole
            and i < len(self.walk.decoder)
            and all(matrix.expert is None for matrix in self.layers[i].values())
        )

    def _looked_up(self, i: int) -> Heard:
        if self.statistic == "none" or not self.layers[i]:
            return {}, {}
        assert self.stored is not None
        with self.walk.clock.timed("load"):
            return self.stored.block(i, self.walk.device, self.statistic == "gram")

    def _listened(self, i: int) -> Heard:
        collector = Collector(self.statistic, self.layers[i], clock=self.walk.clock)
        with collector.listening():
            self.walk.listen(i, self.batches, collector)
        self.walk.ranks.add_up(collector, self.walk.device)
        return collector.owner, {key: sums.tensors() for key, sums in collector.sums.items()}


def _chosen(block: nn.Module, pruner: Pruner) -> dict[str, Matrix]:
    """What `pruner` prunes of a block, which may be nothing."""
    if isinstance(block, Tail):
        return {name: matrix for name, matrix in matrices(block, [block.head]).items() if name == block.head}
    try:
        return matrices(block, pruner.include, pruner.exclude)
    except NothingLeft:
        return {}


def check(model: PreTrainedModel, pruner: Pruner, sparsity: Sparsity, stored: bool = False) -> None:
    """See that `model` (with or without weights) can be pruned this way; `stored` says whether `collect`'s statistics are read.

    Raises:
        ValueError: its blocks or matrices are not found, a pattern matches none, n:m does not divide a layer's inputs, or
            what enters a layer is not among what is stored.
    """
    prefix, blocks = decoder_blocks(model)
    tail = [Tail(model, blocks)] if prunes_head(model, pruner.include, pruner.exclude) else []
    if tail and stored:
        raise ValueError(
            "pruner.include: what enters the output layer is not among the stored statistics, which propagate=dense and "
            "allocations but uniform read: type propagate=pruned allocation=uniform, or leave it out"
        )
    for option, patterns in (("include", pruner.include), ("exclude", pruner.exclude)):
        for pattern in patterns:
            ends = fnmatch(output_layer(model), pattern) if option == "exclude" else pattern == output_layer(model)
            if not ends and not any(names(block, pattern) for block in blocks):
                every = sorted({name for block in blocks for name in names(block, "*")} | {output_layer(model)} - {""})
                raise ValueError(f"pruner.{option}: {pattern!r} matches no layer; layers are {', '.join(every)}")
    compare = getattr(type(pruner), "compare", None)
    if sparsity.group and compare and getattr(pruner, "compare", compare) != compare:
        _log.warning("pruner.compare has no effect on n:m, which compares within each group of %d", sparsity.group)
    chosen = [_chosen(block, pruner) for block in (*blocks, *tail)]
    if not any(chosen):
        matrices(blocks[0], pruner.include, pruner.exclude)  # says what there is
    whole = [f"{prefix}.{i}.{name}" for i, block in enumerate(blocks) for name in names(block, "*")]
    for pattern in getattr(pruner, "skip", ()):
        if not matching(whole, pattern):
            _log.warning(
                "pruner.skip: %r matches no layer; its patterns are of full names, such as %s", pattern, whole[0]
            )
    for i, layers in enumerate(chosen):
        for name, matrix in layers.items():
            if pruner.statistic == "gradient" and matrix.expert is not None:
                raise ValueError(
                    f"pruner={pruner.name} needs gradients, which are not collected of experts; type pruner=wanda, or leave them "
                    f"out with 'pruner.exclude=[\"{matrix.name.partition('.')[0]}.*\"]'"
                )
            if sparsity.group and matrix.shape[1] % sparsity.group:
                full = f"{prefix}.{i}.{name}" if i < len(blocks) else name
                raise ValueError(
                    f"{full} has {matrix.shape[1]} inputs, which groups of {sparsity.group} do not divide; "
                    f"choose another sparsity, or leave the layer out with 'pruner.exclude=[{name}]'"
                )


def _peaks(device: torch.device) -> tuple[float, float | None]:
    """The largest memory of this process, and what it took of its GPU, in MiB."""
    return peak_rss_mib(), torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def _result(
    walk: Walk, method: Method, propagate: str, kept: journal.Journal, peaks: Sequence[tuple[float, float | None]]
) -> PruneResult:
    layers = [layer for found in kept.done for layer in found]
    sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
    each = [layer.sparsity * size for layer, size in zip(layers, sizes, strict=True)]
    zeros, name = sum(each), output_layer(walk.model)
    head = sum(n for layer, n in zip(layers, each, strict=True) if layer.name == name)
    whole = sum(p.numel() for p in walk.model.parameters())  # those that are tied count once
    spent = walk.clock.seconds(whole=True)
    here = walk.ranks.here  # those of a host lie together
    hosts = [sum(mib for mib, _ in peaks[first : first + here]) for first in range(0, len(peaks), here)]
    blind = method.pruner.statistic == "none"
    return PruneResult(
        pruner=method.pruner.name,
        allocation=method.allocation.name,
        propagate=propagate,
        sparsity_target=method.sparsity.target,
        sparsity_realised=zeros / sum(sizes),
        sparsity_model=(zeros - head) / (whole - embeddings(walk.model)),
        sparsity_with_embeddings=zeros / whole,
        unseen=0 if blind else sum(layer.tokens == 0 for layer in layers),
        seconds={what: spent.get(what, 0.0) for what in ("load", "forward", "statistics", "solve", "store")},
        peak_host_mib=max(hosts),
        peak_device_mib=max((mib for _, mib in peaks if mib is not None), default=None),
        layers=tuple(layers),
        checkpoint=CHECKPOINT,
    )
