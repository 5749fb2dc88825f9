"""What every figure is drawn with: its data set, names, panels, colours and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from ssgr.report.figures import ROWS, Figure, Records
from ssgr.report.groups import Group

MANY = 8  # series that colours and shapes can tell apart
_SHAPES = ["circle", "square", "triangle-up", "cross", "triangle-down", "triangle-right", "triangle-left", "stroke"]


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


def name_of(group: Group, what: str) -> str:
    return (
        "_".join(part for part in (what, group.sweep, group.model, group.bench) if part)
        .replace("/", "_")
        .replace(" ", "_")
    )


def said(group: Group) -> str:
    """What every caption of a group ends with: of what its means are, and what is mixed in it."""
    out = f"{group.title}; 95 % intervals over {group.repeats}."
    if group.trouble:
        out = f"{group.title}; one draw each, 95 % intervals over {group.unit}s."
    if len(group.budgets) > 1:
        out += f" Budgets differ ({', '.join(group.budgets)} tokens) and are told apart."
    return out


def metric_title(group: Group) -> str:
    """The metric with its unit and direction."""
    return "perplexity (lower is better)" if group.metric == "perplexity" else group.metric


def panelled(chart: Any, field: str, order: list[str], beside: int) -> Any:
    """A panel for each value of a field; `beside` are the pixels that axis and labels of each take beside its width."""
    faceted = chart.facet(facet=alt.Facet(f"{field}:N", title=None, sort=order), columns=2)
    return faceted.properties(usermeta={"beside": beside})


def only(rows: Sequence[dict[str, Any]], *columns: str) -> Records:
    return [{name: row[name] for name in columns if name in row} for row in rows]


def distinct(rows: Records, name: str) -> list[str]:
    """The values of a column; the dense model first, so that it has the same colour everywhere."""
    return sorted(dict.fromkeys(row[name] for row in rows), key=lambda value: value != "dense")


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
