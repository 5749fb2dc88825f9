"""Plan: what pruning a model needs of the device, the host and the disk, told before it begins."""

from __future__ import annotations

import logging
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ssgr.model.blocks import Matrix, outside
from ssgr.pruner import Pruner, Statistic
from ssgr.stages.activations import Passage, largest_batch, padded_tokens
from ssgr.stages.ranks import Crew
from ssgr.stages.walk import Walk

_GIB, _FLOAT, _DOUBLE = 2**30, 4, 8  # bytes
_OWN, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # control groups of this process, and all of them
_NAMED = 6  # matrices that stay dense, in the line that says so
_GROUPS = {
    "": ("", "memory.max", "memory.current"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}
REMEDY = "type order=block, memory.activations_gib=0, or a smaller budget.tokens or budget.max_row_tokens"
_log = logging.getLogger("ssgr")


@dataclass(frozen=True)
class Memory:
    """How much may be kept in memory, and by how many processes the work is shared; neither changes a result.

    Raises:
        ValueError: there are no ranks, or less than no memory.
    """

    activations_gib: float  # more than this of activations lies in a file that is mapped into memory
    ranks: int | str = 1  # processes, on each host; auto is one a GPU
    crew: Crew | None = None  # the tasks of a job on several hosts

    def __post_init__(self) -> None:
        if not isinstance(self.activations_gib, (int, float)) or not self.activations_gib >= 0:  # nor NaN
            raise ValueError(
                f"memory.activations_gib={self.activations_gib}: give a number of GiB from 0 up, such as 8; 0 keeps all "
                "activations in a file"
            )
        if self.ranks != "auto" and (not isinstance(self.ranks, int) or self.ranks < 1):
            raise ValueError(
                f"memory.ranks={self.ranks}: give a whole number of processes from 1 up, or auto for one a GPU"
            )

    @property
    def leads(self) -> bool:
        """Whether this process, and no task of another host, cares for the folder of the work."""
        return self.crew is None or self.crew.task == 0

    def processes(self, device: torch.device) -> int:
        """How many processes share the work on `device`.

        Raises:
            ValueError: there are fewer GPUs.
        """
        gpus = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
        if self.ranks == "auto":
            return gpus
        ranks = int(self.ranks)
        if device.type == "cuda" and ranks > gpus:
            raise ValueError(
                f"memory.ranks={ranks}: {device} stands for {gpus} GPU(s); type memory.ranks=auto device=cuda"
            )
        return ranks


@dataclass(frozen=True)
class Needs:
    """How what a plan is of has room."""

    mapped: bool  # activations need a file
    pauses: bool  # the rows may pause inside a block, all of them at once


def plan(
    walk: Walk, layers: Sequence[dict[str, Matrix]], statistic: Statistic, rows: Sequence[Passage],
    memory: Memory, folder: Path, disk: int, pruner: Pruner | None, pauses: bool = False,
) -> Needs:  # fmt: skip
    """Say what passing `rows` through the model needs, and `disk` bytes in `folder`.

    What a `pruner` takes is of all matrices with the same inputs, which it is given together, with copies of them before
    and after.

    Where the rows pause inside a block, all of them are there in its middle at once: about three times their hidden states
    and the widest input of a matrix. A batch that runs takes about four of its own and three times what is widest, which
    sums over it take once more in float32. Where that does not fit, they pass through the block again for each set.

    Raises:
        ValueError: the disk, the host or the device has less.
    """
    streams = len({name for row in rows for name, *_ in row.spans})
    size = torch.empty(0, dtype=walk.dtype).element_size()
    config = walk.model.config.get_text_config()
    block = max(sum(p.numel() for p in b.parameters()) for b in walk.blocks) * size
    before = sum(p.numel() for p in outside(walk.model, walk.decoder).values()) * size
    kept = streams * max(sum(_DOUBLE * _numbers(statistic, m) for m in inputs(own)) for own in layers)
    every = [m for own in layers for m in own.values()]
    weight, pair = pruner.work if pruner else (0, 0)
    each = [(sum(m.shape[0] * m.shape[1] for m in some), some[0].shape[1] ** 2) for own in layers for some in sets(own)]
    work = max((2 * _FLOAT + weight) * weights + pair * pairs for weights, pairs in each) if pruner else 0
    hidden = getattr(config, "hidden_size", 0)
    tokens = padded_tokens(rows, walk.apart) // walk.ranks.count
    activations = tokens * hidden * size
    inside = tokens * (3 * hidden + max(m.shape[1] for m in every)) * size if pauses else 0
    together, length = largest_batch(rows, walk.apart)
    widest = max(max(m.shape) for m in every)
    batch = together * length * ((4 * hidden + 3 * widest) * size + widest * _FLOAT)
    if config._attn_implementation == "eager":  # it writes its scores out
        batch += 2 * _FLOAT * together * getattr(config, "num_attention_heads", 1) * length**2
    mapped = activations > memory.activations_gib * _GIB
    here = activations  # in memory
    if mapped:
        disk, here = disk + activations * walk.ranks.count, 0
    elif walk.device.type == "cuda":
        here = 1 << (activations - 1).bit_length()  # as pinned memory is given out
    free = {
        "memory": min([psutil.virtual_memory().available, *_left_in_groups()]),
        "memory for a process (ulimit)": min(_left_by_limits(), default=sys.maxsize),
        "disk": shutil.disk_usage(folder).free,
    }
    if walk.device.type == "cuda":
        unused = torch.cuda.memory_reserved(walk.device) - torch.cuda.memory_allocated(walk.device)
        free[str(walk.device)] = torch.cuda.mem_get_info(walk.device)[0] + unused

    def needed(inside: int) -> dict[str, int]:
        """With so much of rows that pause."""
        device = max(block + kept + inside + max(batch, work), block + before + batch if rows else 0)
        host = here + (device + block if walk.device.type == "cpu" else 2 * block)
        every = {"memory": host * walk.ranks.here, "memory for a process (ulimit)": host, "disk": disk}
        return every | {str(walk.device): device}

    needs = needed(inside)
    again = pauses and any(needs[what] > free[what] for what in free)
    if again:
        needs = needed(0)
    verb = "prune" if pruner else "collect"
    _log.info(
        "%s: %s on %s for one block (weights %s, statistics %s, rows inside %s, a batch %s, work %s), %s of activations %s, "
        "%s of disk",
        verb, _size(needs[str(walk.device)]), walk.device, _size(block), _size(kept), _size(0 if again else inside),
        _size(batch), _size(work), _size(activations if mapped else here), "in a file" if mapped else "in memory", _size(disk),
    )  # fmt: skip
    if pruner:
        _log.info("prune: %s", _chosen(walk, layers))
    for what, left in free.items():
        if needs[what] > left:
            raise ValueError(
                f"{verb} needs {_size(needs[what])} of {what}, and {_size(left)} are free; "
                + {"disk": "free some, or type store.path=DIR elsewhere", "memory": "type memory.activations_gib=0, "
                   "or a smaller budget.tokens"}.get(what.split()[0], "type model.dtype=bfloat16 or device=cpu")
            )  # fmt: skip
    if again:
        _log.info(
            "%s: the rows pass through a block again for each set of layers: in its middle they need %s more",
            verb,
            _size(inside),
        )
    return Needs(mapped, pauses and not again)


def _chosen(walk: Walk, layers: Sequence[dict[str, Matrix]]) -> str:
    """How many matrices are pruned, how much of the blocks they are, and which of the blocks' tensors stay dense."""
    dense: Counter[str] = Counter()
    every = pruned = 0
    for block, own in zip(walk.decoder, layers, strict=False):  # the last of `layers` may be the output layer
        chosen = {matrix.parameter for matrix in own.values()}
        dense.update(name for name, p in block.named_parameters() if p.ndim > 1 and name not in chosen)
        every += sum(p.numel() for p in block.parameters())
        pruned += sum(matrix.weight_OI.numel() for matrix in own.values())
    names = [f"{name} ({n} times)" for name, n in dense.most_common(_NAMED)]
    more = f" and {len(dense) - _NAMED} more" if len(dense) > _NAMED else ""
    return (
        f"{sum(map(len, layers))} matrices, {pruned / every:.1%} of the weights of the blocks; "
        f"dense in them: {', '.join(names) or 'vectors'}{more}"
    )


def _left_in_groups() -> Iterator[int]:
    """Bytes that are left of the memory of each control group that this process is in, such as a job's or a container's."""
    with suppress(OSError):  # a system without them
        for line in _OWN.read_text().splitlines():
            _, kinds, inside = line.split(":", 2)
            for kind in _GROUPS.keys() & kinds.split(","):
                folder, limit, used = _GROUPS[kind]
                innermost = _ROOT / folder / inside.lstrip("/")
                for group in (one for one in (innermost, *innermost.parents) if one.is_relative_to(_ROOT / folder)):
                    with suppress(OSError, ValueError):  # without a limit: no such file, or no number
                        most = int((group / limit).read_text())
                        stat = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                        files = stat.get("total_inactive_file", stat.get("inactive_file", 0))  # given back on demand
                        yield max(0, most - int((group / used).read_text()) + int(files))


def _left_by_limits() -> Iterator[int]:
    """Bytes that are left of each limit of the process itself."""
    has = psutil.Process().memory_info()
    for kind, used in ((resource.RLIMIT_AS, has.vms), (resource.RLIMIT_DATA, getattr(has, "data", 0))):
        most, _ = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            yield max(0, most - used)


def sets(layers: dict[str, Matrix]) -> list[list[Matrix]]:
    """Matrices that are likely to have the same inputs: neighbours in one module, of the same width."""
    out: list[list[Matrix]] = []
    last = None
    for name, matrix in layers.items():
        module = name.rpartition(".")[0]
        if last != (module, matrix.shape[1]):
            out.append([])
        out[-1].append(matrix)
        last = (module, matrix.shape[1])
    return out


def inputs(layers: dict[str, Matrix]) -> list[Matrix]:
    """One matrix of each set that is likely to have the same inputs."""
    return [some[0] for some in sets(layers)]


def _size(n: float) -> str:
    return f"{n / _GIB:.1f} GiB" if n >= 0.1 * _GIB else f"{n / 2**20:.1f} MiB"


def _numbers(statistic: Statistic, matrix: Matrix) -> int:
    outputs, inputs = matrix.shape
    each = {"none": 0, "norm": 2 * inputs, "gram": inputs**2, "gradient": 2 * inputs + outputs * inputs // 2}
    return each[statistic]
