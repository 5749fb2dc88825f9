"""Steps: the rows pass through a block once, and stop before each set of matrices until these have been pruned.

Each batch runs in a greenlet of its own: so the forward pass of any block is stopped in its middle without knowing what
the block looks like. Where all rows in the middle of a block do not fit into memory, they pass through it from its beginning
again for each set, which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from greenlet import getcurrent, greenlet
from torch import Tensor

from ssgr.model.blocks import Matrix
from ssgr.pruner import Statistic
from ssgr.stages.activations import Batch
from ssgr.stages.collect import Collector, sharing
from ssgr.stages.statistics import Heard
from ssgr.stages.walk import Walk


class Owners:
    """Which matrices have the same inputs, found by passing one batch through the first block of each kind."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self._known: dict[tuple[str, ...], dict[str, str]] = {}

    def of(self, i: int, layers: Mapping[str, Matrix], batches: Sequence[Batch]) -> dict[str, str]:
        """For each matrix of block `i` the first one that has the same inputs."""
        kind = tuple(layers)
        if kind not in self._known:
            collector = Collector("norm", layers, clock=self.walk.clock)
            if batches:
                with collector.listening():
                    self.walk.listen(i, batches[:1], collector)
            self._known[kind] = self.walk.ranks.tell(collector.owner, 0)
        return self._known[kind]


def steps(
    walk: Walk, i: int, layers: Mapping[str, Matrix], batches: Sequence[Batch], statistic: Statistic,
    owner: Mapping[str, str],
) -> Iterator[tuple[dict[str, Matrix], Heard]]:  # fmt: skip
    """Pass the rows through block `i`, and hand out each set of matrices with what enters it, to be pruned before it runs.

    Raises:
        ValueError: an output is not finite, a matrix runs twice, or matrices that had the same inputs before have others now.
    """
    collector = Collector(statistic, layers, owner=dict(owner), clock=walk.clock)
    paused = [_Paused(partial(batch.through, walk.blocks[i], i, walk.device), batch, collector) for batch in batches]
    groups = {owner.get(group[0], group[0]): group for group in sharing(list(layers), owner)}
    try:
        with collector.listening():
            while True:
                with walk.clock.timed("forward"):
                    for one in paused:
                        one.resume()
                at = walk.ranks.tell({one.at for one in paused}, 0)
                if at == {None}:
                    break
                if len(at) != 1 or {one.at for one in paused} - at:
                    raise ValueError(f"{walk.full(i)}: its batches run through different layers; type order=block")
                (whose,) = at
                if whose not in groups:
                    raise ValueError(f"{walk.full(i, whose)} runs twice in its block; type order=block")
                walk.ranks.add_up(collector, walk.device)
                sums = {key: sums.tensors() for key, sums in collector.sums.items()}
                collector.sums.clear()  # the memory of one set at a time
                yield {name: layers[name] for name in groups.pop(whose)}, (dict(owner), sums)
                if not groups and i + 1 == len(walk):
                    return  # nothing more to prune: what the last block puts out is not looked at
        for names in groups.values():
            yield {name: layers[name] for name in names}, ({}, {})
        walk.keep(i, ((one.batch, one.out) for one in paused))
    finally:
        for one in paused:
            one.stop()
        collector.pause = collector.last = None  # they hold the last batch, which holds them


def repeated(
    walk: Walk, i: int, layers: Mapping[str, Matrix], batches: Sequence[Batch], statistic: Statistic,
    owner: Mapping[str, str],
) -> Iterator[tuple[dict[str, Matrix], Heard]]:  # fmt: skip
    """Hand out what `steps` does with one batch in memory at a time: for each set the rows pass through block `i` as far as it.

    Raises:
        ValueError: a matrix runs twice.
    """
    for names in sharing(list(owner), owner):  # in the order in which they run
        some = {name: layers[name] for name in names}
        collector = Collector(statistic, some, clock=walk.clock)
        with collector.listening():
            walk.listen(i, batches, collector)
        if collector.twice:
            raise ValueError(f"{walk.full(i, names[0])} runs twice in its block; type order=block")
        walk.ranks.add_up(collector, walk.device)
        yield some, (collector.owner, {key: sums.tensors() for key, sums in collector.sums.items()})
    if unheard := {name: matrix for name, matrix in layers.items() if name not in owner}:
        yield unheard, ({}, {})


class _Paused:
    """A batch on its way through a block; `resume` lets it run to its next stop, `at` some matrix, or to its end."""

    def __init__(self, forward: Callable[[], Tensor], batch: Batch, collector: Collector) -> None:
        self.batch, self.collector = batch, collector
        self.at: str | None = None
        self.out: Tensor | None = None
        self._run, self._home = greenlet(forward), getcurrent()
        self._last: tuple[Tensor, str] | None = None

    def resume(self) -> None:
        """Let it run to its next stop."""
        self.collector.turn(self.batch.streams, self.batch.tokens, self._last, self._pause)
        out = self._run.switch()
        self._last = self.collector.last
        if self._run.dead:
            self.at, self.out = None, out

    def _pause(self, name: str) -> None:
        self.at = name
        self._home.switch()

    def stop(self) -> None:
        """End it, wherever it is."""
        self._run.throw()
