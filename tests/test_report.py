"""Tables: which cells are told apart, which are means, and what they are compared with."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ssgr import tables
from ssgr.records import Outcome, Verdict
from ssgr.report import table
from ssgr.report.__main__ import main
from ssgr.report.cells import find, read
from tests.conftest import ROOT


def cell(
    folder: Path, right: list[bool], problems: str = "p", dense: list[bool] | None = None, **settings: Any
) -> None:
    """A result.json with its outcomes, as a run leaves them; `settings` by dotted name; the dense model is right unless told."""
    config: dict[str, Any] = {
        "model": {"name": "tiny"}, "calib": {"name": "ssgr", "_target_": "Own", "draw": 0, "verdict": "right"},
        "difficulty": {"name": "hard", "low": 0.5}, "length": {"name": "any"}, "scope": {"name": "both"},
        "select": {"balance": "none"}, "pruner": {"name": "sparsegpt", "damping": 0.01}, "sparsity": {"ratio": 0.5},
        "budget": {"tokens": 400, "rows": None}, "sampler": {"engine": {"batch_size": 4}, "decoding": {"seed": 0}},
        "bench": {"name": "held_out", "decoding": {"seed": 1}}, "problems": {"seed": 0}, "device": "cpu",
        "store": {"path": "s"},
    }  # fmt: skip
    for name, value in settings.items():
        *path, last = name.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    folder.mkdir(parents=True)
    accuracy = sum(right) / len(right)
    bench = config["bench"]["name"]
    score = {
        "metric": "accuracy",
        "attempts": 1,
        "accuracy": accuracy,
        "ci95": [0, 1],
        "mean_tokens": 9,
        "truncated": 0,
        "looping": 0,
        "seconds": 1,
    }
    told = json.dumps({k: v for k, v in config.items() if k not in ("device", "store")}, sort_keys=True)
    result = {
        "config": config,
        "keys": {"select": f"s{told}", f"evaluate_pruned.{bench}": f"p{told}", f"evaluate_dense.{bench}": f"d{config['bench']}"},
        "stages": {}, "calibration": {"tokens": {"asked": 400}},
        "prune": {"pruner": config["pruner"]["name"], "sparsity_realised": 0.5},
        "scores": {bench: {"dense": score, "pruned": score, "difference": 0, "ci95": [0, 0]}},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "outcomes").mkdir()
    for which, values in (("pruned", right), ("dense", dense or [True] * len(right))):
        tables.write_outcomes(
            tables.outcomes_file(folder, bench, which),
            [
                Outcome(f"{problems}{i}", 0, 1, Verdict.RIGHT if ok else Verdict.WRONG, "1", 9, "stop", False)
                for i, ok in enumerate(values)
            ],
        )


def test_a_cell_that_was_run_twice_counts_once(tmp_path: Path) -> None:
    for sweep in ("one", "two"):
        for draw in (0, 1):
            cell(tmp_path / sweep / str(draw), [True, draw == 0], calib__draw=draw, store__path=sweep)
    (row,) = table.means(find([tmp_path]), ["calib"])
    assert row["draws"] == "2" and row["deviation of draws"] == "0.354"


@pytest.mark.parametrize(
    ("name", "values"),
    [("pruner__damping", (0.01, 0.1)), ("problems__seed", (0, 1)), ("calib__verdict", ("right", "wrong")),
     ("difficulty__low", (0.5, 0.6))],
)  # fmt: skip
def test_any_setting_that_differs_is_a_column(name: str, values: tuple[Any, ...], tmp_path: Path) -> None:
    for i, value in enumerate(values):
        for draw in (0, 1):
            cell(tmp_path / f"{i}{draw}", [True, i == 0], calib__draw=draw, **{name: value})
    found = table.means(find([tmp_path]))
    column = name.replace("__", ".")
    assert [(row[column], row["draws"]) for row in found] == [(str(value), "2") for value in values]


def test_what_changes_no_result_or_follows_from_a_choice_is_no_column(tmp_path: Path) -> None:
    cell(tmp_path / "a", [True])
    cell(
        tmp_path / "b",
        [False],
        difficulty={"name": "easy", "low": 0.0},
        device="cuda",
        sampler__engine={"batch_size": 8},
    )
    assert set(find([tmp_path])[0].fields) == set(read(tmp_path / "a" / "result.json")[0].fields)


@pytest.mark.parametrize(
    ("group", "first", "other", "column"),
    [("bins", {"name": "none"}, {"name": "difficulty_length", "_target_": "ssgr.bins.Bins"}, "bins.name"),
     ("grader", {"_target_": "ssgr.grader.exact.Exact"}, {"_target_": "ssgr.grader.math.MathVerify"}, "grader._target_")],
)  # fmt: skip
def test_choices_of_a_group_without_a_column_of_its_own_are_told_apart(
    group: str, first: dict[str, str], other: dict[str, str], column: str, tmp_path: Path
) -> None:
    for i, choice in enumerate((first, other)):
        cell(tmp_path / str(i), [bool(i)], **{group: choice})
    own = column.rpartition(".")[2]
    assert {one.fields[column] for one in find([tmp_path])} == {first[own], other[own]}


def test_dense_rows_say_what_tells_them_apart(tmp_path: Path) -> None:
    for cap in (256, 512):
        cell(tmp_path / str(cap), [True], bench__decoding={"max_new_tokens": cap, "seed": 0})
        file = tmp_path / str(cap) / "result.json"
        result = json.loads(file.read_text())
        result["keys"]["evaluate_dense.held_out"] = f"dense at {cap}"
        file.write_text(json.dumps(result))
    dense = [row for row in table.rows(find([tmp_path])) if row["calib"] == "dense"]
    assert [row["bench.decoding.max_new_tokens"] for row in dense] == ["256", "512"]


def test_a_mark_says_that_the_grader_failed(tmp_path: Path) -> None:
    for draw in (0, 1):
        cell(tmp_path / str(draw), [True], calib__draw=draw)
    plain = [row["accuracy"] for row in table.rows(find([tmp_path]))]
    found = json.loads((tmp_path / "1" / "result.json").read_text())
    found["scores"]["held_out"]["pruned"]["grader_failed"] = 0.01
    (tmp_path / "1" / "result.json").write_text(json.dumps(found))
    assert [row["accuracy"] for row in table.rows(find([tmp_path]))] == [*plain[:2], plain[2] + " !"]
    assert table.means(find([tmp_path]))[0]["accuracy"].endswith("] !")


def test_means_are_over_draws_and_seeds(tmp_path: Path) -> None:
    for seed in (0, 1):
        for draw in (0, 1):
            cell(tmp_path / f"{seed}{draw}", [True], calib__draw=draw, sampler__decoding={"seed": seed})
    (row,) = table.means(find([tmp_path]))
    assert row["draws"] == "4" and row["seeds"] == "1"  # another seed of the sampler is another calibration set


def test_a_budget_of_rows_is_one_budget(tmp_path: Path) -> None:
    for draw in (0, 1):
        cell(tmp_path / str(draw), [True], calib__draw=draw, budget={"tokens": None, "rows": 32})
    (row,) = table.means(find([tmp_path]))
    assert row["draws"] == "2" and find([tmp_path])[0].fields["budget"] == "32 rows"


def test_a_control_is_that_of_the_same_draw_and_seed(tmp_path: Path) -> None:
    for seed in (0, 1):
        own = {"sampler__decoding": {"seed": seed}}
        cell(tmp_path / f"s{seed}", [True, True], **own)
        cell(tmp_path / f"m{seed}", [True, seed == 1], calib={"name": "matched", "draw": 0}, **own)
    by = {row["calib"]: row for row in table.means(find([tmp_path]), ["calib"], "calib=matched")}
    assert by["ssgr"]["minus calib=matched"].startswith("+0.250")  # 0.5 of the first seed, 0 of the second


def test_results_of_other_weights_are_no_more_draws(tmp_path: Path) -> None:
    cell(tmp_path / "old", [True])
    cell(tmp_path / "new", [False])
    changed = json.loads((tmp_path / "new" / "result.json").read_text())
    changed["keys"]["evaluate_dense.held_out"] = "other"
    (tmp_path / "new" / "result.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="same settings and are of different weights, data or code"):
        find([tmp_path])


@pytest.mark.parametrize("width", [40, 80, 1000])
def test_no_figure_is_cut_on_a_narrow_terminal(width: int, tmp_path: Path) -> None:
    """A real terminal: the report runs on a pseudo-terminal of that width."""
    for draw in (0, 1):
        cell(tmp_path / str(draw), [True, draw == 0], calib__draw=draw, budget__tokens=[400, 800][draw])
    content = table.rows(find([tmp_path]))
    code = f"import sys; from ssgr.report.__main__ import main; sys.exit(main([{str(tmp_path)!r}]))"
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    done = subprocess.Popen(
        [sys.executable, "-c", code], stdout=child, stderr=child, cwd=ROOT, env={**os.environ, "TERM": "xterm"}
    )
    os.close(child)
    said = b""
    with suppress(OSError):  # the end of a pseudo-terminal is an error
        while part := os.read(parent, 65536):
            said += part
    os.close(parent)
    assert done.wait() == 0
    plain = re.sub(r"\x1b\[[\d;]*m", "", said.decode())
    assert "…" not in plain
    for row in content:
        for value in row.values():
            assert value in plain, value


def test_a_file_gets_the_whole_table(tmp_path: Path) -> None:
    cell(tmp_path / "a", [True, False])
    command = [sys.executable, "-m", "ssgr.report", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=True, env={**os.environ, "COLUMNS": "60"}
    )
    *lines, note = done.stdout.splitlines()
    assert "…" not in done.stdout and len({len(line) for line in lines}) == 1 and note == table.CELL_NOTE


def test_means_without_the_outcomes_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell(tmp_path / "a", [True])
    file = tmp_path / "a" / "outcomes" / "held_out.parquet"
    for content in (b"half a file", None):
        file.unlink() if content is None else file.write_bytes(content)
        assert main([str(tmp_path), "--by", "calib"]) == 1
        assert "held_out.parquet cannot be read" in capsys.readouterr().err


def test_other_problems_have_no_common_mean(tmp_path: Path) -> None:
    cell(tmp_path / "a", [True])
    cell(tmp_path / "b", [True], problems="q", calib__draw=1)
    with pytest.raises(ValueError, match="different problems and have no common mean"):
        table.means(find([tmp_path]), ["calib"])


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no keys": lambda result: result.pop("keys"),
    "no key of the selection": lambda result: result["keys"].pop("select"),
    "no difference": lambda result: result["scores"]["held_out"].pop("difference"),
    "an accuracy that is no number": lambda result: result["scores"]["held_out"]["pruned"].update(accuracy=None),
    "half an interval": lambda result: result["scores"]["held_out"]["dense"].update(ci95=[0]),
    "no score": lambda result: result["scores"].clear(),
    "another bench": lambda result: result["config"].update(bench="held_out"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_named_in_one_sentence(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell(tmp_path / "0", [True, False])
    file = tmp_path / "0" / "result.json"
    result = json.loads(file.read_text())
    DAMAGE[damage](result)
    file.write_text(json.dumps(result))
    for how in ([], ["--by", "calib"]):
        assert main([str(tmp_path), *how]) == 1
        assert capsys.readouterr().err.startswith(f"error: {file} is not a result of ssgr (")


def test_a_result_without_its_stages_has_a_row_all_the_same(tmp_path: Path) -> None:
    cell(tmp_path / "0", [True, False])
    file = tmp_path / "0" / "result.json"
    result = json.loads(file.read_text())
    took = {"prune": 2, "sample": 40, "sample_pruned.held_out": 7, "evaluate_pruned.other": 100}
    took |= {"grade_dense.held_out": 1, "evaluate_dense.held_out": 5}
    result["stages"] = {name: {"seconds": seconds, "cached": True} for name, seconds in took.items()}
    file.write_text(json.dumps(result))
    assert [row["seconds"] for row in table.rows(read(file))] == ["6", "49"], "whoever made them"
    del result["stages"], result["prune"]["sparsity_realised"]
    file.write_text(json.dumps(result))
    assert [(row["sparsity realised"], row["seconds"]) for row in table.rows(read(file))][1] == ("", "")
