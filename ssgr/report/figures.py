"""Figures: what each is called, shows and is made of, and how it is written as CSV, SVG and PNG for a paper."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssgr.files import write_bytes

Records = list[dict[str, Any]]
ROWS = "rows"  # what the data set of a figure is called in its specification
_WIDTH = 320  # points: a column of a paper and its labels
_PIXELS_PER_INCH = 300
_PAPER: dict[str, Any] = {
    "background": "white",
    "font": "Helvetica, Arial, sans-serif",
    "axis": {"labelFontSize": 9, "titleFontSize": 10, "titleFontWeight": "normal", "gridColor": "#e4e4e4"},
    "legend": {"labelFontSize": 9, "titleFontSize": 10, "titleFontWeight": "normal", "labelLimit": 260},
    "header": {"labelFontSize": 10, "titleFontSize": 10},
    "range": {
        "category": ["#0072B2", "#B34700", "#00795A", "#A3437B", "#7A5C00", "#4B4BB0", "#2F7F9E", "#555555"],
    },
    "view": {"stroke": None},
}


@dataclass(frozen=True)
class Figure:
    """A figure: a Vega-Lite specification of its data set `rows`; `caption` says what is shown, of how much, in which unit.

    A `wide` one takes the whole width of the page.
    """

    name: str
    title: str
    caption: str
    rows: Records
    spec: dict[str, Any]
    wide: bool = False

    @property
    def columns(self) -> list[str]:
        """The columns of its data, in the order in which they first come."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


@dataclass(frozen=True)
class Absent:
    """A figure whose data is not there, and the sentence that says what gives it."""

    title: str
    why: str


def comma_separated(figure: Figure) -> str:
    """The data of a figure as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, figure.columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(figure.rows)
    return out.getvalue()


def for_paper(figure: Figure) -> dict[str, Any]:
    """Its specification for print: on white, of a column's width, with its data."""
    spec = copy.deepcopy(figure.spec)
    if spec.get("width") == "container":
        spec["width"] = _WIDTH
    spec["config"] = _PAPER
    spec["datasets"] = {ROWS: figure.rows}
    return spec


def write(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write NAME.csv, NAME.svg and NAME.png of each figure into `folder`; the files that were written.

    Raises:
        ValueError: `folder` cannot be written.
    """
    import vl_convert

    out: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            spec = for_paper(figure)
            made = {
                "csv": comma_separated(figure).encode(),
                "svg": vl_convert.vegalite_to_svg(spec).encode(),
                "png": vl_convert.vegalite_to_png(spec, ppi=_PIXELS_PER_INCH),
            }
            for kind, content in made.items():
                out.append(folder / f"{figure.name}.{kind}")
                write_bytes(out[-1], content)
    except OSError as error:
        raise ValueError(
            f"the folder of figures {folder} cannot be written ({error.strerror}): choose another"
        ) from error
    return out
