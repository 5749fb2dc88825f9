"""Measure: what the process of every engine does around its pruning. Linux only, for the peak that the kernel keeps."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Job:
    """What to prune and how; the pruned checkpoint goes to `out`/checkpoint."""

    model: str
    rows: str  # JSON: a list of rows of token ids
    pruner: str  # wanda or sparsegpt
    pattern: str  # a ratio such as 0.5, or n:m with n of m kept
    threads: int
    out: str
    order: str = "layer"  # of ssgr: whether the rows pass through a block once or, as published, twice

    @property
    def ratio(self) -> float:
        """The share of weights that are pruned."""
        return 1 - self.n / self.m if self.m else float(self.pattern)

    @property
    def n(self) -> int:
        """Weights kept of every m, or 0."""
        return int(self.pattern.split(":")[0]) if ":" in self.pattern else 0

    @property
    def m(self) -> int:
        """Weights of a group, or 0."""
        return int(self.pattern.split(":")[1]) if ":" in self.pattern else 0

    @property
    def checkpoint(self) -> str:
        """Where the pruned checkpoint goes."""
        return str(Path(self.out, "checkpoint"))


def mib(field: str) -> float:
    """Memory of this process as the kernel counts it: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measured(
    load: Callable[[Job], Any],
    prune: Callable[[Job, Any, list[list[int]]], Any],
    save: Callable[[Job, Any], None],
    packages: Sequence[str],
) -> None:
    """Run the job that the first argument names, and write the seconds and peaks of its parts beside the checkpoint."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(job.threads)
    rows = json.loads(Path(job.rows).read_text())
    wall, processor, peaks = {}, {}, {"imported": mib("VmHWM")}
    state: Any = None
    for part, step in {"load": load, "prune": lambda job, x: prune(job, x, rows), "save": save}.items():
        start, used = time.perf_counter(), time.process_time()
        state = step(job) if part == "load" else step(job, state)
        wall[part], processor[part] = time.perf_counter() - start, time.process_time() - used
        peaks[part] = mib("VmHWM")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    result = {"job": asdict(job), "wall": wall, "processor": processor, "peak_mib": peaks, "versions": versions}
    Path(job.out, "measured.json").write_text(json.dumps(result))
