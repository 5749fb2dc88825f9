"""Figures of how models were calibrated and pruned: funnels, pools of traces, layers, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np

from ssgr.difficulty import wrong_shares
from ssgr.report.cells import Cell
from ssgr.report.compare import once
from ssgr.report.drawing import MANY, base, color, figure, legend, panelled, shape
from ssgr.report.figures import Absent, Figure, Records
from ssgr.report.groups import label, six
from ssgr.stages import grade
from ssgr.stages.select import ROWS
from ssgr.tables import read_graded, read_rows

_SELECTIONS = 12  # shown of one model
_BINS = 16
_ASSEMBLED = frozenset({"sparsity", "pruner", "allocation", "propagate", "bench"})  # what no selection depends on


def of_model(model: str, cells: Sequence[Cell]) -> list[Figure | Absent]:
    """Every figure of what the cells of one model selected and pruned."""
    varied = [name for name in cells[0].fields if len({cell.fields[name] for cell in cells}) > 1]
    cells = once(cells)
    selections = _first(cells, "select", varied, without=_ASSEMBLED)
    return [
        *_if(funnels(model, selections)),
        *pools(model, selections),
        *layers(model, _first(cells, "prune", varied, without=frozenset({"bench"}))),
    ]


def _if(one: Figure | Absent | None) -> list[Figure | Absent]:
    return [] if one is None else [one]


def _first(cells: Sequence[Cell], stage: str, varied: Sequence[str], without: frozenset[str]) -> dict[str, Cell]:
    """The first draw of each setting that a stage can tell apart; a setting that changed nothing comes once."""
    out: dict[str, Cell] = {}
    seen: set[str] = set()
    for cell in cells:
        name, key = label(cell, varied, tuple(without)), cell.result["keys"].get(stage, str(cell.path))
        if name not in out and key not in seen:
            out[name] = cell
            seen.add(key)
    return out


def funnels(model: str, selections: dict[str, Cell]) -> Figure | None:
    """What each filter left, a panel for each selection."""
    rows: Records = []
    for name, cell in list(selections.items())[:_SELECTIONS]:
        steps = cell.result.get("calibration", {}).get("funnel", ())
        rows += [
            {"selection": name, "step": f"{i + 1}. {step}", "count": count} for i, (step, count) in enumerate(steps)
        ]
    if not rows:
        return None
    chart = base(
        y=alt.Y("step:N", title=None, sort=None, axis=alt.Axis(labelLimit=170)),
        x=alt.X("count:Q", title="left", axis=None),
    )
    bars = chart.mark_bar(height=14).encode(tooltip=["selection:N", "step:N", "count:Q"])
    texts = chart.mark_text(align="left", dx=4).encode(text=alt.Text("count:Q", format=","))
    drawn = alt.layer(bars, texts).properties(width=150, height=alt.Step(20))
    names = list(dict.fromkeys(row["selection"] for row in rows))
    facet = panelled(drawn, "selection", names, beside=225).resolve_scale(y="independent")
    caption = f"How many rows each filter left for {model}; the first draw of each selection.{_more(selections)}"
    return figure(_name("funnel", model), "Funnel of each selection", caption, rows, facet)


def _more(selections: dict[str, Cell]) -> str:
    left = len(selections) - _SELECTIONS
    return f" {left} more selections are not shown." if left > 0 else ""


def _name(what: str, model: str) -> str:
    return f"{what}_{model}".replace("/", "_").replace(" ", "_")


def pools(model: str, selections: dict[str, Cell]) -> list[Figure | Absent]:
    """Difficulty and length of the pool of traces and of what each selection chose of it."""
    title = "Difficulty and length of the pool"
    graded = [cell for cell in selections.values() if "grade" in cell.result["keys"]]
    if not graded:
        return [Absent(title, "No source here selects among traces: calib=ssgr or calib=self does.")]
    found = next((path for cell in graded if (path := _pool(cell)).exists()), None)
    if found is None:
        return [Absent(title, f"The graded traces lie in the store, and {_pool(graded[0])} is not there any more: give the "
                              "command of the sweep again.")]  # fmt: skip
    shares, lengths = _read(found)
    difficulty, length = {"pool": list(shares.values())}, {"pool": list(lengths.values())}
    difficulty["pool"] = [shares[problem] for problem, _ in lengths if problem in shares]
    for name, cell in list(selections.items())[:_SELECTIONS]:
        rows = cell.path.parent / ROWS
        if _pool(cell) != found or not rows.exists():
            continue
        chosen = [row for row in read_rows(rows)[0] if "#" in row.id]
        problems = [row.id.rpartition("#")[0] for row in chosen]
        if chosen:
            difficulty[name] = [shares[problem] for problem in problems if problem in shares]
            length[name] = [len(row) - row.prompt_tokens for row in chosen]
    said = f"Shares of the traces of {model} in the pool, and of those that the first draw of each selection chose."
    return [
        _histogram(_name("pool_difficulty", model), "Difficulty of the pool and of what was chosen",
                   "share of wrong attempts", difficulty, np.linspace(0, 1, 10), said),
        _histogram(_name("pool_length", model), "Length of the pool and of what was chosen",
                   "response tokens", length, np.histogram_bin_edges(length["pool"], _BINS), said),
    ]  # fmt: skip


def _pool(cell: Cell) -> Path:
    """The graded traces that a selection read; the link to its rows says where the store is."""
    rows = cell.path.parent / ROWS
    store = rows.resolve().parents[2] if rows.is_symlink() else Path(cell.result["config"]["store"]["path"])
    return store / "grade" / str(cell.result["keys"].get("grade", "none")) / grade.GRADED


def _read(path: Path) -> tuple[dict[str, float], dict[tuple[str, int], int]]:
    """The share of wrong attempts by problem, and the tokens of each response."""
    graded = read_graded(path, ids=False)
    return wrong_shares(graded), {(g.trace.problem_id, g.trace.attempt): len(g.trace.generated_ids) for g in graded}


def _histogram(name: str, title: str, unit: str, values: dict[str, list[Any]], edges: Any, said: str) -> Figure:
    rows: Records = []
    for series, own in values.items():
        counts, _ = np.histogram(own, edges)
        rows += [
            {"series": series, "from": float(f"{low:.4g}"), "to": float(f"{high:.4g}"), "count": int(count),
             "share": float(f"{count / max(1, len(own)):.4g}")}
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ]  # fmt: skip
    chart = base(
        x=alt.X("from:Q", title=unit, bin="binned"), x2="to:Q",
        y=alt.Y("share:Q", title="share", axis=alt.Axis(format="%", tickCount=3)),
        tooltip=["series:N", "from:Q", "to:Q", "count:Q", "share:Q"],
    )  # fmt: skip
    drawn = chart.mark_bar(binSpacing=1).properties(width=180, height=100)
    return figure(name, title, said, rows, panelled(drawn, "series", list(values), beside=65))


def layers(model: str, prunes: dict[str, Cell]) -> list[Figure | Absent]:
    """Sparsity and reconstruction error by layer, in the order of the model."""
    some = {name: cell for name, cell in prunes.items() if cell.result["prune"].get("layers")}
    if not some:
        return [Absent("Layers", "These results say nothing of layers: give the command of the sweep again.")]
    shown = _spread(some)
    rows: Records = []
    for name, cell in shown.items():
        for i, layer in enumerate(cell.result["prune"]["layers"]):
            rows.append(
                {"series": name, "number": i, "layer": layer["name"], "sparsity": six(layer["sparsity"]),
                 "error": six(layer.get("error")), "error_held_out": six(layer.get("error_held_out"))}
            )  # fmt: skip
    left = f" {len(shown)} of {len(some)} settings are shown." if len(shown) < len(some) else ""
    out: list[Figure | Absent] = []
    for column, title in (("sparsity", "Sparsity by layer"), ("error", "Reconstruction error by layer")):
        if any(row[column] is not None for row in rows):
            unit = {"sparsity": "share of zeros", "error": "relative error on the calibration rows"}[column]
            # where all shares are the same, Vega would label their one tick with a whole number
            shares: dict[str, Any] = {"scale": alt.Scale(domain=[0, 1]), "axis": alt.Axis(format=".0%")}
            how = shares if column == "sparsity" else {"scale": alt.Scale(zero=False)}
            chart = base(
                x=alt.X("number:Q", title="layer, in the order of the model", axis=alt.Axis(tickMinStep=1)),
                y=alt.Y(f"{column}:Q", title=unit, **how),
                color=color("series", list(shown)),
                tooltip=["series:N", "layer:N", f"{column}:Q"],
            )  # fmt: skip
            points = chart.mark_point(size=30, filled=True, opacity=1).encode(shape=shape("series", list(shown)))
            drawn = (chart.mark_line(strokeWidth=1.5) + points).properties(width="container", height=260)
            caption = f"{model}, the first draw of each setting.{left}"
            out.append(figure(_name(f"layers_{column}", model), title, caption, rows, drawn))
    return out


def _spread(some: dict[str, Cell]) -> dict[str, Cell]:
    """At most as many as colours tell apart, evenly spaced."""
    names = list(some)
    step = max(1.0, len(names) / MANY)
    return {names[int(i * step)]: some[names[int(i * step)]] for i in range(min(MANY, len(names)))}


def stages(cells: Sequence[Cell]) -> Figure | Absent:
    """Seconds by kind of stage, each stage counted once however many cells read it."""
    made: dict[tuple[str, str], tuple[float, bool, float]] = {}
    for cell in cells:
        for name, run in (cell.result.get("stages") or {}).items():
            key = str(cell.result["keys"].get(name, cell.path))
            before = made.get((name, key))
            cached = run.get("cached", False) and (before is None or before[1])
            made[name, key] = float(run["seconds"]), cached, float(run.get("peak_rss_mib") or 0)
    if not made:
        return Absent(
            "Where the time went", "These results say nothing of their stages: give the command of the sweep again."
        )
    by: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (name, _), (seconds, cached, mib) in made.items():
        what = "read from the store" if cached else "made here"
        by.setdefault((name.partition(".")[0], what), []).append((seconds, mib))
    rows = [
        {"stage": stage, "what": what, "stages": len(own), "seconds": float(f"{sum(s for s, _ in own):.4g}"),
         "peak_host_mib": round(max(mib for _, mib in own))}
        for (stage, what), own in by.items()
    ]  # fmt: skip
    chart = base(
        y=alt.Y("stage:N", title=None, sort=None),
        x=alt.X("seconds:Q", title="seconds to make"),
        color=alt.Color("what:N", title=None, legend=legend(["what"])),
        tooltip=["stage:N", "what:N", "stages:Q", "seconds:Q", "peak_host_mib:Q"],
    )
    caption = "Each stage counts once, however many cells use it."
    drawn = chart.mark_bar(height=16).properties(width="container", height=alt.Step(24))
    return figure("stages", "Where the time went", caption, rows, drawn, wide=True)
