"""One line of progress with an ETA, on standard error: redrawn on a terminal, now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

latest: dict[str, str | float] | None = None  # of this process, for whoever watches it from afar
told: Callable[[dict[str, str | float]], None] | None = None  # the parent, where the parent is who is watched


class Progress:
    """Counts units of `total`; `tell` adds words such as tokens a second; nothing is seen where it is not `shown`."""

    def __init__(self, what: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.what, self.total, self.done, self.before, self.start = what, total, done, done, time.monotonic()
        quiet = 0.1 if sys.stderr.isatty() else 10.0  # seconds between lines
        self.bar = tqdm(
            desc=f"{what:<22}",
            total=total,
            initial=done,
            mininterval=quiet,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not shown,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global latest
        latest = None
        self.bar.close()

    def step(self, n: int = 1, tell: str = "") -> None:
        """`n` more units are done."""
        if tell:
            self.bar.set_postfix_str(tell, refresh=False)
        self.bar.update(n)
        self.done += n
        global latest
        seconds = time.monotonic() - self.start
        left = (self.total - self.done) * seconds / max(self.done - self.before, 1e-9)
        latest = {
            "what": self.what,
            "done": self.done,
            "total": self.total,
            "eta_seconds": round(left, 1),
            "tell": tell,
        }
        if told is not None:
            told(latest)
