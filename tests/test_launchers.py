"""Grids in processes of this machine, the status and the store's commands, and what launchers refuse; no scheduler."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import ROOT, SMALL, Run
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from launchers import grid, local, outcome
from launchers.arrays import Task
from launchers.submit import Settings
from ssgr import assemble, status
from ssgr.graph import Graph, Planned
from ssgr.queue import Queued, Records, Submitted
from ssgr.report import __main__ as report_main
from ssgr.report import cells, page
from ssgr.stages.sample import TRACES
from ssgr.store import Store
from ssgr.store.__main__ import delete, entries
from ssgr.store.__main__ import main as store_main
from ssgr.sweep import Sweep, read, referred
from ssgr.tables import read_traces
from tests import sweeps

LOCAL = ("-m", "hydra/launcher=local", "hydra.launcher.max_parallel=2", "hydra.launcher.cpus_per_task=1")


def command(run: Run, *overrides: str, code: int = 0, **how: Any) -> str:
    """What run.py prints of a sweep."""
    done = run(*overrides, COLUMNS="200", **how)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_grid_in_processes_equals_the_grid_in_one(run: Run, tmp_path: Path) -> None:
    """Parts included; a cell whose selection is empty fails alone; a second command does nothing."""
    text = ("bench=perplexity", "bench.text=prose", "bench.window=64", "bench.windows=32")
    small = [setting for setting in SMALL if not setting.startswith("bench.")]
    shared, same = (*text, *small, "pruner=magnitude"), "budget.max_row_tokens=512"
    fold = ("hydra.launcher.fold.evaluate=prune", "+hydra.launcher.fold.select=grade")
    parts = (*LOCAL, "hydra.launcher.parts=2", *fold, *shared)
    said = command(run, *parts, "calib=self,corpus", "budget.max_row_tokens=8,512", small=False, code=1)
    assert "1 of 4 cells failed" in said and "select failed: " in said, said
    sweep = read(tmp_path / "sweep")
    assert sweep is not None
    store = Store(tmp_path / "store")
    found = status.states(sweep, store, {})
    kinds = Counter((stage.kind, found[stage.key].state) for stage in sweep.graph.stages.values())
    assert kinds["select", "failed"] == 1 and kinds["prune", "done"] == 1
    assert kinds["sample", "done"] == 2 and kinds["gather", "done"] == 1
    again = command(run, *parts, same, "calib=self,corpus", small=False)
    assert "; 0 jobs," in again, again
    changed = command(run, *parts, same, "calib=corpus", small=False)  # now cell 0 is another
    assert "; 0 jobs," in changed, changed
    found_ = json.loads((tmp_path / "sweep" / "0" / "result.json").read_text())
    assert found_["config"]["calib"]["name"] == "corpus"
    assert "; 0 jobs," in command(run, *parts, same, "calib=self,corpus", small=False)
    other = (f"store.path={tmp_path / 'alone' / 'store'}", f"hydra.sweep.dir={tmp_path / 'alone' / 'sweep'}")
    alone = command(run, "-m", same, "calib=self,corpus", *shared, *other, small=False)
    for number in ("0", "1"):
        ours, theirs = (
            json.loads((folder / "sweep" / number / "result.json").read_text())
            for folder in (tmp_path, tmp_path / "alone")
        )
        for which in ("dense", "pruned"):
            own, one = (result["scores"]["perplexity"][which]["value"] for result in (ours, theirs))
            assert own == one, alone
        assert set(theirs["keys"].items()) <= set(ours["keys"].items())
    key = json.loads((tmp_path / "sweep" / "0" / "result.json").read_text())["keys"]["sample"]
    in_parts, at_once = (
        read_traces(root / "store" / "sample" / key / TRACES) for root in (tmp_path, tmp_path / "alone")
    )
    assert len(in_parts) == 128 and in_parts == at_once


def test_a_sweeper_that_needs_values_must_wait(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "hydra_plugins" / "own"
    own.mkdir(parents=True)
    (own / "__init__.py").write_text(
        "from hydra._internal.core_plugins.basic_sweeper import BasicSweeper\nclass Seeker(BasicSweeper): pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = command(
        run,
        "-m",
        "hydra/launcher=slurm",
        "hydra.sweeper._target_=hydra_plugins.own.Seeker",
        "calib=corpus",
        alone=True,
        code=1,
    )
    assert (
        "the sweeper Seeker chooses cells by the results of others: type hydra.launcher.wait=true; nothing was" in said
    )


def test_a_site_file_as_in_readme_composes(run: Run, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    block = readme[readme.index("    # @package hydra.launcher") :].split("\n\n")[0]
    site = tmp_path / "hydra" / "launcher" / "mysite.yaml"
    site.parent.mkdir(parents=True)
    site.write_text(textwrap.dedent(block))
    search = f"hydra.searchpath=[pkg://launchers,file://{tmp_path}]"
    shown = ("--cfg", "hydra", "-p", "hydra.launcher")
    said = command(run, *shown, "hydra/launcher=mysite", search)
    found = yaml.safe_load(said[said.index("_target_") :])
    assert found["_target_"].endswith("SlurmLauncher") and found["max_parallel"] == 32
    assert found["resources"]["default"]["account"] == "mylab" and found["resources"]["default"]["signal_delay_s"] == 90
    assert found["resources"]["prune"]["gpus_per_node"] == 4


def test_without_slurm_there_is_one_sentence(run: Run, tmp_path: Path) -> None:
    python = Path(sys.executable).parent
    said = command(run, "-m", "hydra/launcher=slurm", "pruner=magnitude", "calib=corpus", code=1, PATH=str(python))
    assert said.count("there is no sbatch on the path: log in to the cluster, or type hydra/launcher=local") == 1, said
    assert "Traceback" not in said
    assert not Records(tmp_path / "store").read()


@pytest.mark.parametrize(
    ("launcher", "wrong", "said"),
    [
        ("slurm", "max_array=0", "give a whole number of at least 1"),
        ("slurm", "max_array=null", "give a whole number of at least 1"),
        ("slurm", "max_parallel=-3", "give a whole number of at least 1, or null"),
        ("slurm", "max_timeouts=-1", "give a whole number of at least 0"),
        ("slurm", "wait=yes", "give true or false"),
        ("local", "parts=true", "give a whole number of at least 1"),
        ("local", "max_parallel=0", "give a whole number of at least 1, or null"),
        ("local", "timeout_min=0", "give a whole number of at least 1"),
        ("local", "fold.evaluate=grad", "no kind of stage is called grad; valid are convert, sample"),
        ("local", "fold=null", "give kinds of stages in braces, or {} for none"),
        ("slurm", "resources=gpu", "give kinds of stages in braces, or {} for none"),
    ],
)
def test_settings_of_launchers_that_cannot_be(launcher: str, wrong: str, said: str) -> None:
    settings = OmegaConf.load(ROOT / "launchers" / "hydra" / "launcher" / f"{launcher}.yaml")
    OmegaConf.update(settings, wrong.split("=")[0], OverridesParser.create().parse_override(wrong).value())
    with pytest.raises(ValueError, match=rf"^hydra\.launcher\.{re.escape(wrong.split('=')[0])}=.*: {re.escape(said)}"):
        grid._check(OmegaConf.to_container(settings))  # type: ignore[arg-type]


def test_a_setting_of_a_launcher_that_cannot_be_is_one_sentence(run: Run, tmp_path: Path) -> None:
    out = command(run, "-m", "hydra/launcher=local", "hydra.launcher.fold=null", "pruner=magnitude", code=1)
    assert "hydra.launcher.fold=None: give kinds of stages in braces" in out, out
    assert "Traceback" not in out and not (tmp_path / "store" / "jobs").exists()


def test_what_comes_in_batches_cancels_nothing(run: Run, tmp_path: Path) -> None:
    batches = ("hydra.sweeper.max_batch_size=1", "hydra.launcher.cancel_dropped=true")
    said = command(run, "-m", "hydra/launcher=slurm", *batches, "pruner=magnitude,wanda", "calib=corpus", code=1)
    assert "jobs of cells that are still to come would be cancelled; leave it out" in said and "Traceback" not in said


def test_an_axis_of_stores_is_refused(tmp_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        given = [compose("config", [f"store.path={tmp_path / name}"], return_hydra_config=True) for name in "ab"]
    context: Any = SimpleNamespace(config_loader=SimpleNamespace(load_sweep_config=lambda *_: given[1]))
    sweep = Sweep(tmp_path, "", [], "", 1)
    grid._cell(context, given[0], sweep, grid.store_of(given[0]), 0, ["store.path=b"], True)
    assert sweep.refused[0].startswith(
        f"store.path={tmp_path / 'b'}: a sweep of a launcher has one store, here {tmp_path / 'a'}"
    )
    given[1].shard = "1/2"
    grid._cell(context, given[0], sweep, grid.store_of(given[0]), 1, ["shard=1/2"], True)
    assert sweep.refused[1].startswith("shard= is for jobs that are started by hand")


def test_a_sweep_folder_of_another_version_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text('{"version": 99}')
    said = command(run, *LOCAL, "pruner=magnitude", code=1)
    assert "its format is 99, this one's is 1" in said and "Traceback" not in said


def small(store: Store, folder: Path) -> Sweep:
    """A sweep of two cells that share a stage."""
    graph = Graph()
    for n in range(2):
        shared, own = Planned("select", "select", "a", ()), Planned("prune", "prune", f"p{n}", ("a",))
        graph.add(n, [shared, own, Planned("evaluate_pruned.b", "evaluate", f"e{n}", (f"p{n}",))])
    out = Sweep(folder, str(store.root), [], "", 1, graph=graph)
    out.overrides = {0: ["x=0"], 1: ["x=1"]}
    out.names = {n: {graph.stages[key].name: key for key in keys} for n, keys in graph.cells.items()}
    return out


def test_a_damaged_configuration_is_written_again(tmp_path: Path) -> None:
    for _ in range(2):
        sweep = small(Store(tmp_path / "store"), tmp_path)
        sweep.compose(0, {"a": 1})
        assert sweep.config(0) == {"a": 1}
        sweep.config_file(0).write_text("{")


def test_a_changed_grid_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    """What it left of a cell that is gone, or that can no longer be planned, is shown as no cell of the new one."""
    sweeps.sweep(tmp_path, sweeps.grid(ratio=[0.3, 0.4, 0.5]))
    sweep = small(Store(tmp_path / "store"), tmp_path)
    sweep.refused[1] = "it cannot be"
    sweep.write()
    assert sorted(tmp_path.glob("*/result.json")) == [tmp_path / str(n) / "result.json" for n in range(3)]
    shown = [tmp_path / "0" / "result.json"]
    assert [cell.path for cell in cells.find([tmp_path])] == shown
    assert [cell.path for cell in page.find([tmp_path])[0]] == shown
    assert assemble.gaps(sweep, Store(tmp_path / "store")) == ["no result of x=1: it cannot be"]
    other = tmp_path / "2" / "result.json"
    assert [cell.path for cell in cells.find([other])] == [other]


def test_the_folder_of_a_launcher_takes_no_cell_of_another_way(run: Run, tmp_path: Path) -> None:
    """Else tables would show its own grid, and write that over the cell's result."""
    small(Store(tmp_path / "store"), tmp_path / "sweep").write()
    said = command(run, "-m", "calib=corpus", "pruner=magnitude", code=1)
    assert "is the folder of a sweep of hydra/launcher=local or slurm: type that launcher, or another" in said
    assert not (tmp_path / "sweep" / "0" / "result.json").exists()


def test_status_names_what_failed_and_what_it_holds_up(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    sweep = small(store, tmp_path / "sweep")
    store.run("select", "a", lambda work: None)
    Records(store.root).fail("select", "a", "of an attempt before", "other.log")
    Records(store.root).fail("prune", "p0", "the disk is full", "some.log")
    live = {key: Queued("8_1", "PENDING", "Dependency", "0:00") for key in ("e0", "e1")}
    live["p1"] = Queued("7_1", "PENDING", "Priority", "0:00")
    found = status.states(sweep, store, live)
    assert [found[key].state for key in ("a", "p0", "e0", "p1", "e1")] == [
        "done",
        "failed",
        "waiting",
        "queued",
        "queued",
    ]
    assert status.cell_state(sweep, found, 0) == "failed: prune: the disk is full (log: some.log)"
    assert status.cell_state(sweep, found, 1) == "queued: prune (Priority)"
    assert assemble.holes(sweep, store) == {0: "prune failed: the disk is full (log: some.log)"}
    assert dict(assemble.cells(sweep, store)) == {0: None, 1: None}
    unknown = status.states(sweep, store, None)  # no scheduler: processes of this machine, whose command may go on
    assert status.cell_state(sweep, unknown, 1).endswith("give the command of the sweep again, unless it still runs")


def test_status_of_a_store_that_is_gone_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else every stage would wait for its command, which would make all of them again."""
    store = Store(tmp_path / "store")
    small(store, tmp_path / "sweep").write()
    store.root.rename(tmp_path / "moved")
    assert status.main([str(tmp_path / "sweep")]) == 1
    assert f"error: the store {store.root} of this sweep is not there any more" in capsys.readouterr().err


def test_status_knows_a_job_that_died_without_a_word(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    sweep = small(store, tmp_path / "sweep")
    store.run("select", "a", lambda work: None)
    Records(store.root).write(Submitted("ssgr-prune-1", "prune", (("p0",), ("p1",)), "logs", "55"))
    found = status.states(sweep, store, {})
    assert found["p0"].state == "failed" and "its job 55_0 ended without a result" in found["p0"].why
    assert found["p0"].log == "logs/55_0_0_log.err" and found["e0"].why == "prune failed"


def test_progress_is_seen_from_afar(tmp_path: Path) -> None:
    import threading

    from ssgr.progress import Progress

    store = Store(tmp_path / "store", heartbeat_seconds=0.05)
    sweep = small(store, tmp_path / "sweep")
    go = threading.Event()

    def make(work: Path) -> None:
        with Progress("prune", 8, shown=False) as progress:
            progress.step(3)
            go.wait(20)

    thread = threading.Thread(target=lambda: store.run("prune", "p0", make))
    thread.start()
    try:
        while "3/8" not in status.states(sweep, store, {})["p0"].why and thread.is_alive():
            pass
    finally:
        go.set()
        thread.join()
    assert not list((tmp_path / "store" / "prune").glob("*.progress"))


def test_store_lists_verifies_and_clears(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, outputs = Store(tmp_path / "store"), tmp_path / "outputs"

    def make(work: Path) -> None:
        (work / "file").write_text("content")

    store.run("convert", "z", make)
    store.run("sample", "a", make, inputs={"convert": "z"})
    store.run("prune", "b", make, inputs={"sample": "a"})
    store.run("prune", "c", make)
    store.run("sample", "e", make)  # a part, which no result names yet
    (tmp_path / "store" / "prune" / "d.work").mkdir()
    (tmp_path / "store" / "prune" / "d.work" / "gone").symlink_to("since it was listed")
    (outputs / "run").mkdir(parents=True)
    (outputs / "run" / "result.json").write_text(json.dumps({"keys": {"prune": "b"}}))
    (outputs / "run" / "shard.json").write_text(json.dumps({"keys": {"sample 1/2": "e"}}))
    where = ["--store", str(store.root), "--outputs", str(outputs)]
    assert store_main(["ls", *where]) == 0
    assert "prune      2 results" in capsys.readouterr().out
    assert store_main(["verify", *where]) == 0
    assert store_main(["gc", *where]) == 0
    said = capsys.readouterr().out
    assert "type this again with --delete" in said  # and with its --store and --outputs
    assert "prune/c (result" in said and "d.work" in said and "prune/b (" not in said and "sample/" not in said
    assert store_main(["gc", "--delete", *where]) == 0
    assert sorted(path.name for path in (store.root / "prune").iterdir() if path.is_dir()) == ["b"]
    assert store.find("convert", "z"), "what it is made of was made of that"
    (store.root / "sample" / "a" / "file").write_text("CONTENT")
    assert store_main(["verify", *where]) == 1
    assert "the sha256 is not that of its manifest" in capsys.readouterr().out
    assert store_main(["ls", "--store", str(tmp_path / "none")]) == 1
    assert store_main(["gc", "--delete", *where, str(tmp_path / "mistyped")]) == 1
    assert "mistyped is no folder of runs" in capsys.readouterr().err
    (outputs / "sweep" / "0").mkdir(parents=True)
    assert store_main(["gc", "--delete", "--store", str(outputs), "--outputs", str(outputs)]) == 1
    assert "outputs is no store" in capsys.readouterr().err and (outputs / "sweep" / "0").is_dir()


def test_what_lies_behind_a_link_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as outputs/sweeps on another disk: gc removed all that its sweeps had made, and the report found none."""
    cell, outputs = tmp_path / "scratch" / "sweep" / "0", tmp_path / "outputs"
    cell.mkdir(parents=True)
    (cell / "result.json").write_text(json.dumps({"keys": {"prune": "b"}}))
    (cell / "up").symlink_to(tmp_path / "scratch")
    outputs.mkdir()
    (outputs / "sweeps").symlink_to(tmp_path / "scratch")
    (outputs / "gone").symlink_to(tmp_path / "nothing")
    store = Store(tmp_path / "store")
    store.run("prune", "b", lambda work: None)
    where = ["--store", str(store.root), "--outputs", str(outputs)]
    assert store_main(["gc", "--delete", *where]) == 0 and store.find("prune", "b")
    assert cells.result_files([outputs]) == [outputs / "sweeps" / "sweep" / "0" / "result.json"]
    assert cells.result_files([tmp_path]) == [cell / "result.json"]
    assert referred([tmp_path / "nothing"]) == referred([]), "what is gone meanwhile holds nothing"

    def closed(path: str) -> object:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("os.scandir", closed)  # of another user
    assert cells.result_files([outputs]) == []
    with pytest.raises(PermissionError):
        referred([outputs])


@pytest.mark.parametrize("name", ["result.json", "sweep.json"])
@pytest.mark.parametrize("content", ["{", "{}", "[1]", '{"keys": 1, "stages": 1}'])
def test_what_a_damaged_file_refers_to_is_not_cleared(
    name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, file = Store(tmp_path / "store"), tmp_path / "outputs" / "run" / name
    store.run("prune", "b", lambda work: None)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert store_main(["gc", "--delete", "--store", str(store.root), "--outputs", str(tmp_path / "outputs")]) == 1
    assert f"error: {file} cannot be read (" in capsys.readouterr().err and store.find("prune", "b")


def test_what_may_only_be_read_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A colleague's store and sweep, or those of a mount that is read-only."""
    store = Store(tmp_path / "store")
    small(store, tmp_path / "sweep").write()
    store.run("select", "a", lambda work: None)

    def forbidden(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("ssgr.store.tempfile.TemporaryFile", forbidden)
    monkeypatch.setattr("ssgr.assemble.cells", forbidden)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    where = ["--store", str(store.root), "--outputs", str(tmp_path)]
    before = sorted(tmp_path.rglob("*"))
    for command in ("ls", "verify", "gc"):
        assert store_main([command, *where]) == 0, capsys.readouterr().err
    assert status.main([str(tmp_path / "sweep")]) == 0
    told = report_main._assembled([tmp_path])
    assert "may only be read" in told[0] and [line.startswith("no result of ") for line in told[1:]] == [True, True]
    assert sorted(tmp_path.rglob("*")) == before
    assert store_main(["gc", "--delete", *where]) == 1
    assert capsys.readouterr().err == (
        f"error: {store.root} may only be read: leave out --delete, or type it as its owner\n"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_suspended_process_left_is_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its result is there, made by another; unfinished work that is needed stays, as does what was resumed meanwhile."""
    store = Store(tmp_path / "store")
    store.run("prune", "a", lambda work: None)
    for name in ("a.0123.work", "b.4567.work"):
        (store.root / "prune" / name).mkdir()
    (tmp_path / "result.json").write_text(json.dumps({"keys": {"prune": "a", "needed": "b"}}))
    listed = list(entries(store))
    assert store_main(["gc", "--delete", "--store", str(store.root), "--outputs", str(tmp_path)]) == 0
    assert {path.name for path in (store.root / "prune").glob("*/")} == {"a", "b.4567.work"}
    assert [delete(store, entry) for entry in listed if entry.path.name == "a.0123.work"] == [False]


def test_a_cell_in_use_is_never_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ssgr.lease import Lease

    store = Store(tmp_path / "store")
    (store._open("prune") / "d.work").mkdir()
    store.run("sample", "a", lambda work: None)
    lease = Lease(store.root / "prune" / "d", 1.0)
    assert lease.take(60) is None
    with lease:
        assert store_main(["gc", "--delete", "--store", str(store.root), "--outputs", str(tmp_path)]) == 0
        assert "in use, kept" in capsys.readouterr().out
        (tmp_path / "result.json").write_text(json.dumps({"keys": {"prune": "d"}}))  # made again for what names it
        assert store_main(["gc", "--delete", "--store", str(store.root), "--outputs", str(tmp_path)]) == 0
        assert "a process works in this store" in capsys.readouterr().out
    with store.working():  # a run, between two stages
        assert store_main(["gc", "--delete", "--store", str(store.root), "--outputs", str(tmp_path)]) == 0
        assert "a process works in this store" in capsys.readouterr().out
    assert (store.root / "prune" / "d.work").exists()
    assert (store.root / "sample" / "a").exists(), "what works there may be about to read it"


def test_what_a_sweep_with_open_jobs_names_is_never_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder may lie anywhere, and what it needs was made by another."""
    store, sweep = Store(tmp_path / "store"), tmp_path / "elsewhere" / "sweep"
    for key in ("needed", "planned", "other"):
        store.run("sample", key, lambda work: None)
    (sweep / "jobs").mkdir(parents=True)
    (sweep / "sweep.json").write_text(json.dumps({"stages": [{"key": "needed"}]}))
    record = Submitted("ssgr-sample-a", "sample", (("planned",),), str(sweep / "jobs"), job="7")
    (tmp_path / "outputs").mkdir()
    where = ["--store", str(store.root), "--outputs", str(tmp_path / "outputs")]
    for ended, left in ((False, {"needed", "planned"}), (True, set())):
        Records(store.root).write(replace(record, ended=ended))
        assert store_main(["gc", "--delete", *where]) == 0
        assert {path.name for path in (store.root / "sample").iterdir() if path.is_dir()} == left


def test_a_scheduler_that_is_away_for_a_while_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grid, "_PAUSES", (0, 0))
    sweep: Any = SimpleNamespace(folder="the/sweep")
    answers: list[object] = [ValueError("squeue failed: no contact"), ValueError("squeue failed: no contact"), 7]

    def ask() -> object:
        found = answers.pop(0)
        if isinstance(found, ValueError):
            raise found
        return found

    assert grid._patiently(ask, sweep) == 7 and capsys.readouterr().err.count("asked again") == 2
    answers += [ValueError("squeue failed")] * 3
    with pytest.raises(
        ValueError, match=r"squeue failed; no longer watched, and the jobs go on: python -m ssgr.status the/sw"
    ):
        grid._patiently(ask, sweep)


def test_processes_of_submitit_have_their_errors_in_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else Ctrl-C leaves a traceback of each on the terminal."""
    monkeypatch.setattr("submitit.LocalExecutor.submit", lambda *_: os.write(2, b"Traceback"))
    monkeypatch.setattr(local, "work_of", lambda *_: None)
    started: Any = SimpleNamespace(folder=tmp_path, keys=())
    local._start(started, started, 0, 1, 10)
    os.write(2, b"told")
    assert capfd.readouterr().err == "told" and (tmp_path / "jobs" / "submitit.err").read_text() == "Traceback"


@pytest.mark.parametrize(
    ("fold", "fails", "made"),
    [
        ({}, "a", ["a"]),
        ({}, "p0", ["a", "p0", "p1", "e1"]),
        ({"prune": "select"}, "p0", ["a", "p1", "e1"]),  # what its job made before it failed is there for others
    ],
)
def test_a_job_that_fails_keeps_only_what_needs_it_from_starting(
    fold: dict[str, str], fails: str, made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store, started = Store(tmp_path / "store"), []
    sweep, records = small(store, tmp_path / "sweep"), Records(store.root)
    for key in ("p0", "p1"):
        records.fail("prune", key, "of the command before", "old.log")

    def start(_: Sweep, task: Task, *rest: object) -> Any:
        started.append(task.id)
        for key in (key for key in task.keys if key != fails):
            store.run(sweep.graph.stages[key].folder, key, lambda work: None)
        error = ValueError("killed") if fails in task.keys else None
        done = iter([False, True]).__next__
        return SimpleNamespace(done=done, exception=lambda: error, state="FAILED", paths=SimpleNamespace(stderr="log"))

    monkeypatch.setattr(local, "_start", start)
    monkeypatch.setattr(local, "_POLL", 0)
    local.run(sweep, store, Settings(fold=fold, max_parallel=1), 1, 10)
    assert started == made
    failures = {key: records.failure(stage.folder, key) for key, stage in sweep.graph.stages.items()}
    assert [key for key, one in failures.items() if one is not None] == [fails]
    said = "of x=0: its process ended without a result, as one that was killed does; the same command goes on"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parallel", "cpus", "gpus", "found"),
    [(None, None, 0, (3, 2)), (None, None, 2, (2, 3)), (8, None, 2, (8, 1)), (2, 4, 0, (2, 4))],
)
def test_jobs_of_a_machine_share_its_cores(
    parallel: int | None, cpus: int | None, gpus: int, found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert local._slots(parallel, cpus) == found


def test_a_single_cell_that_was_refused_is_told_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outcome, "DONE", [])
    monkeypatch.setattr(outcome, "FAILED", ["calib=corpus: sparsity.ratio=2: give a ratio below 1"])
    outcome.finish()
    assert "1 of 1 cells failed:\n  calib=corpus: sparsity.ratio=2: give a ratio below 1" in capsys.readouterr().err
