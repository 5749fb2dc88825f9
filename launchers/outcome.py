"""What came of the cells of this command: kept while they run, and shown at its end."""

from __future__ import annotations

import sys
from pathlib import Path

from ssgr.records import RunResult, Score
from ssgr.report import table

DONE: list[table.Cell] = []
FAILED: list[str] = []
_STAGES = [0, 0]  # read from the store, made by this process


def add(folder: Path, read: int = 0, made: int = 0) -> None:
    """A cell left its result in `folder`."""
    _STAGES[0] += read
    _STAGES[1] += made
    DONE.extend(table.read(folder / "result.json"))


def value(result: RunResult) -> float:
    """What a sweeper optimises: the pruned model's score on the first benchmark."""
    found = next(iter(result.scores.values())).pruned
    return found.accuracy if isinstance(found, Score) else found.value


def finish() -> None:
    """Print the table, and the cells that failed."""
    runs = len({cell.path for cell in DONE})
    if cells := table.told_apart(DONE):
        table.show(table.rows(cells))
        if any(len({cell.fields[repeat] for cell in cells}) > 1 for repeat in ("draw", "seed")):
            control = "calib=matched" if any(cell.fields["calib"] == "matched" for cell in cells) else None
            table.show(table.means(cells, against=control), "means over draws and seeds")
    if runs > 1 and any(_STAGES):
        print(f"{runs} cells: {_STAGES[0]} stages read from the store, {_STAGES[1]} made")
    if FAILED and (DONE or len(FAILED) > 1):
        print(f"{len(FAILED)} of {len(FAILED) + runs} cells failed:", *FAILED, sep="\n  ", file=sys.stderr)
