"""Tables: which cells are told apart, which are means, and what they are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssgr import tables
from ssgr.records import Outcome, Verdict
from ssgr.report import table


def cell(folder: Path, right: list[bool], problems: str = "p", **settings: Any) -> None:
    """A result.json with its outcomes, as a run leaves them; `settings` by dotted name."""
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
    score = {"accuracy": accuracy, "ci95": [0, 1], "mean_tokens": 9, "truncated": 0, "looping": 0, "seconds": 1}
    told = json.dumps({k: v for k, v in config.items() if k not in ("device", "store")}, sort_keys=True)
    result = {
        "config": config,
        "keys": {"select": f"s{told}", "evaluate_pruned": f"p{told}", "evaluate_dense": "d"},
        "stages": {}, "calibration": {"tokens": {"asked": 400}},
        "prune": {"pruner": config["pruner"]["name"], "sparsity_realised": 0.5},
        "scores": {"dense": score, "pruned": score}, "delta": {"accuracy": 0, "ci95": [0, 0]},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    for name, values in (("outcomes", right), ("outcomes_dense", [True] * len(right))):
        tables.write_outcomes(
            folder / f"{name}.parquet",
            [
                Outcome(f"{problems}{i}", 0, 1, Verdict.RIGHT if ok else Verdict.WRONG, "1", 9, "stop", False)
                for i, ok in enumerate(values)
            ],
        )


def test_a_cell_that_was_run_twice_counts_once(tmp_path: Path) -> None:
    for sweep in ("one", "two"):
        for draw in (0, 1):
            cell(tmp_path / sweep / str(draw), [True, draw == 0], calib__draw=draw, store__path=sweep)
    (row,) = table.means(table.find([tmp_path]), ["calib"])
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
    found = table.means(table.find([tmp_path]))
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
    assert set(table.find([tmp_path])[0].fields) == set(table.read(tmp_path / "a" / "result.json").fields)


def test_means_are_over_draws_and_seeds(tmp_path: Path) -> None:
    for seed in (0, 1):
        for draw in (0, 1):
            cell(tmp_path / f"{seed}{draw}", [True], calib__draw=draw, sampler__decoding={"seed": seed})
    (row,) = table.means(table.find([tmp_path]))
    assert row["draws"] == "4"


def test_a_budget_of_rows_is_one_budget(tmp_path: Path) -> None:
    for draw in (0, 1):
        cell(tmp_path / str(draw), [True], calib__draw=draw, budget={"tokens": None, "rows": 32})
    (row,) = table.means(table.find([tmp_path]))
    assert row["draws"] == "2" and table.find([tmp_path])[0].fields["budget"] == "32 rows"


def test_a_control_is_that_of_the_same_draw_and_seed(tmp_path: Path) -> None:
    for seed in (0, 1):
        own = {"sampler__decoding": {"seed": seed}}
        cell(tmp_path / f"s{seed}", [True, True], **own)
        cell(tmp_path / f"m{seed}", [True, seed == 1], calib={"name": "matched", "draw": 0}, **own)
    by = {row["calib"]: row for row in table.means(table.find([tmp_path]), ["calib"], "calib=matched")}
    assert by["ssgr"]["minus calib=matched"].startswith("+0.250")  # 0.5 of the first seed, 0 of the second


def test_other_problems_have_no_common_mean(tmp_path: Path) -> None:
    cell(tmp_path / "a", [True])
    cell(tmp_path / "b", [True], problems="q", calib__draw=1)
    with pytest.raises(ValueError, match="different problems and have no common mean"):
        table.means(table.find([tmp_path]), ["calib"])
