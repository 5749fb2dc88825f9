"""Figures of what was found, as Vega-Lite by Altair, from plain records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from ssgr.report.figures import ROWS, Absent, Figure, Records
from ssgr.report.groups import Group, label

_CLEAR = 4  # series whose bands do not hide one another
MANY = 8  # series that colours and shapes can tell apart
PANELS = 8  # heat maps side by side
_SHAPES = ["circle", "square", "triangle-up", "cross", "triangle-down", "triangle-right", "triangle-left", "stroke"]


def of_group(group: Group) -> list[Figure | Absent]:
    """Every figure of what one model found on one benchmark."""
    made = [
        intervals(group),
        differences(group),
        tokens(group),
        heat(group),
        *against_sparsity(group),
        against_budget(group),
        draws(group),
        by_level(group),
    ]
    return [one for one in made if one is not None]


def base(**encoding: Any) -> alt.Chart:
    """A chart of the data set `rows` that is put in when it is drawn."""
    return alt.Chart(alt.NamedData(name=ROWS)).encode(**encoding)


def figure(name: str, title: str, caption: str, rows: Records, chart: Any, wide: bool = False) -> Figure:
    """A figure of a chart; what a screen reader says of it is its title and caption."""
    spec = chart.to_dict()
    spec.pop("config", None)
    if isinstance(spec.get("height"), dict):  # steps: only the width fits its place
        spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    spec["description"] = f"{title}. {caption}"
    return Figure(name, title[:1].upper() + title[1:], caption, rows, spec, wide)


def _name(group: Group, what: str) -> str:
    return f"{what}_{group.model}_{group.bench}".replace("/", "_").replace(" ", "_")


def _said(group: Group) -> str:
    """What every caption of a group ends with: of what its means are, and what is mixed in it."""
    out = f"{group.model} on {group.bench}; 95 % intervals over {group.repeats}."
    if group.trouble:
        out = f"{group.model} on {group.bench}; one draw each, 95 % intervals over problems."
    if len(group.budgets) > 1:
        out += f" Budgets differ ({', '.join(group.budgets)} tokens) and are told apart."
    return out


def metric_title(group: Group) -> str:
    """The metric with its unit and direction."""
    return "perplexity (lower is better)" if group.metric == "perplexity" else group.metric


def _y(group: Group, title: str | None = None) -> alt.Y:
    return alt.Y("value:Q", title=title or metric_title(group), scale=alt.Scale(zero=False))


def intervals(group: Group) -> Figure:
    """Every mean with its interval, dense first."""
    rows = _only(group.records, "label", "kind", "value", "low", "high", "draw", "seed", "problem")
    chart = base(y=alt.Y("label:N", sort=None, title=None, axis=alt.Axis(labelLimit=280)))
    x = alt.X("low:Q", title=metric_title(group), scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=8))
    bars = chart.mark_rule(strokeWidth=2).encode(x=x, x2="high:Q")
    marks = alt.Shape("kind:N", title=None, scale=alt.Scale(domain=["dense", "pruned"], range=["diamond", "circle"]),
                      legend=alt.Legend(orient="top"))  # fmt: skip
    points = chart.mark_point(filled=True, size=70, opacity=1).encode(
        x="value:Q", shape=marks, tooltip=["label:N", "value:Q", "low:Q", "high:Q", "draw:Q", "seed:Q", "problem:Q"]
    )
    drawn = (bars + points).properties(width="container", height=alt.Step(22))
    return figure(_name(group, "leaderboard"), f"Leaderboard: {group.metric}", _said(group), rows, drawn, wide=True)


def differences(group: Group) -> Figure | Absent:
    """Every paired difference to dense, and to the control where there is one."""
    rows = []
    for row in group.pruned:
        for which, against in (("to_dense", "dense"), ("to_control", (group.control or "").partition("=")[2])):
            if which in row:
                unsure = row.get(f"{which}_unsure")
                told = "not known" if unsure is None else "no, may be zero" if unsure else "yes"
                rows.append(
                    {"label": row["label"], "against": against, "difference": row[which], "low": row[f"{which}_low"],
                     "high": row[f"{which}_high"], "p_adjusted": row.get(f"{which}_p"), "told_apart": told,
                     "draw": row["draw"], "seed": row["seed"]}
                )  # fmt: skip
    unit = " (nats a token)" if group.metric == "perplexity" else ""
    chart = base(
        y=alt.Y("label:N", sort=None, title=None, axis=alt.Axis(labelLimit=280)), yOffset=alt.YOffset("against:N")
    )
    against_ = alt.Color("against:N", title="minus", legend=alt.Legend(orient="top"))
    x = alt.X("low:Q", title=f"difference of {group.metric}{unit}", axis=alt.Axis(tickCount=8))
    bars = chart.mark_rule(strokeWidth=2).encode(x=x, x2="high:Q", color=against_)
    apart = alt.Scale(domain=["yes", "no, may be zero", "not known"], range=["circle", "cross", "square"])
    told_apart = alt.Shape("told_apart:N", title="told apart", legend=alt.Legend(orient="top"), scale=apart)
    points = chart.mark_point(filled=True, size=60, opacity=1).encode(
        x="difference:Q", color=against_, shape=told_apart,
        tooltip=["label:N", "against:N", "difference:Q", "low:Q", "high:Q", "p_adjusted:Q", "told_apart:N"],
    )  # fmt: skip
    zero = alt.Chart(alt.NamedData(name=ROWS)).mark_rule(strokeDash=[3, 3]).encode(x=alt.datum(0))
    height = alt.Step(16 if group.control else 22)
    drawn = (zero + bars + points).properties(width="container", height=height)
    caption = (
        "Paired by problem, draw and seed; p after Holm's correction over all differences of this figure to the same model. "
        f"A cross marks what is not told apart from zero. {_said(group)}"
    )
    return figure(_name(group, "differences"), "Paired differences", caption, rows, drawn, wide=True)


def tokens(group: Group) -> Figure | None:
    """Accuracy against the mean length of responses."""
    some = [row for row in group.records if "tokens" in row]
    if not some:
        return None
    rows = _only(some, "label", "kind", "calib", "pruner", "value", "low", "high", "tokens", "cut", "draw", "seed")
    several = "pruner" in group.varied
    for row in rows:
        row["colour"] = row["calib"] or "dense"
        row["shape"] = (row["pruner"] or "dense") if several else row["colour"]
    colours, shapes = _distinct(rows, "colour"), _distinct(rows, "shape")
    chart = base(
        x=alt.X("tokens:Q", title="mean response tokens", scale=alt.Scale(zero=False)), color=color("colour", colours)
    )
    bars = chart.mark_rule(strokeWidth=1.5, opacity=0.6).encode(
        y=alt.Y("low:Q", title=metric_title(group)), y2="high:Q"
    )
    points = chart.mark_point(filled=True, size=90, opacity=1).encode(
        y="value:Q",
        shape=shape("shape", shapes),
        tooltip=["label:N", "value:Q", "low:Q", "high:Q", "tokens:Q", "cut:Q"],
    )
    drawn = (bars + points).properties(width="container", height=320)
    return figure(_name(group, "tokens"), f"{group.metric} against tokens", _said(group), rows, drawn)


def heat(group: Group) -> Figure | Absent | None:
    """Accuracy by difficulty and length, a panel for each setting of the rest."""
    by: dict[str, Records] = {}
    keys: dict[str, set[str]] = {}
    for row, (_, cell) in zip(group.pruned, group.labelled, strict=True):
        panel = label(cell, group.varied, without=("difficulty", "length"))
        by.setdefault(panel, []).append({"panel": panel, **row})
        keys.setdefault(panel, set()).add(cell.key("pruned"))
    title = "Difficulty and length"
    fit = [name for name, own in by.items() if len(own) > 1 and len(keys[name]) > 1]
    if not fit or not {"difficulty", "length"} & set(group.varied):
        return Absent(title, "Its cells have one band each: python run.py -m calib=ssgr difficulty=easy,medium,hard "
                             "length=short,medium,long fills this map.")  # fmt: skip
    chosen = [row for name in fit[:PANELS] for row in by[name]]
    rows = _only(chosen, "panel", "difficulty", "length", "value", "low", "high", "draw", "seed", "problem")
    for row in rows:
        row["interval"] = f"[{row['low']:.3f}, {row['high']:.3f}]"
        row["counts"] = f"{row['draw']} × {row['seed']} × {row['problem']}"
    high, low = max(row["value"] for row in rows), min(row["value"] for row in rows)
    ink = alt.condition(alt.datum.value > low + 0.55 * (high - low), alt.value("white"), alt.value("black"))
    chart = base(
        x=alt.X("length:N", title="length", sort=None, axis=alt.Axis(labelAngle=0)),
        y=alt.Y("difficulty:N", title="difficulty", sort=None),
    )
    squares = chart.mark_rect().encode(
        color=alt.Color("value:Q", title=metric_title(group), scale=alt.Scale(scheme="blues"), legend=alt.Legend(orient="top")),
        tooltip=["panel:N", "difficulty:N", "length:N", "value:Q", "low:Q", "high:Q", "draw:Q", "seed:Q", "problem:Q"],
    )  # fmt: skip
    texts = [
        chart.mark_text(dy=dy, fontSize=size).encode(text=alt.Text(what, format=form) if form else what, color=ink)
        for dy, size, what, form in ((-14, 15, "value:Q", ".3f"), (3, 11, "interval:N", ""), (18, 10, "counts:N", ""))
    ]
    drawn = alt.layer(squares, *texts).properties(width=alt.Step(112), height=alt.Step(62))
    drawn = drawn.facet(facet=alt.Facet("panel:N", title=None, sort=fit[:PANELS]), columns=2)
    more = f" {len(fit) - PANELS} more panels are in the leaderboard." if len(fit) > PANELS else ""
    caption = f"In each square the mean, its interval, and draws × seeds × problems. {_said(group)}{more}"
    return figure(_name(group, "heat"), title, caption, rows, drawn, wide=len({row["length"] for row in rows}) > 2)


def against_sparsity(group: Group) -> list[Figure | Absent]:
    """Accuracy, and tokens, against the share of zeros, with the dense model as a line."""
    title = f"{group.metric} against sparsity"
    if "sparsity" not in group.varied:
        return [Absent(title, "Its cells have one sparsity: python run.py experiment=sparsity draws this curve.")]
    out: list[Figure | Absent] = []
    rows = _series(group, "sparsity", "ratio")
    caption = f"The dashed line is the dense model, bands are intervals. {_said(group)}"
    chart = lines(rows, "value", "low", "high", "sparsity", metric_title(group), percent=True)
    out.append(figure(_name(group, "sparsity"), title, caption, rows, chart))
    if all("tokens" in row for row in rows):
        caption = f"The dashed line is the dense model, bands reach from the lowest to the highest draw. {_said(group)}"
        chart = lines(rows, "tokens", "tokens_low", "tokens_high", "sparsity", "mean response tokens", percent=True)
        out.append(figure(_name(group, "sparsity_tokens"), "Tokens against sparsity", caption, rows, chart))
    return out


def against_budget(group: Group) -> Figure | None:
    """Accuracy against the budget of calibration tokens, where that differs."""
    if len(group.budgets) < 2 or not all(budget.isdigit() for budget in group.budgets):
        return None
    rows = _series(group, "budget", "budget")
    for row in rows:
        row["x"] = None if row["x"] is None else float(row["x"])
    caption = f"The dashed line is the dense model, bands are intervals. {_said(group)}"
    chart = lines(rows, "value", "low", "high", "calibration tokens", metric_title(group))
    return figure(_name(group, "budget"), f"{group.metric} against the budget", caption, rows, chart)


def _series(group: Group, without: str, x: str) -> Records:
    """The records as lines: `x`, a series for each setting of all but the field `without`, and panels where they are many."""
    every = [label(cell, group.varied, without=(without,)) for _, cell in group.labelled]
    split = len(set(every)) > _CLEAR and "calib" in group.varied
    columns = ("kind", "value", "low", "high", "tokens", "tokens_low", "tokens_high", "draw", "seed", "problem")
    rows = []
    for (_, cell), name, row in zip(group.labelled, every, group.pruned, strict=True):
        panel = cell.fields["calib"] if split else ""
        own = label(cell, group.varied, without=(without, "calib")) if split else name
        rows.append({"panel": panel, "series": own, "x": row[x], **_only([row], *columns)[0]})
    panels = dict.fromkeys(row["panel"] for row in rows)
    dense = [
        {"panel": p, "series": "dense", "x": None, **_only([row], *columns)[0]} for row in group.dense for p in panels
    ]
    return dense + rows


def lines(rows: Records, y: str, low: str, high: str, x_title: str, y_title: str, percent: bool = False) -> Any:
    """Lines with bands, a colour and shape a series, over the dashed line of the dense model."""
    series = [name for name in _distinct(rows, "series") if name != "dense"]
    panels = _distinct(rows, "panel")
    scale = alt.Scale(zero=False, padding=14) if percent else alt.Scale(type="log", padding=14)
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


def panelled(chart: Any, field: str, order: list[str], beside: int) -> Any:
    """A panel for each value of a field; `beside` are the pixels that axis and labels of each take beside its width."""
    faceted = chart.facet(facet=alt.Facet(f"{field}:N", title=None, sort=order), columns=2)
    return faceted.properties(usermeta={"beside": beside})


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
            y=alt.Y("label:N", sort=None, title=None, axis=alt.Axis(labelLimit=280)),
            x=alt.X("value:Q", title=metric_title(group), scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=8)),
            tooltip=["label:N", "draw:N", "seed:N", "value:Q"],
        )
        .mark_tick(thickness=2, size=14)
        .properties(width="container", height=alt.Step(20))
    )
    caption = f"A line for each draw of the calibration set and seed of the attempts. {group.model} on {group.bench}."
    return figure(_name(group, "draws"), title, caption, rows, drawn, wide=True)


def by_level(group: Group) -> Figure | None:
    """Accuracy by level of the problems, as far as they have levels; plain means over draws."""
    by: dict[tuple[str, str], list[float]] = {}
    names: dict[str, str] = {}
    for cell in group.cells:
        for which in ("dense", "pruned"):
            name = "dense" if which == "dense" else label(cell, group.varied)
            names[name] = "dense" if which == "dense" else cell.fields["calib"]
            for level, value in (cell.score[which].get("by_level") or {}).items():
                by.setdefault((name, level), []).append(value)
    if len({level for _, level in by}) < 2:
        return None
    few = len(names) <= MANY
    rows = [
        {"series": name, "colour": name if few else names[name], "level": level, "accuracy": float(f"{sum(v) / len(v):.6g}")}
        for (name, level), v in by.items()
    ]  # fmt: skip
    levels = {level for _, level in by}
    numbers = all(level.lstrip("-").isdigit() for level in levels)
    order = sorted(levels, key=lambda level: (int(level) if numbers else 0, level))
    colours = _distinct(rows, "colour")
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
        f" {group.model} on {group.bench}."
    )
    return figure(
        _name(group, "levels"), "Accuracy by level", caption, rows, drawn.properties(width="container", height=300)
    )


def _only(rows: Sequence[dict[str, Any]], *columns: str) -> Records:
    return [{name: row[name] for name in columns if name in row} for row in rows]


def _distinct(rows: Records, name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


def legend(values: Sequence[str]) -> alt.Legend:
    """A legend above the chart, in two columns if its labels are short."""
    return alt.Legend(
        orient="top", columns=2 if max(map(len, values), default=0) < 24 else 1, labelLimit=330, symbolOpacity=1
    )


def color(name: str, values: list[str]) -> alt.Color:
    """A colour a value; with `shape` of the same values it shares a legend."""
    return alt.Color(f"{name}:N", title=None, scale=alt.Scale(domain=values), legend=legend(values))


def shape(name: str, values: list[str]) -> alt.Shape:
    """A shape a value, the dense model's a diamond."""
    shapes = ["diamond" if value == "dense" else _SHAPES[i % len(_SHAPES)] for i, value in enumerate(values)]
    return alt.Shape(f"{name}:N", title=None, scale=alt.Scale(domain=values, range=shapes), legend=legend(values))
