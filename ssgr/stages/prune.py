"""Prune: walk the decoder block by block; each block sees the pruned output of the blocks before it.

One block at a time has weights: they come from the source's shards and go into shards of the same layout.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssgr.model import Model
from ssgr.model.blocks import decoder_blocks, empty, fill, linear_layers, outside, put, stored_names
from ssgr.model.checkpoint import DTYPES, Checkpoint, Replica
from ssgr.pruner import Pruner
from ssgr.records import CalibrationSet, LayerResult, PruneResult, to_json
from ssgr.sparsity import Sparsity
from ssgr.stages.activations import Batch, first_inputs
from ssgr.stages.collect import Collector, relative_error
from ssgr.stages.plan import Memory, plan
from ssgr.stages.progress import Progress

VERSION = 2
CHECKPOINT, RESULT = "checkpoint", "prune.json"
_DONE, _ACTIVATIONS = "blocks.json", "activations.bin"  # of a prune that is under way
_log = logging.getLogger("ssgr")


@torch.no_grad()
def prune(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    calibration: CalibrationSet | None,
    pruner: Pruner,
    sparsity: Sparsity,
    memory: Memory,
    work: Path,
) -> PruneResult:
    """Prune every linear layer of the decoder blocks into `work`/checkpoint, in Hugging Face form.

    A prune that was killed continues at its first unfinished block, and ends with the same bytes.

    Raises:
        ValueError: the model cannot be pruned this way or does not fit, all tokens weigh zero, or weights or activations
            are not finite.
    """
    skeleton = model.skeleton()
    check(skeleton, pruner, sparsity)
    work.mkdir(parents=True, exist_ok=True)
    source = Checkpoint(model.files())
    name, blocks = decoder_blocks(skeleton)
    stored = [stored_names(skeleton, f"{name}.{i}", source) for i in range(len(blocks))]
    like = torch.empty(0, device=model.torch_device(), dtype=_dtype(model, source, stored[0]))
    mapped = plan(skeleton, blocks, pruner, calibration, source, like, memory, work / CHECKPOINT)
    file = work / _ACTIVATIONS if mapped else None
    replica = Replica(source, work / CHECKPOINT)
    replica.copy_rest()
    done = [] if replica.fresh else _done(work)
    kept = Checkpoint(replica.folder)
    batches: list[Batch] = []
    if calibration is not None and len(done) < len(blocks):
        batches = _begin(skeleton, blocks, stored[0], source, calibration, tokenizer, like, file)
    with Progress(f"prune {pruner.name}", len(blocks), len(done)) as progress:
        for i, (block, names) in enumerate(zip(blocks, stored, strict=True)):
            again = i < len(done)
            if again and not batches:
                continue
            fill(block, names, kept if again else source, like)
            if again:  # the rows pass through what a killed run left
                _advance(block, i, f"{name}.{i}", batches, like.device)
            else:
                done.append(_prune_block(block, i, f"{name}.{i}", batches, pruner, sparsity, source, names))
                pruned = linear_layers(block, pruner.exclude)
                weights = {names[f"{n}.weight"]: layer.weight for n, layer in pruned.items()}
                replica.write(weights)
                replica.copy(set(names.values()) - set(weights))
                _keep(work, done)
                progress.step()
                del pruned, weights  # the memory of this block goes before the next comes
            empty(block)
    replica.copy(set(source.places) - {place for names in stored for place in names.values()})
    (work / _ACTIVATIONS).unlink(missing_ok=True)
    layers = [layer for block_layers in done for layer in block_layers]
    sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
    realised = sum(layer.sparsity * size for layer, size in zip(layers, sizes, strict=True)) / sum(sizes)
    return PruneResult(pruner.name, sparsity.target, realised, tuple(layers), CHECKPOINT)


def finish(work: Path) -> None:
    """Remove the journal, once the result has been written."""
    (work / _DONE).unlink(missing_ok=True)


def check(model: PreTrainedModel, pruner: Pruner, sparsity: Sparsity) -> None:
    """See that `model` (with or without weights) can be pruned this way.

    Raises:
        ValueError: its blocks or linear layers are not found, or n:m does not divide a layer's inputs.
    """
    block, blocks = decoder_blocks(model)
    for pattern in pruner.exclude:
        if len(linear_layers(blocks[0], (pattern,))) == len(linear_layers(blocks[0], ())):
            raise ValueError(
                f"pruner.exclude: {pattern!r} matches no layer; layers are {', '.join(linear_layers(blocks[0], ()))}"
            )
    compare = getattr(type(pruner), "compare", None)
    if sparsity.group and compare and getattr(pruner, "compare", compare) != compare:
        _log.warning("pruner.compare has no effect on n:m, which compares within each group of %d", sparsity.group)
    for i, layers in enumerate(linear_layers(b, pruner.exclude) for b in blocks):
        for name, layer in layers.items():
            if sparsity.group and layer.in_features % sparsity.group:
                raise ValueError(
                    f"{block}.{i}.{name} has {layer.in_features} inputs, which groups of {sparsity.group} do not divide; "
                    f"choose another sparsity, or leave the layer out with 'pruner.exclude=[{name}]'"
                )


def _dtype(model: Model, source: Checkpoint, stored: dict[str, str]) -> torch.dtype:
    if model.dtype != "auto":
        return DTYPES[{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[model.dtype]]
    largest = max((source.places[place] for place in stored.values()), key=lambda place: place.stop - place.start)
    return DTYPES.get(largest.dtype, torch.float32)


def _begin(
    model: PreTrainedModel, blocks: nn.ModuleList, first: dict[str, str], source: Checkpoint,
    calibration: CalibrationSet, tokenizer: PreTrainedTokenizerBase, like: Tensor, file: Path | None,
) -> list[Batch]:  # fmt: skip
    """Bring the calibration rows to the first block."""
    before = outside(model, blocks)
    fill(model, {name: source.find(name, model.base_model_prefix) for name in before}, source, like)
    fill(blocks[0], first, source, like)
    for name, buffer in model.named_buffers():
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._buffers[leaf] = buffer.to(like.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    try:
        return first_inputs(model, blocks, calibration, pad, like.device, file)
    finally:
        for name in before:
            put(model, name, torch.empty(0, device="meta"))
        empty(blocks[0])


def _done(work: Path) -> list[list[LayerResult]]:
    """What a killed prune wrote of the blocks that it finished."""
    journal = work / _DONE
    if not journal.exists():
        return []
    found = json.loads(journal.read_text())
    return [[LayerResult(**{**layer, "shape": tuple(layer["shape"])}) for layer in layers] for layers in found]


def _keep(work: Path, done: Sequence[Sequence[LayerResult]]) -> None:
    """Note that the blocks in `done` are on the disk."""
    beside = work / f"{_DONE}.new"
    with open(beside, "w") as stream:
        json.dump([[to_json(layer) for layer in layers] for layers in done], stream)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(work / _DONE)


def _prune_block(
    block: nn.Module, i: int, name: str, batches: Sequence[Batch], pruner: Pruner, sparsity: Sparsity,
    source: Checkpoint, stored: dict[str, str],
) -> list[LayerResult]:  # fmt: skip
    """Collect the statistics of a block, prune its layers, and pass the rows through what is left."""
    layers = linear_layers(block, pruner.exclude)
    device = next(block.parameters()).device
    collector = None
    if batches and pruner.statistic != "none":
        collector = Collector(pruner.statistic, layers)
        with collector.listening():
            for batch in batches:
                collector.weights_NT = batch.weights_NT.to(device)
                batch.through(block, i, name, device)
    results = []
    for n, layer in layers.items():
        dtype = DTYPES[source.places[stored[f"{n}.weight"]].dtype]
        results.append(_prune_layer(f"{name}.{n}", n, layer, collector, pruner, sparsity, dtype))
    _advance(block, i, name, batches, device)
    return results


def _advance(block: nn.Module, i: int, name: str, batches: Sequence[Batch], device: torch.device) -> None:
    for batch in batches:
        batch.hidden_NTD.copy_(batch.through(block, i, name, device))


def _prune_layer(
    full: str, name: str, layer: nn.Linear, collector: Collector | None, pruner: Pruner, sparsity: Sparsity,
    dtype: torch.dtype,
) -> LayerResult:  # fmt: skip
    """Prune one layer in float32; its weight is what the checkpoint will hold, rounded to `dtype`."""
    start = time.perf_counter()
    before_OI = layer.weight.to(torch.float32, copy=True)  # the weight is overwritten below
    statistic = collector.of(name) if collector else None
    pruned = pruner.prune(before_OI, statistic, sparsity, full)
    layer.weight.copy_(pruned.w_OI.to(dtype))
    error = None if statistic is None else relative_error(before_OI, layer.weight.float(), statistic)
    zeros = float((layer.weight == 0).float().mean())
    shape = (layer.out_features, layer.in_features)
    return LayerResult(full, shape, zeros, error, pruned.damping, time.perf_counter() - start)
