"""Results in the log format of lm-evaluation-harness, read by that library's own functions."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ssgr import export, tables
from ssgr.__main__ import main
from ssgr.records import Outcome, Text, Verdict
from ssgr.report.cells import find
from tests.conftest import ROOT, Run
from tests.sweeps import cell, sweep


def test_a_suite_is_exported_as_the_library_writes_it(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    done = run("bench=suite/smoke", "calib=prompts", "pruner=wanda", "budget.tokens=400", "device=cpu", small=False)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "logs"
    assert main(["export", str(tmp_path / "run"), "--format", "lm_eval", "--out", str(out)]) == 0
    assert "2 models written" in capsys.readouterr().out
    scores = json.loads((tmp_path / "run" / "result.json").read_text())["scores"]
    for which, pattern in (("dense", "tiny"), ("pruned", "tiny-wanda-50-prompts-any-any-both-0-*")):
        (folder,) = out.glob(pattern)
        names = [str(file) for file in folder.iterdir()]
        (results,) = utils.get_results_filenames(names)
        samples = {utils.get_file_task_name(Path(n).name): n for n in utils.get_sample_results_filenames(names)}
        assert set(samples) == set(scores)
        stamp = {utils.get_file_datetime(name) for name in samples.values()}
        assert len(stamp) == 1 and Path(results).name == f"results_{stamp.pop()}.json"
        found = json.loads(Path(results).read_text())
        shown = utils.make_table(found)
        assert (
            f"|{scores['smoke'][which]['accuracy']:.4g}" in shown and "exact_match" in shown and "perplexity" in shown
        )
        assert {name: c["output_type"] for name, c in found["configs"].items()} == {
            "smoke": "generate_until", "perplexity": "loglikelihood", "perplexity_traces": "loglikelihood",
        }  # fmt: skip
        windows = [
            json.loads(line)["perplexity"] for line in Path(samples["perplexity"]).read_text().split("\n") if line
        ]
        assert min(windows) < scores["perplexity"][which]["value"] < max(windows) and len(windows) == 16
        assert found["higher_is_better"]["perplexity"] == {"perplexity": False}
        rows = [json.loads(line) for line in Path(samples["smoke"]).read_text().split("\n") if line]
        assert len(rows) == 16 == found["n-samples"]["smoke"]["effective"]
        right = [row["exact_match"] for row in rows]
        for bench, each, scale in (
            ("smoke", right, 1),
            ("perplexity", np.log(windows), scores["perplexity"][which]["value"]),
        ):
            (error,) = (x for name, x in found["results"][bench].items() if "stderr" in name)
            assert error == pytest.approx(np.std(each, ddof=1) / 16**0.5 * scale)
        assert sum(right) / 16 == pytest.approx(scores["smoke"][which]["accuracy"])
        for row in rows:
            assert row["doc"]["question"] in row["arguments"]["gen_args_0"]["arg_0"]
            assert len(row["resps"][0]) == len(row["filtered_resps"]) == 1
            assert "</think>" in row["resps"][0][0] or not row["exact_match"]
            assert (row["filtered_resps"][0] == row["target"]) == bool(row["exact_match"])


def test_several_attempts_are_one_row_in_their_order(tmp_path: Path) -> None:
    cell(tmp_path / "run", model="org/m", pattern="2:4", problems=2)
    verdicts = [[Verdict.RIGHT, Verdict.GRADER_FAILED], [Verdict.RIGHT, Verdict.RIGHT]]
    tried = [(i, k) for i in (1, 0) for k in (1, 0)]
    for kind, write, content in (
        (
            "outcomes",
            tables.write_outcomes,
            [Outcome(f"p{i}", k, 1, verdicts[i][k], None, 9, "stop", False) for i, k in tried],
        ),
        ("texts", tables.write_texts, [Text(f"p{i}", k, f"q{i}", "7", f"ask q{i}", f"said {i} {k}") for i, k in tried]),
    ):
        write(tables.outcomes_file(tmp_path / "run", "held_out", "pruned", kind), content)  # type: ignore[operator]
    file = tmp_path / "run" / "result.json"
    result = json.loads(file.read_text())
    result["config"]["bench"] |= {"decoding": {"attempts": 2, "temperature": 0.0, "max_new_tokens": 64}, "fewshot": 5}
    file.write_text(json.dumps(result))
    written = export.export(find([file]), tmp_path / "logs")
    dense, pruned = (path.parent.name for path in written)
    assert dense == "org__m" and pruned.startswith("org__m-sparsegpt-2of4-ssgr-")
    (samples,) = written[1].parent.glob("samples_*")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["resps"] for row in rows] == [[["said 0 0", "said 0 1"]], [["said 1 0", "said 1 1"]]]
    assert [row["exact_match"] for row in rows] == [0.5, 1.0] and rows[0]["filtered_resps"] == ["", ""]
    assert rows[0]["doc"] == {"id": "p0", "question": "q0", "answer": "7", "level": 1} and rows[0]["target"] == "7"
    config = json.loads(written[1].read_text())["configs"]["held_out"]
    assert (config["repeats"], config["num_fewshot"]) == (2, 5)
    assert config["generation_kwargs"] == rows[0]["arguments"]["gen_args_0"]["arg_1"]
    assert config["generation_kwargs"]["do_sample"] is False and config["generation_kwargs"]["max_gen_toks"] == 64


@pytest.mark.filterwarnings("ignore")  # of the library and of what it imports
def test_a_row_has_the_fields_of_the_library(sums: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from tests.conftest import TINY

    model = HFLM(pretrained=TINY.load(), tokenizer=TINY.tokenizer(), batch_size=4)
    own = TaskManager(include_path=str(sums), include_defaults=False)  # the library's index takes seconds to read
    want = lm_eval.simple_evaluate(model, tasks=["sums"], task_manager=own, log_samples=True, bootstrap_iters=0)
    (theirs, *_) = want["samples"]["sums"]
    ours = export.row(0, {"id": "a"}, "4", "2+2=", ["4"], ["4"], "acc", 1.0)
    assert set(ours) == set(theirs)
    kinds = {
        name: type(value)
        for name, value in theirs.items()
        if name not in ("target", "acc", "arguments", "filtered_resps")
    }
    assert {name: type(ours[name]) for name in kinds} == kinds


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cells = find([sweep(tmp_path / "sweep", [{}])])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"--out .* cannot be written .No space left on device"):
        export.export(cells, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_store_that_is_gone_is_named(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench=smoke", "calib=prompts", "pruner=magnitude", "device=cpu", small=False).returncode == 0
    for link in (tmp_path / "run" / "texts").iterdir():
        assert len(tables.read_texts(link)) == 16
        link.unlink()
    assert main(["export", str(tmp_path / "run"), "--format", "lm_eval", "--out", str(tmp_path / "logs")]) == 1
    assert "smoke_dense.parquet is not there" in capsys.readouterr().err


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and "ssgr export" in capsys.readouterr().out
    assert main(["exprot"]) == 2 and "no command 'exprot'" in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "ssgr", "report", "nowhere"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1 and "no result.json" in done.stderr


def test_a_reader_that_stops_is_no_error() -> None:
    there, pipe = os.pipe()
    os.close(there)
    done = subprocess.run(
        [sys.executable, "-m", "ssgr", "--help"], stdout=pipe, stderr=subprocess.PIPE, cwd=ROOT, check=False
    )
    os.close(pipe)
    assert (done.returncode, done.stderr) == (1, b"")
