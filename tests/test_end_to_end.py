"""The chain as a user runs it: python run.py on the model that ships."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssgr import tables
from ssgr.report.__main__ import main
from tests.conftest import ROOT, SMALL, Run

SCHEMA = {
    "config": set(), "keys": set(), "versions": set(), "stages": set(),
    "calibration": {"source", "rows", "tokens", "held_out", "funnel"},
    "prune": {"pruner", "allocation", "propagate", "sparsity_target", "sparsity_realised", "sparsity_model",
              "sparsity_with_embeddings", "unseen", "seconds", "peak_host_mib", "layers", "checkpoint"},
    "scores": {"held_out"},
}  # fmt: skip
SCORE = {"bench", "problems", "attempts", "accuracy", "ci95", "pass_at_k", "maj_at_k", "mean_tokens", "truncated", "looping",
         "no_answer", "grader_failed", "seconds", "by_level"}  # fmt: skip


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_one_run_and_again(run: Run, tmp_path: Path) -> None:
    """The whole chain once; the second time everything comes from the store."""
    first = run("calib=self", alone=True)
    assert first.returncode == 0, first.stderr
    assert "dense" in first.stdout and "difference to dense" in first.stdout
    one = result(tmp_path / "run")
    assert set(one) == set(SCHEMA)
    for name, fields in SCHEMA.items():
        assert fields <= set(one[name])
    found = one["scores"]["held_out"]
    assert set(found) == {"dense", "pruned", "difference", "ci95"}
    assert set(found["dense"]) >= SCORE and set(found["pruned"]) >= SCORE
    assert all(set(s) == {"seconds", "cached", "peak_rss_mib"} for s in one["stages"].values())
    assert one["calibration"]["tokens"]["realised"] == one["calibration"]["tokens"]["asked"] == 400
    assert one["prune"]["sparsity_realised"] == pytest.approx(0.5, abs=0.005)
    assert found["dense"]["accuracy"] > 0.7, "the shipped model solves one to three operations"

    checkpoint = tmp_path / "run" / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template
    weight = model.model.layers[0].mlp.down_proj.weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    rows, held_out = tables.read_rows(tmp_path / "run" / "calibration.parquet")
    assert sum(map(len, rows)) == 400 and all("#" in row.id for row in rows)
    assert not {row.id for row in rows} & {row.id for row in held_out}
    told = json.loads((checkpoint / "ssgr.json").read_text())
    assert told["keys"] == {name: one["keys"][name] for name in ("select", "prune")} and told["calibration"][
        "rows"
    ] == len(rows)
    assert (checkpoint / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    assert "sparsity_config" not in json.loads((checkpoint / "config.json").read_text())
    assert any((tmp_path / "run").glob("*.log"))

    second = run("calib=self")
    assert second.returncode == 0, second.stderr
    two = result(tmp_path / "run")
    assert all(stage["cached"] for stage in two["stages"].values())
    assert two["scores"] == one["scores"] and two["keys"] == one["keys"]
    assert "10 stages read from the store, 0 made" in second.stdout + second.stderr


def test_a_dense_grid_collects_once(run: Run, tmp_path: Path) -> None:
    """Pruners, sparsities, mixtures and allocations of one calibration read the same statistics."""
    axes = ("pruner=wanda,sparsegpt", "scope=both,response", "allocation=owl,uniform")
    text = ("bench=perplexity", "bench.text=prose", "bench.window=64", "bench.windows=8")
    small = [setting for setting in SMALL if not setting.startswith("bench.")]
    done = run("-m", "calib=self", "propagate=dense", "bins=difficulty_length", *text, *axes, *small, small=False)
    assert done.returncode == 0, done.stderr
    cells = [result(tmp_path / "sweep" / str(i)) for i in range(8)]
    assert len({cell["keys"]["collect"] for cell in cells}) == 1
    assert len({cell["keys"]["prune"] for cell in cells}) == 8
    assert sum(not cell["stages"]["collect"]["cached"] for cell in cells) == 1
    for cell in cells:
        assert cell["prune"]["sparsity_realised"] == pytest.approx(0.5, abs=1e-4)
        assert (len({layer["target"] for layer in cell["prune"]["layers"]}) > 1) == (
            cell["prune"]["allocation"] == "owl"
        )
        assert all(layer["error_held_out"] is not None for layer in cell["prune"]["layers"])


@pytest.mark.slow
def test_owl_collects_norms_beside_the_pruned_propagation(run: Run, tmp_path: Path) -> None:
    done = run("calib=corpus", "allocation=owl", "bench=smoke")
    assert done.returncode == 0, done.stderr
    keys = result(tmp_path / "run")["keys"]
    assert (
        json.loads((tmp_path / "store" / "collect" / keys["collect"] / "manifest.json").read_text())["config"][
            "statistic"
        ]
        == "norm"
    )


def test_a_sweep_shares_every_common_stage(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run("-m", "calib=corpus,ssgr,matched", "pruner=magnitude,wanda", "difficulty=any", "length=medium")
    assert done.returncode == 0, done.stderr
    cells = [result(tmp_path / "sweep" / str(i)) for i in range(6)]
    store = tmp_path / "store"
    made = {
        stage: len(list((store / stage).glob("*/manifest.json"))) for stage in ("sample", "grade", "select", "prune")
    }
    # one pool of traces, one dense and four pruned evaluations: magnitude does not depend on the calibration
    assert made == {"sample": 1 + 1 + 4, "grade": 1 + 1 + 4, "select": 3, "prune": 1 + 3}
    by = {(c["calibration"]["source"], c["prune"]["pruner"]): c for c in cells}
    assert by["corpus", "magnitude"]["keys"]["prune"] == by["ssgr", "magnitude"]["keys"]["prune"]
    matched, ssgr = by["matched", "wanda"]["calibration"], by["ssgr", "wanda"]["calibration"]
    assert matched["rows"] == ssgr["rows"] and matched["tokens"]["realised"] == ssgr["tokens"]["realised"]
    assert done.stdout.count("corpus") >= 2
    assert "length=medium has no effect on calib=corpus" in done.stdout + done.stderr
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "calib=corpus,ssgr,matched pruner=magnitude,wanda" in page and "tiny on held_out" in page

    def report(*arguments: str, status: int = 0) -> str:
        assert main([str(tmp_path / "sweep"), *arguments]) == status
        return "".join(capsys.readouterr())

    for form, mark in (("text", "│"), ("markdown", "| --- |"), ("csv", "calib,")):
        told = report("--format", form)
        assert mark in told and "matched" in told
        assert len([line for line in told.splitlines() if "wanda" in line]) == 3
    by_pruner = ("--format", "csv", "--by", "calib,pruner", "--against")
    gaps = {
        (row["calib"], row["pruner"]): row for row in csv.DictReader(io.StringIO(report(*by_pruner, "calib=matched")))
    }
    assert gaps["matched", "wanda"]["minus calib=matched"] == ""
    assert gaps["corpus", "magnitude"]["minus calib=matched"].startswith("+0.000")  # the same checkpoint
    parted = (
        by["corpus", "wanda"]["scores"]["held_out"]["pruned"]["accuracy"]
        - by["matched", "wanda"]["scores"]["held_out"]["pruned"]["accuracy"]
    )
    assert gaps["corpus", "wanda"]["minus calib=matched"].startswith(f"{parted:+.3f}")
    for wrong, answer in (("calib=self", "calib here is corpus, matched, ssgr"), ("kalib=self", "no such field")):
        assert answer in report(*by_pruner, wrong, status=1)


@pytest.mark.slow
def test_the_command_line_beats_what_a_source_implies(run: Run, tmp_path: Path) -> None:
    done = run("-m", "calib=ssgr", "length=short,long", "difficulty=any", "bench=smoke", "budget.tokens=200")
    assert done.returncode == 0, done.stderr
    funnels = [result(tmp_path / "sweep" / str(i))["calibration"]["funnel"] for i in range(2)]
    assert [f[5][0] for f in funnels] == ["length short", "length long"]


@pytest.mark.slow  # in CI the jobs of tests/test_slurm.py are killed in the same ways
def test_a_killed_run_continues(run: Run, tmp_path: Path) -> None:
    """SIGKILL in the middle of sampling; the next run takes over the lease and samples only the rest."""
    places = [f"store.path={tmp_path / 'store'}", f"hydra.run.dir={tmp_path / 'run'}"]
    small = [*SMALL, "sampler.engine.batch_size=8", "problems.calibration=200", "calib=self"]
    command = [sys.executable, str(ROOT / "run.py"), *places, *small]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = tmp_path / "store" / "sample"
    deadline = time.monotonic() + 120
    parts: list[Path] = []
    while len(parts) < 3 and time.monotonic() < deadline and process.poll() is None:
        parts = list(work.glob("*.work/parts/*.parquet"))
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    parts = list(work.glob("*.work/parts/*.parquet"))
    assert len(parts) >= 3
    assert not list((tmp_path / "store" / "select").glob("*/manifest.json"))
    done = run("sampler.engine.batch_size=8", "problems.calibration=200", "calib=self")
    assert done.returncode == 0, done.stderr
    assert not list(work.glob("*.work")) and not list(work.glob("*.lease"))
    clean = run("calib=self", "problems.calibration=200", "sampler.engine.batch_size=8", f"store.path={tmp_path / 'other'}",
                f"hydra.run.dir={tmp_path / 'run2'}")  # fmt: skip
    assert clean.returncode == 0, clean.stderr
    accuracies = [result(tmp_path / r)["scores"]["held_out"]["pruned"]["accuracy"] for r in ("run", "run2")]
    assert accuracies[0] == accuracies[1]
    a, b = (pq.read_table(tmp_path / r / "calibration.parquet") for r in ("run", "run2"))
    assert a.equals(b)


@pytest.mark.slow
def test_a_damaged_artefact_is_made_again(run: Run, tmp_path: Path) -> None:
    assert run("bench=smoke", "calib=corpus").returncode == 0
    weights = next((tmp_path / "store" / "prune").glob("*/checkpoint/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    again = run("bench=smoke", "calib=corpus")
    assert again.returncode == 0
    assert "model.safetensors" in again.stdout + again.stderr
    stages = result(tmp_path / "run")["stages"]
    assert not stages["prune"]["cached"] and stages["select"]["cached"]


@pytest.mark.slow
def test_jobs_share_the_sampling(run: Run, tmp_path: Path) -> None:
    """Parts sampled by several jobs are what one job samples, and the whole run samples only what no part has."""
    for part in ("1/3", "3/3"):
        done = run("calib=self", f"shard={part}")
        assert done.returncode == 0 and "traces are in" in done.stderr + done.stdout, done.stderr
        assert not (tmp_path / "run" / "result.json").exists() and (tmp_path / "run" / "shard.json").exists()
    whole = run("calib=self")
    assert whole.returncode == 0, whole.stderr
    told = whole.stderr + whole.stdout
    assert "sample: 84 traces of other runs are taken" in told  # 21 of 32 problems, 4 attempts each
    assert "sample_dense.held_out: 11 traces of other runs are taken" in told
    shared = result(tmp_path / "run")
    alone = run("calib=self", f"store.path={tmp_path / 'other'}", f"hydra.run.dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    assert result(tmp_path / "alone")["keys"] == shared["keys"]
    assert [
        score["accuracy"] for score in (result(tmp_path / r)["scores"]["held_out"]["dense"] for r in ("run", "alone"))
    ] == [shared["scores"]["held_out"]["dense"]["accuracy"]] * 2
    assert "give the number of a part" in run("shard=4/3").stdout


def test_what_is_stopped_by_its_user_says_how_to_go_on(tmp_path: Path) -> None:
    places = [f"store.path={tmp_path / 'store'}", f"hydra.run.dir={tmp_path / 'run'}"]
    command = [sys.executable, str(ROOT / "run.py"), *places, "device=cpu", "problems.calibration=400"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while not any((tmp_path / "store" / "sample").glob("*.work")) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
    assert process.returncode == 130 and "the same command goes on where this one was" in told, told
    assert "Traceback" not in told
