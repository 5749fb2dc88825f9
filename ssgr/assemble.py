"""A sweep's results: result.json of every cell whose stages are all in the store, and why the others have none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ssgr import results, tracker
from ssgr.graph import ENDS
from ssgr.queue import Records
from ssgr.records import RunResult
from ssgr.report import table
from ssgr.report.cells import read as read_cells
from ssgr.report.cells import told_apart
from ssgr.store import SMALL, Artefact, Store
from ssgr.sweep import Sweep, read


def cells(sweep: Sweep, store: Store) -> Iterator[tuple[int, RunResult | None]]:
    """Every cell with its result, written into its folder and tracked; None where something is missing."""
    for number in sweep.overrides:
        done = _done(sweep, store, number)
        if done is None:
            yield number, None
            continue
        found = results.result(done, sweep.benches[number], sweep.config(number))
        results.write(found, store, sweep.cell(number))
        overrides = tuple(sweep.overrides[number])
        tracker.track(tracker.Cell(found, sweep.cell(number), sweep.folder, store.root, overrides))
        yield number, found


def _done(sweep: Sweep, store: Store, number: int) -> dict[str, Artefact] | None:
    out: dict[str, Artefact] = {}
    if number in sweep.refused:
        return None
    for name, key in sweep.names[number].items():
        stage = sweep.graph.stages[key]
        found = store.find(stage.folder, key, SMALL)
        if found is not None:
            out[name] = found
        elif stage.kind in ENDS:
            return None
    return out


def holes(sweep: Sweep, store: Store) -> dict[int, str]:
    """Why a cell has no result, where that is known: what it was refused for, or the stage that failed."""
    records, out = Records(store.root), dict(sweep.refused)
    failures = {}
    for stage in sweep.graph.stages.values():
        failure = records.failure(stage.folder, stage.key)
        if failure is not None and store.find(stage.folder, stage.key) is None:
            failures[stage.key] = failure
    cause = sweep.graph.failed_by(failures)
    for number, keys in sweep.graph.cells.items():
        for key in keys:
            if key in cause:
                first = sweep.graph.stages[cause[key]]
                out[number] = f"{first.name} failed: {failures[cause[key]].error} (log: {failures[cause[key]].log})"
                break
    return out


def report(folder: Path) -> int:
    """Write what is there and print the table; the number of cells without a result."""
    sweep = read(folder)
    if sweep is None:
        raise ValueError(f"{folder} is no sweep: it has no sweep.json")
    store = Store(Path(sweep.store), reads=True)
    done = [sweep.cell(number) for number, found in cells(sweep, store) if found is not None]
    if done:
        table.show(table.rows(told_apart([cell for one in done for cell in read_cells(one / "result.json")])))
    without = gaps(sweep, store)
    for line in without:
        print(line)
    if done:
        from ssgr.report import page  # Altair takes a second to load

        page.leave(folder, without, any(word.startswith("experiment=") for word in sweep.command))
    print(f"{len(done)} of {len(sweep.overrides)} cells are complete; results in {folder}")
    return len(sweep.overrides) - len(done)


def gaps(sweep: Sweep, store: Store) -> list[str]:
    """A line for each cell that has no result."""
    why = holes(sweep, store)
    without = [n for n in sweep.overrides if n in sweep.refused or not (sweep.cell(n) / "result.json").exists()]
    return [f"no result of {sweep.label(n)}: {why.get(n, 'its stages are not all there yet')}" for n in without]
