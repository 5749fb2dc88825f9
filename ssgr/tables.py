"""Records as Parquet files, zstd-compressed, and back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from ssgr.records import CalibrationSet, Graded, Item, Outcome, Row, Text, Trace, Unread, Verdict

_IDS = pa.list_(pa.int32())
_TRACE = pa.schema(
    [
        ("problem_id", pa.string()),
        ("attempt", pa.int32()),
        ("prompt_ids", _IDS),
        ("generated_ids", _IDS),
        ("finish", pa.string()),
        ("seed", pa.int64()),
        ("on_policy", pa.bool_()),
    ]
)
_VERDICT = [
    ("answer", pa.string()),
    ("verdict", pa.string()),
    ("level", pa.int32()),
    ("thinking", pa.int32()),
    ("closed", pa.bool_()),
]
_LENGTHS = [("prompt_tokens", pa.int32()), ("generated_tokens", pa.int32())]
_GRADED = pa.schema([*_TRACE, *[pa.field(*column) for column in (*_VERDICT, *_LENGTHS)]])
_OUTCOME = pa.schema(
    [
        ("problem_id", pa.string()),
        ("attempt", pa.int32()),
        ("level", pa.int32()),
        ("verdict", pa.string()),
        ("answer", pa.string()),
        ("tokens", pa.int32()),
        ("finish", pa.string()),
        ("looping", pa.bool_()),
        ("thinking", pa.int32()),
        ("closed", pa.bool_()),
    ]
)
_TEXT = pa.schema(
    [
        ("problem_id", pa.string()),
        ("attempt", pa.int32()),
        ("question", pa.string()),
        ("gold", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
    ]
)
_ITEM = pa.schema([("id", pa.string()), ("value", pa.float64()), ("weight", pa.int64())])
ITEM = frozenset(_ITEM.names)
_ROW = pa.schema(
    [
        ("id", pa.string()),
        ("ids", _IDS),
        ("prompt_tokens", pa.int32()),
        ("bin", pa.string()),
        ("held_out", pa.bool_()),
    ]
)


def _plain(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in fields(record)}


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema), file, compression="zstd", write_page_checksum=True)
        file.flush()
        os.fsync(file.fileno())  # a rename must not reach the disk before what it names
    os.replace(beside, path)


def columns(path: Path) -> list[str]:
    """The names of a file's columns."""
    names: list[str] = pq.read_schema(path).names
    return names


def _read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path, page_checksum_verification=True).to_pylist()
    return rows


def write_traces(path: Path, traces: Sequence[Trace]) -> None:
    """Write traces."""
    _write(path, [_plain(trace) for trace in traces], _TRACE)


def read_traces(path: Path) -> list[Trace]:
    """Read what `write_traces` wrote."""
    return [_trace(row) for row in _read(path)]


def _trace(row: dict[str, Any]) -> Trace:
    return Trace(**{**row, "prompt_ids": tuple(row["prompt_ids"]), "generated_ids": tuple(row["generated_ids"])})


def write_graded(path: Path, graded: Sequence[Graded]) -> None:
    """Write graded traces: a trace's columns, those of its verdict, and how many ids it has."""
    rows = []
    for g in graded:
        lengths = {"prompt_tokens": len(g.trace.prompt_ids), "generated_tokens": len(g.trace.generated_ids)}
        rows.append({**_plain(g.trace), **_plain(g), "verdict": str(g.verdict), **lengths})
        del rows[-1]["trace"]
    _write(path, rows, _GRADED)


def read_graded(path: Path, ids: bool = True) -> list[Graded]:
    """Read what `write_graded` wrote; without `ids` these stay in the file, and are `Unread`."""
    out = []
    left = {name for name, _ in _LENGTHS} if ids else {"prompt_ids", "generated_ids"}
    for row in pq.read_table(path, columns=[name for name in _GRADED.names if name not in left]).to_pylist():
        own = {name: row.pop(name) for name, _ in _VERDICT}
        if ids:
            trace = _trace(row)
        else:
            prompt, generated = (cast("tuple[int, ...]", Unread(row.pop(name))) for name, _ in _LENGTHS)
            trace = Trace(prompt_ids=prompt, generated_ids=generated, **row)
        out.append(Graded(trace, **{**own, "verdict": Verdict(own["verdict"])}))
    return out


def with_ids(drawn: CalibrationSet, path: Path) -> CalibrationSet:
    """What was drawn of traces that were read without their ids, with these, from what `write_graded` wrote."""
    table = pq.read_table(path, columns=["problem_id", "attempt", "prompt_ids", "generated_ids"])
    names = zip(table["problem_id"].to_pylist(), table["attempt"].to_pylist(), strict=True)
    at = {f"{problem}#{attempt}": i for i, (problem, attempt) in enumerate(names)}

    def read(rows: tuple[Row, ...]) -> tuple[Row, ...]:
        found = table.take(pa.array([at[row.id] for row in rows], pa.int64())).to_pylist()
        ids = [(*one["prompt_ids"], *one["generated_ids"]) for one in found]
        return tuple(replace(row, ids=own[: len(row)]) for row, own in zip(rows, ids, strict=True))

    return replace(drawn, rows=read(drawn.rows), held_out=read(drawn.held_out))


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the attempts of an evaluation."""
    _write(path, [{**_plain(o), "verdict": str(o.verdict)} for o in outcomes], _OUTCOME)


def read_outcomes(path: Path) -> list[Outcome]:
    """Read what `write_outcomes` wrote."""
    return [Outcome(**{**row, "verdict": Verdict(row["verdict"])}) for row in _read(path)]


def read_verdicts(path: Path) -> list[tuple[str, Verdict]]:
    """The problem id and verdict of every outcome that `write_outcomes` wrote: what scores need, without the rest."""
    found = pq.read_table(path, columns=["problem_id", "verdict"]).to_pydict()
    return list(zip(found["problem_id"], map(Verdict, found["verdict"]), strict=True))


def outcomes_file(folder: Path, bench: str, which: str, kind: str = "outcomes") -> Path:
    """Where a run keeps the outcomes (or items, or `texts`) of its `dense` or `pruned` model on a benchmark."""
    return folder / kind / f"{bench}{'_dense' if which == 'dense' else ''}.parquet"


def write_texts(path: Path, texts: Sequence[Text]) -> None:
    """Write what was asked and answered."""
    _write(path, [_plain(text) for text in texts], _TEXT)


def read_texts(path: Path) -> list[Text]:
    """Read what `write_texts` wrote."""
    return [Text(**row) for row in _read(path)]


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Write the items of a measure."""
    _write(path, [_plain(item) for item in items], _ITEM)


def read_items(path: Path) -> list[Item]:
    """Read what `write_items` wrote."""
    return [Item(**row) for row in _read(path)]


def write_rows(path: Path, calibration: CalibrationSet) -> None:
    """Write the rows of a calibration set, then those that are held out."""
    every = [(row, False) for row in calibration.rows] + [(row, True) for row in calibration.held_out]
    _write(path, [{**_plain(row), "held_out": held_out} for row, held_out in every], _ROW)


def read_rows(path: Path) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """The rows of a calibration set, and those that are held out."""
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in _read(path):
        parts[row["held_out"]].append(Row(tuple(row["ids"]), row["prompt_tokens"], row["id"], bin=row["bin"]))
    return tuple(parts[0]), tuple(parts[1])
