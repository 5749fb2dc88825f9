"""Prune: walk the decoder block by block; each block sees the pruned output of the blocks before it.

One block at a time has weights: they come from the source's shards and go into shards of the same layout.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssgr.model import Model, pick_device
from ssgr.model.blocks import decoder_blocks, empty, fill, linear_layers, put, stored_names
from ssgr.model.checkpoint import DTYPES, Checkpoint, Replica
from ssgr.pruner import Pruner
from ssgr.records import CalibrationSet, LayerResult, PruneResult, to_json
from ssgr.sparsity import Sparsity
from ssgr.stages.activations import Batch, first_inputs, padded_tokens
from ssgr.stages.collect import Collector, relative_error
from ssgr.stages.progress import Progress

VERSION = 2
CHECKPOINT, RESULT = "checkpoint", "prune.json"
_DONE, _ACTIVATIONS = "blocks.json", "activations.bin"  # of a prune that is under way
_GIB, _FLOAT = 2**30, 4  # bytes
_log = logging.getLogger("ssgr")


@dataclass(frozen=True)
class Memory:
    """How much may be kept in memory; it changes no result."""

    activations_gib: float  # more than this of activations lies in a file that is mapped into memory


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
    like = torch.empty(0, device=pick_device(model.device), dtype=_dtype(model, source, stored[0]))
    file = _plan(skeleton, blocks, pruner, calibration, source, like, memory, work)
    replica = Replica(source, work / CHECKPOINT)
    replica.copy_rest()
    done = _done(work)
    batches: list[Batch] = []
    if calibration is not None and len(done) < len(blocks):
        batches = _begin(skeleton, blocks, stored[0], source, calibration, tokenizer, like, file)
    with Progress(f"prune {pruner.name}", len(blocks), len(done)) as progress:
        for i, (block, names) in enumerate(zip(blocks, stored, strict=True)):
            again = i < len(done)
            if again and not batches:
                continue
            fill(block, names, Checkpoint(replica.folder) if again else source, like)
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


def _plan(
    model: PreTrainedModel, blocks: nn.ModuleList, pruner: Pruner, calibration: CalibrationSet | None,
    source: Checkpoint, like: Tensor, memory: Memory, work: Path,
) -> Path | None:  # fmt: skip
    """Say what the walk will need, and where the activations lie: a file, or None for memory.

    Raises:
        ValueError: the disk, the host or the device has less.
    """
    layers = linear_layers(blocks[0], pruner.exclude).values()
    block = max(sum(p.numel() for p in b.parameters()) for b in blocks) * like.element_size()
    outside = sum(p.numel() for p in _outside(model, blocks).values()) * like.element_size()
    statistics = sum(_statistic_bytes(pruner, layer) for layer in layers)
    solve = max(
        3 * _FLOAT * layer.out_features * layer.in_features + 4 * _statistic_bytes(pruner, layer) for layer in layers
    )
    hidden = getattr(model.config.get_text_config(), "hidden_size", 0) * like.element_size()
    activations = 0 if calibration is None else padded_tokens(calibration) * hidden
    mapped = activations > memory.activations_gib * _GIB
    device = max(block + statistics + solve, block + outside if calibration else 0)
    host = (0 if mapped else activations) + (device if like.device.type == "cpu" else block)
    disk = source.size - _written(work) + (activations if mapped else 0)
    _log.info(
        "prune: %s on %s for one block (weights %s, statistics %s, solve %s), %s of activations %s, %s of disk",
        _size(device), like.device, _size(block), _size(statistics), _size(solve), _size(activations),
        "in a file" if mapped else "in memory", _size(disk),
    )  # fmt: skip
    needs = {"memory": (host, psutil.virtual_memory().available), "disk": (disk, shutil.disk_usage(work).free)}
    if like.device.type == "cuda":
        needs[str(like.device)] = (device, torch.cuda.mem_get_info(like.device)[0])
    for what, (needed, free) in needs.items():
        if needed > free:
            raise ValueError(
                f"prune needs {_size(needed)} of {what}, and {_size(free)} are free; "
                + {"disk": "free some, or type store.path=DIR elsewhere", "memory": "type memory.activations_gib=0, or a "
                   "smaller budget.tokens"}.get(what, "type model.dtype=bfloat16 or device=cpu")
            )  # fmt: skip
    return work / _ACTIVATIONS if mapped else None


def _size(n: float) -> str:
    return f"{n / _GIB:.1f} GiB" if n >= 0.1 * _GIB else f"{n / 2**20:.1f} MiB"


def _statistic_bytes(pruner: Pruner, layer: nn.Linear) -> int:
    return _FLOAT * {"none": 0, "norm": layer.in_features, "gram": layer.in_features**2}[pruner.statistic]


def _written(work: Path) -> int:
    """Bytes that a killed prune already has on the disk."""
    return sum(file.stat().st_blocks * 512 for file in (work / CHECKPOINT).glob("*.safetensors"))


def _outside(model: PreTrainedModel, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
    """The parameters before and after the blocks, without those of an output layer of its own."""
    inside = {id(p) for block in blocks for p in block.parameters()}
    head = model.get_output_embeddings()
    own = {id(p) for p in head.parameters()} if head is not None else set()
    tied = {id(p) for p in model.get_input_embeddings().parameters()}
    skipped = inside | (own - tied)
    return {name: p for name, p in model.named_parameters() if id(p) not in skipped}


def _begin(
    model: PreTrainedModel, blocks: nn.ModuleList, first: dict[str, str], source: Checkpoint,
    calibration: CalibrationSet, tokenizer: PreTrainedTokenizerBase, like: Tensor, file: Path | None,
) -> list[Batch]:  # fmt: skip
    """Bring the calibration rows to the first block."""
    outside = _outside(model, blocks)
    fill(model, {name: source.find(name, model.base_model_prefix) for name in outside}, source, like)
    fill(blocks[0], first, source, like)
    for name, buffer in model.named_buffers():
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._buffers[leaf] = buffer.to(like.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    try:
        return first_inputs(model, blocks, calibration, pad, like.device, file)
    finally:
        for name in outside:
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
