"""Reads what W&B's library wrote: the records of a `.wandb` file, which is a log in LevelDB's format, put together."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
_BLOCK, _HEAD = 32768, struct.Struct("<IHB")  # a chunk's checksum, size and kind
_FULL, _LAST = 1, 4


def records(file: Path) -> Iterator[Any]:
    """The records in their order; every checksum is compared."""
    data = file.read_bytes()
    assert data.startswith(_HEADER), f"{file} is no .wandb file"
    at, whole = len(_HEADER), b""
    while at + _HEAD.size <= len(data):
        if (room := _BLOCK - at % _BLOCK) < _HEAD.size:
            at += room
            continue
        checksum, size, kind = _HEAD.unpack_from(data, at)
        part = data[at + _HEAD.size : at + _HEAD.size + size]
        assert zlib.crc32(bytes([kind]) + part) == checksum, f"{file} is damaged at {at}"
        at += _HEAD.size + size
        whole += part
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@dataclass
class Offline:
    """A run as its files tell it."""

    folder: Path
    id: str = ""
    group: str = ""
    job_type: str = ""
    project: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    ended: bool = False

    def table(self, name: str) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of a table of the summary."""
        found = json.loads((self.folder / "files" / self.summary[f"tables/{name}"]["path"]).read_text())
        return found["columns"], found["data"]


def read(folder: Path) -> Offline:
    """The run whose files lie in `folder`."""
    (file,) = folder.glob("run-*.wandb")
    out = Offline(folder)
    for record in records(file):
        kind = record.WhichOneof("record_type")
        one = getattr(record, kind)
        if kind == "run":
            out.id, out.group, out.job_type, out.project = one.run_id, one.run_group, one.job_type, one.project
            out.tags = list(one.tags)
            out.config = {item.key: json.loads(item.value_json) for item in one.config.update if item.key != "_wandb"}
        elif kind == "history":
            out.history.append({_name(item): json.loads(item.value_json) for item in one.item})
        elif kind == "summary":
            out.summary |= {_name(item): json.loads(item.value_json) for item in one.update}
        elif kind == "artifact":
            out.artifacts.append(one)
        out.ended |= kind == "exit"
    return out


def runs(folder: Path) -> dict[str, Offline]:
    """Every run below a sweep's folder by its id; one that has two folders is an error."""
    found = [read(one) for one in sorted((folder / "wandb").glob("offline-run-*"))]
    assert len({one.id for one in found}) == len(found)
    return {one.id: one for one in found}


def _name(item: Any) -> str:
    return item.key or "/".join(item.nested_key)
