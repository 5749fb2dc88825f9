"""The graph of a grid: the stages of all its cells, each once, as cells share whatever has the same key. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

KINDS = ("convert", "sample", "gather", "grade", "select", "collect", "prune", "evaluate")  # in the order of the flow
ENDS = ("evaluate", "prune", "select")  # what a cell's result is read from: its scores, its checkpoint, its calibration


@dataclass(frozen=True)
class Planned:
    """A stage of a cell: its name there, its kind, its key in the store, and the keys of what must be there before it."""

    name: str
    stage: str
    key: str
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """A stage of the graph; `kind` is its name in KINDS, `cell` the first cell that wants it."""

    key: str
    kind: str
    folder: str  # in the store
    name: str  # in that cell
    needs: tuple[str, ...]
    cell: int


@dataclass
class Graph:
    """Unique stages, each after those that it needs, and what each cell wants."""

    stages: dict[str, Stage] = field(default_factory=dict)
    cells: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def add(self, cell: int, planned: Iterable[Planned]) -> None:
        """Add the stages of a cell."""
        wanted = []
        for one in planned:
            if one.key not in self.stages:
                whole = one.stage == "sample" and any(self.stages[need].folder == "sample" for need in one.needs)
                kind = "gather" if whole else one.stage
                self.stages[one.key] = Stage(one.key, kind, one.stage, one.name, one.needs, cell)
            wanted.append(one.key)
        self.cells[cell] = tuple(wanted)

    def missing(self, have: Callable[[Stage], bool]) -> list[Stage]:
        """The stages that must be made, given those that the store has: what only a stage that is there needs is not wanted."""
        wanted: set[str] = set()
        needed = {key for keys in self.cells.values() for key in keys if self.stages[key].kind in ENDS}
        for stage in reversed(self.stages.values()):
            if stage.key in needed and not have(stage):
                wanted.add(stage.key)
                needed |= set(stage.needs)
        return [stage for stage in self.stages.values() if stage.key in wanted]

    def failed_by(self, failed: Collection[str]) -> dict[str, str]:
        """For every stage that cannot be made, the first of `failed` that is in its way."""
        out: dict[str, str] = {key: key for key in failed}
        for stage in self.stages.values():
            for need in stage.needs:
                if need in out:
                    out.setdefault(stage.key, out[need])
        return out
