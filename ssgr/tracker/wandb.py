"""Weights & Biases: one run a cell, and one for each dense model, whose ids are digests of what was run.

The library runs in a process of its own: whatever it prints, raises or waits for, the run of ssgr goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ssgr
from ssgr import keys
from ssgr.files import write_json
from ssgr.records import to_json
from ssgr.store import Store
from ssgr.tracker import Cell, content

MODES = ("offline", "online", "disabled")
TRACKED = "tracked"  # in the folder `wandb`: a file for each run that was tracked whole


@dataclass(frozen=True)
class Wandb:
    """Runs of Weights & Biases; offline they lie in the folder `wandb` of a sweep until `wandb sync` sends them."""

    name: str = "wandb"
    mode: str = "offline"
    project: str = "ssgr"
    entity: str | None = None
    samples: int = 16
    sample_chars: int = 4000
    timeout: float = 120.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"tracker.mode={self.mode}: valid choices are {', '.join(MODES)}")
        if not self.project:
            raise ValueError("tracker.project is empty: type tracker.project=NAME")
        content.check(self.samples, self.sample_chars)
        if not isinstance(self.timeout, (int, float)) or self.timeout <= 0:
            raise ValueError(f"tracker.timeout={self.timeout}: give a number of seconds")

    def track(self, cell: Cell) -> None:
        """Make the runs of a cell and of its dense model that are not there already.

        Raises:
            TimeoutError: it took longer than `timeout`.
            RuntimeError: the library failed; the message is its last line.
            OSError: the folder cannot be written.
        """
        if self.mode == "disabled":
            return
        result = to_json(cell.result)
        marks = {
            content.run_id(result): self._mark(result, dense=False),
            content.dense_id(result): self._mark(result, dense=True),
        }
        folder = cell.sweep.absolute() / "wandb"
        if _left(folder, marks):
            with Store(cell.store).alone(TRACKED):  # two that assemble a sweep must not both make its runs
                self._make(cell, folder, marks)

    def _make(self, cell: Cell, folder: Path, marks: dict[str, dict[str, Any]]) -> None:
        left = _left(folder, marks)
        (folder / TRACKED).mkdir(parents=True, exist_ok=True)
        for id_ in left:
            _forget(folder, id_)
        runs = {id_: {"dense": marks[id_]["dense"], "history": not self._known(cell.store, id_)} for id_ in left}
        asked = {
            **asdict(self),
            "runs": runs,
            "folder": str(cell.folder.absolute()),
            "root": str(cell.sweep.absolute()),
            "overrides": list(cell.overrides),
        }
        if runs:
            _in_a_process(asked, self.timeout)
        for id_ in left:
            write_json(folder / TRACKED / f"{id_}.json", marks[id_])
            if runs[id_]["history"]:
                write_json(cell.store / TRACKED / f"wandb-{id_}.json", {**self._place, "folder": str(folder)})

    @property
    def _place(self) -> dict[str, Any]:
        return {"mode": self.mode, "project": self.project, "entity": self.entity}

    def _known(self, store: Path, id_: str) -> bool:
        """Whether the history of a run was written before: online, or in a folder that is still there.

        A cell has the same history however often it is run, and a server would append the points of a second file.
        """
        found = _read(store / TRACKED / f"wandb-{id_}.json")
        if not isinstance(found, dict) or any(found.get(one) != self._place[one] for one in ("project", "entity")):
            return False
        return found["mode"] == "online" or any(Path(found["folder"]).glob(f"offline-run-*-{id_}"))

    def _mark(self, result: dict[str, Any], dense: bool) -> dict[str, Any]:
        """What tells a run that is to be shown again from one that is there."""
        same = content.unchanging(result)
        shown = content.scalars(same, dense_only=True) if dense else same
        whole = {"shown": json.dumps(shown, sort_keys=True, default=str), "samples": [self.samples, self.sample_chars]}
        return {**self._place, "dense": dense, "content": keys.digest(whole)}


def _left(folder: Path, marks: dict[str, dict[str, Any]]) -> list[str]:
    """The runs that are not there, or not as they should be."""
    return [id_ for id_, mark in marks.items() if _read(folder / TRACKED / f"{id_}.json") != mark]


def _read(file: Path) -> object:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text())
    return None


def _forget(folder: Path, id_: str) -> None:
    """Take away what an earlier attempt at this run left and nobody sent: it would be sent beside the new one."""
    for old in folder.glob(f"offline-run-*-{id_}"):
        if not list(old.glob("*.synced")):
            shutil.rmtree(old)
            shutil.rmtree(folder / "staged" / id_, ignore_errors=True)


def _in_a_process(asked: dict[str, Any], timeout: float) -> None:
    root = str(Path(ssgr.__path__[0]).parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        [sys.executable, "-m", "ssgr.tracker.wandb_run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the library starts a service of its own, which must end with it
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        try:
            _, said = process.communicate(json.dumps(asked, default=str), timeout)
        except subprocess.TimeoutExpired:
            where = Path(asked["root"]) / "wandb"
            raise TimeoutError(
                f"it took longer than {timeout:g} seconds; what it has so far is in {where}; tracker.timeout= gives it "
                "longer, tracker.mode=offline needs no network"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        lines = [line for line in said.splitlines() if line.strip()] or [f"it ended with status {process.returncode}"]
        raise RuntimeError(content.without_secrets(lines[-1].strip()))
