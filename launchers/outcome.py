"""What came of the cells of this command: kept while they run, and shown at its end."""

from __future__ import annotations

import os
import sys
import webbrowser
from datetime import UTC, datetime
from pathlib import Path

from ssgr.records import RunResult, Score
from ssgr.report import ran, table
from ssgr.report.cells import Cell, told_apart
from ssgr.report.cells import read as read_cells
from ssgr.sweep import COMMAND, MANIFEST, code

DONE: list[Cell] = []
FAILED: list[str] = []
_SHOWN: set[str] = set()  # of those that failed, what is not said again
_BEGAN = datetime.now(UTC).isoformat(timespec="seconds")
_STAGES = [0, 0]  # read from the store, made by this process


def add(folder: Path, read: int = 0, made: int = 0) -> None:
    """A cell left its result in `folder`."""
    _STAGES[0] += read
    _STAGES[1] += made
    if _swept(folder.parent) and folder.parent not in _sweeps():  # what is noted there is of an earlier command
        (folder.parent / COMMAND).unlink(missing_ok=True)
    DONE.extend(read_cells(folder / "result.json"))


def fail(line: str, shown: bool = False) -> None:
    """A cell failed, or all; `shown` says that nothing else will be said after it, so that it is not said again."""
    FAILED.append(line)
    if shown:
        _SHOWN.add(line)


def value(result: RunResult) -> float:
    """What a sweeper optimises: the pruned model's score on the first benchmark."""
    found = next(iter(result.scores.values())).pruned
    return found.accuracy if isinstance(found, Score) else found.value


def finish() -> None:
    """Print the table and the cells that failed, and leave the page of a sweep in its folder."""
    runs = len({cell.path for cell in DONE})
    try:
        cells = told_apart(DONE)
    except ValueError as error:  # the results stay, and there is no page either
        cells = []
        print(f"[WARNING] no table: {error}", file=sys.stderr)
    if cells:
        table.show(table.rows(cells))
        if any(len({cell.fields[repeat] for cell in cells}) > 1 for repeat in ("draw", "seed")):
            control = "calib=matched" if any(cell.fields["calib"] == "matched" for cell in cells) else None
            table.show(table.means(cells, against=control), "means over draws and seeds")
    if runs > 1 and any(_STAGES):
        print(f"{runs} cells: {_STAGES[0]} stages read from the store, {_STAGES[1]} made")
    if set(FAILED) - _SHOWN:
        print(f"{len(FAILED)} of {len(FAILED) + runs} cells failed:", *FAILED, sep="\n  ", file=sys.stderr)
    for folder in _sweeps():
        if _swept(folder):  # a single run has a table
            _page(folder)


def _swept(folder: Path) -> bool:
    """Whether Hydra marked a folder as that of a sweep; what lies beside a single run is none of ours."""
    return (folder / "multirun.yaml").exists()


def _sweeps() -> list[Path]:
    """The folders that the cells lie in."""
    return list(dict.fromkeys(cell.path.parent.parent for cell in DONE))


def _page(folder: Path) -> None:
    """Leave a sweep's page and, of a named experiment, its figures; open it where somebody is looking."""
    from ssgr.report import page  # Altair takes a second to load

    if not (folder / MANIFEST).exists():
        try:
            root = Path(__file__).parent.parent
            command = ["python", Path(sys.argv[0]).name, *sys.argv[1:]]
            own = dict.fromkeys(cell.path.parent.name for cell in DONE if cell.path.parent.parent == folder)
            ran.record(folder, command, code(root, folder / "code.diff"), _BEGAN, list(own))
        except OSError as error:
            print(f"[WARNING] {folder / COMMAND} cannot be written ({error.strerror})", file=sys.stderr)
    failed = [f"no result of {line}" for line in FAILED]
    file = page.leave(folder, failed, any(word.startswith("experiment=") for word in sys.argv))
    if file is not None:
        print(f"page: {file}")
        if _watched():
            webbrowser.open(file.resolve().as_uri())


def _watched() -> bool:
    """Whether there is a display, and somebody at the terminal."""
    display = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return display and sys.stdout.isatty()
