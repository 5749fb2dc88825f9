"""What was run: the commands, commits, models, budgets, draws and versions behind some cells, as far as they were recorded."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ssgr.files import write_json
from ssgr.report.cells import Cell
from ssgr.report.groups import sweep_of
from ssgr.sweep import COMMAND, MANIFEST

_UNKNOWN = "not recorded"


def record(folder: Path, command: Sequence[str], commit: str, began: str, cells: Sequence[str]) -> None:
    """Leave in the folder of a sweep what made it, and the names of its cells."""
    found = {"command": list(command), "commit": commit, "created": began, "cells": list(cells)}
    write_json(folder / COMMAND, found)


def facts(cells: Sequence[Cell]) -> list[tuple[str, list[str]]]:
    """What was run, as names with one value or several."""
    recorded = [found for folder in _folders(cells) if (found := _recorded(folder))]
    names = dict.fromkeys(name for cell in cells for name in cell.fields)
    fields = {name: list(dict.fromkeys(c.fields[name] for c in cells if name in c.fields)) for name in names}
    versions: dict[str, dict[str, None]] = {}
    for cell in cells:
        for name, version in (cell.result.get("versions") or {}).items():
            versions.setdefault(name, {})[version] = None
    out = [
        ("command", _unique(shlex.join(found["command"]) for found in recorded)),
        ("commit of the code", _unique(found.get("commit") or _UNKNOWN for found in recorded)),
        ("began", _unique(found.get("created") or _UNKNOWN for found in recorded)),
        ("models", [*dict.fromkeys(map(_model, cells))]),
        ("benchmarks", [*dict.fromkeys(map(_bench, cells))]),
        ("problems for calibration", [*dict.fromkeys(map(_problems, cells))]),
        *((name, fields[own]) for name, own in _FIELDS),
        ("calibration budget, tokens", fields["budget"]),
        ("draws of the calibration set", fields["draw"]),
        ("seeds of the attempts", fields["seed"]),
        ("versions", [f"{name} {' and '.join(own)}" for name, own in versions.items()]),
    ]
    return [(name, [value for value in values if value] or [_UNKNOWN]) for name, values in out]


_FIELDS = (("calibration sources", "calib"), ("pruners", "pruner"), ("sparsities", "sparsity"))


def _folders(cells: Iterable[Cell]) -> list[Path]:
    """The folders of runs and sweeps that the cells lie in."""
    return list(dict.fromkeys(sweep_of(cell.path) or cell.path.parent for cell in cells))


def _recorded(folder: Path) -> dict[str, Any] | None:
    """Command, commit and time of the sweep or run in `folder`; of an older one the overrides alone, which Hydra noted."""
    for name in (MANIFEST, COMMAND):
        try:
            found = json.loads((folder / name).read_text())
            if isinstance(found, dict) and all(isinstance(word, str) for word in found["command"]):
                return found
        except (OSError, ValueError, KeyError, TypeError):
            continue
    for name, start in (("multirun.yaml", ["-m"]), (".hydra/hydra.yaml", [])):
        try:
            overrides = yaml.safe_load((folder / name).read_text())["hydra"]["overrides"]["task"]
            return {"command": ["python", "run.py", *start, *map(str, overrides)]}
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            continue
    return None


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _model(cell: Cell) -> str:
    model: Mapping[str, Any] = cell.result["config"]["model"]
    parts = [model.get("path"), model.get("revision") and f"revision {model['revision']}", model.get("dtype")]
    said = ", ".join(str(part) for part in parts if part)
    return f"{model['name']} ({said})" if said else str(model["name"])


def _bench(cell: Cell) -> str:
    score = cell.score["dense"]
    each = [
        f"{score.get(f'{what}s', '?')} {what}{'' if score.get(f'{what}s') == 1 else 's'}"
        for what in (("problem", "attempt") if "attempts" in score else ("item",))
    ]
    return f"{cell.fields['bench']}: {' × '.join(each)}"


def _problems(cell: Cell) -> str:
    problems = cell.result["config"].get("problems")
    if not isinstance(problems, Mapping):
        return ""
    kind = str(problems.get("_target_", "")).rpartition(".")[2]
    own = [
        f"{name}={value}"
        for name, value in problems.items()
        if name in ("name", "path", "calibration", "seed") and value is not None
    ]
    return " ".join([kind, *own]).strip()
