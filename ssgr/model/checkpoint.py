"""Checkpoints on disk, tensor by tensor: read from the shards of a source, written into shards of the same layout.

A pruned model has the names, shapes and dtypes of its source, so each of its files begins with the source's header, and
every tensor has its place there before it is known.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssgr.products import finite

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TABLES = {"I64": torch.int64}  # of whole numbers, such as DeepSeek-V4's from tokens to experts; no weights
BESIDE = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")  # what a checkpoint needs beside its weights
TEMPLATES = "additional_chat_templates/*.jinja"  # where there are several
LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")  # how the files begin that must go wherever the weights go
CONFIG = "config.json"
CARD = "README.md"  # tells of one model; it is not copied to another
_LENGTH_BYTES = 8  # of the header's length, little-endian (safetensors format)
_CHUNK = 16 << 20  # bytes copied at a time


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its file, the bytes [start, stop) there, and what they are."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def weight_files(directory: Path) -> list[str]:
    """The safetensors files that transformers loads: the one that config.json names, the single one, or those of the index.

    Raises:
        ValueError: there are none, or the index is damaged.
    """
    config = directory / CONFIG
    named = json.loads(config.read_text()).get("transformers_weights") if config.is_file() else None
    first = named or (SINGLE if (directory / SINGLE).is_file() else INDEX)
    if not (directory / first).is_file():
        missing = f"no {named}, which its config.json names," if named else f"neither {SINGLE} nor {INDEX}"
        raise ValueError(
            f"{directory}: {missing} is there; other formats are not read: convert the checkpoint with save_pretrained"
        )
    if not first.endswith(".json"):
        return [first]
    try:
        return sorted(set(json.loads((directory / first).read_text())["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / first}: it is damaged ({error!r}); download the model again") from error


def beside(directory: Path) -> list[Path]:
    """What a checkpoint needs beside its weights: configuration, tokenizer, chat templates, code."""
    found = [*directory.iterdir(), *directory.glob(TEMPLATES)]
    return sorted(file for file in found if file.suffix in BESIDE and file.is_file())


class Checkpoint:
    """The safetensors files of a Hugging Face directory.

    Raises:
        ValueError: there are none, one is missing, or one is shorter than its header says.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.places: dict[str, Place] = {}
        for file in weight_files(directory):
            self._read_header(file)

    def _read_header(self, file: str) -> None:
        path = self.directory / file
        try:
            size = path.stat().st_size
            with open(path, "rb") as stream:
                length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
                header = json.loads(stream.read(length)) if length <= size else {}
        except OSError as error:
            raise ValueError(
                f"{path}: this shard cannot be read ({error.strerror}); download the model again"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: its header is damaged ({error}); download the model again") from error
        first = _LENGTH_BYTES + length
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = (first + offset for offset in entry["data_offsets"])
                self.places[name] = Place(file, entry["dtype"], tuple(entry["shape"]), start, stop)
        end = max((p.stop for p in self.places.values() if p.file == file), default=first)
        if not header or end > size:
            raise ValueError(f"{path}: {size} bytes, and its header says {end}: it is cut; download the model again")

    def header(self, file: str) -> bytes:
        """The length and the header of `file`, as they stand there."""
        with open(self.directory / file, "rb") as stream:
            length = stream.read(_LENGTH_BYTES)
            return length + stream.read(int.from_bytes(length, "little"))

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own and in its own dtype.

        Raises:
            ValueError: it is of a dtype that weights have where they are quantised, holds NaN or infinity, or is no longer
                there.
        """
        place = self.places[name]
        if (dtype := (DTYPES | _TABLES).get(place.dtype)) is None:
            raise ValueError(
                f"{self.directory}: {name} has dtype {place.dtype}; quantised weights cannot be pruned: take the "
                f"unquantised checkpoint ({', '.join(DTYPES)})"
            )
        content = bytearray(place.stop - place.start)
        with self.open(place) as stream:
            if stream.readinto(content) != len(content):
                raise self.cut(place)
        tensor = torch.frombuffer(content, dtype=dtype).view(place.shape)
        if not finite(tensor):
            raise ValueError(
                f"{self.directory}: {name} holds NaN or infinity; the checkpoint is damaged, use another copy"
            )
        return tensor

    def open(self, place: Place) -> BufferedReader:
        """The file of a tensor, at its first byte.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            stream = open(self.directory / place.file, "rb")  # noqa: SIM115
        except OSError as error:
            raise ValueError(
                f"{self.directory / place.file}: this shard cannot be read ({error.strerror}); download the model again"
            ) from error
        stream.seek(place.start)
        return stream

    def cut(self, place: Place) -> ValueError:
        """What to raise where a file ends before a tensor does."""
        return ValueError(
            f"{self.directory / place.file}: it ends before byte {place.stop}, and did not when it was opened; bring back "
            "the file as it was, or download the model again"
        )

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(p.stop - p.start for p in self.places.values())

    def stamp(self) -> dict[str, list[int]]:
        """Size and time of change of every file that is there: what tells whether it is still the same."""
        files = [file for file in sorted({p.file for p in self.places.values()}) if (self.directory / file).exists()]
        stats = {file: (self.directory / file).stat() for file in files}
        return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


class Replica:
    """A checkpoint in `folder` in the layout of `source`, filled tensor by tensor in any order.

    `fresh` says whether a file must be begun; else all that was written there before still stands.

    Raises:
        ValueError: `folder` is that of the source, or one of its files is.
    """

    def __init__(self, source: Checkpoint, folder: Path) -> None:
        self.source, self.folder = source, folder
        for own in (folder, *(folder / file for file in self._files())):
            if own.exists() and own.samefile(source.directory / own.relative_to(folder)):
                raise ValueError(f"{own}: a model cannot be pruned into its own files; give another folder")
        self.fresh = not all(self._begun(file) for file in self._files())

    def _begun(self, file: str) -> bool:
        """Whether `file` has the size and the header of the source's."""
        path, header = self.folder / file, self.source.header(file)
        if not path.is_file() or path.stat().st_size != self._end(file):
            return False
        with open(path, "rb") as stream:
            return stream.read(len(header)) == header

    def begin(self) -> None:
        """Begin the files that are not there, and see that their headers reach the disk."""
        self.folder.mkdir(exist_ok=True)  # no parents: the folder of the work is gone where another process took over
        for file in self._files():
            if not self._begun(file):
                with open(self.folder / file, "wb") as stream:
                    stream.write(self.source.header(file))
                    stream.truncate(self._end(file))
                self._sync([file])

    def _end(self, file: str) -> int:
        return max(p.stop for p in self.source.places.values() if p.file == file)

    def _files(self) -> list[str]:
        return sorted({p.file for p in self.source.places.values()})

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Put `tensors` in their places, in the source's dtype, and see that they reach the disk."""
        for name, tensor in tensors.items():
            place = self.source.places[name]
            assert tuple(tensor.shape) == place.shape, name
            content = tensor.to("cpu", DTYPES[place.dtype]).contiguous().view(torch.uint8).numpy()
            with open(self.folder / place.file, "r+b") as stream:
                stream.seek(place.start)
                stream.write(content.data)
        self._sync({self.source.places[name].file for name in tensors})

    def copy(self, names: Collection[str]) -> None:
        """Copy tensors as they are in the source.

        Raises:
            ValueError: a file of the source is no longer what it was.
        """
        for name in names:
            place = self.source.places[name]
            with self.source.open(place) as old, open(self.folder / place.file, "r+b") as new:
                new.seek(place.start)
                left = place.stop - place.start
                while left:
                    chunk = old.read(min(_CHUNK, left))
                    if not chunk:
                        raise self.source.cut(place)
                    new.write(chunk)
                    left -= len(chunk)
        self._sync({self.source.places[name].file for name in names})

    def copy_rest(self) -> None:
        """Copy the configuration, the tokenizer, the index and the licence of the source; its card is not of this model."""
        unused = INDEX if self._files() == [SINGLE] else None  # of shards that are not written
        source = self.source.directory
        legal = {file for file in source.iterdir() if file.is_file() and file.name.upper().startswith(LEGAL)}
        for file in legal.union(beside(source)):
            if file.name != unused:
                copy = self.folder / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
        config = self.folder / CONFIG
        found = json.loads(config.read_text()) if config.is_file() else None
        if found != (plain := _without_sparsity(found)):
            config.write_text(json.dumps(plain, indent=2) + "\n")

    def _sync(self, files: Collection[str]) -> None:
        for file in files:
            with open(self.folder / file, "rb") as stream:
                os.fsync(stream.fileno())


def _without_sparsity(config: Any) -> Any:
    """`config` without what says how another pruning was done, here or inside compression_config."""
    if not isinstance(config, dict):
        return config
    return {key: _without_sparsity(value) for key, value in config.items() if key != "sparsity_config"}
