"""Submit what is missing of a sweep: join what is queued, retry what failed, and return."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launchers.arrays import Array, arrays, tasks
from launchers.cluster import Cluster, Resources, resources
from launchers.work import Report, Work
from ssgr.graph import KINDS, Stage
from ssgr.queue import FOLDER, Queued, Records, Submitted
from ssgr.store import SMALL, Store
from ssgr.sweep import Sweep, read, submitted

REPORT = "report"
LOGS = "jobs"  # in the sweep's folder


@dataclass(frozen=True)
class Settings:
    """How a sweep is cut in jobs."""

    resources: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    fold: Mapping[str, str] = field(default_factory=dict)
    max_array: int = 1000
    max_parallel: int | None = None
    cancel_dropped: bool = False


@dataclass(frozen=True)
class Plan:
    """What a submission would do: stages by state, and the arrays."""

    missing: tuple[Stage, ...]
    live: Mapping[str, Queued]  # of the missing ones, those that a job makes already
    arrays: tuple[Array, ...]
    stored: Counter[str]  # stages that are in the store, by kind


@dataclass(frozen=True)
class Submission:
    """What was submitted: a record of each array, and of the report."""

    arrays: tuple[Submitted, ...]
    plan: Plan
    report: Submitted | None

    @property
    def jobs(self) -> int:
        """Jobs of stages."""
        return sum(len(one.tasks) for one in self.arrays)


def plan(sweep: Sweep, store: Store, settings: Settings, live: Mapping[str, Queued]) -> Plan:
    """What there is to do for a sweep; nothing is submitted."""
    graph = sweep.graph
    there = {stage.key for stage in graph.stages.values() if store.find(stage.folder, stage.key, SMALL) is not None}
    missing = graph.missing(lambda stage: stage.key in there)
    joined = {stage.key: live[stage.key] for stage in missing if stage.key in live}
    ids = {key: one.job for key, one in joined.items()}
    todo = arrays(tasks(missing, settings.fold, ids), ids, settings.max_array)
    stored = Counter(stage.kind for stage in graph.stages.values() if stage.key in there)
    return Plan(tuple(missing), joined, tuple(todo), stored)


def kinds(plan_: Plan, settings: Settings) -> dict[str, Resources]:
    """The resources of every kind of job that would be submitted.

    Raises:
        ValueError: as `resources`; or a kind that does not exist has some.
    """
    valid = (*KINDS, REPORT, "default")
    for name in settings.resources:
        if name not in valid:
            raise ValueError(f"hydra.launcher.resources.{name}: no such kind of stage; valid are {', '.join(valid)}")
    used = {array.kind for array in plan_.arrays} | {REPORT}
    return {kind: resources(settings.resources, kind) for kind in used}


def submit(sweep: Sweep, store: Store, cluster: Cluster, settings: Settings) -> Submission:
    """Submit what is missing, one driver at a time for a store, and a report that runs when all has ended.

    Raises:
        ValueError: the cluster refuses; what was submitted until then is on record, and the same command goes on.
    """
    records = Records(store.root)
    with store.alone(FOLDER):
        for lost in records.settle():
            _mend(sweep, cluster, lost, resources(settings.resources, lost.kind))
        live = records.live()
        found = plan(sweep, store, settings, live)
        shapes = kinds(found, settings)
        if found.arrays:
            cluster.check(shapes)
        gone = _dropped(sweep, records, live) if settings.cancel_dropped else []
        sweep.write()
        cluster.cancel(gone)
        logs = sweep.folder / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        done: list[Submitted] = []
        for array in found.arrays:
            asked = shapes[array.kind]
            works = [work_of(sweep, task.keys, asked.cpus) for task in array.tasks]
            for task in array.tasks:
                for key in task.keys:
                    records.forgive(sweep.graph.stages[key].folder, key)
            dependency = _dependency(array, done)
            keys = tuple(task.keys for task in array.tasks)
            done.append(
                _submitted(records, cluster, array.kind, keys, works, asked, dependency, logs, settings.max_parallel)
            )
        report = _report(sweep, records, cluster, found, done, shapes[REPORT], logs)
    return Submission(tuple(done), found, report)


def _submitted(
    records: Records,
    cluster: Cluster,
    kind: str,
    keys: tuple[tuple[str, ...], ...],
    works: Sequence[Any],
    asked: Resources,
    dependency: str | None,
    logs: Path,
    parallel: int | None,
) -> Submitted:
    """Submit an array between two lines of its record."""
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    one = Submitted(f"ssgr-{kind}-{secrets.token_hex(4)}", kind, keys, str(logs), when=now)
    records.write(one)
    try:
        job = cluster.submit(works, one.name, asked, dependency, logs, parallel)
    except ValueError as error:
        # an sbatch that timed out may have been accepted all the same: the record stays, and is looked up by its name
        raise ValueError(
            f"{error}; what was submitted before goes on, and the same command submits the rest"
        ) from error
    one = replace(one, job=job)
    records.write(one)
    return one


def work_of(sweep: Sweep, keys: tuple[str, ...], cpus: int) -> Work:
    """What the job does that makes `keys`."""
    stages = tuple(sweep.graph.stages[key] for key in keys)
    return Work(sweep.config_file(stages[0].cell), Path(sweep.store), stages, sweep.parts, cpus)


def _mend(sweep: Sweep, cluster: Cluster, lost: Submitted, asked: Resources) -> None:
    """Give jobs of a driver that died what they are to do, as far as this sweep knows it; others end, and are retried."""
    for i, keys in enumerate(lost.tasks):
        if lost.kind == REPORT:
            cluster.give(lost, i, Report(Path(lost.folder).parent), asked)
        elif all(key in sweep.graph.stages for key in keys):
            cluster.give(lost, i, work_of(sweep, keys, asked.cpus), asked)


def _dependency(array: Array, done: Sequence[Submitted]) -> str | None:
    """SLURM's words for what an array waits for."""
    each = [done[i].job for i, j in array.after if j is None]
    ok = [done[i].id(j) for i, j in array.after if j is not None] + list(array.live)
    parts = [f"aftercorr:{':'.join(map(str, each))}"] if each else []
    parts += [f"afterok:{':'.join(ok)}"] if ok else []
    return ",".join(parts) or None


def _report(
    sweep: Sweep,
    records: Records,
    cluster: Cluster,
    found: Plan,
    done: Sequence[Submitted],
    asked: Resources,
    logs: Path,
) -> Submitted | None:
    """A job that runs when every other has ended, however it ended."""
    jobs = [str(one.job) for one in done] + sorted({one.job.partition("_")[0] for one in found.live.values()})
    name = f"report of {sweep.folder}"
    if not jobs or (not done and name in records.live()):
        return None
    dependency = f"afterany:{':'.join(jobs)}"
    return _submitted(
        records,
        cluster,
        REPORT,
        ((name,),),
        [Report(sweep.folder)],
        asked,
        dependency,
        logs,
        None,
    )


def _dropped(sweep: Sweep, records: Records, live: Mapping[str, Queued]) -> list[str]:
    """The jobs that were submitted for this sweep's folder of stages that neither it nor another sweep wants."""
    wanted = sweep.graph.stages.keys() | submitted(records.root, but=sweep.folder)
    before = read(sweep.folder)
    for stage in reversed(before.graph.stages.values() if before else ()):
        if stage.key in wanted and stage.key in live:  # it waits for the parts of before, where there are others now
            wanted |= {*stage.needs}
    own = [one for one in records.read() if Path(one.folder).parent == sweep.folder and one.kind != REPORT]
    gone = [key for one in own for keys in one.tasks if wanted.isdisjoint(keys) for key in keys]
    return sorted({live[key].job for key in gone if key in live})
