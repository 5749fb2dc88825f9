"""Figures of what was found, as Vega-Lite by Altair, from plain records."""

from __future__ import annotations

import altair as alt

from ssgr.report.curves import against_budget, against_sparsity, by_level, draws
from ssgr.report.drawing import base, color, distinct, figure, metric_title, name_of, only, said, shape
from ssgr.report.figures import ROWS, Absent, Figure, Records
from ssgr.report.groups import Group, label

PANELS = 8  # heat maps side by side


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
    return sorted((one for one in made if one is not None), key=_place)


def _place(one: Figure | Absent) -> int:
    """Wide figures first, so that none leaves a hole beside another; last what is not there."""
    return 2 if isinstance(one, Absent) else 1 - one.wide


def intervals(group: Group) -> Figure:
    """Every mean with its interval, dense first."""
    rows = only(group.records, "label", "kind", "value", "low", "high", "draw", "seed", "problem")
    chart = base(y=alt.Y("label:N", sort=None, title=None, axis=alt.Axis(labelLimit=340)))
    x = alt.X("low:Q", title=metric_title(group), scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=8))
    bars = chart.mark_rule(strokeWidth=2).encode(x=x, x2="high:Q")
    marks = alt.Shape("kind:N", title=None, scale=alt.Scale(domain=["dense", "pruned"], range=["diamond", "circle"]),
                      legend=alt.Legend(orient="top"))  # fmt: skip
    points = chart.mark_point(filled=True, size=70, opacity=1).encode(
        x="value:Q", shape=marks, tooltip=["label:N", "value:Q", "low:Q", "high:Q", "draw:Q", "seed:Q", "problem:Q"]
    )
    drawn = (bars + points).properties(width="container", height=alt.Step(22))
    return figure(name_of(group, "leaderboard"), f"Leaderboard: {group.metric}", said(group), rows, drawn, wide=True)


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
        y=alt.Y("label:N", sort=None, title=None, axis=alt.Axis(labelLimit=340)), yOffset=alt.YOffset("against:N")
    )
    against_ = alt.Color("against:N", title="minus", legend=alt.Legend(orient="top"))
    x = alt.X("low:Q", title=f"difference of {group.metric}{unit}", axis=alt.Axis(tickCount=8))
    bars = chart.mark_rule(strokeWidth=2).encode(x=x, x2="high:Q", color=against_)
    shapes = {"yes": "circle", "no, may be zero": "cross", "not known": "square"}
    there = [told for told in shapes if any(row["told_apart"] == told for row in rows)]
    apart = alt.Scale(domain=there, range=[shapes[told] for told in there])
    told_apart = alt.Shape("told_apart:N", title="told apart", legend=alt.Legend(orient="top"), scale=apart)
    points = chart.mark_point(filled=True, size=60, opacity=1).encode(
        x="difference:Q", color=against_, shape=told_apart,
        tooltip=["label:N", "against:N", "difference:Q", "low:Q", "high:Q", "p_adjusted:Q", "told_apart:N"],
    )  # fmt: skip
    zero = alt.Chart(alt.NamedData(name=ROWS)).mark_rule(strokeDash=[3, 3]).encode(x=alt.datum(0))
    height = alt.Step(16 if group.control else 22)
    drawn = (zero + bars + points).properties(width="container", height=height)
    caption = (
        f"Paired by {group.unit}, draw and seed; p after Holm's correction over all differences of this figure to the same "
        f"model. A cross marks what is not told apart from zero. {said(group)}"
    )
    return figure(name_of(group, "differences"), "Paired differences", caption, rows, drawn, wide=True)


def tokens(group: Group) -> Figure | None:
    """Accuracy against the mean length of responses."""
    some = [row for row in group.records if "tokens" in row]
    if not some:
        return None
    rows = only(some, "label", "kind", "calib", "pruner", "value", "low", "high", "tokens", "cut", "draw", "seed")
    several = "pruner" in group.varied
    for row in rows:
        row["colour"] = row["calib"] or "dense"
        row["shape"] = (row["pruner"] or "dense") if several else row["colour"]
    colours, shapes = distinct(rows, "colour"), distinct(rows, "shape")
    x = alt.X("tokens:Q", title="mean response tokens", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=6))
    chart = base(x=x, color=color("colour", colours))
    bars = chart.mark_rule(strokeWidth=1.5, opacity=0.6).encode(
        y=alt.Y("low:Q", title=metric_title(group)), y2="high:Q"
    )
    points = chart.mark_point(filled=True, size=90, opacity=1).encode(
        y="value:Q",
        shape=shape("shape", shapes),
        tooltip=["label:N", "value:Q", "low:Q", "high:Q", "tokens:Q", "cut:Q"],
    )
    drawn = (bars + points).properties(width="container", height=320)
    return figure(name_of(group, "tokens"), f"{group.metric} against tokens", said(group), rows, drawn)


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
    rows = only(chosen, "panel", "difficulty", "length", "value", "low", "high", "draw", "seed", "problem")
    for row in rows:
        row["interval"] = f"[{row['low']:.3f}, {row['high']:.3f}]"
        row["counts"] = f"{row['draw']} × {row['seed']} × {row['problem']}"
    high, low = max(row["value"] for row in rows), min(row["value"] for row in rows)
    ink = alt.condition(alt.datum.value > low + 0.68 * (high - low), alt.value("white"), alt.value("black"))
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
    caption = f"In each square the mean, its interval, and draws × seeds × {group.unit}s. {said(group)}{more}"
    return figure(name_of(group, "heat"), title, caption, rows, drawn, wide=len({row["length"] for row in rows}) > 2)
