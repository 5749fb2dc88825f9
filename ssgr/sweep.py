"""A sweep's folder: which cells it has, of which stages, from which code; one folder a cell beside it."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ssgr.files import below, write_bytes
from ssgr.graph import Graph, Stage
from ssgr.keys import KEY_LENGTH, digest
from ssgr.queue import Records

MANIFEST, VERSION = "sweep.json", 1
PART = "shard.json"  # what a job that samples a part leaves: the keys of its stages
COMMAND = "command.json"  # what a sweep in one process leaves when it ends: what made it, and which cells it has
CONFIGS = "configs"  # what cells were composed to, by content: a queued job finds its own, however the grid changes


@dataclass
class Sweep:
    """What was asked for in `folder`; `names` has each cell's stages by name, `refused` why a cell was never planned."""

    folder: Path
    store: str
    command: list[str]
    commit: str
    parts: int
    benches: dict[int, list[str]] = field(default_factory=dict)
    overrides: dict[int, list[str]] = field(default_factory=dict)
    names: dict[int, dict[str, str]] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    configs: dict[int, str] = field(default_factory=dict)
    graph: Graph = field(default_factory=Graph)
    created: str = ""

    @property
    def id(self) -> str:
        """What the sweep is called."""
        return self.folder.name

    def cell(self, number: int) -> Path:
        """The folder of a cell."""
        return self.folder / str(number)

    def label(self, number: int) -> str:
        """The overrides that tell a cell from the others, on one line."""
        every = set.intersection(*map(set, self.overrides.values())) if len(self.overrides) > 1 else set()
        return ",".join(one for one in self.overrides[number] if one not in every) or "defaults"

    def config_file(self, number: int) -> Path:
        """Where a cell's configuration lies."""
        return self.folder / CONFIGS / f"{self.configs[number]}.json"

    def config(self, number: int) -> dict[str, Any]:
        """What a cell was composed to."""
        out: dict[str, Any] = json.loads(self.config_file(number).read_text())
        return out

    def compose(self, number: int, config: dict[str, Any]) -> None:
        """Keep a cell's configuration; the result of another that had its number is no result of it."""
        before, self.configs[number] = self.configs.get(number), digest(config)[:KEY_LENGTH]
        if before != self.configs[number]:
            (self.cell(number) / "result.json").unlink(missing_ok=True)
        file, content = self.config_file(number), json.dumps(config).encode()
        if not file.exists() or file.read_bytes() != content:  # it may be damaged
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(file, content)

    def write(self) -> None:
        """Write the manifest whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        cells = [
            {
                "number": n,
                "overrides": self.overrides[n],
                "benches": self.benches.get(n, []),
                "stages": self.names.get(n, {}),
                "refused": self.refused.get(n),
                "config": self.configs.get(n),
            }
            for n in self.overrides
        ]
        stages = [asdict(stage) for stage in self.graph.stages.values()]
        content = {
            "version": VERSION,
            "store": self.store,
            "command": self.command,
            "commit": self.commit,
            "parts": self.parts,
            "created": self.created or datetime.now(UTC).isoformat(timespec="seconds"),
            "cells": cells,
            "stages": stages,
        }
        write_bytes(self.folder / MANIFEST, json.dumps(content).encode())


def read(folder: Path) -> Sweep | None:
    """The sweep of `folder`, None if it has no manifest.

    Raises:
        ValueError: its manifest is of another version, or damaged.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
        version = found["version"]
        if version == VERSION:
            return _sweep(folder, found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); remove it and give the command of the sweep again"
        ) from error
    raise ValueError(
        f"{file} was written by another version of ssgr (its format is {version}, this one's is {VERSION}); choose another "
        "folder with hydra.sweep.dir=DIR: what is in the store is used all the same"
    )


def _sweep(folder: Path, found: dict[str, Any]) -> Sweep:
    out = Sweep(folder, found["store"], found["command"], found["commit"], found["parts"], created=found["created"])
    for one in found["stages"]:
        stage = Stage(**{**one, "needs": tuple(one["needs"])})
        out.graph.stages[stage.key] = stage
    for cell in found["cells"]:
        n = cell["number"]
        out.overrides[n], out.benches[n], out.names[n] = cell["overrides"], cell["benches"], cell["stages"]
        if cell["config"] is not None:
            out.configs[n] = cell["config"]
        if cell["refused"] is not None:
            out.refused[n] = cell["refused"]
        else:
            out.graph.cells[n] = tuple(cell["stages"].values())
    return out


def referred(folders: Sequence[Path]) -> set[str]:
    """The keys that results, parts and sweeps under `folders` name.

    Raises:
        ValueError: one of them is damaged, so that it is not known what it refers to.
    """
    out: set[str] = set()
    for folder in folders:
        for file in below(folder, "result.json", PART, MANIFEST, whole=True):
            try:
                found = json.loads(file.read_text())
                out |= {one["key"] for one in found["stages"]} if file.name == MANIFEST else {*found["keys"].values()}
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{file} cannot be read ({type(error).__name__}: {error}), so what it refers to is not known: remove it and "
                    "give its command again"
                ) from error
    return out


def submitted(store: Path, but: Path | None = None) -> set[str]:
    """The keys of the sweeps, `but` one, whose jobs have not all left the queue, as far as is known here."""
    out: set[str] = set()
    for one in Records(store).read():
        if not one.ended and Path(one.folder).parent != but:
            out |= {key for keys in one.tasks for key in keys}
            out |= referred([folder for folder in Path(one.folder).parents[:2] if (folder / MANIFEST).exists()])
    return out


def code(root: Path, diff: Path) -> str:
    """The commit of the code in `root`; what differs from it is written to `diff`. Nothing where there is no git."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = _git(root, ["rev-parse", "HEAD"]).strip()
        changed = _git(root, ["diff", "HEAD"])
        if changed:
            diff.parent.mkdir(parents=True, exist_ok=True)
            diff.write_text(changed)
            return f"{commit} and {diff.name}"
        return commit
    return ""


def _git(root: Path, command: Sequence[str]) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *command], capture_output=True, text=True, check=True, timeout=60
    ).stdout
