"""Plan: what pruning a model needs of the device, the host and the disk, told before it begins."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssgr.model.blocks import linear_layers, outside
from ssgr.model.checkpoint import Checkpoint
from ssgr.pruner import Pruner
from ssgr.records import CalibrationSet
from ssgr.stages.activations import padded_tokens

_GIB, _FLOAT = 2**30, 4  # bytes
_log = logging.getLogger("ssgr")


@dataclass(frozen=True)
class Memory:
    """How much may be kept in memory; it changes no result."""

    activations_gib: float  # more than this of activations lies in a file that is mapped into memory


def plan(
    model: PreTrainedModel, blocks: nn.ModuleList, pruner: Pruner, calibration: CalibrationSet | None,
    source: Checkpoint, like: Tensor, memory: Memory, folder: Path,
) -> bool:  # fmt: skip
    """Say what pruning into `folder` will need; whether the activations must lie in a file.

    Raises:
        ValueError: the disk, the host or the device has less.
    """
    layers = linear_layers(blocks[0], pruner.exclude).values()
    block = max(sum(p.numel() for p in b.parameters()) for b in blocks) * like.element_size()
    before = sum(p.numel() for p in outside(model, blocks).values()) * like.element_size()
    statistics = sum(_statistic_bytes(pruner, layer) for layer in layers)
    solve = max(
        3 * _FLOAT * layer.out_features * layer.in_features + 4 * _statistic_bytes(pruner, layer) for layer in layers
    )
    hidden = getattr(model.config.get_text_config(), "hidden_size", 0) * like.element_size()
    activations = 0 if calibration is None else padded_tokens(calibration) * hidden
    mapped = activations > memory.activations_gib * _GIB
    device = max(block + statistics + solve, block + before if calibration else 0)
    host = (0 if mapped else activations) + (device if like.device.type == "cpu" else block)
    disk = source.size - _written(folder) + (activations if mapped else 0)
    _log.info(
        "prune: %s on %s for one block (weights %s, statistics %s, solve %s), %s of activations %s, %s of disk",
        _size(device), like.device, _size(block), _size(statistics), _size(solve), _size(activations),
        "in a file" if mapped else "in memory", _size(disk),
    )  # fmt: skip
    needs = {"memory": (host, psutil.virtual_memory().available), "disk": (disk, shutil.disk_usage(folder.parent).free)}
    if like.device.type == "cuda":
        needs[str(like.device)] = (device, torch.cuda.mem_get_info(like.device)[0])
    for what, (needed, free) in needs.items():
        if needed > free:
            raise ValueError(
                f"prune needs {_size(needed)} of {what}, and {_size(free)} are free; "
                + {"disk": "free some, or type store.path=DIR elsewhere", "memory": "type memory.activations_gib=0, or a "
                   "smaller budget.tokens"}.get(what, "type model.dtype=bfloat16 or device=cpu")
            )  # fmt: skip
    return mapped


def _size(n: float) -> str:
    return f"{n / _GIB:.1f} GiB" if n >= 0.1 * _GIB else f"{n / 2**20:.1f} MiB"


def _statistic_bytes(pruner: Pruner, layer: nn.Linear) -> int:
    return _FLOAT * {"none": 0, "norm": layer.in_features, "gram": layer.in_features**2}[pruner.statistic]


def _written(folder: Path) -> int:
    """Bytes that a killed prune already has on the disk."""
    return sum(file.stat().st_blocks * 512 for file in folder.glob("*.safetensors"))
