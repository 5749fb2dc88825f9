"""Errors of libraries: in one line, and what the system said."""

from __future__ import annotations

import re


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
