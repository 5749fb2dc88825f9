"""How far a sweep is: python -m ssgr.status [SWEEP] (the latest one of outputs/sweeps if none is named)."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from tqdm import tqdm

from ssgr import sweep as sweeps
from ssgr.errors import unless_closed
from ssgr.graph import ENDS, KINDS, Stage
from ssgr.lease import beating
from ssgr.queue import Queued, Records, ended
from ssgr.store import Store

SWEEPS = Path("outputs/sweeps")
STATES = ("done", "running", "queued", "failed", "waiting")


@dataclass(frozen=True)
class State:
    """Where a stage is, one of STATES: `waiting` has no job and has not failed, or cannot run since `why`."""

    state: str
    why: str = ""
    seconds: float = 0.0
    log: str = ""


def states(sweep: sweeps.Sweep, store: Store, live: Mapping[str, Queued] | None) -> dict[str, State]:
    """The state of every stage of a sweep; `live` are those that jobs make, None where that cannot be known."""
    records = Records(store.root)
    last = records.last()
    out: dict[str, State] = {}
    lost: dict[str, str] = {}
    for key, stage in sweep.graph.stages.items():
        beat = _beat(store, stage)
        if (found := store.find(stage.folder, key)) is not None:
            out[key] = State("done", seconds=found.run.seconds)
        elif beat is not None:
            out[key] = State("running", beat)
        elif live is not None and key in live:
            running = live[key].state == "RUNNING"
            out[key] = State("running", "starting") if running else State("queued", live[key].reason)
        elif (failure := records.failure(stage.folder, key)) is not None:
            out[key] = State("failed", failure.error, log=failure.log)
        else:
            if live is not None and key in last:
                one, i = last[key]
                lost[key] = one.id(i)
                out[key] = State("waiting", log=str(one.log(i)))
            else:
                out[key] = State("waiting")
    _explain(sweep, out, lost)
    return out


def _explain(sweep: sweeps.Sweep, out: dict[str, State], lost: dict[str, str]) -> None:
    """Tell stages whose job died without a word from those that what they need keeps from starting."""
    words = ended(sorted({job.partition("_")[0] for job in lost.values()}))
    for key, job in lost.items():
        needs = [need for need in sweep.graph.stages[key].needs if out[need].state != "done"]
        if not needs:
            said = words.get(job, "")
            how = f" ({said})" if said else ""
            out[key] = State("failed", f"its job {job} ended without a result{how}", log=out[key].log)
    causes = sweep.graph.failed_by([key for key, one in out.items() if one.state == "failed"])
    for key, cause in causes.items():
        if out[key].state in ("waiting", "queued"):
            out[key] = State("waiting", f"{sweep.graph.stages[cause].name} failed")


def _beat(store: Store, stage: Stage) -> str | None:
    """How far the holder of a stage's lease is; None if it has none, or one that is silent."""
    lease = store.root / stage.folder / f"{stage.key}.lease"
    if not beating(lease, store.stale_seconds):
        return None
    with contextlib.suppress(OSError, ValueError, KeyError):
        told = json.loads(lease.with_suffix(".progress").read_text())
        return f"{told['done']}/{told['total']}, {tqdm.format_interval(told['eta_seconds'])} left"
    return "begun"


def show(sweep: sweeps.Sweep, found: Mapping[str, State]) -> Group:
    """A line a stage kind, then the cells."""
    kinds = Table(title=f"sweep {sweep.id}", title_justify="left", box=None, pad_edge=False)
    for name in ("stage", *STATES, "time so far"):
        kinds.add_column(name, justify="left" if name == "stage" else "right")
    by_kind: dict[str, list[State]] = defaultdict(list)
    for key, stage in sweep.graph.stages.items():
        by_kind[stage.kind].append(found[key])
    for kind in KINDS:
        if here := by_kind.get(kind):
            count = Counter(one.state for one in here)
            kinds.add_row(
                kind, *(str(count[s] or "") for s in STATES), tqdm.format_interval(sum(one.seconds for one in here))
            )
    total = Counter(one.state for one in found.values())
    kinds.add_row(
        "all", *(str(total[s] or "") for s in STATES), tqdm.format_interval(sum(one.seconds for one in found.values()))
    )
    cells = Table(box=None, pad_edge=False)
    for name in ("cell", "overrides", "state"):
        cells.add_column(name, overflow="fold")
    for number in sweep.overrides:
        cells.add_row(str(number), sweep.label(number), cell_state(sweep, found, number))
    return Group(kinds, "", cells)


def cell_state(sweep: sweeps.Sweep, found: Mapping[str, State], number: int) -> str:
    """A cell's state in words."""
    if number in sweep.refused:
        return f"refused: {sweep.refused[number]}"
    own = {key: found[key] for key in sweep.graph.cells[number]}
    wanted = [one for key, one in own.items() if sweep.graph.stages[key].kind in ENDS]
    if all(one.state == "done" for one in wanted):
        return "done"
    for key, one in own.items():
        if one.state == "failed":
            return f"failed: {sweep.graph.stages[key].name}: {one.why} (log: {one.log})"
    for key, one in own.items():
        if one.state == "running":
            return f"running: {sweep.graph.stages[key].name} {one.why}"
    for key, one in own.items():
        if one.state == "queued":
            return f"queued: {sweep.graph.stages[key].name}" + (f" ({one.why})" if one.why != "None" else "")
    return "waiting: no job is queued for it; give the command of the sweep again, unless it still runs"


def find(path: Path | None) -> sweeps.Sweep:
    """The sweep in `path`, or the latest.

    Raises:
        ValueError: there is none.
    """
    folder = path
    if folder is None:
        there = sorted(SWEEPS.glob(f"*/{sweeps.MANIFEST}"), key=lambda file: file.stat().st_mtime)
        if not there:
            raise ValueError(f"there is no sweep in {SWEEPS}; name one: python -m ssgr.status FOLDER")
        folder = there[-1].parent
    elif not folder.exists() and (SWEEPS / folder).exists():
        folder = SWEEPS / folder
    found = sweeps.read(folder)
    if found is None:
        raise ValueError(
            f"{folder} has no {sweeps.MANIFEST}: give the folder of a sweep that hydra/launcher=slurm or local made"
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the state of a sweep; 1 if a cell failed or there is no sweep."""
    parser = argparse.ArgumentParser(prog="python -m ssgr.status", description="How far a sweep is.")
    parser.add_argument(
        "sweep", nargs="?", type=Path, help="its folder or its id; the latest of outputs/sweeps by default"
    )
    args = parser.parse_args(arguments)
    try:
        sweep = find(args.sweep)
        store = Store(Path(sweep.store), reads=True)
        if not store.root.is_dir():
            raise ValueError(
                f"the store {store.root} of this sweep is not there any more, so how far it is cannot be told; what its cells "
                f"left is in python -m ssgr.report {shlex.quote(str(sweep.folder))}"
            )
        found = states(sweep, store, live(store))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Console(width=None if sys.stdout.isatty() else 200).print(show(sweep, found))
    bad = sweep.refused or any(one.state == "failed" for one in found.values())
    return 1 if bad else 0


def live(store: Store) -> dict[str, Queued] | None:
    """The stages that jobs make; None where there is no scheduler."""
    try:
        return Records(store.root).live()
    except ValueError as error:
        if Records(store.root).read():
            print(f"the queue is not known ({error})", file=sys.stderr)
        return None


if __name__ == "__main__":
    sys.exit(unless_closed(main))
