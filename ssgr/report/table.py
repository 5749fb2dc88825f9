"""Tables of results: one row a cell and one for each dense model, or means over draws and seeds; text, Markdown or CSV."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ssgr.records import MANY_CUT, PERPLEXITY
from ssgr.report.cells import Cell, shown_fields
from ssgr.report.compare import Comparison, Gap, compare, draw_of, holds_zero

Rows = list[dict[str, str]]
UNSURE = " ~"  # beside a difference that proves nothing
_LOOK = " !"  # beside what tells of the cap or of the grader rather than of the model
NOTE = "~ the 95 % interval holds zero, or p is 0.05 or more after Holm's correction over the differences of its column"
_DENSE = ("model", "problems", "grader", "bench", "seed")  # fields that the dense model's score may depend on
CELL_NOTE = "~ the 95 % interval holds zero"


def rows(cells: Sequence[Cell]) -> Rows:
    """A row for each dense model, then one for each cell in the order given."""
    shown = shown_fields(cells)
    out: Rows = []
    seen: set[str] = set()
    for cell in cells:
        dense = cell.score["dense"]
        if (key := cell.key("dense")) not in seen:
            seen.add(key)
            names = {f: cell.fields[f] if f.startswith(_DENSE) else "" for f in shown}
            out.append({**names, "calib": "dense", "pruner": "", **_score(dense), "difference to dense": "",
                        "sparsity realised": "0 %", "seconds": _seconds(cell, "dense")})  # fmt: skip
    for cell in cells:
        found, share = cell.score, cell.result["prune"].get("sparsity_realised")
        out.append(
            {
                **{f: cell.fields[f] for f in shown},
                **_score(found["pruned"]),
                "difference to dense": _interval(found["difference"], found["ci95"], signed=True)
                + _unit(cell.metric)
                + (UNSURE if holds_zero(found["ci95"]) else ""),
                "sparsity realised": "" if share is None else f"{100 * share:.1f} %",
                "seconds": _seconds(cell, "pruned"),
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


def _seconds(cell: Cell, which: str) -> str:
    """What the stages took when they were made, whoever made them: those of the dense model's score, or those of the cell."""
    stages = cell.result.get("stages")
    if stages is None:
        return ""
    end = f"_{which}.{cell.fields['bench']}"  # others with a dot are of another benchmark or of the other model
    own = (
        stage["seconds"]
        for name, stage in stages.items()
        if name.endswith(end) or ("." not in name and which == "pruned")
    )
    return f"{sum(own):.0f}"


def _unit(metric: str) -> str:
    return " nats" if metric == PERPLEXITY else ""


def means(cells: Sequence[Cell], by: Sequence[str] | None = None, against: str | None = None) -> Rows:
    """A row for each group of `compare.compare`: means over draws and seeds, and differences, with `~` beside unsure ones.

    Raises:
        ValueError: as `compare.compare` does.
    """
    out: Rows = []
    for found in compare(cells, by, against):
        scores = [cell.score["pruned"] for cell in found.cells]
        unit = _unit(found.metric)
        out.append(
            {
                **found.names,
                "draws": str(found.draws),
                "seeds": str(found.seeds),
                **({"missing": f"{found.missing} of {found.draws * found.seeds}"} if found.missing else {}),
                found.metric: _interval(found.value.mean, found.value.ci95) + _failed(*scores),
                "deviation of draws": _deviation(found),
                "difference to dense": _gap(found.to_dense, unit),
                **({f"minus {against}": _gap(found.to_control, unit)} if against else {}),
                **{k: f"{np.mean([s[v] for s in scores]):.{d}f}" for k, v, d in _MEANS if v in scores[0]},
            }
        )
    return _filled(out)


_MEANS = (("tokens", "mean_tokens", 1), ("cut", "truncated", 3), ("looping", "looping", 3))


def _deviation(found: Comparison) -> str:
    """The standard deviation of the score between draws, each the mean of its cells; blank for one draw."""
    each: dict[str, list[float]] = defaultdict(list)
    for cell in found.cells:
        score = cell.score["pruned"]
        each[" ".join(draw_of(cell))].append(score["accuracy"] if "attempts" in score else score["value"])
    return f"{np.std([np.mean(one) for one in each.values()], ddof=1):.3f}" if found.draws > 1 else ""


def _gap(gap: Gap | None, unit: str) -> str:
    return "" if gap is None else _interval(gap.mean, gap.ci95, signed=True) + unit + (UNSURE if gap.unsure else "")


def _score(score: dict[str, Any]) -> dict[str, str]:
    if "attempts" not in score:
        return {score["metric"]: _interval(score["value"], score["ci95"])}
    return {
        "accuracy": _interval(score["accuracy"], score["ci95"]) + _failed(score),
        "tokens": f"{score['mean_tokens']:.1f}",
        "cut": f"{100 * score['truncated']:.1f} %{_LOOK if score['truncated'] > MANY_CUT else ''}",
        "looping": f"{100 * score['looping']:.1f} %",
    }


def _failed(*scores: dict[str, Any]) -> str:
    """A mark beside an accuracy in which answers count as not right because the grader failed."""
    return _LOOK if any(score.get("grader_failed") for score in scores) else ""


def _interval(mean: float, ci95: Sequence[float], signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{mean:{sign}.3f} [{ci95[0]:{sign}.3f}, {ci95[1]:{sign}.3f}]"


def note(content: Rows) -> str:
    """What the mark beside a difference means; blank where there is none."""
    if not any(value.endswith(UNSURE) for row in content for value in row.values()):
        return ""
    return NOTE if "draws" in content[0] else CELL_NOTE


def show(content: Rows, title: str | None = None) -> None:
    """Print a table and what its mark means; where the terminal is too narrow for it, a block of lines for each row."""
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
    if said := note(content):
        console.print(said, markup=False, highlight=False, soft_wrap=True)


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
    """A Markdown table, and what its mark means."""
    lines = [list(content[0]), ["---"] * len(content[0]), *[list(row.values()) for row in content]]
    said = note(content)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + (f"\n\n{said}" if said else "")


def comma_separated(content: Rows) -> str:
    """A CSV table."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(content[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(content)
    return out.getvalue().rstrip("\n")
