"""Grids on a real SLURM: whatever cluster `sbatch` on the path reaches. `make test-slurm` runs these."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import ROOT, SMALL

from ssgr import status
from ssgr.queue import Records, Submitted
from ssgr.store import Store
from ssgr.sweep import Sweep, read
from tests.started import Started

pytestmark = pytest.mark.slurm
LIMIT = 900  # seconds that a grid may take before its test fails
SITE = (  # what a job of the shipped model needs
    "hydra/launcher=slurm",
    "hydra.launcher.resources.default.cpus_per_task=1",
    "hydra.launcher.resources.default.mem_gb=2",
    "hydra.launcher.resources.report.mem_gb=2",
    *(f"hydra.launcher.resources.{kind}.gpus_per_node=0" for kind in ("sample", "collect", "prune", "evaluate")),
)


def slurm(*command: str) -> str:
    """What a command of the scheduler says."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(autouse=True)
def cluster(tmp_path: Path, started: Started, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster that answers; no job of the test is left in its queue."""
    if shutil.which("sbatch") is None:
        pytest.skip("there is no sbatch on the path, so no SLURM cluster to submit to")
    if subprocess.run(["sinfo"], capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("sbatch is on the path, but its cluster does not answer sinfo")
    monkeypatch.setattr(Grid, "started", started, raising=False)
    yield
    if left := {job.job for job in Records(tmp_path / "store").live().values()}:
        subprocess.run(["scancel", *left], check=False)


class Grid:
    """A grid in a folder of its own: its command, its store, its sweep."""

    started: ClassVar[Started]  # what commands are forked from

    def __init__(self, folder: Path, *overrides: str, sweep: str = "sweep") -> None:
        self.folder, self.path = folder, folder / sweep
        self.overrides = [*SMALL, *overrides, f"store.path={folder / 'store'}"]
        self.store = Store(folder / "store")

    def command(self, *more: str, launcher: tuple[str, ...] = SITE) -> list[str]:
        """The command of the grid."""
        place = f"hydra.sweep.dir={self.path}"
        return [sys.executable, str(ROOT / "run.py"), "-m", *launcher, *self.overrides, place, *more]

    def submit(self, *more: str, code: int = 0) -> str:
        """Give the command and return what it printed."""
        return self.run(self.command(*more), code)

    def in_one(self) -> None:
        """Make the grid in one process."""
        self.run(self.command(launcher=()), 0)

    def run(self, command: list[str], code: int) -> str:
        """What a command prints, which is forked from a process that has its imports done."""
        done = self.started.run(command[2:], ROOT, COLUMNS=ENV["COLUMNS"])
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def sweep(self) -> Sweep:
        """What was planned."""
        found = read(self.path)
        assert found is not None
        return found

    @property
    def records(self) -> list[Submitted]:
        """What was submitted, reports left out."""
        return [one for one in Records(self.store.root).read() if one.kind != "report"]

    def states(self) -> dict[str, status.State]:
        """The state of every stage."""
        return status.states(self.sweep, self.store, Records(self.store.root).live())

    def reach(self, ready: Callable[[], Any]) -> None:
        """Wait for something that a job of the grid is to do, as long as it has any."""

        def seen() -> bool:
            if ready():
                return True
            assert Records(self.store.root).live() or ready(), {k: one for k, one in self.states().items() if one.why}
            return False

        until(seen)

    def wait(self) -> None:
        """Wait until the queue has no job of this store, the report among them."""
        until(lambda: not Records(self.store.root).live())

    def key(self, name: str, cell: int = 0) -> str:
        """The key of a stage of a cell."""
        return self.sweep.names[cell][name]

    def job(self, key: str) -> str:
        """The job that is to make a stage."""
        one, i = Records(self.store.root).last()[key]
        return one.id(i)

    def work(self, name: str, cell: int = 0) -> Path:
        """The folder in which a stage is being made; one that is not there while it has not begun."""
        stage = self.sweep.graph.stages[self.key(name, cell)]
        return next((self.store.root / stage.folder).glob(f"{stage.key}.*work"), self.store.root / "none")

    def incomplete(self) -> str:
        """The cells that have no result, with what their jobs came to and said; empty where none is missing."""
        missing = [n for n in self.sweep.overrides if not (self.sweep.cell(n) / "result.json").exists()]
        if not missing:
            return ""
        left = {key: state for key, state in self.states().items() if state.state != "done"}
        jobs = accounted([one.job for one in Records(self.store.root).read() if one.job])
        return f"cells {missing} have no result: {left}\n{jobs}\n{logs(self)[-4000:]}"

    def complete(self) -> bool:
        """Whether every cell has its result."""
        return not self.incomplete()


def until(ready: Callable[[], Any], limit: float = LIMIT) -> None:
    """Wait for something, but not for ever."""
    end = time.monotonic() + limit
    while not ready():
        assert time.monotonic() < end, f"not so after {limit} s: squeue says\n{slurm('squeue')}"
        time.sleep(0.1)


def accounted(jobs: list[str]) -> dict[str, list[str]]:
    """Every incarnation of jobs in the accounting, with its state."""
    out: dict[str, list[str]] = {}
    ids = ",".join({job.partition("_")[0] for job in jobs})
    for line in slurm("sacct", "-D", "-n", "-P", "-X", "-o", "JobID,State", "-j", ids).splitlines():
        job, state = line.split("|")[:2]
        out.setdefault(job, []).append(state.split()[0])
    return out


def manifests(store: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Every result of a store with the checksums of its files; those that hold times are left out."""
    out = {}
    for path in store.glob("*/*/manifest.json"):
        if path.parent.suffix:
            continue
        found = json.loads(path.read_text())
        timed = ("spent.json", "score.json", "prune.json", "blocks.json", "ssgr.json", "README.md")
        out[found["stage"], found["key"]] = {
            name: entry["sha256"] for name, entry in found["files"].items() if Path(name).name not in timed
        }
    return out


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
SAMPLED = "+hydra.launcher.fold.sample=prune"  # a pruned model is sampled in the job that made it: half as many jobs
TOGETHER = (SAMPLED, "+hydra.launcher.fold.prune=select")
GRID = ("calib=corpus,self", "scope=both,response", "pruner=wanda,magnitude", "sparsity.ratio=0.3,0.4,0.5")


@pytest.mark.xdist_group("grid")
def test_a_grid_of_24_cells_runs_each_stage_once_though_its_driver_is_killed(tmp_path: Path) -> None:
    """Arrays of at most 5; the driver is killed once some jobs are in the queue, and what it left is joined."""
    grid = Grid(tmp_path, *GRID)
    limit = ("hydra.launcher.max_array=5", *TOGETHER)
    with open(tmp_path / "driver.log", "w") as log:
        driver = subprocess.Popen(grid.command(*limit), stdout=log, stderr=log, env=ENV)
    until(lambda: driver.poll() is not None or sum(one.job is not None for one in grid.records) >= 3)
    driver.kill()
    driver.wait()
    before = [one for one in grid.records if one.job is not None]
    said = grid.submit(*limit)
    there = {key for _, key in manifests(tmp_path / "store")}
    joined = "stages are made by jobs that were there before" in said or "nothing was left" in said
    assert joined or there.issuperset(key for one in before for keys in one.tasks for key in keys), said
    assert len(before) >= 3
    assert "nothing was left to submit" in grid.submit(*limit)
    grid.wait()
    assert all(one.state == "done" for one in grid.states().values())
    assert grid.complete(), grid.incomplete()
    stages = grid.sweep.graph.stages
    # magnitude listens to no source, and text has no prompts and responses to tell apart
    assert Counter(stage.kind for stage in stages.values())["prune"] == 3 + (1 + 2) * 3
    made = Counter(key for one in grid.records for keys in one.tasks for key in keys)
    assert set(made.values()) == {1} and made.keys() <= stages.keys()  # nothing was submitted twice
    assert there.issuperset(
        stages.keys() - made.keys()
    )  # jobs that had ended before the driver was killed over their id
    assert all(len(one.tasks) <= 5 for one in grid.records)
    jobs = [one.id(i) for one in grid.records for i in range(len(one.tasks))]
    until(lambda: all(accounted(jobs).get(job, [""])[-1] == "COMPLETED" for job in jobs), 60)  # it lags
    again = {job: states for job, states in accounted(jobs).items() if job in jobs and len(states) > 1}
    assert not again, again
    assert {key for _, key in manifests(grid.store.root)} == set(stages)

    alone = Grid(tmp_path / "alone", *GRID)
    alone.in_one()
    assert manifests(alone.store.root) == manifests(grid.store.root)
    for number in grid.sweep.overrides:
        ours, theirs = (json.loads((one.path / str(number) / "result.json").read_text()) for one in (grid, alone))
        assert ours["keys"] == theirs["keys"] and ours["config"]["sparsity"] == theirs["config"]["sparsity"]
        for which in ("dense", "pruned"):
            own, other = (found["scores"]["held_out"][which] for found in (ours, theirs))
            assert {**own, "seconds": 0, "tokens_per_second": 0} == {**other, "seconds": 0, "tokens_per_second": 0}
        assert ours["scores"]["held_out"]["difference"] == theirs["scores"]["held_out"]["difference"]


LONG = (  # stages that last long enough to be hit in the middle
    "calib=self",
    "pruner=wanda",
    "problems.calibration=96",
    "problems.test=48",
    "sampler.engine.batch_size=16",
    "bench.engine.batch_size=4",
    "budget.tokens=20000",
    "hydra.launcher.resources.default.signal_delay_s=20",
)


def parts(grid: Grid, name: str, cell: int = 0) -> int:
    """Batches of a sample that are on the disk."""
    return len(list(grid.work(name, cell).glob("parts/*.parquet")))


def rows(grid: Grid, name: str, cell: int = 0) -> int:
    """Traces of a sample that are on the disk."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(file).num_rows for file in grid.work(name, cell).glob("parts/*.parquet"))


def logs(grid: Grid) -> str:
    """What all jobs wrote."""
    return "\n".join(file.read_text() for file in sorted((grid.path / "jobs").glob("*_log.err")))


def began(grid: Grid, name: str, count: int) -> bool:
    """Whether the progress of a job began at `count`, where the pieces of an earlier one end."""
    lines = [line for line in logs(grid).replace("\r", "\n").splitlines() if line.startswith(name)]
    return any(f" {count}/" in line for line in lines)


@pytest.mark.xdist_group("faults")
def test_jobs_that_are_killed_go_on_where_they_were_after_one_resubmission(tmp_path: Path) -> None:
    """SIGKILL in the middle of sampling, of pruning and of evaluating; scancel of one more."""
    grid = Grid(tmp_path, *LONG, SAMPLED, "sparsity.ratio=0.3,0.4,0.5")
    grid.submit()
    kept = {}

    def kill(name: str, cell: int, begun: Callable[[], Any]) -> None:
        grid.reach(begun)
        slurm("scancel", "--signal=KILL", f"{grid.job(grid.key(name, cell))}.0")  # the step: its process gets no time
        until(lambda: grid.key(name, cell) not in Records(grid.store.root).live())

    kill("sample_dense.held_out", 0, lambda: parts(grid, "sample_dense.held_out") >= 2)
    kept["sample_dense.held_out"] = rows(grid, "sample_dense.held_out")
    kill("prune", 0, lambda: (grid.work("prune") / "blocks.json").exists())
    kept["prune wanda"] = len(json.loads((grid.work("prune") / "blocks.json").read_text())["blocks"])
    kill("sample_pruned.held_out", 1, lambda: parts(grid, "sample_pruned.held_out", 1) >= 1)
    kept["sample_pruned.held_out"] = rows(grid, "sample_pruned.held_out", 1)
    slurm("scancel", grid.job(grid.key("sample_pruned.held_out", 2)))
    grid.wait()
    found = grid.states()
    lost = found[grid.key("prune")]
    assert lost.state == "failed" and "ended without a result" in lost.why, lost
    assert found[grid.key("sample_pruned.held_out")].why == "prune failed"
    assert not grid.complete()
    grid.submit()
    grid.wait()
    assert grid.complete(), grid.incomplete()
    for name, count in kept.items():
        assert count and began(grid, name, count), (name, count, logs(grid))


@pytest.mark.xdist_group("grid")
def test_requeued_jobs_and_lost_nodes_need_no_hand(tmp_path: Path) -> None:
    """`scontrol requeue` in the middle of sampling, then a node set down under a job: the grid ends by itself."""
    grid = Grid(tmp_path, *LONG)
    grid.submit()
    grid.reach(lambda: parts(grid, "sample") >= 2)
    slurm("scontrol", "requeue", grid.job(grid.key("sample")))
    grid.reach(lambda: parts(grid, "sample_pruned.held_out") >= 1)
    job = grid.job(grid.key("sample_pruned.held_out"))
    node = slurm("squeue", "-h", "-o", "%N", "-j", job).strip()
    slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        grid.wait()
    finally:
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False, capture_output=True)
    assert grid.complete(), grid.incomplete()
    again = {job: states for job, states in accounted([grid.job(grid.key("sample")), job]).items() if len(states) > 1}
    assert len(again) == 2, again


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
def test_preempted_jobs_go_on(tmp_path: Path) -> None:
    """A job of a partition of higher priority takes the nodes in the middle of sampling."""
    if "urgent" not in slurm("sinfo", "-h", "-o", "%R").split():
        pytest.skip("the cluster has no partition `urgent` that preempts others")
    grid = Grid(tmp_path, *LONG)
    grid.submit()
    grid.reach(lambda: parts(grid, "sample") >= 2)
    slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    grid.wait()
    assert grid.complete(), grid.incomplete()
    job = grid.job(grid.key("sample"))
    assert accounted([job])[job][0] in ("PREEMPTED", "REQUEUED") and len(accounted([job])[job]) > 1
    assert "this job is preempted" in logs(grid)


@pytest.mark.xdist_group("faults")
def test_a_time_limit_that_is_too_short_only_takes_longer(tmp_path: Path) -> None:
    """A job is told before its time is up, puts itself back in the queue and goes on."""
    grid = Grid(tmp_path, *LONG, "problems.calibration=1000")
    grid.submit()
    job = grid.job(grid.key("sample"))
    grid.reach(lambda: parts(grid, "sample") >= 2)
    slurm("scontrol", "update", f"jobid={job}", "timelimit=1")  # looked at every 30 s, so none is told while it starts
    grid.reach(lambda: len(accounted([job])[job]) > 1)
    slurm("scontrol", "update", f"jobid={job}", "timelimit=60")
    kept = rows(grid, "sample")
    assert kept and "Caught signal SIGUSR2" in logs(grid)
    grid.reach(lambda: began(grid, "sample", kept))
    left = [one.job for one in Records(grid.store.root).read() if one.job]
    slurm("scancel", *left)  # what follows shows nothing more


@pytest.mark.xdist_group("grid")
def test_two_submissions_of_overlapping_grids_share_their_stages(tmp_path: Path) -> None:
    """At the same moment, into one store."""
    same = (*TOGETHER, "calib=corpus", "pruner=wanda")
    one = Grid(tmp_path, *same, "sparsity.ratio=0.3,0.5", sweep="one")
    other = Grid(tmp_path, *same, "sparsity.ratio=0.5,0.6", sweep="other")
    drivers = [
        subprocess.Popen(grid.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)
        for grid in (one, other)
    ]
    said = [driver.communicate(timeout=LIMIT)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], said
    one.wait()
    assert one.complete() and other.complete(), one.incomplete() + other.incomplete()
    made = Counter(key for record in one.records for keys in record.tasks for key in keys)
    assert made == Counter(one.sweep.graph.stages.keys() | other.sweep.graph.stages.keys())


@pytest.mark.slow
@pytest.mark.xdist_group("grid")
def test_two_nodes_that_share_a_prune_make_the_same_bytes(tmp_path: Path) -> None:
    """Statistics of the dense model and the prune that reads them are each made by a task on either node."""
    cell = ("calib=corpus", "pruner=sparsegpt", "propagate=dense")
    grid, alone = Grid(tmp_path, *cell), Grid(tmp_path / "alone", *cell)
    grid.submit(*(f"+hydra.launcher.resources.{kind}.nodes=2" for kind in ("collect", "prune")))
    alone.in_one()
    grid.wait()
    assert grid.complete(), grid.incomplete()
    for name in ("collect", "prune"):
        job = grid.job(grid.key(name))
        tasks = [line.split("|") for line in slurm("sacct", "-n", "-P", "-o", "JobID,NTasks", "-j", job).splitlines()]
        assert [f"{job}.0", "2"] in tasks, tasks
    assert manifests(alone.store.root) == manifests(grid.store.root)
    assert not list((grid.path / "jobs").glob("*_board.json"))


@pytest.mark.xdist_group("faults")
def test_a_cell_that_must_fail_fails_alone_and_says_why(tmp_path: Path) -> None:
    """Two that cannot be planned, and one whose selection is empty when it is made."""
    grid = Grid(tmp_path, *TOGETHER, "pruner=wanda", "calib=corpus,ssgr", "sparsity.ratio=0.5,1.5")
    said = grid.submit("hydra.launcher.wait=true", code=1)
    assert "3 of 4 cells failed" in said and "select failed: " in said and "ratio=1.5" in said, said
    assert [n for n in range(4) if (grid.path / str(n) / "result.json").exists()] == [0]
    table = subprocess.run(
        [sys.executable, "-m", "ssgr.status", str(grid.path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert table.returncode == 1 and "failed: select:" in table.stdout, table.stdout


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("hydra.launcher.resources.default.partition=nowhere", "nvalid partition"),
        ("hydra.launcher.resources.default.mem_gb=900000", "SLURM refuses jobs of kind"),
        ("hydra.launcher.resources.default.cpus_per_task=0", "give a whole number of at least 1"),
        ("+hydra.launcher.resources.prun.mem_gb=2", "no such kind of stage; valid are"),
        ("+hydra.launcher.resources.default.nodes=2", "collect and prune alone run on several nodes"),
    ],
)
def test_what_the_site_refuses_is_one_sentence_and_nothing_is_submitted(tmp_path: Path, wrong: str, said: str) -> None:
    grid = Grid(tmp_path, "calib=corpus", "pruner=magnitude")
    out = grid.submit(wrong, code=1)
    assert said in out and "Traceback" not in out, out
    assert not grid.records


@pytest.mark.xdist_group("faults")
def test_a_dry_run_shows_the_graph_and_submits_nothing(tmp_path: Path) -> None:
    grid = Grid(tmp_path, "calib=corpus", "pruner=wanda,magnitude", "sparsity.ratio=0.3,0.5")
    out = grid.submit("hydra.launcher.dry_run=true")
    assert "4 cells" in out and "prune" in out and "dry run: nothing was submitted" in out, out
    assert not grid.records and not (grid.path / "sweep.json").exists()
