"""A graph's missing stages -> tasks -> arrays of jobs. Pure: no scheduler, no store, no Hydra.

A task is what one job does: a stage, and the small stages that follow it. An array is tasks of one kind that start on the
same condition.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ssgr.graph import Stage


@dataclass(frozen=True)
class Task:
    """What one job does: its stages, in their order, of the cell whose configuration it reads."""

    kind: str
    keys: tuple[str, ...]
    cell: int
    needs: frozenset[str]  # keys of stages that other jobs make

    @property
    def id(self) -> str:
        """The key of its first stage."""
        return self.keys[0]


def tasks(missing: Sequence[Stage], fold: Mapping[str, str], live: Mapping[str, str]) -> list[Task]:
    """The missing stages that no `live` job makes, as tasks.

    `fold` says which kind of stage goes on in the job of which kind, if it needs nothing else.
    """
    absent = {stage.key for stage in missing}
    kinds = {stage.key: stage.kind for stage in missing}
    home: dict[str, str] = {}  # a stage's key -> that of the first stage of its task
    chains: dict[str, list[Stage]] = {}
    for stage in missing:
        if stage.key in live:
            continue
        needs = [need for need in stage.needs if need in absent]
        chain = chains.get(home.get(needs[0], "")) if len(needs) == 1 else None
        # of one cell, as a job builds one: a second grader of the same traces is a job of its own
        if chain and kinds[needs[0]] in _alike(fold.get(stage.kind)) and chain[0].cell == stage.cell:
            home[stage.key] = chain[0].key
            chain.append(stage)
        else:
            home[stage.key] = stage.key
            chains[stage.key] = [stage]
    out = []
    for chain in chains.values():
        own = {stage.key for stage in chain}
        needs_ = frozenset(need for stage in chain for need in stage.needs if need in absent and need not in own)
        out.append(Task(chain[0].kind, tuple(stage.key for stage in chain), chain[0].cell, needs_))
    return out


def _alike(kind: str | None) -> tuple[str | None, ...]:
    """A whole sample is gathered where it is cut in parts."""
    return ("sample", "gather") if kind == "sample" else (kind,)


@dataclass(frozen=True)
class Array:
    """Jobs that are submitted together; `after` are arrays or single jobs that must have succeeded.

    `after` holds (array, element) pairs, with `element` None where element i waits for element i alone.
    """

    kind: str
    tasks: tuple[Task, ...]
    after: tuple[tuple[int, int | None], ...] = ()
    live: tuple[str, ...] = ()  # ids of jobs that were submitted before


_Element = tuple[int, int]  # of which array, which
# a task, what it needs of this submission, and of earlier ones
_Member = tuple[Task, frozenset[_Element], frozenset[str]]
_Group = tuple[str, int | None, frozenset[_Element] | None, frozenset[str] | None]
_After = tuple[tuple[int, int | None], ...]


def arrays(todo: Sequence[Task], live: Mapping[str, str], limit: int) -> list[Array]:
    """Tasks in arrays of at most `limit`; `live` gives the job that makes a stage already.

    A job waits for what it needs and no more: tasks that need exactly the same stages share an array, and so do tasks of
    which each needs one element of the same array.
    """
    out: list[Array] = []
    place: dict[str, tuple[int, int]] = {}  # a stage's key -> its array and element
    for level in _levels(todo):
        groups: dict[_Group, list[_Member]] = defaultdict(list)
        for task in level:
            own = frozenset(place[need] for need in task.needs if need in place)
            old = frozenset(live[need] for need in task.needs if need in live)
            single = len(own) == 1 and not old
            shared = next(iter(own))[0] if single else None
            groups[task.kind, shared, None if single else own, None if single else old].append((task, own, old))
        for (kind, shared, *_), members in groups.items():
            for some, after in _aligned(out, shared, members, limit):
                i = len(out)
                out.append(Array(kind, tuple(task for task, *_ in some), after, tuple(sorted(some[0][2]))))
                for j, (task, *_) in enumerate(some):
                    place |= {key: (i, j) for key in task.keys}
    return out


def _aligned(
    out: Sequence[Array], shared: int | None, members: Sequence[_Member], limit: int
) -> Iterator[tuple[Sequence[_Member], _After]]:
    """`members` cut in arrays, with what each array waits for."""
    if shared is not None:
        by_element: dict[int, list[_Member]] = defaultdict(list)
        for member in members:
            by_element[next(iter(member[1]))[1]].append(member)
        size = len(out[shared].tasks)
        layers = max(map(len, by_element.values()))
        if 1 < size == len(by_element) and layers <= size:  # no more arrays than one an element
            while all(by_element.values()):
                yield [by_element[j].pop(0) for j in range(size)], ((shared, None),)
        for j, rest in sorted(by_element.items()):
            for k in range(0, len(rest), limit):
                yield rest[k : k + limit], ((shared, j),)
        return
    after = tuple(sorted(members[0][1]))
    for k in range(0, len(members), limit):
        yield members[k : k + limit], after


def _levels(todo: Sequence[Task]) -> Iterator[list[Task]]:
    """Tasks whose needs are in earlier levels, level by level."""
    home = {key: task.id for task in todo for key in task.keys}
    depth: dict[str, int] = {}
    levels: dict[int, list[Task]] = defaultdict(list)
    for task in todo:  # in the order of the graph: what a task needs comes before it
        above = [depth[home[need]] for need in task.needs if need in home]
        depth[task.id] = 1 + max(above, default=-1)
        levels[depth[task.id]].append(task)
    for _, level in sorted(levels.items()):
        yield level
