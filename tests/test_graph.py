"""The plan of a grid: unique stages, tasks, arrays; pure, and tried on thousands of cells with a recording cluster."""

from __future__ import annotations

import errno
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from launchers.arrays import Array, Task, arrays, tasks
from launchers.cluster import Resources, Slurm, resources
from launchers.submit import Settings, plan, submit
from ssgr.files import write_json
from ssgr.graph import Graph, Planned
from ssgr.queue import Queued, Records, Submitted, squeue
from ssgr.store import Store
from ssgr.sweep import Sweep, read

FOLD = {"grade": "sample", "evaluate": "grade"}


def cell(source: str, pruner: str, parts: int = 1) -> list[Planned]:
    """The stages of a cell as the pipeline plans them."""

    def sampled(name: str, key: str, *needs: str) -> list[Planned]:
        some = (
            [Planned(f"{name} {i + 1}/{parts}", "sample", f"{key}-{i}", needs) for i in range(parts)]
            if parts > 1
            else []
        )
        return [*some, Planned(name, "sample", key, (*needs, *(one.key for one in some)))]

    out = [*sampled("sample", "s"), Planned("grade", "grade", "g", ("s",))]
    out += [Planned("select", "select", f"sel-{source}", ("g",))]
    out += sampled("sample_dense.b", "s-dense")
    out += [Planned("grade_dense.b", "grade", "g-dense", ("s-dense",))]
    out += [Planned("evaluate_dense.b", "evaluate", "e-dense", ("g-dense",))]
    own = f"{source}-{pruner}"
    out += [
        Planned("prune", "prune", f"p-{own}", (f"sel-{source}",)),
        *sampled("sample_pruned.b", f"s-{own}", f"p-{own}"),
    ]
    out += [Planned("grade_pruned.b", "grade", f"g-{own}", (f"s-{own}",))]
    return [*out, Planned("evaluate_pruned.b", "evaluate", f"e-{own}", (f"g-{own}",))]


def grid(sources: int, pruners: int, parts: int = 1) -> Graph:
    """A grid of sources x pruners."""
    out = Graph()
    for n in range(sources * pruners):
        out.add(n, cell(f"c{n // pruners}", f"w{n % pruners}", parts))
    return out


def todo(graph: Graph, fold: Mapping[str, str] = FOLD) -> list[Task]:
    """The tasks of a grid of which nothing is there."""
    return tasks(graph.missing(lambda stage: False), fold, {})


class Recording:
    """A cluster that only notes what is submitted."""

    def __init__(self, refuse_after: int | None = None) -> None:
        self.arrays: list[tuple[str, int, str | None]] = []
        self.work: list[Any] = []
        self.parallel: list[int | None] = []
        self.checked: Mapping[str, Resources] = {}
        self.cancelled: list[str] = []
        self.given: list[tuple[str, tuple[str, ...]]] = []
        self.refuse_after = refuse_after

    def check(self, kinds: Mapping[str, Resources]) -> None:
        self.checked = kinds

    def submit(
        self,
        work: Sequence[Any],
        name: str,
        asked: Resources,
        dependency: str | None,
        folder: Path,
        parallel: int | None,
    ) -> str:
        if self.refuse_after is not None and len(self.arrays) >= self.refuse_after:
            raise ValueError(f"SLURM refused {name}: submit limit reached")
        self.arrays.append((name, len(work), dependency))
        self.work += work
        self.parallel.append(parallel)
        return str(1000 + len(self.arrays))

    def give(self, one: Submitted, i: int, work: Any, asked: Resources) -> None:
        self.given.append((one.id(i), tuple(stage.key for stage in work.stages)))

    def cancel(self, jobs: Sequence[str]) -> None:
        self.cancelled += jobs

    def queue(self, names: Iterable[str]) -> dict[str, list[Queued]]:
        """Its answer to squeue: every job waits."""
        sizes = {name: (f"{1001 + i}", size) for i, (name, size, _) in enumerate(self.arrays)}
        ids = {name: [f"{job}_{j}" for j in range(size)] if size > 1 else [job] for name, (job, size) in sizes.items()}
        return {name: [Queued(job, "PENDING", "None", "0:00") for job in ids[name]] for name in names}


def starts_after(found: Sequence[Array], array: int, element: int) -> set[str]:
    """The keys that are made before an element of an array starts, as SLURM would see to it."""
    out: set[str] = set()
    for i, j in found[array].after:
        j = element if j is None else j
        out |= set(found[i].tasks[j].keys) | starts_after(found, i, j)
    return out


def test_cells_share_what_has_the_same_key() -> None:
    graph = grid(4, 6)
    assert Counter(stage.kind for stage in graph.stages.values()) == {
        "sample": 2 + 24, "grade": 2 + 24, "evaluate": 1 + 24, "select": 4, "prune": 24,
    }  # fmt: skip


def test_what_only_finished_stages_need_is_not_made_again() -> None:
    graph = grid(2, 2)
    have = {key for key in graph.stages if key not in ("e-c0-w0", "g-c0-w0", "s", "g", "sel-c1")}
    wanted = ["s", "g", "g-c0-w0", "e-c0-w0", "sel-c1"]
    assert [stage.key for stage in graph.missing(lambda stage: stage.key in have)] == wanted
    assert graph.missing(lambda stage: True) == []


def test_small_stages_go_on_in_the_job_of_what_they_read() -> None:
    graph = grid(1, 1)
    assert [task.keys for task in todo(graph)] == [
        ("s", "g"), ("sel-c0",), ("s-dense", "g-dense", "e-dense"), ("p-c0-w0",), ("s-c0-w0", "g-c0-w0", "e-c0-w0"),
    ]  # fmt: skip
    assert all(len(task.keys) == 1 for task in todo(graph, fold={}))
    two = Graph()  # what needs something else too would wait for it in the middle of its job, here for ever
    both = Planned("evaluate", "evaluate", "e", ("s", "p"))
    two.add(0, [Planned("sample", "sample", "s", ()), Planned("prune", "prune", "p", ("s",)), both])
    assert [task.keys for task in todo(two, {"evaluate": "sample"})] == [("s",), ("p",), ("e",)]


def test_a_job_holds_stages_of_one_cell_only() -> None:
    """A second grader of the same traces is wanted by another cell, whose configuration its job needs."""
    graph = Graph()
    graph.add(0, [Planned("sample", "sample", "s", ()), Planned("evaluate", "evaluate", "e", ("s",))])
    graph.add(1, [Planned("sample", "sample", "s", ()), Planned("evaluate", "evaluate", "e2", ("s",))])
    assert [(task.keys, task.cell) for task in todo(graph, {"evaluate": "sample"})] == [(("s", "e"), 0), (("e2",), 1)]


def test_parts_are_jobs_of_their_own_and_are_gathered() -> None:
    graph = grid(1, 1, parts=3)
    kinds = Counter(task.kind for task in todo(graph))
    assert kinds == {"sample": 9, "gather": 3, "select": 1, "prune": 1}
    gather = next(task for task in todo(graph) if task.keys[0] == "s")
    assert gather.keys == ("s", "g") and gather.needs == {"s-0", "s-1", "s-2"}


@pytest.mark.parametrize("fold", [FOLD, {}], ids=["folded", "single"])
@pytest.mark.parametrize("limit", [1, 5, 1000])
@pytest.mark.parametrize("seed", range(8))
def test_arrays_keep_the_order_whatever_is_there_and_queued(seed: int, limit: int, fold: Mapping[str, str]) -> None:
    """Random states of the store and the queue: every missing stage once, after what it needs, in arrays small enough."""
    draw = random.Random(seed)
    graph = grid(draw.randint(1, 5), draw.randint(1, 6), parts=draw.randint(1, 3))
    have = {key for key in graph.stages if draw.random() < 0.3}
    missing = graph.missing(lambda stage: stage.key in have)
    live = {stage.key: f"77_{i}" for i, stage in enumerate(missing) if draw.random() < 0.2}
    found = arrays(tasks(missing, fold, live), live, limit)
    made = [key for array in found for task in array.tasks for key in task.keys]
    assert sorted(made + list(live)) == sorted(stage.key for stage in missing)
    assert all(
        1 <= len(array.tasks) <= limit and {task.kind for task in array.tasks} == {array.kind} for array in found
    )
    for i, array in enumerate(found):
        for after, element in array.after:
            assert after < i  # submitted before
            if element is None:
                assert len(found[after].tasks) == len(array.tasks)
        for j, task in enumerate(array.tasks):
            before = starts_after(found, i, j) | have
            for at, key in enumerate(task.keys):
                for need in graph.stages[key].needs:
                    if need in live:
                        assert live[need] in array.live
                    elif need in {stage.key for stage in missing}:
                        assert need in before or need in task.keys[:at]


def test_a_job_waits_for_its_own_branch_only() -> None:
    found = arrays(todo(grid(4, 6)), {}, 1000)
    prunes = [(i, array) for i, array in enumerate(found) if array.kind == "prune"]
    assert sum(len(array.tasks) for _, array in prunes) == 24
    for i, array in prunes:
        for j, task in enumerate(array.tasks):
            source = task.keys[0].split("-")[1]
            assert {key for key in starts_after(found, i, j) if key.startswith("sel")} == {f"sel-{source}"}
    assert len(prunes) == 4 and len(found) < 16  # and not one array a job, nor one a pruner


def test_jobs_that_wait_for_other_jobs_of_before_share_no_array() -> None:
    some = [Task("sample", (f"s{i}",), i, frozenset()) for i in range(2)]
    some += [Task("gather", (f"g{i}",), i, frozenset({f"s{i}", f"old{i}"})) for i in range(2)]
    found = arrays(some, {"old0": "7_0", "old1": "7_1"}, 10)
    assert [(array.kind, array.live) for array in found] == [("sample", ()), ("gather", ("7_0",)), ("gather", ("7_1",))]


def test_an_array_is_never_longer_than_the_site_allows() -> None:
    found = arrays(todo(grid(4, 6)), {}, 5)
    assert max(len(array.tasks) for array in found) <= 5


def sweep_of(graph: Graph, store: Store, folder: Path) -> Sweep:
    """A sweep of the cells of `graph`."""
    out = Sweep(folder, str(store.root), ["run.py", "-m"], "", 1, graph=graph)
    out.overrides = {n: [f"cell={n}"] for n in graph.cells}
    out.configs = {n: str(n) for n in graph.cells}
    out.names = {n: {graph.stages[key].name: key for key in keys} for n, keys in graph.cells.items()}
    return out


def test_submission_records_every_job_and_the_report_waits_for_all(tmp_path: Path) -> None:
    store, cluster = Store(tmp_path / "store"), Recording()
    sweep = sweep_of(grid(2, 3), store, tmp_path / "sweep")
    Records(store.root).fail("sample", "s", "an earlier try", "log")
    done = submit(sweep, store, cluster, Settings(fold=FOLD, max_parallel=7))
    assert Records(store.root).failure("sample", "s") is None
    assert set(cluster.checked) == {"sample", "select", "prune", "report"}
    assert cluster.parallel == [7] * len(done.arrays) + [None]
    assert done.jobs == 2 + 2 + 6 + 6 and cluster.arrays[-1][0].startswith("ssgr-report")
    assert cluster.arrays[-1][2] == "afterany:" + ":".join(str(one.job) for one in done.arrays)
    assert {one.name for one in Records(store.root).read()} == {name for name, *_ in cluster.arrays}
    assert set(Records(store.root).last()) >= set(sweep.graph.stages)
    again = read(tmp_path / "sweep")
    assert again is not None and again.graph == sweep.graph and again.names == sweep.names and again.id == "sweep"


def test_live_stages_are_joined_and_finished_ones_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    graph = grid(1, 2)
    store.run("sample", "s", lambda work: None)
    live = {"g": Queued("12", "RUNNING", "None", "1:00"), "p-c0-w0": Queued("13_1", "PENDING", "Dependency", "0:00")}
    found = plan(sweep_of(graph, store, tmp_path / "sweep"), store, Settings(fold=FOLD), live)
    assert found.stored == {"sample": 1} and set(found.live) == {"g", "p-c0-w0"}
    by_key = {task.keys[0]: array for array in found.arrays for task in array.tasks}
    assert by_key["sel-c0"].live == ("12",) and by_key["s-c0-w0"].live == ("13_1",)
    assert "s" not in by_key and "p-c0-w0" not in by_key


def test_jobs_of_a_driver_that_died_are_found_by_name_and_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, cluster = Store(tmp_path / "store"), Recording()
    records = Records(store.root)
    records.write(Submitted("ssgr-prune-a", "prune", (("p-c0-w0",), ("p-c0-w1",)), "logs"))
    records.write(Submitted("ssgr-prune-b", "prune", (("p-c1-w0",),), "logs"))  # sbatch never got it
    records.write(Submitted("ssgr-sample-c", "sample", (("s-dense", "g-other"),), "logs"))  # of another sweep, in part
    queue = {
        "ssgr-sample-c": [Queued("14", "PENDING", "Resources", "0:00")],
        "ssgr-prune-a": [Queued("12_0", "RUNNING", "None", "0:01"), Queued("12_1", "PENDING", "Resources", "0:00")],
    }
    monkeypatch.setattr("ssgr.queue.squeue", lambda names: {name: queue[name] for name in names if name in queue})
    done = submit(sweep_of(grid(2, 2), store, tmp_path / "sweep"), store, cluster, Settings(fold=FOLD))
    assert cluster.given == [("12_0", ("p-c0-w0",)), ("12_1", ("p-c0-w1",))]
    assert set(done.plan.live) == {"s-dense", "p-c0-w0", "p-c0-w1"}
    assert "ssgr-prune-b" not in {one.name for one in records.read()}
    assert any("afterok:12_0" in (after or "") for _, _, after in cluster.arrays)


def test_a_refusal_midway_keeps_what_was_submitted_on_record(tmp_path: Path) -> None:
    store, cluster = Store(tmp_path / "store"), Recording(refuse_after=2)
    with pytest.raises(ValueError, match="submit limit reached; what was submitted before goes on"):
        submit(sweep_of(grid(2, 3), store, tmp_path / "sweep"), store, cluster, Settings(fold=FOLD))
    assert [one.job for one in Records(store.root).read()] == ["1001", "1002", None]


@pytest.mark.parametrize("writes", range(9))
def test_a_disk_that_fills_during_a_submission_loses_nothing(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after a job was accepted: the same command submits the rest, once there is room."""
    store, first, second = Store(tmp_path / "store"), Recording(), Recording()
    sweep = sweep_of(grid(2, 3), store, tmp_path / "sweep")
    left = [writes]

    def full(path: Path, value: Any) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        left[0] -= 1
        write_json(path, value)

    monkeypatch.setattr("ssgr.queue.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        submit(sweep, store, first, Settings(fold=FOLD))
    queued = {
        name: [Queued(f"{1001 + i}_{j}", "PENDING", "None", "0:00") for j in range(size)]
        for i, (name, size, _) in enumerate(first.arrays)
    }
    monkeypatch.setattr("ssgr.queue.write_json", write_json)
    monkeypatch.setattr("ssgr.queue.squeue", lambda names: {name: queued[name] for name in names if name in queued})
    submit(sweep, store, second, Settings(fold=FOLD))
    made = Counter(stage.key for work in first.work + second.work for stage in getattr(work, "stages", ()))
    assert made == Counter(sweep.graph.stages.keys())


def test_a_job_that_is_put_into_the_queue_again_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM calls it COMPLETING meanwhile, as it calls one that ends for good, whose time it still tells."""
    records = Records(tmp_path)
    records.write(Submitted("ssgr-prune-a", "prune", (("p",),), "logs", job="77"))
    for state, elapsed, live in (
        ("RUNNING", "0:01", {"p"}),
        ("COMPLETING", "0:01", set()),  # for good
        ("COMPLETING", "0:00", {"p"}),
        ("PENDING", "0:00", {"p"}),
    ):
        queue = {"ssgr-prune-a": [Queued("77", state, "None", elapsed)]}
        monkeypatch.setattr("ssgr.queue.squeue", lambda names, queue=queue: {name: queue[name] for name in names})
        records.settle()
        assert set(records.live()) == live and not records.read()[0].ended, state


def test_a_stage_that_failed_fails_all_that_need_it_and_no_other() -> None:
    graph = grid(2, 2)
    cause = graph.failed_by(["sel-c1"])
    assert set(cause.values()) == {"sel-c1"}
    assert {key for key in cause if key.startswith("p-")} == {"p-c1-w0", "p-c1-w1"}


def test_resources_are_those_of_the_kind_over_the_default() -> None:
    given = {
        "default": {"cpus_per_task": 2, "partition": "cpu", "timeout_min": 30},
        "prune": {"partition": "gpu", "gpus_per_node": 8},
    }
    assert resources({"default": {"mem_gb": 32}, "prune": {"mem": "200G"}}, "prune").asked["mem"] == "200G"
    asked = resources(given, "prune")
    assert (asked.cpus, asked.gpus, asked.asked["partition"], asked.asked["time"]) == (2, 8, "gpu", 30)
    assert "OMP_NUM_THREADS=2" in asked.asked["setup"][0]
    assert resources(given, "grade").gpus == 0 and "gpus_per_node" not in resources(given, "grade").asked
    with pytest.raises(ValueError, match=r"resources\.grade\.cpus_per_task=0: give a whole number"):
        resources({"default": {"cpus_per_task": 0}}, "grade")
    with pytest.raises(ValueError, match="may be told as it starts, and dies of it; give at least timeout_min=3"):
        resources({"default": {"signal_delay_s": 90}, "sample": {"timeout_min": 2}}, "sample")
    with pytest.raises(ValueError, match=r"a job has one task a node; memory\.ranks=auto uses all GPUs"):
        resources({"prune": {"tasks_per_node": 2}}, "prune")
    with pytest.raises(ValueError, match="collect and prune alone run on several nodes"):
        resources({"sample": {"nodes": 2}}, "sample")
    for wrong in (
        {"prune": "gpu"},
        {"default": {"setup": "module load cuda"}},
        {"prune": {"additional_parameters": 3}},
    ):
        with pytest.raises(ValueError, match=r"hydra\.launcher\.resources\.prune.*=.*: give .* such as [{\[]"):
            resources(wrong, "prune")
    two = resources({"prune": {"nodes": 2, "gpus_per_node": 4}}, "prune")
    assert two.gpus == 8 and two.asked["nodes"] == 2 and two.asked["ntasks_per_node"] == 1
    assert two.asked["srun_args"] == ["--kill-on-bad-exit=1"]


def test_flags_without_a_value_are_given_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same when SLURM is asked whether it takes such jobs, and in the file that submitit writes."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun", "squeue", "scancel"):
        (tmp_path / "bin" / name).write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/{name}\necho Submitted batch job 7\n'
        )
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    extra = {"requeue": True, "spread-job": False, "begin": None, "nice": 3}
    given = {"default": {"exclusive": False, "use_srun": False, "timeout_min": 30, "additional_parameters": extra}}
    asked = resources(given, "prune")
    Slurm().check({"prune": asked})
    assert {"--requeue", "--nice=3", "--time=30"} < set((tmp_path / "sbatch").read_text().split())
    assert Slurm().submit([print], "name", asked, None, tmp_path / "logs", None) == "7"
    lines = (tmp_path / "logs" / "7_submission.sh").read_text().splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --nice=3", "#SBATCH --time=30"} < set(lines)
    for written in (lines, (tmp_path / "sbatch").read_text().split()):
        assert not [line for line in written if "False" in line or "None" in line or "True" in line]
    assert not [line for line in lines if line.startswith("srun")]


@pytest.mark.parametrize(
    ("command", "script", "said"),
    [
        (
            "sbatch",
            "exec sleep 9",
            "sbatch did not answer in 0.1 s: SLURM's controller may be down; nothing was submitted",
        ),
        ("sbatch", "", 'sbatch told no id of name: Could not make sense of sbatch output ""'),
        ("squeue", "echo Maintenance on Monday", r"squeue answered what is no line of a job \(Maintenance on Monday\)"),
    ],
)
def test_a_command_of_slurm_that_hangs_or_babbles_is_one_sentence(
    command: str, script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "srun", "squeue", "scancel"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script if name == command else ''}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if "sleep" in script:
        monkeypatch.setattr("launchers.cluster._ANSWER", 0.1)
    asked = resources({}, "prune")

    def ask() -> None:
        if command == "squeue":
            squeue(["name"])
        Slurm().check({"prune": asked})
        Slurm().submit([print], "name", asked, None, tmp_path / "logs", None)

    with pytest.raises(ValueError, match=said):
        ask()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exec sleep 9", "scancel did not answer in 0.1 s"),
        ("echo no such job >&2; exit 1", "scancel failed: no such job"),
    ],
)
def test_a_scancel_that_hangs_or_fails_is_a_warning(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scancel").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if "sleep" in script:
        monkeypatch.setattr("ssgr.queue._ANSWER", 0.1)
    Slurm().cancel(["7_1", "8"])
    shown = capsys.readouterr().err
    assert f"[WARNING] {said}" in shown and "of the dropped jobs 7_1, 8 some may go on" in shown


def test_ten_thousand_cells_are_planned_and_submitted(tmp_path: Path) -> None:
    """In seconds: nothing in it is more than linear in the cells (figures in LOG.md)."""
    store = Store(tmp_path / "store")
    start = time.perf_counter()
    cluster = Recording()
    sweep = sweep_of(grid(100, 100), store, tmp_path / "sweep")
    done = submit(sweep, store, cluster, Settings(fold=FOLD, max_array=1000))
    print(
        f"{len(sweep.graph.stages)} stages, {done.jobs} jobs, {len(done.arrays)} arrays: {time.perf_counter() - start:.1f} s"
    )
    assert done.jobs == 2 + 100 + 2 * 10_000
    assert sum(size for _, size, _ in cluster.arrays) == done.jobs + 1
    assert len(done.arrays) < 400


@pytest.mark.parametrize("cancel", [False, True])
def test_only_jobs_that_no_sweep_wants_any_more_are_cancelled(
    cancel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed grid drops cells of which another sweep of the store has joined one."""
    store, cluster = Store(tmp_path / "store"), Recording()
    monkeypatch.setattr("ssgr.queue.squeue", cluster.queue)
    cut = Settings(fold=FOLD, cancel_dropped=cancel)
    first, joined, changed = Graph(), Graph(), Graph()
    for n in range(3):
        first.add(n, cell("c", f"w{n}"))
    joined.add(0, cell("c", "w1"))
    changed.add(0, cell("c", "w0")[:-1])  # of whose last job a part is wanted
    submit(sweep_of(first, store, tmp_path / "sweep"), store, cluster, cut)
    submit(sweep_of(joined, store, tmp_path / "other"), store, cluster, cut)
    live = Records(store.root).live()
    assert not cluster.cancelled
    assert submit(sweep_of(changed, store, tmp_path / "sweep"), store, cluster, cut).report is None, "it is queued"
    gone = {live[key].job for key in ("p-c-w2", "s-c-w2")} if cancel else set()
    assert set(cluster.cancelled) == gone


def test_other_parts_leave_those_that_a_queued_job_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, cluster = Store(tmp_path / "store"), Recording()
    monkeypatch.setattr("ssgr.queue.squeue", cluster.queue)
    for parts in (3, 2):
        sweep = sweep_of(grid(1, 1, parts), store, tmp_path / "sweep")
        submit(sweep, store, cluster, Settings(fold=FOLD, cancel_dropped=True))
    assert not cluster.cancelled


def test_what_the_queue_says_of_the_jobs_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that end or never run are none; a record whose id was not noted is known by its name, a damaged one left out."""
    asked: list[int] = []

    def ask(command: Sequence[str]) -> str:
        asked.append(len(command[-1].split(",")))
        states = {"7_0": "RUNNING|None", "7_1": "PENDING|DependencyNeverSatisfied", "7_2": "FAILED|NonZeroExitCode"}
        lines = [f"{job}|ssgr-z|{state}|0:01|x" for job, state in states.items()]
        return "\n".join(lines) if "ssgr-z" in command[-1] else ""

    monkeypatch.setattr("ssgr.queue.ask", ask)
    records = Records(tmp_path)
    records.write(Submitted("ssgr-z", "prune", (("a",), ("b",), ("c",)), "logs", when="1"))
    records.write(Submitted("ssgr-a", "prune", (("a",),), "logs", job="6", when="2"))
    (tmp_path / "jobs" / "ssgr-b.json").write_text("{")
    assert [one.name for one in records.read()] == ["ssgr-z", "ssgr-a"]
    assert {key: job.job for key, job in records.live().items()} == {"a": "7_0"}
    assert set(records.last()) == {"a"}
    assert [one.job for one in records.settle()] == ["7"]
    assert [one.ended for one in records.read()] == [False, True] and set(records.last()) == {"a", "b", "c"}
    asked.clear()
    squeue(f"ssgr-{i}" for i in range(201))
    records.live()
    assert asked == [200, 1, 1]
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / "a.failed").write_text("{")
    assert records.failure("prune", "a") is None
    (tmp_path / "grade").touch()  # a disk that takes nothing more
    records.fail("grade", "a", "no luck", "log")
