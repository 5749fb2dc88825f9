"""Errors of libraries, in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What kind of error it is, and the first line of what it says, if it says anything."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
