"""ssgr COMMAND ...: what one does with results and answers beside running experiments (python run.py)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ssgr.errors import unless_closed

COMMANDS = {
    "report": ("ssgr.report.__main__", "tables of runs and sweeps"),
    "status": ("ssgr.status", "how far a sweep is"),
    "store": ("ssgr.store.__main__", "what the store holds, what of it is damaged, what nothing refers to"),
    "export": ("ssgr.export", "results in another tool's format"),
    "grade": ("ssgr.grade", "verdicts on a file of answers"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Hand the rest of the command line to the command that it names."""
    return unless_closed(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int | None:
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if name not in COMMANDS:
        known = "\n".join(f"  ssgr {command:<8} {what}" for command, (_, what) in COMMANDS.items())
        asked = name in ("-h", "--help")
        print(
            ("" if asked else f"error: ssgr has no command {name!r}\n") + known,
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    return importlib.import_module(COMMANDS[name][0]).main(rest[:-1])  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
