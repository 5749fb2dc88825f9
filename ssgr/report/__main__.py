"""Rebuild the table of a run or a sweep: python -m ssgr.report PATH... [--format text|markdown|csv] [--by FIELDS
[--against FIELD=VALUE]], or its page and figures: [--html FILE] [--figures DIR].
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ssgr import sweep
from ssgr.errors import unless_closed
from ssgr.files import below
from ssgr.report import table
from ssgr.report.cells import Cell, find
from ssgr.store import Store
from ssgr.tracker import wandb_report


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 and a sentence if there is nothing to print."""
    parser = argparse.ArgumentParser(prog="python -m ssgr.report", description="Tables of results.")
    parser.add_argument("paths", nargs="+", type=Path, help="result.json files, or folders of runs and sweeps")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text", help="how it is printed")
    parser.add_argument("--by", help="means over all cells that agree in these fields, such as calib,pruner")
    parser.add_argument("--against", metavar="FIELD=VALUE", help="also the paired difference to this control, such as "
                        "calib=matched (with --by, or with all fields but the draw)")  # fmt: skip
    parser.add_argument(
        "--wandb", action="store_true", help="also send it to W&B as a report, where tracker=wandb sent the runs"
    )
    parser.add_argument("--project", default="ssgr", help="W&B's project")
    parser.add_argument("--entity", help="W&B's account or team; by default that of the login")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write one page with everything, which needs no network"
    )
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write each figure as CSV, SVG and PNG")
    args = parser.parse_args(arguments)
    try:
        holes = _assembled(args.paths)
        if args.html or args.figures:
            return _page(args, holes)
        cells = find(args.paths)
        by = [name.strip() for name in args.by.split(",")] if args.by else None
        content = table.means(cells, by, args.against) if by or args.against else table.rows(cells)
        if args.wandb:
            print(_sent(args, cells, content))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for hole in holes:
        print(hole, file=sys.stderr)
    if args.format == "text":
        table.show(content)
    else:
        print(table.markdown(content) if args.format == "markdown" else table.comma_separated(content))
    return 0


def _sent(args: argparse.Namespace, cells: list[Cell], content: table.Rows) -> str:
    """Send a report of W&B with the tables; its address."""
    found = {cell.path: cell.result for cell in cells}
    name = " ".join(path.absolute().name for path in args.paths)
    shown = {"Results": table.markdown(content)}
    if len({cell.fields["draw"] for cell in cells}) > 1:
        shown["Means over draws"] = table.markdown(table.means(cells))
    return wandb_report.publish(name, list(found.values()), shown, args.project, args.entity)


def _page(args: argparse.Namespace, holes: list[str]) -> int:
    """Write the page, the figures or both; the tables are in the page."""
    from ssgr.report import figures, page  # Altair takes a second to load

    if args.by or args.against:
        raise ValueError(
            "--by and --against are for tables: the page shows every field, and compares with calib=matched"
        )
    cells, unread = page.find(args.paths)
    holes += unread
    report = page.gather(cells, holes)
    if args.html:
        page.write(report, args.html)
        print(f"{args.html}: {len(cells)} results, {len(holes)} missing")
    if args.figures:
        written = figures.write(report.figures, args.figures)
        print(f"{args.figures}: {len(written)} files of {len(report.figures)} figures")
    for hole in holes:
        print(hole, file=sys.stderr)
    return 0


def _assembled(paths: list[Path]) -> list[str]:
    """Write the results of the sweeps among `paths` that launchers run stage by stage; a line for each that is not there yet."""
    out: list[str] = []
    for path in paths:
        for manifest in sorted(below(path, sweep.MANIFEST)):
            found = sweep.read(manifest.parent)
            if found is not None and Path(found.store).is_dir():
                from ssgr import assemble  # loads torch, which takes seconds

                store = Store(Path(found.store), reads=True)
                if os.access(found.folder, os.W_OK):
                    for _ in assemble.cells(found, store):
                        pass
                else:
                    out.append(f"{found.folder} may only be read: a result that is not written there yet is not shown")
                out += assemble.gaps(found, store)
    return out


if __name__ == "__main__":
    sys.exit(unless_closed(main))
