"""Statistics on the disk: what was collected of a dense model, block by block, stream by stream.

A block is one safetensors file in float32; of a Gram matrix only what lies right of the diagonal is kept, in strips.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ssgr import files
from ssgr.errors import system_number
from ssgr.model import Model
from ssgr.model.blocks import Matrix, matrices, names
from ssgr.progress import Progress
from ssgr.pruner import Statistic
from ssgr.records import CalibrationSet
from ssgr.stages import activations, heap, journal
from ssgr.stages.activations import Passage, passages
from ssgr.stages.collect import Collector
from ssgr.stages.plan import REMEDY, Memory, inputs, plan
from ssgr.stages.ranks import Ranks, run
from ssgr.stages.walk import Walk

VERSION = 2

_STRIP = 1024  # rows of a Gram matrix in one tensor
_BETWEEN = "|"  # owner, stream, part
_SOURCE = "source.json"  # of which model, while they are collected


def file_of(folder: Path, i: int) -> Path:
    """The file of block `i`."""
    return folder / f"block_{i:04}.safetensors"


def write(folder: Path, i: int, collector: Collector) -> None:
    """Write what `collector` holds of block `i`: whole, or not at all."""
    out: dict[str, Tensor] = {}
    for (owner, stream), sums in collector.sums.items():
        for part, tensor in sums.tensors().items():
            kept = tensor.float() if part != "tokens" else tensor
            if part != "gram":
                out[_BETWEEN.join((owner, stream, part))] = kept.cpu()
                continue
            for first in range(0, len(kept), _STRIP):
                strip = kept[first : first + _STRIP, first:].contiguous().cpu()
                out[_BETWEEN.join((owner, stream, f"gram.{first}"))] = strip
    beside = folder / "block.new"
    try:
        save_file(out, beside, {"owner": json.dumps(collector.owner, sort_keys=True)})
    except SafetensorError as error:  # the library hides what the system said
        if number := system_number(error):
            raise OSError(number, os.strerror(number), str(beside)) from error
        raise
    with open(beside, "rb") as stream_:
        os.fsync(stream_.fileno())
    beside.replace(file_of(folder, i))


Heard = tuple[dict[str, str], dict[tuple[str, str], dict[str, Tensor]]]  # whose sums are whose, and the sums


class Statistics:
    """The statistics in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def block(self, i: int, device: torch.device, gram: bool) -> Heard:
        """Whose sums are those of each matrix of block `i`, and the sums by owner and stream.

        Raises:
            ValueError: they are not there or damaged, or Gram matrices are wanted and none were collected.
        """
        path = file_of(self.folder, i)
        try:
            owner, sums = self._read(path, device, gram)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path}: the statistics of block {i} cannot be read ({error}); remove {self.folder} to collect again"
            ) from error
        if gram and sums and not any("gram" in parts for parts in sums.values()):
            raise ValueError(
                f"{path}: it holds means and norms and no Gram matrices, which this pruner needs; type "
                "collect.statistic=gram, or pruner=wanda"
            )
        return owner, sums

    def _read(self, path: Path, device: torch.device, gram: bool) -> Heard:
        sums: dict[tuple[str, str], dict[str, Tensor]] = {}
        with safe_open(path, "pt") as file:
            owner = json.loads(file.metadata()["owner"])
            for name in sorted(file.keys()):
                whose, rest = name.split(_BETWEEN, 1)
                stream, part = rest.rsplit(_BETWEEN, 1)
                own = sums.setdefault((whose, stream), {})
                if not part.startswith("gram."):
                    own[part] = file.get_tensor(name).to(device)
                elif gram:
                    first, strip = int(part.removeprefix("gram.")), file.get_tensor(name).to(device)
                    whole = own.setdefault("gram", torch.zeros(1, device=device))
                    if whole.ndim == 1:
                        size = first + strip.shape[1]
                        whole = own["gram"] = torch.zeros(size, size, device=device)
                    whole[first : first + len(strip), first:] = strip
        return owner, sums


@torch.no_grad()
def collect(
    model: Model, tokenizer: PreTrainedTokenizerBase, calibration: CalibrationSet, statistic: Statistic,
    memory: Memory, work: Path,
) -> None:  # fmt: skip
    """Collect the statistics of every matrix of the dense model into `work`, one file a block.

    They depend on no pruner, sparsity or mixture of streams. A run that was killed goes on at its first missing block.

    Raises:
        ValueError: the model does not fit, the calibration cannot be used, weights or activations are not finite, or the
            model changed since a killed run began.
    """
    device = model.torch_device()
    count = memory.processes(device)
    with activations.removed(work, memory.leads):
        run(
            count, work, device.type, _collect, model, tokenizer, calibration, statistic, memory, work, crew=memory.crew
        )


@torch.no_grad()
@heap.enough(REMEDY)
@heap.reused()
def _collect(
    ranks: Ranks, model: Model, tokenizer: PreTrainedTokenizerBase, calibration: CalibrationSet, statistic: Statistic,
    memory: Memory, work: Path,
) -> None:  # fmt: skip
    walk = Walk(model, ranks)
    layers = [matrices(block, names(block, "*")) for block in walk.blocks]
    rows = passages(calibration, None)
    streams = len({name for row in rows for name, *_ in row.spans})
    widths = [m.shape[1] for own in layers for m in inputs(own)] if statistic == "gram" else []
    there = [file_of(work, i).stat().st_size for i in range(len(walk)) if file_of(work, i).exists()]
    disk = max(0, streams * sum(2 * n * (n + min(n, _STRIP)) for n in widths) - sum(there))
    mapped = plan(walk, layers, statistic, rows, memory, work, disk, None).mapped
    done = ranks.tell(next((i for i in range(len(walk)) if not file_of(work, i).exists()), len(walk)), 0)
    source, began = walk.source.stamp(), work / _SOURCE
    if ranks.rank == 0:
        if done and began.exists() and json.loads(began.read_text()) != source:
            raise journal.changed(walk, work)
        files.write_json(began, source)
    if done < len(walk):
        _pass(walk, layers, statistic, rows, tokenizer, work, done, mapped)
    if walk.source.stamp() != source:
        raise journal.changed(walk, work)
    ranks.meet()
    if ranks.rank == 0:
        began.unlink()


def _pass(
    walk: Walk, layers: Sequence[dict[str, Matrix]], statistic: Statistic, rows: Sequence[Passage],
    tokenizer: PreTrainedTokenizerBase, work: Path, done: int, mapped: bool,
) -> None:  # fmt: skip
    """Pass the rows through all blocks, and write what enters those from `done` on."""
    ranks = walk.ranks
    batches = walk.begin(rows, tokenizer, activations.file_of(work, ranks.rank) if mapped else None)
    with Progress("collect", len(walk), done, shown=ranks.rank == 0) as progress:
        for i, _ in walk.filled(range(len(walk)), lambda i: None):
            if i < done:
                walk.advance(i, batches)
                continue
            collector = Collector(statistic, layers[i], clock=walk.clock)
            with collector.listening():
                walk.advance(i, batches, collector)
            ranks.add_up(collector, walk.device)
            if ranks.rank == 0:
                write(work, i, collector)
            progress.step()
