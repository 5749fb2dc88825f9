"""Rebuild the table of a run or a sweep: python -m ssgr.report PATH... [--format text|markdown|csv] [--by FIELDS
[--against FIELD=VALUE]].
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssgr.report import table


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 and a sentence if there is nothing to print."""
    parser = argparse.ArgumentParser(prog="python -m ssgr.report", description="Tables of results.")
    parser.add_argument("paths", nargs="+", type=Path, help="result.json files, or folders of runs and sweeps")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text", help="how it is printed")
    parser.add_argument("--by", help="means over all cells that agree in these fields, such as calib,pruner")
    parser.add_argument("--against", metavar="FIELD=VALUE", help="also the paired difference to this control, such as "
                        "calib=matched (with --by, or with all fields but the draw)")  # fmt: skip
    args = parser.parse_args(arguments)
    try:
        cells = table.find(args.paths)
        by = args.by.split(",") if args.by else None
        content = table.means(cells, by, args.against) if by or args.against else table.rows(cells)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.format == "text":
        table.show(content)
    else:
        print(table.markdown(content) if args.format == "markdown" else table.comma_separated(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
