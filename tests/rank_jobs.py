"""What the ranks of test_ranks.py do; they import this file, so it imports little before it is asked for more."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from ssgr.stages.ranks import Ranks

JOBS = {  # pruner, dtype, order, tokens of a batch, GiB of activations in memory
    "wanda": ("wanda", "float32", "layer", 100, 1),
    "sparsegpt": ("sparsegpt", "float32", "layer", 100, 1),
    "by block, mapped": ("sparsegpt", "float32", "block", 100, 0),
    "bfloat16": ("sparsegpt", "bfloat16", "layer", 100, 1),
    "float32 in bfloat16": ("wanda", "rounded", "layer", 100, 1),
    "one batch": ("sparsegpt", "float32", "layer", 10**6, 1),
    "one batch, by block": ("wanda", "float32", "block", 10**6, 1),
}


def everything(own: Ranks, sources: Mapping[str, Path], work: Path) -> None:
    """All that is compared between numbers of ranks, and how the ranks spoke with each other."""
    import psutil

    from ssgr.allocation.owl import OWL
    from ssgr.model import Model
    from ssgr.pruner.sparsegpt import SparseGPT
    from ssgr.pruner.wanda import Wanda
    from ssgr.sparsity import Unstructured
    from ssgr.stages import activations
    from ssgr.stages.plan import Memory
    from ssgr.stages.prune import Passing, _prune
    from ssgr.stages.solve import Method
    from ssgr.stages.statistics import _collect
    from ssgr.store import peak_rss_mib
    from tests.conftest import TINY
    from tests.test_prune import calibration, uniform

    tokenizer, rows, half = TINY.tokenizer(), calibration(rows=20), Unstructured(0.5)
    models = {dtype: Model("random", str(path), dtype=dtype, device="cpu") for dtype, path in sources.items()}  # type: ignore[arg-type]
    models["rounded"] = dataclasses.replace(models["float32"], dtype="bfloat16")
    pruners = {"wanda": Wanda(), "sparsegpt": SparseGPT()}
    before = activations._BATCH_TOKENS
    try:
        for name, (pruner, dtype, order, tokens, gib) in JOBS.items():
            activations._BATCH_TOKENS = tokens
            (work / name).mkdir(exist_ok=True)
            given = (uniform(pruners[pruner], half), Memory(gib, own.count), work / name)  # type: ignore[arg-type]
            _prune(own, models[dtype], tokenizer, rows, *given, Passing("pruned", order), None)  # type: ignore[arg-type]
        activations._BATCH_TOKENS = 100
        for name in ("collect", "dense"):
            (work / name).mkdir(exist_ok=True)
        _collect(own, models["float32"], tokenizer, rows, "gram", Memory(1, own.count), work / "collect")
        dense = (Method(SparseGPT(), half, OWL()), Memory(1, own.count), work / "dense", Passing("dense"))
        _prune(own, models["float32"], tokenizer, None, *dense, work / "collect")
    finally:
        activations._BATCH_TOKENS = before
    ends = [(c.laddr.ip, c.raddr.ip if c.raddr else None) for c in psutil.Process().net_connections("inet")]
    there = [file.name for file in work.iterdir()]
    (work / f"rank_{own.rank}.json").write_text(json.dumps([ends, there, peak_rss_mib()]))


def last_fails(own: Ranks, how: str) -> None:
    """The last rank fails, while the others wait for it."""
    if own.rank < own.count - 1:
        own.meet()
    if how == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "a/file")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ZeroDivisionError(how)


def orphaned(own: Ranks, work: Path) -> None:
    """The parent dies, and nobody else tells the ranks to end."""
    (work / f"rank_{own.rank}").write_text(str(os.getpid()))
    own.meet()
    if own.rank == 0:
        os.kill(os.getppid(), signal.SIGKILL)
    for _ in range(600):
        time.sleep(0.1)
    (work / "survived").touch()


def doomed(own: Ranks, blocks: int, source: Path, work: Path) -> None:
    """Prune until so many blocks are written, then kill every process of the group."""
    from ssgr import files
    from ssgr.stages.prune import Passing, _prune

    written, write = [], files.write_json

    def counted(file: Path, what: object) -> None:
        write(file, what)
        written.append(file.name)
        if written.count("blocks.json") == blocks:
            os.killpg(0, signal.SIGKILL)

    files.write_json = counted
    _prune(own, *arguments(source, work, own.count), Passing(), None)


def arguments(source: Path, work: Path, count: int):  # type: ignore[no-untyped-def]
    """Of `doomed`, and of the run that takes its work over."""
    from ssgr.model import Model
    from ssgr.pruner.sparsegpt import SparseGPT
    from ssgr.sparsity import Unstructured
    from ssgr.stages.plan import Memory
    from tests.conftest import TINY
    from tests.test_prune import calibration, uniform

    model = Model("random", str(source), dtype="float32", device="cpu")
    method = uniform(SparseGPT(), Unstructured(0.5))
    return model, TINY.tokenizer(), calibration(rows=20), method, Memory(0, count), work


def steps(own: Ranks) -> None:
    """Work of two steps, the second of which is never taken, by ranks that have loaded what a run loads and no more."""
    import sys

    from ssgr.progress import Progress

    assert "transformers.modeling_utils" in sys.modules and not {"scipy", "sklearn"} & {*sys.modules}

    with Progress("prune", 2, shown=False) as progress:
        progress.step()
        time.sleep(3)
