"""One line of progress with an ETA, on standard error: redrawn on a terminal, now and then in a log."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts units of `total`; `tell` adds words such as tokens a second; nothing is seen where it is not `shown`."""

    def __init__(self, what: str, total: int, done: int = 0, shown: bool = True) -> None:
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
        self.bar.close()

    def step(self, n: int = 1, tell: str = "") -> None:
        """`n` more units are done."""
        if tell:
            self.bar.set_postfix_str(tell, refresh=False)
        self.bar.update(n)
