"""Errors of libraries: in one line, and what the system said."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable


def first_line(error: BaseException) -> str:
    """What kind of error it is, and the first line of what it says, if it says anything."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def system_number(error: BaseException) -> int | None:
    """The number of the system's error: an OSError has it, a library written in Rust only writes it into its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def unless_closed(main: Callable[[], int | None]) -> int:
    """What a command returns; 1 without a word where its reader, such as head, closed the pipe that it prints to."""
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is flushed at the end
        return 1
