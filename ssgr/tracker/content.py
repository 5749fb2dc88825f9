"""What trackers show of a result.json: numbers, rows of layers, samples of answers; never a secret."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssgr import keys, tables
from ssgr.records import Outcome, Text

Result = Mapping[str, Any]  # the content of result.json
LAYER = ("sparsity", "error", "error_held_out", "seconds")  # what is shown of each layer, beside its name
SAMPLE = ("bench", "problem_id", "attempt", "question", "gold", "dense response", "dense verdict", "dense tokens",
          "pruned response", "pruned verdict", "pruned tokens")  # fmt: skip
_DENSE = "evaluate_dense."
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.I)
_LEAST = 8  # characters of what may be a secret: a shorter word would be found in any text
_USER = re.compile(r"(\w+://)[^/@\s]+@")


def run_id(result: Result) -> str:
    """What a cell's run is called wherever and however often it runs: a digest of what was selected, pruned and scored."""
    own = {
        name: key for name, key in result["keys"].items() if name in ("select", "prune") or name.startswith("evaluate_")
    }
    return keys.digest(own)[: keys.KEY_LENGTH]


def dense_id(result: Result) -> str:
    """What the run of its dense model is called, which all cells with the same dense scores share."""
    own = {name: key for name, key in result["keys"].items() if name.startswith(_DENSE)}
    return keys.digest({"dense": own})[: keys.KEY_LENGTH]


def unchanging(result: Result) -> dict[str, Any]:
    """A result but for what says whether this run made it or read it from the store."""
    stages = {name: {**stage, "cached": None} for name, stage in result["stages"].items()}
    return {**result, "stages": stages}


def axes(result: Result) -> dict[str, Any]:
    """What ablations vary, by short names, to group and filter by."""
    config, prune = result["config"], result["prune"]
    named = {name: config[name]["name"] for name in ("model", "calib", "difficulty", "length", "scope")}
    sparsity = config["sparsity"]
    pruned = {"pruner": prune["pruner"], "allocation": prune["allocation"], "sparsity": prune["sparsity_target"]}
    pattern = f"{sparsity['n']}:{sparsity['m']}" if "n" in sparsity else "unstructured"
    return {**named, **pruned, "pattern": pattern, "draw": config["calib"]["draw"]}


def scalars(result: Result, dense_only: bool = False) -> dict[str, float]:
    """Every number of a result by its path, such as scores/held_out/pruned/accuracy; of intervals ci95_low and ci95_high."""
    scores = {name: {"dense": one["dense"]} if dense_only else one for name, one in result["scores"].items()}
    out = dict(_numbers({"scores": scores}))
    stages = {name: one for name, one in result["stages"].items() if not dense_only or _of_dense(name)}
    out |= dict(_numbers({"stages": stages}))
    if not dense_only:
        prune = {name: value for name, value in result["prune"].items() if name != "layers"}
        own = {name: value for name, value in result["calibration"].items() if name != "funnel"}
        funnel = {f"{i:02d} {name}": count for i, (name, count) in enumerate(result["calibration"]["funnel"])}
        out |= dict(_numbers({"prune": prune, "calibration": {**own, "funnel": funnel}}))
    return out


def _of_dense(stage: str) -> bool:
    return stage.partition(".")[0].endswith("_dense")


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, one in value.items():
            if name == "ci95":
                yield from ((f"{path}/ci95_low", float(one[0])), (f"{path}/ci95_high", float(one[1])))
            else:
                yield from _numbers(one, f"{path}/{name}" if path else str(name))
    elif isinstance(value, (bool, int, float)):
        yield path, float(value)


def layers(result: Result) -> list[dict[str, Any]]:
    """A row for each pruned matrix in the order of the model: its name and `LAYER`."""
    return [{name: layer[name] for name in ("name", *LAYER)} for layer in result["prune"]["layers"]]


def stages(result: Result) -> list[list[Any]]:
    """Rows of stage, seconds and peak MiB."""
    return [[name, one["seconds"], one["peak_rss_mib"]] for name, one in result["stages"].items()]


def samples(folder: Path, result: Result, count: int, chars: int) -> list[list[Any]]:
    """Rows of `SAMPLE`: for each benchmark that is sampled, `count` attempts spread evenly over it, answers cut to `chars`."""
    out: list[list[Any]] = []
    for bench in result["scores"]:
        files = [tables.outcomes_file(folder, bench, which, "texts") for which in ("dense", "pruned")]
        if not all(file.exists() for file in files):
            continue
        texts = [{(t.problem_id, t.attempt): t for t in tables.read_texts(file)} for file in files]
        found = [
            {(o.problem_id, o.attempt): o for o in tables.read_outcomes(tables.outcomes_file(folder, bench, which))}
            for which in ("dense", "pruned")
        ]
        both = sorted(texts[0].keys() & texts[1].keys())
        step = max(1, len(both) // count) if count else len(both) + 1
        for at in both[::step][:count]:
            own = [_answer(text[at], outcome[at], chars) for text, outcome in zip(texts, found, strict=True)]
            out.append([bench, *at, cut(texts[0][at].question, chars), texts[0][at].gold, *own[0], *own[1]])
    return out


def _answer(text: Text, outcome: Outcome, chars: int) -> tuple[str, str, int]:
    return cut(text.response, chars), str(outcome.verdict), outcome.tokens


def check(samples: int, chars: int) -> None:
    """See that the settings of `samples` can be.

    Raises:
        ValueError: one cannot.
    """
    for name, value, least in (("samples", samples, 0), ("sample_chars", chars, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"tracker.{name}={value}: give a whole number of at least {least}")


def cut(text: str, chars: int) -> str:
    """`text` with its middle left out where it is longer than `chars`; what is left out is counted."""
    if len(text) <= chars:
        return text
    half = max(1, chars // 2)
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"


def without_secrets(value: Any) -> Any:
    """`value` with *** for whatever the environment holds under a name such as ..._KEY, and for passwords in addresses."""
    secrets = [text for name, text in os.environ.items() if _SECRET.search(name) and len(text) >= _LEAST]
    return _hidden(value, sorted(secrets, key=len, reverse=True))


def _hidden(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
        return _USER.sub(r"\1***@", value)
    if isinstance(value, Mapping):
        return {_hidden(name, secrets): _hidden(one, secrets) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hidden(one, secrets) for one in value]
    return value
