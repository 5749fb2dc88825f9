"""Prune with ssgr. It reads and writes block by block, so its time of pruning holds that of loading and saving."""

from __future__ import annotations

from pathlib import Path

from measure import Job, measured

from ssgr.allocation.uniform import Uniform
from ssgr.model import Model
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.pruner.wanda import Wanda
from ssgr.records import CalibrationSet, Row
from ssgr.sparsity import NM, Unstructured
from ssgr.stages.plan import Memory
from ssgr.stages.prune import Passing, prune
from ssgr.stages.solve import Method


def pruned(job: Job, model: Model, ids: list[list[int]]) -> None:
    """Prune; every token weighs the same."""
    rows = tuple(Row(tuple(row), 0, str(i)) for i, row in enumerate(ids))
    weights = tuple((1.0,) * len(row) for row in ids)
    calibration = CalibrationSet("benchmark", rows, weights, (), sum(map(len, rows)))
    pruner = {"wanda": Wanda, "sparsegpt": SparseGPT}[job.pruner]()
    sparsity = NM(job.n, job.m) if job.m else Unstructured(job.ratio)
    method = Method(pruner, sparsity, Uniform())
    prune(model, model.tokenizer(), calibration, method, Memory(16), Path(job.out), Passing(order=job.order))


measured(
    load=lambda job: Model("benchmark", job.model, device="cpu"),
    prune=pruned,
    save=lambda job, nothing: None,
    packages=["torch", "transformers"],
)
