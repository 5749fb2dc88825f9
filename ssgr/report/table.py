"""Tables of results: one row a cell and one for each dense model, or means over draws; text, Markdown or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ssgr.intervals import cluster_bootstrap
from ssgr.records import MANY_CUT, Verdict
from ssgr.stages.evaluate import PERPLEXITY, shown
from ssgr.tables import ITEM, columns, outcomes_file, read_items, read_outcomes

Rows = list[dict[str, str]]
_ALWAYS = ("calib", "pruner")  # columns that are shown even where all cells agree
_FILTERS = frozenset({"difficulty", "length", "scope", "balance"})  # what one source uses and another need not
_REPEATS = ("draw", "seed", "sampler.decoding.seed")  # what means are over
_NAMED = ("calib.draw", "bench.decoding.seed", "budget.tokens", "budget.rows", "select.balance", "sparsity.")  # fields
_NEVER = ("device", "store.", "memory.", "hydra.", "tracker.", "model.device", "batch_size")  # what changes no result


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
            _ = cell.metric, cell.key("dense"), cell.key("pruned")
        return cells
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of ssgr ({type(error).__name__}: {error})") from error


def find(paths: Iterable[Path]) -> list[Cell]:
    """Read every result.json at or below `paths`; a cell that was run again counts once.

    Raises:
        ValueError: there is none.
    """
    given = list(paths)
    files = [f for p in given for f in ([p] if p.is_file() else sorted(p.rglob("result.json")))]
    if not files:
        raise ValueError(
            f"no result.json at or below {', '.join(map(str, given))}; type the folder of a run or a sweep"
        )
    return told_apart([cell for file in files for cell in read(file)])


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
            seen[name, _choice(cell.result["config"], name)].add(value)
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


def _shown(cells: Sequence[Cell]) -> list[str]:
    """The fields in which the cells differ."""
    return [f for f in cells[0].fields if f in _ALWAYS or len({cell.fields[f] for cell in cells}) > 1]


def rows(cells: Sequence[Cell]) -> Rows:
    """A row for each dense model, then one for each cell in the order given."""
    shown = _shown(cells)
    out: Rows = []
    seen: set[str] = set()
    for cell in cells:
        dense = cell.score["dense"]
        if (key := cell.key("dense")) not in seen:
            seen.add(key)
            names = {f: cell.fields[f] if f in ("model", "bench", "seed") else "" for f in shown}
            out.append({**names, "calib": "dense", "pruner": "", **_score(dense), "difference to dense": "",
                        "sparsity realised": "0 %", "seconds": f"{dense['seconds']:.0f}"})  # fmt: skip
    for cell in cells:
        found, stages = cell.score, cell.result["stages"]
        out.append(
            {
                **{f: cell.fields[f] for f in shown},
                **_score(found["pruned"]),
                "difference to dense": _interval(found["difference"], found["ci95"], signed=True) + _unit(cell.metric),
                "sparsity realised": f"{100 * cell.result['prune']['sparsity_realised']:.1f} %",
                "seconds": f"{sum(s['seconds'] for s in stages.values() if not s['cached']):.0f}",
            }
        )
    return _filled(out)


def _filled(content: Rows) -> Rows:
    """Rows with the same columns, in the order in which they first come; what a row lacks is blank."""
    columns: list[str] = []
    for row in content:
        before = 0
        for name in row:
            if name in columns:
                before = columns.index(name) + 1
            else:
                columns.insert(before, name)
                before += 1
    return [{name: row.get(name, "") for name in columns} for row in content]


def _unit(metric: str) -> str:
    return " nats" if metric == PERPLEXITY else ""


def means(cells: Sequence[Cell], by: Sequence[str] | None = None, against: str | None = None) -> Rows:
    """A row for each group of cells that agree in the fields `by` (by default all shown but draws and seeds).

    The interval resamples draws and problems (from outcomes.parquet beside each result). `against` names a control as
    FIELD=VALUE, such as calib=matched: each cell is then also compared with the control's of the same draw.

    Raises:
        ValueError: `by` or `against` names no field, no cell is the control, or a group mixes different problems.
    """
    by = list(by) if by else [f for f in _shown(cells) if f not in _REPEATS]
    _check_fields("--by", by, cells)
    control = _control(cells, against) if against else {}
    groups: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[tuple(cell.fields[f] for f in by)].append(cell)
    out: Rows = []
    for names, group in groups.items():
        _check_problems(group)
        metric = group[0].metric
        pruned = [values(cell, "pruned") for cell in group]
        gaps = [p - values(cell, "dense") for p, cell in zip(pruned, group, strict=True)]
        scores = [cell.score["pruned"] for cell in group]
        mean, ci95 = float(np.mean(pruned)), cluster_bootstrap(pruned)
        value, low, high = (shown(metric, one) for one in (mean, *ci95))
        each = [shown(metric, float(own.mean())) for own in pruned]
        beside = {f"minus {against}": _minus_control(group, pruned, control, against)} if against else {}
        out.append(
            {
                **dict(zip(by, names, strict=True)),
                "draws": str(len(group)),
                metric: _interval(value, (low, high)),
                "deviation of draws": f"{np.std(each, ddof=1):.3f}" if len(group) > 1 else "",
                "difference to dense": _mean(gaps) + _unit(metric),
                **beside,
                **{k: f"{np.mean([s[v] for s in scores]):.{d}f}" for k, v, d in _MEANS if v in scores[0]},
            }
        )
    return _filled(out)


_MEANS = (("tokens", "mean_tokens", 1), ("cut", "truncated", 3), ("looping", "looping", 3))


def _check_problems(group: Sequence[Cell]) -> None:
    tried = {cell.path: (cell.metric, _by_id(cell.outcomes("pruned")).keys()) for cell in group}
    if odd := [path for path, ids in tried.items() if ids != tried[group[0].path]]:
        raise ValueError(
            f"{group[0].path} and {odd[0]} were tried on different problems and have no common mean: give one sweep, "
            "or --by with the fields that tell them apart"
        )


def _check_fields(option: str, given: Sequence[str], cells: Sequence[Cell]) -> None:
    valid = list(cells[0].fields)
    if unknown := [f for f in given if f not in valid]:
        raise ValueError(f"{option} {','.join(unknown)}: no such field; valid are {', '.join(valid)}")


def _twin(cell: Cell, against: str) -> tuple[str, ...]:
    """What a cell and its control agree in: all but the field compared and, between sources, the filters."""
    field = against.partition("=")[0]
    free = {field} | (_FILTERS if field == "calib" else set())
    return tuple(value for name, value in cell.fields.items() if name.partition(".")[0] not in free)


def _control(cells: Sequence[Cell], against: str) -> dict[tuple[str, ...], NDArray[np.float64]]:
    """Share of right attempts by problem of each cell of the control."""
    field, _, value = against.partition("=")
    _check_fields("--against", [field], cells)
    chosen = [cell for cell in cells if cell.fields[field] == value]
    if not chosen:
        there = sorted({cell.fields[field] for cell in cells})
        raise ValueError(f"--against {against}: no such cell; {field} here is {', '.join(there)}")
    return {_twin(cell, against): values(cell, "pruned") for cell in chosen}


def _minus_control(
    group: Sequence[Cell],
    right_DP: Sequence[NDArray[np.float64]],
    control: Mapping[tuple[str, ...], NDArray[np.float64]],
    against: str,
) -> str:
    """Mean paired difference to the control; nothing for the control itself and where a draw has no control."""
    field, _, value = against.partition("=")
    twins = [control.get(_twin(cell, against)) for cell in group]
    gaps = [right_P - twin_P for right_P, twin_P in zip(right_DP, twins, strict=True) if twin_P is not None]
    itself = any(cell.fields[field] == value for cell in group)
    return "" if itself or len(gaps) < len(group) else _mean(gaps)


def _mean(gaps_DP: Sequence[NDArray[np.float64]]) -> str:
    return _interval(float(np.mean(gaps_DP)), cluster_bootstrap(gaps_DP), signed=True)


def values(cell: Cell, which: str) -> NDArray[np.float64]:
    """Share of right attempts by problem, or the values of items, in the order of ids; their plain mean is the score's."""
    return np.array(list(_by_id(cell.outcomes(which)).values()))


@lru_cache(maxsize=1024)
def _by_id(path: Path) -> dict[str, float]:
    try:
        if set(columns(path)) >= ITEM:
            items = sorted(read_items(path), key=lambda item: item.id)
            mean = np.mean([item.weight for item in items])
            return {item.id: item.value * item.weight / float(mean) for item in items}
        attempts = read_outcomes(path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}): give the whole folder of a run or a sweep, with the folder "
            "outcomes beside each result.json"
        ) from error
    right: dict[str, list[bool]] = defaultdict(list)
    for outcome in attempts:
        right[outcome.problem_id].append(outcome.verdict is Verdict.RIGHT)
    return {problem: float(np.mean(right[problem])) for problem in sorted(right)}


def _score(score: dict[str, Any]) -> dict[str, str]:
    if "attempts" not in score:
        return {score["metric"]: _interval(score["value"], score["ci95"])}
    return {
        "accuracy": _interval(score["accuracy"], score["ci95"]),
        "tokens": f"{score['mean_tokens']:.1f}",
        "cut": f"{100 * score['truncated']:.1f} %{' !' if score['truncated'] > MANY_CUT else ''}",
        "looping": f"{100 * score['looping']:.1f} %",
    }


def _interval(mean: float, ci95: Sequence[float], signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{mean:{sign}.3f} [{ci95[0]:{sign}.3f}, {ci95[1]:{sign}.3f}]"


def show(content: Rows, title: str | None = None) -> None:
    """Print a table; where the terminal is too narrow for it, a block of lines for each row: no figure is ever cut."""
    console = Console()
    whole = rich_table(content, title)
    wanted = Measurement.get(Console(width=_ENDLESS), Console(width=_ENDLESS).options, whole).maximum
    if not console.is_terminal:
        Console(width=wanted).print(whole)
    elif wanted <= console.width:
        console.print(whole)
    else:
        console.print(title or "", end="\n" if title else "", markup=False)
        width = max(map(len, content[0]))
        for row in content:
            lines = [f"{name:<{width}}  {value}" for name, value in row.items() if value]
            console.print("\n".join(lines), markup=False, highlight=False, end="\n\n", soft_wrap=True)


_ENDLESS = 10_000  # columns: wider than any table


def rich_table(content: Rows, title: str | None = None) -> Table:
    """A table for the terminal."""
    out = Table(title=title, title_justify="left")
    for column in content[0]:
        text = column in (
            "model",
            "calib",
            "pruner",
            "difficulty",
            "length",
            "scope",
            "bench",
            "balance",
            "allocation",
            "propagate",
        )
        out.add_column(column, justify="left" if text else "right", no_wrap=True)
    for row in content:
        out.add_row(*(Text(value) for value in row.values()))
    return out


def markdown(content: Rows) -> str:
    """A Markdown table."""
    lines = [list(content[0]), ["---"] * len(content[0]), *[list(row.values()) for row in content]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def comma_separated(content: Rows) -> str:
    """A CSV table."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(content[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(content)
    return out.getvalue().rstrip("\n")
