"""Figures of what was found against something: sparsity, budget, draws and levels of the problems."""

from __future__ import annotations

from typing import Any

import altair as alt

from ssgr.report.cells import Cell
from ssgr.report.drawing import MANY, base, color, distinct, figure, metric_title, name_of, only, panelled, said, shape
from ssgr.report.figures import Absent, Figure, Records
from ssgr.report.groups import Group, label

_CLEAR = 4  # series whose bands do not hide one another


def against_sparsity(group: Group) -> list[Figure | Absent]:
    """Accuracy, and tokens, against the share of zeros, with the dense model as a line."""
    title = f"{group.metric} against sparsity".capitalize()
    if "sparsity" not in group.varied:
        return [Absent(title, "Its cells have one sparsity: python run.py experiment=sparsity draws this curve.")]
    out: list[Figure | Absent] = []
    rows = _series(group, "sparsity", "ratio")
    caption = f"The dashed line is the dense model, bands are intervals. {said(group)}"
    chart = lines(rows, "value", "low", "high", "sparsity", metric_title(group), percent=True)
    out.append(figure(name_of(group, "sparsity"), title, caption, rows, chart))
    if all("tokens" in row for row in rows):
        caption = f"The dashed line is the dense model, bands reach from the lowest to the highest draw. {said(group)}"
        chart = lines(rows, "tokens", "tokens_low", "tokens_high", "sparsity", "mean response tokens", percent=True)
        out.append(figure(name_of(group, "sparsity_tokens"), "Tokens against sparsity", caption, rows, chart))
    return out


def against_budget(group: Group) -> Figure | None:
    """Accuracy against the budget of calibration tokens, where that differs."""
    if len(group.budgets) < 2 or not all(budget.isdigit() for budget in group.budgets):
        return None
    rows = _series(group, "budget", "budget")
    for row in rows:
        row["x"] = None if row["x"] is None else float(row["x"])
    caption = f"The dashed line is the dense model, bands are intervals. {said(group)}"
    chart = lines(rows, "value", "low", "high", "calibration tokens", metric_title(group))
    return figure(name_of(group, "budget"), f"{group.metric} against the budget", caption, rows, chart)


def _series(group: Group, without: str, x: str) -> Records:
    """The records as lines: `x`, a series for each setting of all but the field `without`, and panels where they are many."""
    every = [_name(cell, group, without) for _, cell in group.labelled]
    split = len(set(every)) > _CLEAR and "calib" in group.varied
    columns = ("kind", "value", "low", "high", "tokens", "tokens_low", "tokens_high", "draw", "seed", "problem")
    rows = []
    for (_, cell), name, row in zip(group.labelled, every, group.pruned, strict=True):
        panel = cell.fields["calib"] if split else ""
        own = _name(cell, group, without, "calib") if split else name
        rows.append({"panel": panel, "series": own, "x": row[x], **only([row], *columns)[0]})
    panels = dict.fromkeys(row["panel"] for row in rows)
    dense = [
        {"panel": p, "series": "dense", "x": None, **only([row], *columns)[0]} for row in group.dense for p in panels
    ]
    return dense + rows


def _name(cell: Cell, group: Group, *without: str) -> str:
    """The series of a cell; along the sparsity each N:M is its own, as its zeros lie otherwise than those of a bare share."""
    name, sparsity = label(cell, group.varied, without), cell.fields["sparsity"]
    return f"{name}, {sparsity}" if "sparsity" in without and ":" in sparsity else name


def lines(rows: Records, y: str, low: str, high: str, x_title: str, y_title: str, percent: bool = False) -> Any:
    """Lines with bands, a colour and shape a series, over the dashed line of the dense model."""
    series = [name for name in distinct(rows, "series") if name != "dense"]
    panels = distinct(rows, "panel")
    scale = alt.Scale(zero=False, padding=14) if percent else alt.Scale(type="log", nice=False, padding=14)
    xs = sorted({row["x"] for row in rows if row["x"] is not None})
    axis = alt.Axis(values=xs, format=".0%" if percent else ",", grid=False)
    pruned = base(x=alt.X("x:Q", title=x_title, scale=scale, axis=axis), color=color("series", series))
    pruned = pruned.transform_filter("datum.kind == 'pruned'")
    bands = pruned.mark_area(opacity=0.13).encode(
        y=alt.Y(f"{low}:Q", title=y_title, scale=alt.Scale(zero=False)), y2=f"{high}:Q"
    )
    line = pruned.mark_line(strokeWidth=2).encode(y=f"{y}:Q")
    points = pruned.mark_point(filled=True, size=60, opacity=1).encode(
        y=f"{y}:Q",
        shape=shape("series", series),
        tooltip=["panel:N", "series:N", "x:Q", f"{y}:Q", f"{low}:Q", f"{high}:Q"],
    )
    dense = base().transform_filter("datum.kind == 'dense'").mark_rule(strokeDash=[6, 4], strokeWidth=1.5)
    drawn = bands + line + points + dense.encode(y=f"{y}:Q")
    if len(panels) == 1:
        return drawn.properties(width="container", height=300)
    return panelled(drawn.properties(width=200, height=190), "panel", panels, beside=70)


def draws(group: Group) -> Figure | Absent:
    """What every draw and seed found by itself."""
    title = "Draws"
    if "draw" not in group.varied and "seed" not in group.varied:
        return Absent(title, "Each setting was drawn once: calib.draw=range(5) shows how far draws lie apart.")
    rows = []
    for cell in group.cells:
        score = cell.score["pruned"]
        rows.append({"label": label(cell, group.varied), "draw": cell.fields["draw"], "seed": cell.fields["seed"],
                     "value": score.get("accuracy", score.get("value"))})  # fmt: skip
    drawn = (
        base(
            y=alt.Y("label:N", sort=None, title=None, axis=alt.Axis(labelLimit=340)),
            x=alt.X("value:Q", title=metric_title(group), scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=8)),
            tooltip=["label:N", "draw:N", "seed:N", "value:Q"],
        )
        .mark_tick(thickness=2, size=14, opacity=1)
        .properties(width="container", height=alt.Step(20))
    )
    caption = f"A line for each draw of the calibration set and seed of the attempts. {group.title}."
    return figure(name_of(group, "draws"), title, caption, rows, drawn, wide=True)


def by_level(group: Group) -> Figure | None:
    """Accuracy by level of the problems, as far as they have levels; plain means over draws."""
    settings = {label(cell, group.varied) for cell in group.cells}
    split = len(settings) > _CLEAR and "calib" in group.varied
    panels = list(dict.fromkeys(cell.fields["calib"] for cell in group.cells)) if split else [""]
    without = ("calib",) if split else ()
    by: dict[tuple[str, str, str], list[float]] = {}
    for cell in group.cells:
        own = cell.fields["calib"] if split else ""
        for level, value in (cell.score["pruned"].get("by_level") or {}).items():
            by.setdefault((own, label(cell, group.varied, without), level), []).append(value)
        for level, value in (cell.score["dense"].get("by_level") or {}).items():
            for panel in panels:
                by.setdefault((panel, "dense", level), []).append(value)
    if len({level for *_, level in by}) < 2:
        return None
    few = len({series for _, series, _ in by}) <= MANY
    rows = [
        {"panel": panel, "series": series, "colour": series if few or series == "dense" else "pruned", "level": level,
         "accuracy": float(f"{sum(values) / len(values):.6g}")}
        for (panel, series, level), values in by.items()
    ]  # fmt: skip
    levels = {level for *_, level in by}
    numbers = all(level.lstrip("-").isdigit() for level in levels)
    order = sorted(levels, key=lambda level: (int(level) if numbers else 0, level))
    colours = distinct(rows, "colour")
    chart = base(
        x=alt.X("level:N", title="level of the problem", sort=order, axis=alt.Axis(labelAngle=0)),
        y=alt.Y("accuracy:Q", scale=alt.Scale(domain=[0, 1])),
        color=color("colour", colours), detail="series:N",
        tooltip=["series:N", "level:N", "accuracy:Q"],
    )  # fmt: skip
    drawn = chart.mark_line(strokeWidth=2) + chart.mark_point(filled=True, size=60, opacity=1).encode(
        shape=shape("colour", colours)
    )
    caption = (
        "Means over draws and seeds without intervals: a level has too few problems for a claim by itself."
        f" {group.title}."
    )
    drawn = drawn.properties(width=200, height=190) if split else drawn.properties(width="container", height=300)
    if split:
        drawn = panelled(drawn, "panel", panels, beside=70)
    return figure(name_of(group, "levels"), "Accuracy by level", caption, rows, drawn)
