"""Cells by model and benchmark, and plain records of what they found: what tables and figures of the page are made of."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssgr.report.cells import Cell
from ssgr.report.compare import Comparison, Gap, compare, once
from ssgr.report.figures import Records
from ssgr.sweep import MANIFEST

CONTROL = "calib=matched"
_MARKS = ("multirun.yaml", MANIFEST)  # what Hydra and our launchers leave in the folder of a sweep
_OWN_AXIS = ("model", "bench", "draw", "seed")  # what no label says: headings do, or it is averaged over
_BARE = ("calib", "pruner", "sparsity")  # whose values need no name beside them


@dataclass(frozen=True)
class Group:
    """All cells of one model on one benchmark in one sweep, which is named where there are several.

    `records` has a row for each dense model and each group of draws and seeds;
    `trouble` says why means have no intervals, where something that they need is missing; `alike` counts cells that are left
    out, as their source ignores the filters in which they differ from another.
    """

    sweep: str
    model: str
    bench: str
    cells: tuple[Cell, ...]
    records: Records
    labelled: tuple[tuple[str, Cell], ...]
    varied: tuple[str, ...]
    control: str | None
    trouble: str = ""
    alike: int = 0
    budgets: tuple[str, ...] = field(default=())

    @property
    def title(self) -> str:
        """What heads its section and its captions."""
        return f"{self.sweep}: {self.model} on {self.bench}" if self.sweep else f"{self.model} on {self.bench}"

    @property
    def metric(self) -> str:
        """What is measured."""
        return self.cells[0].metric

    @property
    def pruned(self) -> Records:
        """The records of the pruned models."""
        return [row for row in self.records if row["kind"] == "pruned"]

    @property
    def dense(self) -> Records:
        """The records of the dense models: one, unless attempts were made in several ways."""
        return [row for row in self.records if row["kind"] == "dense"]

    @property
    def repeats(self) -> str:
        """Over how many draws and seeds the means are."""
        named = {"draw": "draw", "seed": "seed", "problem": self.unit}
        return ", ".join(_range([row[name] for row in self.pruned], told) for name, told in named.items())

    @property
    def unit(self) -> str:
        """What a benchmark is made of: problems where it is sampled, else items (windows of a text, documents of a task)."""
        return "problem" if self.metric == "accuracy" else "item"


def _range(counts: Sequence[int], name: str) -> str:
    low, high = min(counts), max(counts)
    return f"{low if low == high else f'{low} to {high}'} {name}{'' if high == 1 else 's'}"


def groups(cells: Sequence[Cell]) -> list[Group]:
    """The cells by model and benchmark, in the order given."""
    by: dict[tuple[str, str, str], list[Cell]] = defaultdict(list)
    for sweep, own in by_sweep(cells).items():
        for cell in own:
            by[sweep, cell.fields["model"], cell.fields["bench"]].append(cell)
    return [_group(*names, own) for names, own in by.items()]


def by_sweep(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells by the name of their sweep; without a name where they are all of one, or lie in no sweep."""
    folders: dict[Path | None, list[Cell]] = defaultdict(list)
    for cell in cells:
        folders[sweep_of(cell.path)].append(cell)
    if len(folders) == 1:
        return {"": list(cells)}
    names = [folder.name if folder else "single runs" for folder in folders]
    clear = len(set(names)) == len(names)
    return {name if clear else str(folder): own for name, (folder, own) in zip(names, folders.items(), strict=True)}


def sweep_of(result: Path) -> Path | None:
    """The folder of the sweep that a result.json lies in."""
    folder = result.parent.parent
    return folder if any((folder / mark).exists() for mark in _MARKS) else None


def _group(sweep: str, model: str, bench: str, cells: list[Cell]) -> Group:
    every, cells = cells, once(cells)
    control = CONTROL if any(cell.fields["calib"] == "matched" for cell in cells) else None
    varied = tuple(name for name in cells[0].fields if len({cell.fields[name] for cell in cells}) > 1)
    trouble = ""
    try:
        found = compare(cells, against=control)
        records = _dense(found) + [_compared(one, varied) for one in found]
        labelled = tuple((label(one.cells[0], varied), one.cells[0]) for one in found)
    except (ValueError, OSError) as error:
        trouble = f"No means and no intervals over draws: {error}."
        records = [_alone(cell, varied) for cell in cells]
        labelled = tuple((row["label"], cell) for row, cell in zip(records, cells, strict=True))
    budgets = tuple(dict.fromkeys(cell.fields["budget"] for cell in cells))
    return Group(
        sweep, model, bench, tuple(cells), records, labelled, varied, control, trouble, len(every) - len(cells), budgets
    )


def label(cell: Cell, varied: Sequence[str], without: Sequence[str] = ()) -> str:
    """What tells a cell from the others, but for draws, seeds and the fields `without`."""
    parts = [
        value if name in _BARE else f"{name} {value}"
        for name, value in cell.fields.items()
        if name in varied
        and name not in (*_OWN_AXIS, *without)
        and not name.endswith("decoding.seed")
        and value != "any"
    ]
    return ", ".join(parts) or ("all" if "calib" in without else cell.fields["calib"])


def _dense(found: Sequence[Comparison]) -> Records:
    """One record for each dense model that was tried: the widest table of each is that of all its seeds."""
    out: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in found:
        own = tuple(sorted({cell.key("dense") for cell in one.cells}))
        score = [cell.score["dense"] for cell in one.cells]
        out.setdefault(
            own,
            {
                "label": "dense", "kind": "dense", **dict.fromkeys(one.cells[0].fields, ""),
                **_numbers("", one.dense.mean, one.dense.ci95), "draw": 1, "seed": one.seeds, "problem": one.problems,
                **_means(score), "sparsity_realised": 0.0, "ratio": 0.0,
            },
        )  # fmt: skip
    return list(out.values())


def _compared(one: Comparison, varied: Sequence[str]) -> dict[str, Any]:
    cell = one.cells[0]
    return {
        **_names(cell, varied),
        **_numbers("", one.value.mean, one.value.ci95),
        **_gap("to_dense", one.to_dense),
        **(_gap("to_control", one.to_control) if one.to_control else {}),
        "draw": one.draws, "seed": one.seeds, "missing": one.missing, "problem": one.problems,
        **_means([c.score["pruned"] for c in one.cells]),
        **_sparsity(one.cells),
    }  # fmt: skip


def _alone(cell: Cell, varied: Sequence[str]) -> dict[str, Any]:
    """A cell by itself, from its record alone."""
    score, gap = cell.score["pruned"], cell.score["difference"]
    name = f", draw {cell.fields['draw']}" if "draw" in varied else ""
    names = _names(cell, varied)
    return {
        **names,
        "label": names["label"] + name,
        **_numbers("", score.get("accuracy", score.get("value")), score["ci95"]),
        **_numbers("to_dense", gap, cell.score["ci95"]),
        "draw": 1, "seed": 1, "problem": score.get("problems", score.get("items", 0)),
        **_means([score]),
        **_sparsity([cell]),
    }  # fmt: skip


def _names(cell: Cell, varied: Sequence[str]) -> dict[str, Any]:
    return {"label": label(cell, varied), "kind": "pruned", **cell.fields}


def _numbers(name: str, mean: float, ci95: Sequence[float]) -> dict[str, Any]:
    """A mean and the ends of its interval; six digits are more than any of them holds."""
    before = f"{name}_" if name else ""
    return {name or "value": six(mean), f"{before}low": six(ci95[0]), f"{before}high": six(ci95[1])}


def six(value: float | None) -> float | None:
    """Six digits of a number; nothing of what is no number."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _gap(name: str, gap: Gap) -> dict[str, Any]:
    return {**_numbers(name, gap.mean, gap.ci95), f"{name}_p": six(gap.p_adjusted), f"{name}_unsure": gap.unsure}


def _means(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Plain means over draws, with the lowest and highest draw of the tokens."""
    out: dict[str, Any] = {}
    for name, key in (
        ("tokens", "mean_tokens"),
        ("cut", "truncated"),
        ("looping", "looping"),
        ("failed", "grader_failed"),
    ):
        if all(key in score for score in scores):
            out[name] = six(float(np.mean([score[key] for score in scores])))
    if "tokens" in out:
        each = [score["mean_tokens"] for score in scores]
        out |= {"tokens_low": six(min(each)), "tokens_high": six(max(each))}
    return out


def _sparsity(cells: Sequence[Cell]) -> dict[str, Any]:
    realised = [cell.result["prune"].get("sparsity_realised") for cell in cells]
    target = cells[0].result["prune"].get("sparsity_target")
    known = [one for one in realised if one is not None]
    mean = six(float(np.mean(known))) if known else None
    return {"sparsity_realised": mean, "ratio": mean if target is None else six(target)}
