"""Clock: the seconds of a prune by what they were spent on, on a GPU without waiting for it."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

_UNREAD = 256  # spans of a GPU that may be unread


class Clock:
    """Seconds by what they were spent on: one thing at a time, the innermost.

    A GPU works on after the host has gone on, so there its own events tell when something began and ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._what: str | None = None
        self._since: Any = None
        self._unread: deque[tuple[str, Any, Any]] = deque()  # what, and the events of its beginning and end

    def begin(self, seconds: Mapping[str, float]) -> None:
        """Count on from `seconds`."""
        self._seconds.update(seconds)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the seconds spent inside as `what`, and not as what this is a part of."""
        outer = self._what
        self._turn(what)
        try:
            yield
        finally:
            self._turn(outer)

    def seconds(self, whole: bool = False) -> dict[str, float]:
        """Those of all that is done; with `whole` of all that was begun, which is waited for."""
        if whole and self._unread:
            self._unread[-1][2].synchronize()
        self._read()
        return dict(self._seconds)

    def _turn(self, what: str | None) -> None:
        now: Any = self._event() if self.cuda else time.perf_counter()
        if self._what is not None and self.cuda:
            self._unread.append((self._what, self._since, now))
        elif self._what is not None:
            self._seconds[self._what] += now - self._since
        self._what, self._since = what, now
        if len(self._unread) > _UNREAD:
            self._read()

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _read(self) -> None:
        while self._unread and self._unread[0][2].query():
            what, start, stop = self._unread.popleft()
            self._seconds[what] += start.elapsed_time(stop) / 1000
