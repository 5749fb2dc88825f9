"""Steps: the rows pass through a block once, and stop before each set of matrices until these have been pruned.

Each batch has a thread of its own, asleep but while it is its turn: so the forward pass of any block is stopped in its
middle without knowing what the block looks like.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ssgr.model.blocks import Matrix
from ssgr.pruner import Statistic
from ssgr.stages.activations import Batch
from ssgr.stages.collect import Collector, sharing
from ssgr.stages.statistics import Heard
from ssgr.stages.walk import Walk

_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's mallopt
_LARGE, _USUAL = 4 << 20, 32 << 20  # bytes; the second is where glibc's own threshold ends when many are freed


def _give_back(size: int) -> None:
    """Let memory of `size` bytes and more go back to the system at once: each thread has a heap of its own, and what one
    frees there is of no use to the others. What the environment asks for stands."""
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(_THRESHOLD, size)


class Owners:
    """Which matrices have the same inputs, found by passing one batch through the first block of each kind."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self._known: dict[tuple[str, ...], dict[str, str]] = {}

    def of(self, i: int, layers: Mapping[str, Matrix], batches: Sequence[Batch]) -> dict[str, str]:
        """For each matrix of block `i` the first one that has the same inputs."""
        kind = tuple(layers)
        if kind not in self._known:
            collector = Collector("norm", layers)
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
    _give_back(_LARGE)
    collector = Collector(statistic, layers, owner=dict(owner))
    paused = [_Paused(partial(batch.through, walk.blocks[i], i, walk.device), batch, collector) for batch in batches]
    groups = {owner.get(group[0], group[0]): group for group in sharing(list(layers), owner)}
    try:
        with collector.listening():
            while True:
                with walk.timed("forward"):
                    for one in paused:
                        one.resume()
                at = walk.ranks.tell({one.at for one in paused}, 0)
                if at == {None}:
                    break
                if len(at) != 1 or {one.at for one in paused} - at:
                    raise ValueError(f"{walk.name}.{i}: its batches run through different layers; type order=block")
                (whose,) = at
                if whose not in groups:
                    raise ValueError(f"{walk.name}.{i}.{whose} runs twice in its block; type order=block")
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
        walk.count(collector)
        for one in paused:
            one.stop()
        _give_back(_USUAL)
        collector.pause = collector.last = None  # they hold the last batch, which holds them


class _Stopped(BaseException):
    """This batch is not needed any more."""


class _Paused(threading.Thread):
    """A batch on its way through a block; `resume` lets it run to its next stop, `at` some matrix, or to its end."""

    def __init__(self, forward: Callable[[], Tensor], batch: Batch, collector: Collector) -> None:
        super().__init__(daemon=True)
        self.forward, self.batch, self.collector = forward, batch, collector
        self.at: str | None = None
        self.out: Tensor | None = None
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._stopped = False
        self._last: tuple[Tensor, str] | None = None

    def run(self) -> None:
        """What the thread does: the forward pass, whenever it is its turn."""
        self._turn.acquire()
        try:
            with torch.no_grad():  # a setting of each thread
                self.out = self.forward()
            self.at = None
        except _Stopped:
            pass
        except BaseException as error:  # raised where this batch is waited for
            self._error = error
        finally:
            self._back.release()

    def resume(self) -> None:
        """Let it run to its next stop.

        Raises:
            BaseException: what the forward pass raised.
        """
        self.collector.turn(self.batch.streams, self.batch.tokens, self._last, self._pause)
        if not self.ident:
            self.start()
        self._turn.release()
        self._back.acquire()
        self._last = self.collector.last
        if self._error is not None:
            raise self._error

    def _pause(self, name: str) -> None:
        self.at = name
        self._back.release()
        self._turn.acquire()
        if self._stopped:
            raise _Stopped

    def stop(self) -> None:
        """End it, wherever it is."""
        if self.is_alive():
            self._stopped = True
            self._turn.release()
            self.join()
