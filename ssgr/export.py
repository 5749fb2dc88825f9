"""Results in the log format of lm-evaluation-harness: ssgr export --format lm_eval PATH... [--out DIR].

For each model of each run a folder with `results_DATE.json` and, for each benchmark, `samples_BENCH_DATE.jsonl`, as
`lm_eval --log_samples --output_path DIR` leaves them (0.4): a row a problem with all its attempts, accuracy as `exact_match`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ssgr import tables
from ssgr.errors import unless_closed
from ssgr.files import write_bytes
from ssgr.records import PERPLEXITY, Verdict, shown
from ssgr.report.cells import Cell, find, values

_ACCURACY = "exact_match"  # lm-evaluation-harness's name for the share of right answers


def export(cells: Sequence[Cell], out: Path) -> list[Path]:
    """Write the cells, and return the files of results.

    Raises:
        ValueError: what a result refers to is no longer there, or `out` cannot be written.
    """
    runs: dict[Path, list[Cell]] = defaultdict(list)
    for cell in cells:
        runs[cell.path].append(cell)
    written: dict[Path, None] = {}
    for path, some in runs.items():
        for which in ("dense", "pruned"):
            written[_export_model(path, some, which, out)] = None
    return list(written)


def _export_model(path: Path, cells: Sequence[Cell], which: str, out: Path) -> Path:
    name = _model(cells[0], which)
    date = datetime.fromtimestamp(path.stat().st_mtime, UTC).replace(tzinfo=None)
    stamp = date.isoformat().replace(":", "-")
    folder = out / _sanitised(name)
    result: dict[str, Any] = {
        kind: {}
        for kind in ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes")
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for cell in cells:
            bench = cell.fields["bench"]
            rows = _samples(cell, which)
            score, metric = cell.score[which], _metric(cell)
            value = score.get("accuracy", score.get("value"))
            error = _standard_error(cell, which, value)
            result["results"][bench] = {"alias": bench, f"{metric},none": value, f"{metric}_stderr,none": error}
            result["configs"][bench] = _config(cell)
            result["versions"][bench] = 1
            result["n-shot"][bench] = result["configs"][bench]["num_fewshot"]
            result["higher_is_better"][bench] = {metric: metric != PERPLEXITY}
            result["n-samples"][bench] = {"original": len(rows), "effective": len(rows)}
            result["task_hashes"][bench] = _hash(
                "".join(r["doc_hash"] + r["prompt_hash"] + r["target_hash"] for r in rows)
            )
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_bytes(folder / f"samples_{bench}_{stamp}.jsonl", lines.encode())
        result |= {
            "group_subtasks": {},
            "config": {"model": "ssgr", "model_args": name, "batch_size": None, "device": None, "limit": None},
            "git_hash": None,
            "date": path.stat().st_mtime,
            "transformers_version": cells[0].result["versions"].get("transformers"),
            "lm_eval_version": None,
            "model_source": "ssgr",
            "model_name": name,
            "model_name_sanitized": _sanitised(name),
        }
        file = folder / f"results_{stamp}.json"
        write_bytes(file, json.dumps(result, indent=2, ensure_ascii=False).encode())
    except OSError as error_:
        raise ValueError(f"--out {out}: {folder} cannot be written ({error_.strerror})") from error_
    return file


def _standard_error(cell: Cell, which: str, value: float) -> float | str:
    """That of the mean over problems or items; of a perplexity, to first order, that of the mean loss times it."""
    each = values(cell, which)
    if len(each) < 2:
        return "N/A"
    return float(np.std(each, ddof=1) / len(each) ** 0.5) * (value if cell.metric == PERPLEXITY else 1)


def _samples(cell: Cell, which: str) -> list[dict[str, Any]]:
    """A row a problem, window or document, in the order of ids."""
    metric, bench = _metric(cell), cell.fields["bench"]
    if "attempts" not in cell.score[which]:
        items = sorted(tables.read_items(cell.outcomes(which)), key=lambda item: item.id)
        return [
            row(i, {"id": item.id}, "", "", [], [], metric, shown(cell.metric, item.value))
            for i, item in enumerate(items)
        ]
    file = tables.outcomes_file(cell.path.parent, bench, which, "texts")
    if not file.exists():
        raise ValueError(
            f"{file} is not there: the responses lie in the store that the run was made with; run the same command again"
        )
    texts = {(text.problem_id, text.attempt): text for text in tables.read_texts(file)}
    attempts: dict[str, list[Any]] = defaultdict(list)
    for outcome in sorted(tables.read_outcomes(cell.outcomes(which)), key=lambda o: (o.problem_id, o.attempt)):
        attempts[outcome.problem_id].append(outcome)
    rows = []
    for i, (problem, some) in enumerate(attempts.items()):
        each = [texts[problem, outcome.attempt] for outcome in some]
        doc = {"id": problem, "question": each[0].question, "answer": each[0].gold, "level": some[0].level}
        resps, answers = [text.response for text in each], [outcome.answer or "" for outcome in some]
        mean = float(np.mean([outcome.verdict is Verdict.RIGHT for outcome in some]))
        one = row(i, doc, each[0].gold, each[0].prompt, resps, answers, metric, mean)
        one["arguments"]["gen_args_0"]["arg_1"] = _config(cell)["generation_kwargs"]
        rows.append(one)
    return rows


def row(
    i: int,
    doc: dict[str, Any],
    target: str,
    prompt: str,
    resps: list[str],
    answers: list[str],
    metric: str,
    value: float,
) -> dict[str, Any]:
    """A line of samples: `doc`, its gold `target`, the `prompt`, all responses, what was found in them, and the metric."""
    return {
        "doc_id": i,
        "doc": doc,
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": prompt}},
        "resps": [resps],
        "filtered_resps": answers,
        "filter": "none",
        "metrics": [metric],
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(target),
        metric: value,
    }


def _metric(cell: Cell) -> str:
    return _ACCURACY if cell.metric == "accuracy" else cell.metric


def _config(cell: Cell) -> dict[str, Any]:
    bench, group = cell.fields["bench"], cell.result["config"]["bench"]
    own = next((b for b in group.get("benches", {}).values() if b["name"] == bench), group)
    decoding = (
        own["decoding"] | {k: v for k, v in group.get("decoding", {}).items() if v is not None}
        if "decoding" in own
        else {}
    )
    generation = {
        "do_sample": decoding.get("temperature", 0) > 0,
        "temperature": decoding.get("temperature"),
        "top_p": decoding.get("top_p"),
        "max_gen_toks": decoding.get("max_new_tokens"),
        "until": [],
    }
    return {
        "task": bench,
        "output_type": "generate_until" if decoding else "loglikelihood",
        "repeats": decoding.get("attempts", 1),
        "num_fewshot": own.get("fewshot") or 0,
        "generation_kwargs": generation if decoding else None,
        "metadata": {"ssgr": own},
    }


def _model(cell: Cell, which: str) -> str:
    fields = cell.fields
    if which == "dense":
        return fields["model"]
    parts = ("pruner", "sparsity", "calib", "difficulty", "length", "scope", "draw")
    own = "-".join(fields[part].replace(" %", "").replace(":", "of") for part in parts)
    return f"{fields['model']}-{own}-{cell.result['keys']['prune'][:8]}"


def _sanitised(name: str) -> str:
    return "".join("__" if sign in '"<>:/|\\?*[]' else sign for sign in name)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Export; 1 and a sentence where that cannot be."""
    parser = argparse.ArgumentParser(prog="ssgr export", description="Results for other tools.")
    parser.add_argument("paths", nargs="+", type=Path, help="result.json files, or folders of runs and sweeps")
    parser.add_argument("--format", choices=("lm_eval",), required=True, help="the log format of lm-evaluation-harness")
    parser.add_argument("--out", type=Path, default=Path("exported"), help="folder to write to (exported)")
    args = parser.parse_args(arguments)
    try:
        files = export(find(args.paths), args.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"results of {len({file.parent for file in files})} models written:", *files, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(unless_closed(main))
