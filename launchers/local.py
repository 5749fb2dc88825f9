"""Run a graph in processes of this machine through submitit's local executor: each job when what it needs is there."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import submitit
import torch

from launchers.arrays import Task, tasks
from launchers.submit import LOGS, Settings, work_of
from ssgr.progress import Progress
from ssgr.queue import Records
from ssgr.store import SMALL, Store
from ssgr.sweep import Sweep

_POLL = 0.2  # seconds
_ENDED = "its process ended without a result, as one that was killed does; the same command goes on where it was"


def run(sweep: Sweep, store: Store, settings: Settings, cpus: int | None, timeout_min: int) -> None:
    """Make what is missing of a sweep; a stage that fails keeps only those that need it from starting."""
    count, threads = _slots(settings.max_parallel, cpus)
    graph, records = sweep.graph, Records(store.root)
    missing = graph.missing(lambda stage: store.find(stage.folder, stage.key, SMALL) is not None)
    waiting = {task.id: task for task in tasks(missing, settings.fold, {})}
    print(
        f"sweep {sweep.id}: {len(sweep.overrides)} cells, {len(graph.stages)} stages; {len(waiting)} jobs, {count} at a time "
        f"with {threads} threads each; logs in {sweep.folder / LOGS}"
    )
    absent = {key for task in waiting.values() for key in task.keys}
    for key in absent:
        records.forgive(graph.stages[key].folder, key)
    running: dict[int, tuple[Task, submitit.Job[None]]] = {}  # by slot
    with Progress("sweep", len(waiting)) as progress:
        try:
            while waiting or running:
                for slot, (task, job) in list(running.items()):
                    if job.done():
                        del running[slot]
                        progress.step()
                        lost = [] if job.exception() is None else _lost(records, sweep, store, task, job)
                        absent -= {*task.keys} - {*lost}  # what a job made before it failed is there for others
                        progress.step(_drop(waiting, lost))
                ready = [task for task in waiting.values() if not task.needs & absent]
                for task in ready[: count - len(running)]:
                    slot = next(i for i in range(count) if i not in running)
                    running[slot] = (waiting.pop(task.id), _start(sweep, task, slot, threads, timeout_min))
                time.sleep(_POLL)
        finally:
            for _, job in running.values():
                job.cancel()


def _slots(parallel: int | None, cpus: int | None) -> tuple[int, int]:
    """How many jobs run at a time, and the threads of each."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = parallel if parallel is not None else torch.cuda.device_count() or max(1, there // 2)
    threads = cpus if cpus is not None else max(1, there // count)
    return count, threads


def _start(sweep: Sweep, task: Task, slot: int, threads: int, timeout_min: int) -> submitit.Job[None]:
    executor = submitit.LocalExecutor(sweep.folder / LOGS)
    gpus = torch.cuda.device_count()
    visible = {"gpus_per_node": 1, "visible_gpus": (slot % gpus,)} if gpus else {}
    executor.update_parameters(timeout_min=timeout_min, **visible)
    with _aside(sweep.folder / LOGS / "submitit.err"):
        return executor.submit(work_of(sweep, task.keys, threads))


@contextlib.contextmanager
def _aside(file: Path) -> Iterator[None]:
    """What is started meanwhile has its errors in `file`: submitit's own process ends with a traceback at Ctrl-C."""
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as log:
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _lost(records: Records, sweep: Sweep, store: Store, task: Task, job: submitit.Job[None]) -> list[str]:
    """What a task that failed did not make, after saying so; one that was killed could not note it itself."""
    stages = [sweep.graph.stages[key] for key in task.keys]
    left = [one for one in stages if store.find(one.folder, one.key) is None]
    stage = left[0] if left else stages[-1]
    failure = records.failure(stage.folder, stage.key)
    if failure is None:
        records.fail(stage.folder, stage.key, _ENDED, str(job.paths.stderr))
    said = failure.error if failure else _ENDED
    print(f"[ERROR] {stage.name} of {sweep.label(task.cell)}: {said} (log: {job.paths.stderr})", file=sys.stderr)
    return [one.key for one in left]


def _drop(waiting: dict[str, Task], lost: list[str]) -> int:
    """Take out of `waiting` all that needs what was lost; how many those are."""
    gone, before = set(lost), len(waiting)
    for task in list(waiting.values()):  # in the order of the graph
        if task.needs & gone:
            gone |= set(task.keys)
            del waiting[task.id]
    return before - len(waiting)
