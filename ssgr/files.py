"""Files that are whole or not there, and the lines of those that others wrote."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssgr.errors import first_line


def write_bytes(file: Path, content: bytes) -> None:
    """Write beside `file`, bring it to the disk, and give it the name; of several processes that do so at once, the last
    one's stays.
    """
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def write_json(file: Path, content: object) -> None:
    """The same of JSON, by one process at a time: a killed one leaves nothing that the next does not write over."""
    beside = file.with_name(f"{file.name}.new")
    with open(beside, "w") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)


def below(folder: Path, *names: str, whole: bool = False) -> list[Path]:
    """What has one of these names in `folder` or deeper, also behind links to folders, such as those to another disk; each
    folder once, and under its own name where that lies below as well.

    Raises:
        OSError: with `whole`, a folder cannot be read.
    """

    def told(error: OSError) -> None:
        if whole and not isinstance(error, FileNotFoundError):  # one that is gone meanwhile holds nothing
            raise error

    found, seen, left = [], set[str](), [str(folder)]
    for start in left:
        for at, folders, others in os.walk(start, onerror=told):
            if (real := os.path.realpath(at)) in seen:
                folders.clear()
                continue
            seen.add(real)
            left += [inner for name in folders if os.path.islink(inner := os.path.join(at, name))]
            found += [Path(at, name) for name in (*folders, *others) if name in names]
    return found


def cached(name: str, make: Callable[[], str]) -> str:
    """What `make` gives, made once: other processes find it under `name` in the user's cache, if there is one.

    It is kept below its own SHA-256, so that what is damaged is made again.
    """
    file = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ssgr", name)
    with suppress(OSError, RuntimeError):  # it is not there; there is no home
        file = file.expanduser()
        digest, _, content = file.read_bytes().partition(b"\n")
        if digest == hashlib.sha256(content).hexdigest().encode():
            return content.decode()
    made = make()
    with suppress(OSError, RuntimeError):  # then it is made again
        content = made.encode()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    return made


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, each with its number.

    Raises:
        ValueError: a line is not UTF-8; it is named.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path.name}, row {number}: not UTF-8 ({error.reason} at byte {error.start + 1}); save the file as UTF-8"
                ) from error
            yield number, text


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file, each with the number of its line; numbers are text, as they were written.

    Raises:
        ValueError: a line is not UTF-8 or not JSON; it is named.
    """
    for number, line in lines(path):
        bare = line.removeprefix("\ufeff").strip()
        if bare:
            yield number, parsed(bare, f"{path.name}, row {number}", parse_int=str, parse_float=str)


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of one array; a file that begins with something else is JSONL by another name.

    Raises:
        ValueError: it is not UTF-8 or not JSON.
    """
    bare = (line.removeprefix("\ufeff").strip() for _, line in lines(path))
    if next(filter(None, bare), "").startswith("["):
        text = "".join(line for _, line in lines(path)).removeprefix("\ufeff")
        yield from enumerate(parsed(text, path.name, parse_int=str, parse_float=str), 1)
    else:
        yield from json_lines(path)


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Parquet file, each with its number.

    Raises:
        ValueError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(path).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path.name} is no Parquet file that can be read ({first_line(error)})") from error


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV file, each with its number: texts as they were written, None where a cell is empty.

    Raises:
        ValueError: it is not UTF-8 or not CSV, or a row has more cells than there are columns; it is named.
    """
    table = csv.DictReader((line.removeprefix("\ufeff") for _, line in lines(path)), strict=True)
    number = 0
    try:
        for number, row in enumerate(table, 1):
            if None in row:
                raise ValueError(f"{path.name}, row {number}: more cells than columns; put cells with commas in quotes")
            yield number, {name: cell or None for name, cell in row.items()}
    except csv.Error as error:
        raise ValueError(f"{path.name}, row {number + 1}: not CSV ({error})") from error


ROWS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".csv": csv_rows,
    ".json": json_rows,
    ".jsonl": json_lines,
    ".parquet": parquet_rows,
}  # of files that hold a row a record; read here, as what `datasets` guesses changes answers


def parsed(text: str, where: str, **how: Any) -> Any:
    """What a line of JSON holds, or several.

    Raises:
        ValueError: it is not JSON, or more than Python reads; the message begins with `where`.
    """
    try:
        return json.loads(text, **how)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{where}: not JSON ({error.msg} at {line}column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: its JSON is nested too deeply to be read; mend the row") from error
    except ValueError as error:  # of an integer with thousands of digits
        raise ValueError(f"{where}: a number has too many digits to be read; put it in quotes") from error
