"""Texts: generated prose, a text file or one of rows, or a dataset of the hub, as documents."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ssgr import prose
from ssgr.errors import first_line
from ssgr.files import ROWS, lines

PROSE = "prose"  # the name that means generated prose


class _NoColumn(ValueError):
    """A row without the column of the text."""


@dataclass(frozen=True)
class Text:
    """A text by its name: `prose`, a file, or a dataset id with its column, subset, split and revision.

    `setting` is what the user typed to name it, for messages.
    """

    name: str
    setting: str
    column: str = "text"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None

    def key_content(self) -> object:
        """A file or a folder is keyed by what it holds, a dataset by its name and revision."""
        path = Path(self.name).expanduser()
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else []
        kind = ".jsonl" if path.suffix == ".json" and files == [path] else None  # they are read alike
        sums = [(kind or f.suffix, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]
        return sums if files and self.name != PROSE else self.name

    def documents(self, seed: int) -> Iterable[str]:
        """The documents that are not empty, in an order drawn by `seed`, those of a file as they stand; prose never ends.

        Raises:
            ValueError: there is no such file or dataset, or a row has no such column.
        """
        if self.name == PROSE:
            return _prose(random.Random(f"prose/{seed}"))
        path = Path(self.name).expanduser()
        every = _file_documents(path, self.column) if path.is_file() else self._dataset(seed)
        return (text for text in every if text)

    def whole(self, most: int) -> str:
        """One text: a text file as it is, else the documents in their order with blank lines between, `most` of prose.

        Empty ones are joined too, as the published codes do with WikiText.

        Raises:
            ValueError: there is no such file or dataset, or a row has no such column.
        """
        path = Path(self.name).expanduser()
        if self.name == PROSE:
            return "\n\n".join(islice(_prose(random.Random("prose/whole")), most))
        if path.is_file() and path.suffix not in ROWS:
            return _text(path)
        return "\n\n".join(_file_documents(path, self.column) if path.is_file() else self._dataset(None))

    def _dataset(self, seed: int | None) -> Iterable[str]:
        import datasets

        group = self.setting.rpartition(".")[0]
        try:
            how: dict[str, Any] = {"split": self.split, "revision": self.revision, "streaming": True}
            data = datasets.load_dataset(self.name, self.subset, **how)
            for row in data if seed is None else data.shuffle(seed=seed, buffer_size=1000):
                if self.column not in row:
                    raise _NoColumn(
                        f"{group}.column={self.column}: {self.name} has no such column; its columns are {', '.join(row)}. Type "
                        f"{group}.column=COLUMN"
                    )
                yield _told(row[self.column])
        except _NoColumn:
            raise
        except Exception as error:  # the library raises a dozen kinds; all mean that there is no text
            raise ValueError(
                f"{self.setting}={self.name} is neither a file nor a dataset that can be loaded with "
                f"{group}.subset={self.subset} {group}.split={self.split} {group}.revision={self.revision} "
                f"({first_line(error)}); type those of the dataset, null for its default or newest, or "
                f"{self.setting}=FILE.txt, FILE.jsonl or prose"
            ) from error


def _prose(rng: random.Random) -> Iterable[str]:
    while True:
        yield prose.paragraph(rng)


def _file_documents(path: Path, column: str) -> Iterable[str]:
    if path.suffix not in ROWS:
        yield from (part for part in _text(path).split("\n\n") if part.strip())
        return
    for number, row in ROWS[path.suffix](path):
        if not isinstance(row, dict) or column not in row:
            there = f"it has {', '.join(row)}" if isinstance(row, dict) else "it is no JSON object"
            raise ValueError(f"{path.name}, row {number}: no column {column!r}; {there}")
        yield _told(row[column])


def _told(value: Any) -> str:
    return "" if value is None else str(value)


def _text(path: Path) -> str:
    return "".join(line for _, line in lines(path)).replace("\r\n", "\n").replace("\r", "\n")
