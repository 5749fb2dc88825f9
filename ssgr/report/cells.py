"""The cells of runs and sweeps: read from result.json files, and told apart by their settings."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssgr.files import below
from ssgr.intervals import linear
from ssgr.records import Verdict
from ssgr.sweep import COMMAND
from ssgr.sweep import read as read_sweep
from ssgr.tables import ITEM, columns, outcomes_file, read_items, read_verdicts

_ALWAYS = ("calib", "pruner")  # columns that are shown even where all cells agree
_NAMED = ("calib.draw", "bench.decoding.seed", "budget.tokens", "budget.rows", "select.balance", "sparsity.")  # fields
# what changes no result
_NEVER = ("device", "store.", "memory.", "hydra.", "tracker.", "model.device", "batch_size", "workers")
_SAMPLED = ("accuracy", "mean_tokens", "truncated", "looping")  # what is told of a benchmark that is sampled


@dataclass(frozen=True)
class Cell:
    """One benchmark of a result.json and where that lies; `fields` are the settings that tell cells apart, by their columns."""

    path: Path
    result: dict[str, Any]
    fields: dict[str, str]

    @property
    def score(self) -> dict[str, Any]:
        """What was found on the benchmark: `dense` and `pruned`, and their `difference` with its `ci95`."""
        found: dict[str, Any] = self.result["scores"][self.fields["bench"]]
        return found

    @property
    def metric(self) -> str:
        """What is measured."""
        return str(self.score["pruned"]["metric"])

    def key(self, which: str) -> str:
        """The key of the evaluation of the `dense` or the `pruned` model."""
        return str(self.result["keys"][f"evaluate_{which}.{self.fields['bench']}"])

    def outcomes(self, which: str) -> Path:
        """The file of every attempt, or item, of the `dense` or the `pruned` model."""
        return outcomes_file(self.path.parent, self.fields["bench"], which)


def read(path: Path) -> list[Cell]:
    """Read one result.json: a cell for each of its benchmarks.

    Raises:
        ValueError: it is not one.
    """
    try:
        result = json.loads(path.read_text())
        cells = [Cell(path, result, _fields(result, bench)) for bench in result["scores"]]
        for cell in cells:
            _check(cell)
        if not cells:
            raise ValueError("it has no scores")
        return cells
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a result of ssgr ({type(error).__name__}: {error}): it was written by another version of ssgr or "
            "damaged; give its command again"
        ) from error


def _check(cell: Cell) -> None:
    """See that a cell has what every table and page is made of."""
    score, result = cell.score, cell.result
    _ = cell.metric, cell.key("dense"), cell.key("pruned"), result["keys"]["select"]
    numbers = [score["difference"], *(score["ci95"][i] for i in (0, 1))]
    for own in (score["dense"], score["pruned"]):
        names = _SAMPLED if "attempts" in own else ("value",)
        numbers += [own["seconds"], *(own["ci95"][i] for i in (0, 1)), *(own[name] for name in names)]
    numbers += [stage["seconds"] for stage in result.get("stages", {}).values()]
    sum(numbers)  # a TypeError where one is no number


def find(paths: Iterable[Path]) -> list[Cell]:
    """Read every result.json at or below `paths`; a cell that was run again counts once.

    Raises:
        ValueError: there is none, one cannot be read, or two have the same settings and other results.
    """
    given = list(paths)
    found = result_files(given)
    if not found:
        raise ValueError(
            f"no result.json at or below {', '.join(map(str, given))}; type the folder of a run or a sweep"
        )
    return told_apart([cell for file in found for cell in read(file)])


def result_files(given: Iterable[Path]) -> list[Path]:
    """Every result.json that is given or lies below; what the folder of a changed grid has of an earlier one is none of it."""
    found: list[Path] = []
    for path in given:
        if path.is_file():
            found.append(path)
            continue
        there = sorted(below(path, "result.json"), key=natural)
        cells = {folder: _cells_of(folder) for folder in {file.parent.parent for file in there}}
        found += [file for file in there if (own := cells[file.parent.parent]) is None or file.parent in own]
    return found


def _cells_of(folder: Path) -> set[Path] | None:
    """The folders of a sweep's cells; None where no sweep says which they are."""
    if (own := read_sweep(folder)) is not None:
        return {own.cell(number) for number in own.graph.cells}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return {folder / name for name in json.loads((folder / COMMAND).read_text())["cells"]}
    return None


def natural(path: Path) -> list[tuple[int, str]]:
    """An order in which cell 10 comes after cell 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.parts]


def told_apart(cells: Sequence[Cell]) -> list[Cell]:
    """`cells` without repeats, with every setting as a field in which two of them differ that else look alike.

    Raises:
        ValueError: two cells have the same settings and other results.
    """
    made: dict[tuple[str, ...], Cell] = {}
    for cell in cells:
        keys = cell.result["keys"]["select"], cell.key("pruned"), cell.key("dense")
        made.setdefault((*cell.fields.values(), *keys), cell)
    settings = [_settings(cell.result["config"]) for cell in made.values()]
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for cell, own in zip(made.values(), settings, strict=True):
        for name, value in own.items():
            chosen = name.partition(".")[0] not in cell.fields and name.endswith(("._target_", ".name"))
            seen[name, "" if chosen else _choice(cell.result["config"], name)].add(value)
    differ = sorted({name for (name, _), values in seen.items() if len(values) > 1})
    told = [
        replace(cell, fields=cell.fields | {name: own.get(name, "") for name in differ})
        for cell, own in zip(made.values(), settings, strict=True)
    ]
    _check_twins(told)
    return told


def _check_twins(cells: Sequence[Cell]) -> None:
    """Refuse cells of the same settings and other results: weights, data or code changed between them."""
    first: dict[tuple[str, ...], Cell] = {}
    for cell in cells:
        twin = first.setdefault(tuple(cell.fields.values()), cell)
        if twin is not cell:
            raise ValueError(
                f"{twin.path} and {cell.path} have the same settings and are of different weights, data or code: "
                "give the folders of one of them"
            )


def _settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every setting that has no field of its own and can change a result, by its dotted name."""
    out: dict[str, str] = {}
    for name, value in config.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping):
            out |= _settings(value, f"{dotted}.")
        elif not dotted.startswith((*_NAMED, *_NEVER)) and not dotted.endswith(_NEVER):
            out[dotted] = str(value)
    return out


def _choice(config: Mapping[str, Any], name: str) -> str:
    """What was chosen in the group of the setting `name`; its other settings follow from that unless changed."""
    group = config.get(name.partition(".")[0])
    return f"{group.get('name')} {group.get('_target_')}" if isinstance(group, Mapping) else ""


def _fields(result: dict[str, Any], bench: str) -> dict[str, str]:
    config, prune = result["config"], result["prune"]
    sparsity, budget = config["sparsity"], config["budget"]
    return {
        "model": config["model"]["name"],
        "calib": config["calib"]["name"],
        "difficulty": config["difficulty"]["name"],
        "length": config["length"]["name"],
        "scope": config["scope"]["name"],
        "balance": config["select"]["balance"],
        "pruner": prune["pruner"],
        "allocation": prune.get("allocation", "uniform"),
        "propagate": prune.get("propagate", "pruned"),
        "sparsity": f"{sparsity['n']}:{sparsity['m']}" if "n" in sparsity else f"{100 * sparsity['ratio']:g} %",
        "budget": f"{budget['tokens']}" if budget["tokens"] is not None else f"{budget['rows']} rows",
        "bench": bench,
        "seed": str(config["bench"].get("decoding", {}).get("seed", "")),
        "draw": str(config["calib"]["draw"]),
    }


def shown_fields(cells: Sequence[Cell]) -> list[str]:
    """The fields in which the cells differ, and those that are always shown."""
    return [f for f in cells[0].fields if f in _ALWAYS or len({cell.fields[f] for cell in cells}) > 1]


def values(cell: Cell, which: str) -> NDArray[np.float64]:
    """Share of right attempts by problem, or the values of items, in the order of ids; their plain mean is the score's."""
    return np.array(list(by_id(cell.outcomes(which)).values()))


@lru_cache(maxsize=1024)
def by_id(path: Path) -> dict[str, float]:
    """Share of right attempts by problem, or value by item, in the order of ids.

    Raises:
        ValueError: the file is not there or cannot be read.
    """
    try:
        if set(columns(path)) >= ITEM:
            items = sorted(read_items(path), key=lambda item: item.id)
            scaled_N = linear(np.array([i.value for i in items]), np.array([i.weight for i in items], dtype=float))
            return dict(zip([item.id for item in items], map(float, scaled_N), strict=True))
        attempts = read_verdicts(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}): give the whole folder of a run or a sweep, with the folder "
            "outcomes beside each result.json"
        ) from error
    right: dict[str, list[bool]] = defaultdict(list)
    for problem, verdict in attempts:
        right[problem].append(verdict is Verdict.RIGHT)
    return {problem: sum(right[problem]) / len(right[problem]) for problem in sorted(right)}
