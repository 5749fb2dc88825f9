"""Problems from a table: a JSONL, JSON, Parquet or CSV file, or any dataset that `datasets` can load."""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from ssgr.errors import first_line
from ssgr.files import ROWS, json_lines
from ssgr.problems import Split, checked
from ssgr.records import Problem

_log = logging.getLogger("ssgr")
_TEST_SHARE = 10  # one row in ten, by a hash of its question, is kept for the test split where the source has none


class _BadRow(ValueError):
    """A row without a question or an answer; the message names it."""


@dataclass(frozen=True)
class Columns:
    """Which column holds what; a column that a source lacks is null.

    Multiple choice: `choices` is the column that lists the options, and the answer a letter or a number from 0, or one of
    the labels where they have some, as in ARC; or it names the columns that hold one option each, the right one first, of
    which the others may be empty. They are shown as A., B., ... in an order of their own for each problem, drawn with the
    seed `shuffle` (null: as they stand). What is asked is `prompt` with the question in it.

    Raises:
        ValueError: `prompt` has no place for the question.
    """

    question: str = "problem"
    answer: str = "answer"
    id: str | None = None
    level: str | None = None
    solution: str | None = None
    answer_after: str | None = None  # the answer is what follows this mark in its column, as #### in GSM8K
    choices: str | Sequence[str] | None = None
    shuffle: int | None = None
    prompt: str = "{question}"

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt:
            raise ValueError(
                f"problems.columns.prompt={self.prompt!r}: it has no {{question}}, where the question is put"
            )

    def problem(self, row: Mapping[str, Any], number: int, source: str, before: int = 0) -> Problem:
        """One row as a problem; `before` are the rows of the files that come before its own.

        Raises:
            ValueError: no question or no answer, or one that is no text; the row is named.
        """
        own = isinstance(self.choices, str) or self.choices is None  # the answer has a column of its own
        for role in ("question", "answer") if own else ("question",):
            if _blank(value := row.get(getattr(self, role))) or _no_text(value, several=role == "answer"):
                raise self._lacks(role, row, f"{source}, row {number}")
        question = bare = str(row[self.question])
        solution = row.get(self.solution) if self.solution else None
        if self.choices is None:
            gold = row[self.answer]
            answer = ", ".join(map(str, gold)) if isinstance(gold, list) else str(gold)
        else:
            options, right = self._options(row, f"{source}, row {number}")
            shown, answer = self._shown(options, right, question)
            question = f"{question}\n\n{shown}"
            bare = "\n".join((bare, *sorted(options)))  # in whatever order they are shown, it is the same
        if self.answer_after and self.answer_after in answer:
            answer = answer.rsplit(self.answer_after, 1)[1].strip()
            solution = solution and str(solution).rsplit(self.answer_after, 1)[0].strip()
        if not answer.strip():
            raise self._lacks("answer", row, f"{source}, row {number}")
        return Problem(
            id=str(row[self.id]) if self.id and row.get(self.id) is not None else f"row/{before + number}",
            question=self.prompt.replace("{question}", question),
            bare=bare,
            alone=None if self.choices is None else str(row[self.question]),
            answer=answer,
            source=source,
            level=_level(row.get(self.level)) if self.level else None,
            solution=str(solution) if solution else None,
        )

    def _lacks(self, role: str, row: Mapping[str, Any], where: str) -> _BadRow:
        column = getattr(self, role)
        nested = (
            f", which holds no text but {row[column]!s:.60}" if isinstance(row.get(column), (Mapping, list)) else ""
        )
        return _BadRow(
            f"{where}: no {role} in column {column!r}{nested}; its columns are {', '.join(row) or 'none'}. "
            f"Type problems.columns.{role}=COLUMN, or mend the row"
        )

    def _options(self, row: Mapping[str, Any], where: str) -> tuple[list[str], int]:
        """The options, and which of them is right."""
        right = 0
        if isinstance(self.choices, str):
            listed: Any = row.get(self.choices)
            labels: Any = None
            if isinstance(listed, Mapping):  # as ARC has them
                labels, listed = listed.get("label"), listed.get("text")
            if not isinstance(listed, (list, tuple)) or any(_no_text(one) for one in listed):
                raise _BadRow(
                    f"{where}: choices in column {self.choices!r} are no list of texts but {listed!s:.60}; its columns are "
                    f"{', '.join(row)}. Type problems.columns.choices=COLUMN, or '[COLUMN,COLUMN,...]' with the right one first"
                )
            options, given = [str(one) for one in listed], str(row[self.answer]).strip()
            right = ord(given.upper()) - ord("A") if given.isalpha() and len(given) == 1 else -1
            right = int(given) if given.isdecimal() else right
            if labels:
                told = [str(one).strip() for one in labels]
                right = told.index(given) if given in told else -1
        else:
            names = list(self.choices or ())
            if _blank(row.get(names[0]) if names else None):
                raise _BadRow(
                    f"{where}: the right option, in column {names[:1]}, is empty; its columns are {', '.join(row)}. Type "
                    "problems.columns.choices='[COLUMN,COLUMN,...]' with the right one first, or mend the row"
                )
            options = [str(row[name]).strip() for name in names if not _blank(row.get(name))]
        if not 0 <= right < len(options) or len(options) < 2:
            raise _BadRow(
                f"{where}: {len(options)} choices in {self.choices!r}, and the answer is none of them; type "
                "problems.columns.choices=COLUMN, or mend the row"
            )
        return options, right

    def _shown(self, options: Sequence[str], right: int, question: str) -> tuple[str, str]:
        """The options as they are shown, and the letter of the right one."""
        order = list(range(len(options)))
        if self.shuffle is not None:
            random.Random(f"{self.shuffle}/{question}").shuffle(order)
        letters = [chr(ord("A") + n) for n in range(len(options))]
        each = (f"{letter}. {options[i]}" for letter, i in zip(letters, order, strict=True))
        return "\n".join(each), letters[order.index(right)]


def _blank(value: object) -> bool:
    return value in (None, []) or value != value or (isinstance(value, str) and not value.strip())  # NaN is none


def _no_text(value: object, several: bool = False) -> bool:
    """Whether `value` is no text, such as the turns of a chat, nor `several` texts where those may be."""
    if several and isinstance(value, list):
        return any(map(_no_text, value))
    return value is None or isinstance(value, (Mapping, list))


def _level(value: object) -> int | None:
    found = re.search(r"\d+", str(value))
    return int(found[0]) if found else None


@dataclass(frozen=True)
class JsonlProblems:
    """Problems from JSONL files, or by their suffix JSON, Parquet or CSV: `path` for calibration, `test_path` for the test split.

    Without a `test_path` one row in ten, chosen by a hash of its question, is the test split, and the rest calibration.
    """

    path: str
    columns: Columns
    test_path: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        _check_limit(self.limit)

    def read(self, split: Split) -> list[Problem]:
        """The problems of `split`.

        Raises:
            ValueError: a file is missing, or a row cannot be read or lacks a question or an answer; the row is named.
        """
        own = self.test_path is not None
        path = _file(self.test_path, "test_path") if self.test_path and split == "test" else _file(self.path, "path")
        lost = _wrong_choices(self.columns)
        rows = _of_split(_problems([path], self.columns, lost), split, own)
        hint = (
            f": of its rows one in {_TEST_SHARE} is for the test split; type problems.test_path=FILE, or give more rows"
        )
        where = f"problems.path={path}, split {split},"
        problems = checked(list(islice(rows, self.limit)), where, "" if own else hint)
        return _told(problems, self.columns, path.name, lost)


def _told(problems: list[Problem], columns: Columns, where: object, lost: set[str]) -> list[Problem]:
    """`problems`; a column that some rows lack is none of their fault, and one that all lack, as those of choices that are
    `lost`, is mistyped."""
    given: dict[str, Callable[[Problem], object]] = {
        "id": lambda p: not re.fullmatch(r"row/\d+", p.id),
        "level": lambda p: p.level is not None,
        "solution": lambda p: p.solution,
    }
    for role, has in given.items():
        if (column := getattr(columns, role)) and not any(map(has, problems)):
            _warn(f"columns.{role}={column}: no row of {where} has its {role} there; type another column, or null")
    for column in sorted(lost):
        _warn(
            f"columns.choices has {column}: no row of {where} has a choice there; type another column, or leave it out"
        )
    return problems


def _wrong_choices(columns: Columns) -> set[str]:
    """The columns of wrong options, which rows may lack."""
    return set() if isinstance(columns.choices, str) else set((columns.choices or ())[1:])


def _note(row: Mapping[str, Any], lost: set[str]) -> Mapping[str, Any]:
    """Take out of `lost` the columns that `row` has."""
    lost.difference_update([name for name in lost if not _blank(row.get(name))])
    return row


@cache  # a run reads its problems several times
def _warn(what: str) -> None:
    _log.warning(what)


def _check_limit(limit: int | None) -> None:
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"problems.limit={limit}: give a whole number, 1 or more, or null for all")


def _file(name: str, setting: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"problems.{setting}={name}: there is no such file; type problems.{setting}=FILE.jsonl")
    return path


def _problems(files: Sequence[Path], columns: Columns, lost: set[str]) -> Iterable[Problem]:
    """The problems of `files`, one after the other; of `lost` stay the columns that no row has."""
    before = 0
    for path in files:
        number = 0
        for number, row in ROWS.get(path.suffix, json_lines)(path):
            if not isinstance(row, dict):
                raise ValueError(f"{path.name}, row {number}: a row must be a JSON object")
            _note(row, lost)
            yield columns.problem(row, number, path.name, before)
        before += number


def _of_split(problems: Iterable[Problem], split: Split, own: bool) -> Iterator[Problem]:
    return (p for p in problems if own or (_bucket(p.question) == 0) == (split == "test"))


def _bucket(question: str) -> int:
    return hashlib.sha256(" ".join(question.split()).encode()).digest()[0] % _TEST_SHARE


@dataclass(frozen=True)
class HubProblems:
    """Problems from a dataset id or a local dataset folder through the `datasets` library, or from a local file.

    `file` stands for the test split without the hub: a JSONL, JSON, Parquet or CSV file with the same columns.
    """

    path: str
    columns: Columns
    split: str = "train"
    test_split: str | None = None
    subset: str | None = None
    revision: str | None = None
    limit: int | None = None
    streaming: bool = False
    file: str | None = None

    def __post_init__(self) -> None:
        _check_limit(self.limit)

    def read(self, split: Split) -> list[Problem]:
        """The problems of `split`; like JSONL, one row in ten is the test split where the source has none.

        Raises:
            ValueError: the dataset cannot be loaded, or a row lacks a question or an answer.
        """
        own, lost = self.test_split is not None, _wrong_choices(self.columns)
        part = self.test_split if own and split == "test" else self.split
        files: list[Path] = []
        if self.file and split == "test":
            own, files = True, [_file(self.file, "file")]
        elif (path := Path(self.path).expanduser()).is_file():
            own, files = False, [path]
        try:
            files = files or self._files(part)
            if not files:
                rows = (
                    self.columns.problem(_note(row, lost), n, self.path) for n, row in enumerate(self._load(part), 1)
                )
                problems = list(islice(_of_split(rows, split, own), self.limit))
        except _BadRow:
            raise
        except Exception as error:  # the library raises a dozen kinds; all mean that there is no data
            raise ValueError(
                f"problems.path={self.path} subset={self.subset} split={part} revision={self.revision} cannot be "
                f"loaded: {first_line(error)}"
            ) from error
        if files:
            problems = list(islice(_of_split(_problems(files, self.columns, lost), split, own), self.limit))
        where = self.path if len(files) != 1 else files[0]
        return _told(checked(problems, f"problems.path={where}, split {part},"), self.columns, where, lost)

    def _load(self, part: str | None) -> Any:
        import datasets

        return datasets.load_dataset(
            self.path, self.subset, split=part, revision=self.revision, streaming=self.streaming
        )

    def _files(self, part: str | None) -> list[Path]:
        """The files of `part` in a local dataset folder, if all are of kinds that are read here."""
        import datasets

        if not Path(self.path).is_dir():
            return []
        config = datasets.load_dataset_builder(self.path, self.subset, revision=self.revision).config
        files = [Path(file) for file in (config.data_files or {}).get(part, ())]
        return files if all(file.suffix in ROWS and file.is_file() for file in files) else []


@dataclass(frozen=True)
class Together:
    """The test problems of several datasets as one benchmark; the name of each comes before its ids.

    `file` stands for all of them: a JSONL, JSON, Parquet or CSV file with the columns of the first.
    """

    parts: Mapping[str, HubProblems]
    file: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        _check_limit(self.limit)

    def read(self, split: Split) -> list[Problem]:
        """Their problems, one dataset after the other.

        Raises:
            ValueError: one cannot be loaded, or a row lacks a question or an answer.
        """
        if self.file:
            return replace(next(iter(self.parts.values())), file=self.file, limit=self.limit).read(split)
        read = [replace(one, id=f"{name}/{one.id}") for name, part in self.parts.items() for one in part.read(split)]
        return checked(read[: self.limit], f"problems.parts={','.join(self.parts)}")
