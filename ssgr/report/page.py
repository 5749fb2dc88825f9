"""One HTML page of a sweep that needs nothing beside itself: no network, no server, no account."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as installed
from importlib.resources import files
from pathlib import Path
from typing import Any

from ssgr.files import below, cached, write_bytes
from ssgr.report import charts, figures, inside, ran, traces
from ssgr.report.cells import Cell, natural, read, result_files, told_apart
from ssgr.report.drawing import metric_title
from ssgr.report.figures import Absent, Figure
from ssgr.report.groups import Group, by_sweep, groups, sweep_of
from ssgr.sweep import COMMAND, MANIFEST

FILE, FIGURES = "report.html", "figures"  # what a sweep leaves in its folder
_log = logging.getLogger("ssgr")
_TEMPLATES = "templates"


@dataclass(frozen=True)
class Report:
    """What a page shows, before it is HTML."""

    cells: tuple[Cell, ...]
    groups: tuple[Group, ...]
    by_group: tuple[tuple[Figure | Absent, ...], ...]
    by_model: dict[str, tuple[Figure | Absent, ...]]
    stages: Figure | Absent
    holes: tuple[str, ...]

    @property
    def figures(self) -> list[Figure]:
        """Every figure that there is data for."""
        every = [*sum(self.by_group, ()), *sum(self.by_model.values(), ()), self.stages]
        return [one for one in every if isinstance(one, Figure)]


def find(paths: Iterable[Path], unfinished: bool = True) -> tuple[list[Cell], list[str]]:
    """Every cell at or below `paths` that can be read, and a sentence for each result.json that cannot and, where
    `unfinished` is asked for, for each cell that began and left none.

    Raises:
        ValueError: there is none that can be read, or two have the same settings and other results.
    """
    given = list(paths)
    cells: list[Cell] = []
    holes: list[str] = []
    for file in result_files(given):
        try:
            cells += read(file)
        except ValueError as error:
            holes.append(str(error))
    if unfinished:
        holes += [hole for path in given if path.is_dir() for hole in _unfinished(path)]
        holes += [
            f"the sweep in {folder} was stopped, or still runs: cells that it had not begun are not known; give its command again"
            for folder in dict.fromkeys(sweep_of(cell.path) for cell in cells)
            if folder and not (folder / COMMAND).exists() and not (folder / MANIFEST).exists()
        ]
    if not cells:
        why = f"; {holes[0]}" if holes else ""
        raise ValueError(
            f"no result.json that can be read at or below {', '.join(map(str, given))}{why}: type the folder of a run or a "
            "sweep, such as outputs/sweeps/NAME, or make one with python run.py -m calib=corpus,ssgr"
        )
    by: dict[Path | None, list[Cell]] = {}
    for cell in cells:
        by.setdefault(sweep_of(cell.path), []).append(cell)
    return [cell for own in by.values() for cell in told_apart(own)], holes


def _unfinished(folder: Path) -> list[str]:
    """A line for each cell that Hydra began in this process, and that left no result."""
    begun = sorted((path.parent for path in below(folder, ".hydra") if path.parent.name.isdigit()), key=natural)
    return [
        f"no result of cell {cell.name} of {cell.parent}: it failed or did not end; its log is {cell / 'run.log'}"
        for cell in begun
        if not (cell / "result.json").exists()
    ]


def gather(cells: Sequence[Cell], holes: Iterable[str] = ()) -> Report:
    """All that a page of these cells shows."""
    some = tuple(groups(cells))
    models: dict[str, list[Cell]] = {}
    for sweep, own in by_sweep(cells).items():
        for cell in own:
            models.setdefault(f"{sweep} {cell.fields['model']}".strip(), []).append(cell)
    return Report(
        cells=tuple(cells),
        groups=some,
        by_group=tuple(tuple(charts.of_group(group)) for group in some),
        by_model={model: tuple(inside.of_model(model, own)) for model, own in models.items()},
        stages=inside.stages(cells),
        holes=tuple(holes),
    )


def write(report: Report, file: Path) -> None:
    """Write the page whole.

    Raises:
        ValueError: it cannot be written.
    """
    content = render(report)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, content.encode("utf-8"))
    except OSError as error:
        raise ValueError(f"--html {file} cannot be written ({error.strerror}): choose another file") from error


def leave(folder: Path, holes: Iterable[str] = (), with_figures: bool = False) -> Path | None:
    """Write the page of a sweep into its folder, or warn why there is none: results are never lost for the want of a page."""
    try:
        known = list(holes)
        cells, unread = find([folder], unfinished=not known)
        report = gather(cells, [*known, *unread])
        write(report, folder / FILE)
        if with_figures:
            figures.write(report.figures, folder / FIGURES)
    except Exception as error:
        _log.warning("no page of %s was written (%s: %s)", folder, type(error).__name__, error)
        return None
    return folder / FILE


def render(report: Report) -> str:
    """The page: every script and style in it is named in its policy by its hash, and nothing else may run or load."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ssgr.report", _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = traces.visible
    room = traces.Room(traces.MAX_CHARACTERS)
    sections = [
        {
            "id": f"group{i}",
            "group": group,
            "table": table(group),
            "figures": own,
            "traces": _traces(group, room, len(report.groups) - i),
        }
        for i, (group, own) in enumerate(zip(report.groups, report.by_group, strict=True))
    ]
    own = {"bundle": bundle(), "script": _own("page.js"), "style": _own("page.css")}
    return environment.get_template("page.html.j2").render(
        report=report,
        facts=ran.facts(report.cells),
        sections=sections,
        is_figure=lambda one: isinstance(one, Figure),
        policy=_policy(own),
        **own,
    )


def _traces(group: Group, room: traces.Room, sections: int) -> dict[str, Any] | str:
    """The answers of a group; this and the later ones, so many `sections`, share the room that is left."""
    if group.metric != "accuracy" or "attempts" not in group.cells[0].score["dense"]:
        return f"{group.bench} is measured without answers, so there are no traces to read."
    share = traces.Room(room.left // sections)
    room.left -= share.left
    try:
        return traces.sample(group.labelled, share)
    except (OSError, ValueError, KeyError) as error:
        return f"The answers cannot be read ({type(error).__name__}: {error}): give the command of the sweep again."
    finally:
        room.left += max(0, share.left)


def table(group: Group) -> dict[str, Any]:
    """The leaderboard of a group: its columns, and a row for each record with what is shown and what is sorted by."""
    repeats = ("draw", "seed", "model", "bench")
    fields = [name for name in group.varied if name not in repeats and not name.endswith("decoding.seed")]
    fields = [name for name in group.cells[0].fields if name in ("calib", "pruner", *fields)]
    columns = [
        *fields, metric_title(group), "minus dense", *(["minus matched"] if group.control else []), "tokens", "cut",
        "looping", "zeros", "draws × seeds", f"{group.unit}s",
    ]  # fmt: skip
    rows = []
    for row in group.records:
        cells = [(row["calib"] or "dense" if name == "calib" else row[name], row[name], "") for name in fields]
        failed = f"the grader failed on {row['failed']:.1%}" if row.get("failed") else ""
        cells.append((_interval(row, "value", signed=False), row["value"], failed))
        for which in ("to_dense", *(["to_control"] if group.control else [])):
            cells.append((_interval(row, which, signed=True), row.get(which, ""), _doubt(row, which)))
        cells += [
            (_shown(row.get("tokens"), ".1f"), row.get("tokens", ""), ""),
            (_shown(row.get("cut"), ".1%"), row.get("cut", ""), ""),
            (_shown(row.get("looping"), ".1%"), row.get("looping", ""), ""),
            (_shown(row["sparsity_realised"], ".1%"), row["sparsity_realised"], ""),
            (f"{row['draw']} × {row['seed']}", row["draw"] * row["seed"], _lack(row)),
            (str(row["problem"]), row["problem"], ""),
        ]
        rows.append({"label": row["label"], "kind": row["kind"], "cells": cells})
    filters = {name: list(dict.fromkeys(row[name] for row in group.pruned)) for name in fields}
    return {"columns": columns, "fields": len(fields), "rows": rows, "filters": {n: v for n, v in filters.items() if len(v) > 1},
            "names": fields}  # fmt: skip


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _interval(row: dict[str, Any], name: str, signed: bool) -> str:
    if name not in row:
        return ""
    before, sign = ("" if name == "value" else f"{name}_"), ("+" if signed else "")
    mean, low, high = (
        "too large" if row[key] is None else f"{row[key]:{sign}.3f}" for key in (name, f"{before}low", f"{before}high")
    )
    return f"{mean} [{low}, {high}]"


def _doubt(row: dict[str, Any], name: str) -> str:
    """The words beside a difference that may be zero."""
    return "not told apart" if row.get(f"{name}_unsure") else ""


def _lack(row: dict[str, Any]) -> str:
    """The words beside draws and seeds of which cells are missing."""
    return f"{row['missing']} missing" if row.get("missing") else ""


def _own(name: str) -> str:
    return (files("ssgr.report") / _TEMPLATES / name).read_text(encoding="utf-8")


@cache
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, in the version that Altair writes for."""
    import altair
    import vl_convert

    version, wanted = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2]), "window.vegaEmbed = vegaEmbed;"
    script = cached(  # it takes seconds
        f"vega/{version}-{installed('vl-convert-python')}.js",
        lambda: str(vl_convert.javascript_bundle(wanted, version)),
    )
    assert "</script" not in script.lower() and "<!--" not in script
    return script


def _policy(own: dict[str, str]) -> str:
    """The page's Content-Security-Policy."""
    script, style = f"{_hash(own['bundle'])} {_hash(own['script'])}", _hash(own["style"])
    return f"default-src 'none'; script-src {script}; style-src {style}; img-src data: blob:; base-uri 'none'; form-action 'none'"


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
