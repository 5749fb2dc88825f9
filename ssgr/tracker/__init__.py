"""Trackers: where a cell's result is shown beside its result.json. They read it, change nothing, and never fail a run."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ssgr.records import RunResult

_log = logging.getLogger("ssgr")
_GIVEN_UP: set[str] = (
    set()
)  # trackers that did not answer in time: the other cells of this process do not wait for them


@dataclass(frozen=True)
class Cell:
    """A cell whose result is written.

    `folder` holds its result.json, outcomes and texts, `sweep` those of all cells of its sweep (`folder` itself, if there is
    but one), `store` its artefacts, and `overrides` tell it from other cells.
    """

    result: RunResult
    folder: Path
    sweep: Path
    store: Path
    overrides: tuple[str, ...]


class Tracker(Protocol):
    """What shows results."""

    def track(self, cell: Cell) -> None:
        """Show a cell; one that was shown before and has not changed is left as it is.

        Raises:
            Exception: whatever keeps it from doing so.
        """
        ...


def build(given: Mapping[str, Any] | None) -> Tracker | None:
    """The tracker that the group `tracker` of a configuration describes; None where none is wanted.

    Raises:
        ValueError: a setting has no valid value; the message names it.
    """
    settings = dict(given or {})
    target = settings.pop("_target_", None)
    if target is None:
        return None
    module, _, kind = str(target).rpartition(".")
    try:
        made: Tracker = getattr(importlib.import_module(module), kind)(**settings)
    except (ImportError, AttributeError, ValueError) as error:
        if isinstance(error, ValueError) and module:
            raise
        raise ValueError(
            f"tracker._target_={target}: there is no such tracker; type tracker=none, wandb or tensorboard"
        ) from error
    except TypeError as error:
        raise ValueError(f"tracker: {error}; leave it out, or see conf/tracker") from error
    return made


def track(cell: Cell) -> None:
    """Show a cell with the tracker of its configuration; one that fails is a warning, whatever the reason."""
    given = cell.result.config.get("tracker") or {}
    name = str(given.get("name"))
    if name in _GIVEN_UP:
        return
    try:
        tracker = build(given)
        if tracker is not None:
            tracker.track(cell)
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        more = ""
        if isinstance(error, TimeoutError):
            _GIVEN_UP.add(name)
            more = ", and this process tracks no further cells"
        _log.warning(
            "tracker=%s: the result in %s is whole and was not tracked (%s)%s; the same command again tracks it",
            name, cell.folder, said, more,
        )  # fmt: skip
