"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write_bytes(file: Path, content: bytes) -> None:
    """Write beside `file` and give it the name; of several processes that do so at once, the last one's stays."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def write_json(file: Path, content: object) -> None:
    """Write JSON beside `file`, bring it to the disk, and give it the name."""
    beside = file.with_name(f"{file.name}.new")
    with open(beside, "w") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)
