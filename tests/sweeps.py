"""Sweeps made up for the tests of the page: folders of result.json, outcomes and texts, as runs leave them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from ssgr import tables
from ssgr.records import CalibrationSet, Graded, Outcome, Row, Text, Trace, Verdict

LAYERS = [f"model.layers.{block}.{name}" for block in range(3) for name in ("self_attn.q_proj", "mlp.down_proj")]


def sweep(folder: Path, cells: list[dict[str, Any]], problems: int = 12, response: str = "<think>so</think>42") -> Path:
    """A folder with a run for each of `cells`, given by what its fields are."""
    for number, fields in enumerate(cells):
        cell(folder / str(number), problems=problems, response=response, **fields)
    return folder


def cell(
    folder: Path,
    model: str = "tiny",
    bench: str = "held_out",
    calib: str = "ssgr",
    difficulty: str = "any",
    length: str = "any",
    ratio: float = 0.5,
    draw: int = 0,
    budget: int = 400,
    pattern: str | None = None,
    problems: int = 12,
    response: str = "<think>so</think>42",
) -> None:
    """One run, whose answers are drawn by chance from its settings."""
    told = f"{model} {bench} {calib} {difficulty} {length} {pattern or ratio} {draw} {budget}"
    n, _, m = (pattern or "").partition(":")
    config = {
        "model": {"name": model, "path": "weights", "thinking": {"start": "<think>", "end": "</think>"}},
        "calib": {"name": calib, "_target_": "Own", "draw": draw},
        "difficulty": {"name": difficulty}, "length": {"name": length}, "scope": {"name": "both"},
        "select": {"balance": "none"}, "pruner": {"name": "sparsegpt"},
        "sparsity": {"n": n, "m": m} if pattern else {"ratio": ratio},
        "budget": {"tokens": budget, "rows": None}, "sampler": {"decoding": {"seed": 0}},
        "bench": {"name": bench, "decoding": {"seed": 1}}, "problems": {"seed": 0},
        "store": {"path": str(folder.parent / "store")},
    }  # fmt: skip
    right = {which: 0.7 if which == "dense" else 0.7 - ratio / 2 for which in ("dense", "pruned")}
    scores = {
        w: _evaluated(folder, bench, w, f"{told if w == 'pruned' else model}", problems, r, response)
        for w, r in right.items()
    }
    layers = [
        {
            "name": name,
            "shape": [4, 4],
            "target": ratio,
            "sparsity": ratio,
            "error": 0.1 + i / 100,
            "error_held_out": None,
        }
        for i, name in enumerate(LAYERS)
    ]
    gap = scores["pruned"]["accuracy"] - scores["dense"]["accuracy"]
    result = {
        "config": config,
        "keys": {
            "sample": "sampled", "grade": "graded", "select": f"s{calib}{difficulty}{length}{draw}{budget}", "prune": f"p{told}",
            f"evaluate_pruned.{bench}": f"e{told}", f"evaluate_dense.{bench}": f"d{model}{bench}",
        },
        "versions": {"python": "3.11", "torch": "2.10"},
        "stages": {
            "sample": {"seconds": 40.0, "cached": draw > 0, "peak_rss_mib": 900.0},
            "prune": {"seconds": 3.5, "cached": False, "peak_rss_mib": 950.0},
            "evaluate_pruned": {"seconds": 0.5, "cached": True, "peak_rss_mib": 500.0},
        },
        "calibration": {"source": calib, "tokens": {"asked": budget}, "funnel": [["graded", 96], ["right", 60], ["drawn", 9]]},
        "prune": {
            "pruner": "sparsegpt", "allocation": "uniform", "sparsity_target": ratio, "sparsity_realised": ratio,
            "layers": layers,
        },
        "scores": {bench: {**scores, "difference": gap, "ci95": [-0.5, 0.1]}},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


def _evaluated(
    folder: Path, bench: str, which: str, seed: str, problems: int, right: float, response: str
) -> dict[str, Any]:
    """Outcomes and texts of one model; what its score says of them."""
    chance = random.Random(seed)
    outcomes, texts = [], []
    for i in range(problems):
        ok = chance.random() < right
        verdict = Verdict.RIGHT if ok else Verdict.WRONG
        cut = not ok and chance.random() < 0.3
        name = f"problem/{i:03}"
        outcomes.append(
            Outcome(
                name,
                0,
                1 + i % 4,
                verdict,
                "42",
                chance.randint(20, 90),
                "length" if cut else "stop",
                False,
                5,
                not cut,
            )
        )
        texts.append(Text(name, 0, f"What is {i} + {i}?", str(2 * i), "prompt", response))
    for kind, write, content in (("outcomes", tables.write_outcomes, outcomes), ("texts", tables.write_texts, texts)):
        file = tables.outcomes_file(folder, bench, which, kind)
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, content)  # type: ignore[operator]
    by: dict[str, list[bool]] = {}
    for outcome in outcomes:
        by.setdefault(str(outcome.level), []).append(outcome.verdict is Verdict.RIGHT)
    accuracy = sum(o.verdict is Verdict.RIGHT for o in outcomes) / problems
    return {
        "metric": "accuracy", "attempts": 1, "problems": problems, "accuracy": accuracy,
        "ci95": [max(0, accuracy - 0.2), min(1, accuracy + 0.2)], "mean_tokens": sum(o.tokens for o in outcomes) / problems,
        "truncated": sum(o.finish == "length" for o in outcomes) / problems, "looping": 0.0, "seconds": 1.0,
        "by_level": {level: sum(own) / len(own) for level, own in by.items()},
    }  # fmt: skip


def store(folder: Path) -> None:
    """The store beside the cells of a sweep: a pool of graded traces, and the rows that each cell chose of it."""
    root = folder / "store"
    (root / "grade" / "graded").mkdir(parents=True)
    pool = [
        Graded(
            Trace(f"p{i}", attempt, (1,), tuple(range(5 + i)), "stop", 0),
            "1",
            Verdict.RIGHT if attempt < i % 5 else Verdict.WRONG,
        )
        for i in range(24)
        for attempt in range(4)
    ]
    tables.write_graded(root / "grade" / "graded" / "graded.parquet", pool)
    for file in sorted(folder.glob("*/result.json")):
        key = json.loads(file.read_text())["keys"]["select"]
        rows = root / "select" / key / "calibration.parquet"
        if not rows.exists():
            rows.parent.mkdir(parents=True)
            chosen = [g for g in pool if g.verdict is Verdict.RIGHT][:9]
            own = tuple(Row((1, *g.trace.generated_ids), 1, f"{g.trace.problem_id}#{g.trace.attempt}") for g in chosen)
            tables.write_rows(rows, CalibrationSet("ssgr", own, ((),) * len(own), (), 400))
        (file.parent / "calibration.parquet").symlink_to(rows)


def grid(**axes: list[Any]) -> list[dict[str, Any]]:
    """Every combination of the values of some fields."""
    out: list[dict[str, Any]] = [{}]
    for name, values in axes.items():
        out = [{**one, name: value} for one in out for value in values]
    return out
