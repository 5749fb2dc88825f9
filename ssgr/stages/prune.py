"""Prune: walk the decoder block by block; each block sees the pruned output of the blocks before it.

Shapes: N rows of a batch, T tokens (padded on the right), D hidden size, O outputs, I inputs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssgr.model.blocks import decoder_blocks, linear_layers
from ssgr.pruner import Pruner
from ssgr.records import CalibrationSet, LayerResult, PruneResult
from ssgr.sparsity import Sparsity
from ssgr.stages.collect import Collector, relative_error
from ssgr.stages.progress import Progress

VERSION = 1
CHECKPOINT, RESULT = "checkpoint", "prune.json"
_BATCH_TOKENS = 4096  # padded tokens of one forward pass


@dataclass
class _Batch:
    """Rows of like length on their way through the blocks."""

    hidden_NTD: Tensor
    weights_NT: Tensor
    kwargs: dict[str, Any]


class _Reached(Exception):
    """The first block was reached: its inputs are known."""


@torch.no_grad()
def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: CalibrationSet | None,
    pruner: Pruner,
    sparsity: Sparsity,
    work: Path,
) -> PruneResult:
    """Prune every linear layer of the decoder blocks and save the model to `work`/checkpoint in Hugging Face form.

    Raises:
        ValueError: n:m does not divide a layer, all tokens weigh zero, or activations are not finite.
    """
    check(model, pruner, sparsity)
    name, blocks = decoder_blocks(model)
    batches = [] if calibration is None else _first_inputs(model, blocks[0], calibration, tokenizer)
    layers: list[LayerResult] = []
    with Progress(f"prune {pruner.name}", len(blocks)) as progress:
        for i, block in enumerate(blocks):
            layers += _prune_block(block, f"{name}.{i}", batches, pruner, sparsity)
            progress.step()
    model.save_pretrained(work / CHECKPOINT)
    tokenizer.save_pretrained(work / CHECKPOINT)
    sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
    realised = sum(layer.sparsity * size for layer, size in zip(layers, sizes, strict=True)) / sum(sizes)
    return PruneResult(pruner.name, sparsity.target, realised, tuple(layers), CHECKPOINT)


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
    for i, layers in enumerate(linear_layers(b, pruner.exclude) for b in blocks):
        for name, layer in layers.items():
            if sparsity.group and layer.in_features % sparsity.group:
                raise ValueError(
                    f"{block}.{i}.{name} has {layer.in_features} inputs, which groups of {sparsity.group} do not divide; "
                    f"choose another sparsity, or leave the layer out with 'pruner.exclude=[{name}]'"
                )


def _first_inputs(
    model: PreTrainedModel, first: nn.Module, calibration: CalibrationSet, tokenizer: PreTrainedTokenizerBase
) -> list[_Batch]:
    """What reaches the first block, batch by batch: causal attention keeps padding on the right from real tokens."""
    if not any(w > 0 for weights in calibration.weights for w in weights):
        raise ValueError(f"calib={calibration.source}: every token weighs zero in this scope; type scope=both")
    pairs = sorted(zip(calibration.rows, calibration.weights, strict=True), key=lambda pair: len(pair[0]))
    caught: list[_Batch] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        kwargs.update(past_key_values=None, use_cache=False)
        caught.append(_Batch(hidden, weights_NT, kwargs))
        raise _Reached

    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    try:
        for group in _groups([len(row) for row, _ in pairs]):
            width = len(pairs[group[-1]][0])
            ids_NT = torch.tensor([[*pairs[i][0].ids, *[pad] * (width - len(pairs[i][0]))] for i in group])
            weights_NT = torch.tensor([[*pairs[i][1], *[0.0] * (width - len(pairs[i][1]))] for i in group])
            weights_NT = weights_NT.to(model.device)
            with suppress(_Reached):
                model(input_ids=ids_NT.to(model.device), use_cache=False)
    finally:
        handle.remove()
    return caught


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sorted rows in batches of at most _BATCH_TOKENS padded tokens."""
    groups: list[list[int]] = [[]]
    for i, length in enumerate(lengths):
        if groups[-1] and (len(groups[-1]) + 1) * length > _BATCH_TOKENS:
            groups.append([])
        groups[-1].append(i)
    return groups


def _prune_block(
    block: nn.Module, name: str, batches: Sequence[_Batch], pruner: Pruner, sparsity: Sparsity
) -> list[LayerResult]:
    """Collect the statistics of a block, prune its layers, and pass the rows through what is left."""
    layers = linear_layers(block, pruner.exclude)
    collector = None
    if batches and pruner.statistic != "none":
        collector = Collector(pruner.statistic, layers)
        with collector.listening():
            for batch in batches:
                collector.weights_NT = batch.weights_NT
                _forward(block, batch, name)
    results = [_prune_layer(f"{name}.{n}", n, layer, collector, pruner, sparsity) for n, layer in layers.items()]
    for batch in batches if collector else ():
        batch.hidden_NTD = _forward(block, batch, name)
    return results


def _forward(block: nn.Module, batch: _Batch, name: str) -> Tensor:
    out = block(batch.hidden_NTD, **batch.kwargs)
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    if not torch.isfinite(hidden).all():
        raise ValueError(f"{name}: its output holds NaN or infinity on the calibration rows; use model.dtype=float32")
    return hidden


def _prune_layer(
    full: str, name: str, layer: nn.Linear, collector: Collector | None, pruner: Pruner, sparsity: Sparsity
) -> LayerResult:
    start = time.perf_counter()
    before_OI = layer.weight.to(torch.float32, copy=True)  # the weight is overwritten below
    statistic = collector.of(name) if collector else None
    pruned = pruner.prune(before_OI, statistic, sparsity, full)
    layer.weight.copy_(pruned.w_OI)
    error = None if statistic is None else relative_error(before_OI, layer.weight.float(), statistic)
    zeros = float((layer.weight == 0).float().mean())
    shape = (layer.out_features, layer.in_features)
    return LayerResult(full, shape, zeros, error, pruned.damping, time.perf_counter() - start)
