"""ssgr.tracker: what W&B and TensorBoard are told is what result.json says; a cell is one run; nothing of it fails a run."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from ssgr import assemble, pipeline, sweep, tables, tracker
from ssgr.records import RunResult, to_json
from ssgr.report import cells, table
from ssgr.report.cells import find
from ssgr.store import Store
from ssgr.tracker import content
from ssgr.tracker.tensorboard import TensorBoard
from ssgr.tracker.wandb import Wandb
from tests import wandb_files
from tests.conftest import ROOT, SMALL
from tests.started import Started
from tests.test_configs import build
from tests.wandb_server import Server, serve

pytestmark = pytest.mark.xdist_group("tracker")  # its sweep is made once
API_KEY = "0123456789abcdef" * 2 + "01234567"  # made up


def command(
    started: Started, place: Path, name: str, *overrides: str, calib: str = "self,corpus", **environment: str
) -> subprocess.CompletedProcess[str]:
    """A sweep of `calib` in `place`/`name`, with the store of `place`."""
    places = (f"store.path={place / 'store'}", f"hydra.sweep.dir={place / name}")
    own = {"WANDB_API_KEY": API_KEY, "HOME": str(place / "home"), **environment}
    return started.run(["-m", f"calib={calib}", *overrides, *SMALL, *places], place, **own)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, started: Started) -> Path:
    """A sweep that was tracked offline, in `one`; and again through another launcher, in `two`."""
    place = tmp_path_factory.mktemp("tracked")
    for name, launcher in (("one", "basic"), ("two", "local")):
        done = command(started, place, name, f"hydra/launcher={launcher}", "tracker=wandb")
        assert done.returncode == 0, done.stderr
        told = done.stdout + done.stderr
        assert "difference to dense" in done.stdout and "not tracked" not in told
        assert "\nwandb:" not in told, "the library is silent"
    return place


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server that plays W&B, for this process and those that it starts."""
    with serve() as state:
        monkeypatch.setenv("WANDB_BASE_URL", state.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        yield state


def results(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The two cells of a sweep."""
    return [(folder / str(i), json.loads((folder / str(i) / "result.json").read_text())) for i in range(2)]


def cell(place: Path, number: int, sweep: Path, **settings: Any) -> tracker.Cell:
    """A cell of `place`/one, as it is handed to a tracker with these settings."""
    folder, found = results(place / "one")[number]
    found["config"]["tracker"] = {"_target_": "ssgr.tracker.wandb.Wandb", "name": "wandb", **settings}
    return tracker.Cell(RunResult(**found), folder, sweep, sweep / "store", ("calib=self", "device=cpu"))


def layer_points(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (i, one["sparsity"], one["error"], one["error_held_out"]) for i, one in enumerate(result["prune"]["layers"])
    ]


def points(history: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(p["layer"], p["layer/sparsity"], p.get("layer/error"), p.get("layer/error_held_out")) for p in history]


def test_offline_runs_are_what_result_json_says(place: Path) -> None:
    runs = wandb_files.runs(place / "one")
    assert len(runs) == 3, "two cells, and one dense model that they share"
    for folder, result in results(place / "one"):
        run = runs[content.run_id(result)]
        assert run.ended and (run.group, run.job_type, run.project) == ("one", "prune", "ssgr")
        assert f"calib={result['config']['calib']['name']}" in run.tags and not [
            t for t in run.tags if "store.path" in t
        ]
        own = {"keys": result["keys"], "versions": result["versions"]}
        assert {k: v for k, v in run.config.items() if k != "cell"} == {**result["config"], **own}
        assert run.config["cell"]["pruner"] == result["prune"]["pruner"]
        found = result["scores"]["held_out"]
        for which in ("dense", "pruned"):
            said = [run.summary[f"scores/held_out/{which}/{name}"] for name in ("accuracy", "ci95_low", "ci95_high")]
            assert said == [found[which]["accuracy"], *found[which]["ci95"]]
        gap = [run.summary[f"scores/held_out/{name}"] for name in ("difference", "ci95_low", "ci95_high")]
        assert gap == [found["difference"], *found["ci95"]]
        for name, stage in result["stages"].items():
            assert run.summary[f"stages/{name}/seconds"] == stage["seconds"]
            assert run.summary[f"stages/{name}/peak_rss_mib"] == stage["peak_rss_mib"]
            assert bool(run.summary[f"stages/{name}/cached"]) == stage["cached"]
        assert points(run.history) == layer_points(result)
        assert run.table("funnel")[1] == result["calibration"]["funnel"]
        columns, rows = run.table("layers")
        assert [row[columns.index("name")] for row in rows] == [one["name"] for one in result["prune"]["layers"]]
        assert [row[columns.index("error")] for row in rows] == [one["error"] for one in result["prune"]["layers"]]
        texts = {
            t.problem_id: t for t in tables.read_texts(tables.outcomes_file(folder, "held_out", "pruned", "texts"))
        }
        outcomes = {o.problem_id: o for o in tables.read_outcomes(tables.outcomes_file(folder, "held_out", "pruned"))}
        columns, rows = run.table("samples")
        assert len(rows) == 16
        for row in rows:
            told = dict(zip(columns, row, strict=True))
            text, outcome = texts[told["problem_id"]], outcomes[told["problem_id"]]
            assert (told["question"], told["gold"], told["pruned response"]) == (
                text.question,
                text.gold,
                text.response,
            )
            assert (told["pruned verdict"], told["pruned tokens"]) == (outcome.verdict, outcome.tokens)


def test_artifacts_are_references_with_their_lineage(place: Path) -> None:
    for folder, result in results(place / "one"):
        run = wandb_files.runs(place / "one")[content.run_id(result)]
        made = {one.type: one for one in run.artifacts}
        used, checkpoint = made["calibration"], made["checkpoint"]
        assert used.name == f"calibration-{result['keys']['select']}" and used.use_after_commit
        assert checkpoint.name == f"checkpoint-{result['keys']['prune']}" and not checkpoint.use_after_commit
        assert [item.ref for item in used.manifest.contents] == [(folder / "calibration.parquet").resolve().as_uri()]
        there = {file.as_uri() for file in (folder / "checkpoint").resolve().rglob("*") if file.is_file()}
        assert {item.ref for item in checkpoint.manifest.contents} == there
        assert not [item for item in [*used.manifest.contents, *checkpoint.manifest.contents] if item.local_path]


def test_the_dense_model_is_one_run(place: Path) -> None:
    (_, first), (_, second) = results(place / "one")
    assert content.dense_id(first) == content.dense_id(second)
    run = wandb_files.runs(place / "one")[content.dense_id(first)]
    assert (run.job_type, run.tags) == ("evaluate", ["dense"]) and not run.history
    assert run.summary["scores/held_out/dense/accuracy"] == first["scores"]["held_out"]["dense"]["accuracy"]
    assert not [name for name in run.summary if "pruned" in name or name.startswith(("prune/", "calibration/"))]
    assert "pruned response" not in run.table("samples")[0]


def test_a_cell_that_is_run_again_is_the_same_run(place: Path) -> None:
    """Another folder and another launcher: the same ids and the same summary, and no point of history twice."""
    first, second = wandb_files.runs(place / "one"), wandb_files.runs(place / "two")
    assert first.keys() == second.keys()
    for id_, run in first.items():
        again = second[id_]
        steps = [point["_step"] for point in run.history + again.history]
        assert len(steps) == len(set(steps))
        gone = {"_timestamp", "_runtime", "_step", "_wandb/runtime"}
        both = [
            {
                n: v
                for n, v in one.summary.items()
                if n not in gone and not n.startswith("tables/") and not n.endswith("/cached")
            }
            for one in (run, again)
        ]
        assert both[0] == both[1]
        for name in ("samples", "layers", "stages", "funnel"):
            if f"tables/{name}" in run.summary:
                assert run.table(name) == again.table(name)


def test_assembling_again_tracks_nothing_again(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = sorted(file.stat().st_mtime_ns for file in (place / "two" / "wandb").rglob("*"))
    found = sweep.read(place / "two")
    assert found is not None
    assert [one is not None for _, one in assemble.cells(found, Store(Path(found.store)))] == [True, True]
    assert sorted(file.stat().st_mtime_ns for file in (place / "two" / "wandb").rglob("*")) == before
    assert not caplog.records


def test_what_a_killed_tracker_left_is_replaced(place: Path, tmp_path: Path) -> None:
    """A kill between the two runs: the one that is whole stays, the other is made from its beginning."""
    shutil.copytree(place / "one" / "wandb", tmp_path / "wandb", symlinks=True)
    one = cell(place, 0, tmp_path)
    id_ = content.run_id(results(place / "one")[0][1])
    (partial,) = (tmp_path / "wandb").glob(f"offline-run-*-{id_}")
    (file,) = partial.glob("*.wandb")
    file.write_bytes(file.read_bytes()[:5000])
    (tmp_path / "wandb" / "tracked" / f"{id_}.json").unlink()
    tracker.track(dataclasses.replace(one, overrides=()))
    runs = wandb_files.runs(tmp_path)
    assert runs[id_].ended and points(runs[id_].history) == layer_points(results(place / "one")[0][1])
    assert not partial.exists() and len(runs) == 3


def test_two_that_track_at_once_make_a_run_once(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor(2) as both:
        list(both.map(tracker.track, [cell(place, 0, tmp_path)] * 2))
    assert [one.ended for one in wandb_files.runs(tmp_path).values()] == [True, True], "a cell and its dense model"
    assert not [said for said in caplog.messages if "not tracked" in said]


def test_sync_sends_what_online_runs_send(place: Path, server: Server, tmp_path: Path) -> None:
    """`wandb sync` of both sweeps, one after the other, and the same cell tracked online, twice."""
    wandb = Path(sys.executable).with_name("wandb")
    for name in ("one", "two"):
        shutil.copytree(place / name / "wandb", tmp_path / name / "wandb", symlinks=True)
        folders = [str(one) for one in sorted((tmp_path / name / "wandb").glob("offline-run-*"))]
        done = subprocess.run(
            [wandb, "sync", *folders], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    result = results(place / "one")[0][1]
    id_ = content.run_id(result)
    synced, used = server.runs.pop(id_), {one["input"]["artifactID"] for one in server.used}
    names = {
        one["artifactCollectionName"]
        for one in server.artifacts
        if one["artifactTypeName"] in ("calibration", "checkpoint")
    }
    assert points(synced.history) == layer_points(result), "42 points, although two files were sent"
    assert {f"calibration-{result['keys']['select']}"} <= used
    assert {f"calibration-{result['keys']['select']}", f"checkpoint-{result['keys']['prune']}"} <= names
    for again in ("a", "b"):
        tracker.track(
            dataclasses.replace(cell(place, 0, tmp_path / again, mode="online", timeout=60), store=tmp_path / again)
        )
    online = server.runs[id_]
    assert online.config["keys"] == synced.config["keys"] and online.config["cell"] == synced.config["cell"]
    assert points(online.history) == points(synced.history)

    def numbers(run: Any) -> dict[str, Any]:
        return {n: v for n, v in run.summary.items() if n.startswith(("scores/", "prune/", "calibration/", "stages/"))
                and not n.endswith("/cached")}  # fmt: skip

    assert numbers(online) == numbers(synced) and len(numbers(online)) > 50
    report_is_of_these_runs(place, server)


def report_is_of_these_runs(place: Path, server: Server) -> None:
    """The request of the report: its runs are on the server, and so is every number and setting that its panels show."""
    arguments = [sys.executable, "-m", "ssgr.report", str(place / "one"), "--wandb"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["type"]) == ("me", "ssgr", "runs")
    assert "/me/ssgr/reports/" in done.stdout
    blocks = json.loads(view["spec"])["blocks"]
    text = " ".join(child.get("text", "") for one in blocks for child in one.get("children", ()))
    for told in (
        "Budget of calibration: 400 tokens",
        "Draws of the calibration set: 0 (1)",
        "Seeds of sampling: 0",
        "held_out",
    ):
        assert told in text
    (shown,) = [one["content"] for one in blocks if one["type"] == "markdown-block"]
    assert table.markdown(table.rows(find([place / "one"]))) == shown
    grids = [one["metadata"] for one in blocks if one["type"] == "panel-grid"]
    for runs in (one for grid in grids for one in grid["runSets"]):
        (only,) = runs["filters"]["filters"]
        assert only["key"]["name"] == "name" and set(only["value"]) <= server.runs.keys()
    panels = [one["config"] for grid in grids for one in grid["panelBankSectionConfig"]["panels"]]
    result = results(place / "one")[0][1]
    run = server.runs[content.run_id(result)]
    grouped = {one["groupBy"] for one in panels if "groupBy" in one}
    assert grouped == {f"cell.value.{name}" for name in ("calib", "difficulty", "length", "pruner")}
    assert {one.removeprefix("cell.value.") for one in grouped} <= run.config["cell"].keys()
    metrics = {name for one in panels for name in one.get("metrics", ())}
    metrics |= {
        one[axis].removeprefix("summary:")
        for one in panels
        for axis in ("xAxis", "yAxis")
        if "summary:" in one.get(axis, "")
    }
    assert "prune/sparsity_realised" in metrics
    assert metrics <= run.summary.keys() | run.history[0].keys()


@pytest.mark.parametrize("how", ["nobody", "refused"])
def test_a_report_that_cannot_be_sent_is_a_sentence(how: str, place: Path, tmp_path: Path, server: Server) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    if how == "refused":
        server.refuses = True
        environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}
    arguments = [sys.executable, "-m", "ssgr.report", str(place / "one"), "--wandb", "--entity", "me"]
    done = subprocess.run(
        arguments, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False, env=environment
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and API_KEY not in done.stderr
    assert ("type wandb login" if how == "nobody" else "W&B did not take the report") in done.stderr


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_a_run_whose_tracker_cannot_reach_anybody_is_whole(place: Path, started: Started) -> None:
    """mode=online and a server that refuses: one warning, and the table and the result are there."""
    url = f"http://127.0.0.1:{closed_port()}"
    options = ("tracker=wandb", "tracker.mode=online", "tracker.timeout=4")
    done = command(started, place, "online", *options, calib="self", WANDB_BASE_URL=url)
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    assert "difference to dense" in done.stdout and "Traceback" not in told and API_KEY not in told
    assert told.count("was not tracked") == 1
    result = json.loads((place / "online" / "0" / "result.json").read_text())
    same = results(place / "one")[0][1]
    assert (result["scores"], result["keys"]) == (same["scores"], same["keys"])


@pytest.mark.parametrize("how", ["broken library", "unwritable", "not installed", "silent server"])
def test_a_tracker_that_fails_is_one_warning(
    how: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracker, "_GIVEN_UP", set())
    settings: dict[str, Any] = {}
    with socket.socket() as silent:
        if how == "broken library":
            (tmp_path / "broken" / "wandb").mkdir(parents=True)
            (tmp_path / "broken" / "wandb" / "__init__.py").write_text(
                f"raise RuntimeError('quota of {API_KEY}\\nis used up')"
            )
            monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
            monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        elif how == "not installed":
            monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
            settings = {"_target_": "ssgr.tracker.tensorboard.TensorBoard"}
        elif how == "unwritable":
            (tmp_path / "wandb").write_text("a file where the folder should be")
        else:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
            monkeypatch.setenv("WANDB_API_KEY", API_KEY)
            settings = {"mode": "online", "timeout": 3}
        one = cell(place, 0, tmp_path, **settings)
        before = (one.folder / "result.json").read_bytes()
        with caplog.at_level(logging.WARNING):
            tracker.track(one)
    (said,) = caplog.messages
    assert said.startswith("tracker=wandb: the result in") and "\n" not in said and API_KEY not in said
    wanted = {
        "broken library": "RuntimeError: quota of ***",
        "unwritable": "wandb",
        "silent server": "longer than 3 seconds",
        "not installed": "pip install -e '.[tensorboard]'",
    }
    assert wanted[how] in said
    assert (one.folder / "result.json").read_bytes() == before
    assert not [p for p in psutil.Process().children(recursive=True) if "wandb" in " ".join(p.cmdline())]
    tracker.track(one)
    assert len(caplog.messages) == (1 if how == "silent server" else 2), "what hung once is not waited for again"


def test_no_key_is_in_any_file(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two", "online", "store"):
        for file in (f for f in (place / name).rglob("*") if f.is_file() and (place / name).exists()):
            assert API_KEY.encode() not in file.read_bytes(), file
    secret = "a-made-up-password"
    monkeypatch.setenv("SITE_TOKEN", secret)
    one = cell(place, 0, tmp_path)
    one = dataclasses.replace(one, folder=copied(one.folder, tmp_path / "cell"), overrides=(f"problems.note={secret}",))
    one.result.config["problems"] |= {"path": f"https://me:word@host/{secret}", "note": f"my {secret}"}
    (one.folder / "result.json").write_text(json.dumps(to_json(one.result)))
    tracker.track(one)
    TensorBoard().track(one)
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.name != "result.json"]
    assert [file for file in files if file.suffix == ".wandb"] and [f for f in files if "tfevents" in f.name]
    for file in files:
        assert secret.encode() not in file.read_bytes() and b"me:word" not in file.read_bytes(), file
    (run,) = [one for one in wandb_files.runs(tmp_path).values() if one.job_type == "prune"]
    assert run.config["problems"]["path"] == "https://***@host/***" and run.tags == ["problems.note=***"]


def copied(folder: Path, to: Path) -> Path:
    """A cell's folder, to write in."""
    return Path(shutil.copytree(folder, to, symlinks=True))


def test_tensorboard_is_what_result_json_says_and_a_second_run_replaces_it(place: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = copied(place / "one" / "0", tmp_path / "cell")
    result = json.loads((folder / "result.json").read_text())
    result["config"]["tracker"] = {"_target_": "ssgr.tracker.tensorboard.TensorBoard", "name": "tensorboard"}
    for _ in range(2):
        tracker.track(tracker.Cell(RunResult(**result), folder, folder, tmp_path / "store", ()))
    assert len(list((folder / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    found = result["scores"]["held_out"]["pruned"]
    for name, value in (
        ("accuracy", found["accuracy"]),
        ("ci95_low", found["ci95"][0]),
        ("mean_tokens", found["mean_tokens"]),
    ):
        (event,) = events.Scalars(f"scores/held_out/pruned/{name}")
        assert event.value == pytest.approx(value)
    layers = result["prune"]["layers"]
    assert [(e.step, e.value) for e in events.Scalars("layer/error")] == [
        (i, pytest.approx(layer["error"])) for i, layer in enumerate(layers)
    ]
    downs = [layer["error"] for layer in layers if layer["name"].endswith("down_proj")]
    (histogram,) = events.Histograms("layers/error/down_proj")
    assert histogram.histogram_value.num == len(downs)
    assert histogram.histogram_value.sum == pytest.approx(sum(downs))
    tags = events.Tags()["tensors"]
    assert "config/text_summary" in tags and len([tag for tag in tags if tag.startswith("samples/held_out")]) == 16


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["tracker=wandb", "tracker.mode=onlin"], "tracker.mode=onlin: valid choices are offline, online, disabled"),
        (["tracker=wandb", "tracker.samples=-1"], "tracker.samples=-1"),
        (["tracker=wandb", "tracker.timeout=0"], "tracker.timeout=0"),
        (["tracker=wandb", "+tracker.colour=red"], "colour"),
        (["tracker=tensorboard", "tracker.sample_chars=0"], "tracker.sample_chars=0"),
        (["tracker=tensorboard", "tracker._target_=ssgr.tracker.nothing.Nothing"], "there is no such tracker"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(settings: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told.replace(".", r"\.")):
        build(*settings)


def test_a_tracker_is_in_no_key_and_tells_no_cells_apart(tmp_path: Path) -> None:
    plans = [
        [stage.key for stage in pipeline.plan(build(f"tracker={name}", "device=cpu"), Store(tmp_path))]
        for name in ("none", "wandb", "tensorboard")
    ]
    assert plans[0] == plans[1] == plans[2] and len(plans[0]) == 10
    settings = cells._settings({"tracker": {"name": "wandb", "mode": "online"}, "order": "layer"})
    assert settings == {"order": "layer"}


def test_disabled_and_none_write_nothing(place: Path, tmp_path: Path) -> None:
    tracker.track(cell(place, 0, tmp_path, mode="disabled"))
    assert tracker.build({"name": "none"}) is None and tracker.build(None) is None
    assert not list(tmp_path.iterdir())
    assert Wandb(mode="disabled").timeout > 0


def test_a_long_answer_is_cut_and_says_so() -> None:
    assert content.cut("a" * 10, 10) == "a" * 10
    short = content.cut("a" * 90 + "b" * 110, 100)
    assert short.startswith("a" * 50) and short.endswith("b" * 50) and "[... 100 characters ...]" in short
