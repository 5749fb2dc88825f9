"""Replay of saved traces: nothing is generated, nothing is re-tokenised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from ssgr.records import Trace
from ssgr.sampler import Checkpoint, Decoding, Request

_NEEDED = ("problem_id", "attempt", "generated_ids", "finish")


@dataclass(frozen=True)
class ReplaySampler:
    """Traces from a Parquet or JSONL file with problem_id, attempt, generated_ids, finish and, if known, prompt_ids."""

    runs_model: ClassVar[bool] = False
    path: str
    on_policy: bool = False

    def key_content(self) -> object:
        """Saved traces are keyed by what they hold."""
        path = _file(self.path)
        return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "on_policy": self.on_policy}

    def sample(
        self,
        checkpoint: Checkpoint,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        decoding: Decoding,
    ) -> Iterator[list[Trace]]:
        """Yield the saved trace of each request.

        Raises:
            ValueError: the file is missing or is not of the form, or lacks an attempt; the first is named.
        """
        saved = {(str(row["problem_id"]), int(row["attempt"])): row for row in _rows(_file(self.path))}
        missing = [r for r in requests if (r.problem_id, r.attempt) not in saved]
        if missing:
            first = missing[0]
            raise ValueError(
                f"sampler.engine.path={self.path} lacks {len(missing)} of {len(requests)} traces, the first is attempt "
                f"{first.attempt} of {first.problem_id}; lower sampler.decoding.attempts or give the file of these problems"
            )
        traces = [self._trace(r, saved[r.problem_id, r.attempt]) for r in requests]
        for trace in traces:
            if not all(0 <= i < len(tokenizer) for i in (*trace.prompt_ids, *trace.generated_ids)):
                raise ValueError(
                    f"sampler.engine.path={self.path}: attempt {trace.attempt} of {trace.problem_id} holds token ids outside "
                    f"the model's vocabulary of {len(tokenizer)}: these are traces of another model"
                )
        yield traces

    def _trace(self, request: Request, row: Mapping[str, Any]) -> Trace:
        prompt = tuple(row.get("prompt_ids") or request.prompt_ids)
        finish = row["finish"]
        if finish not in ("stop", "length"):
            raise ValueError(f"{self.path}: finish is {finish!r} in {request.problem_id}; valid are stop, length")
        return Trace(
            request.problem_id,
            request.attempt,
            prompt,
            tuple(row["generated_ids"]),
            finish,
            int(row.get("seed") or 0),
            self.on_policy,
        )


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"sampler.engine.path={name}: there is no such file; give a .parquet or .jsonl file of traces")
    return path


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(path).to_pylist()
    else:
        lines = enumerate(path.read_text(encoding="utf-8").split("\n"), 1)  # U+2028 ends no line of JSON
        rows = [_row(line, f"{path.name}, row {number}") for number, line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        lacking = [name for name in _NEEDED if row.get(name) is None]
        if lacking:
            raise ValueError(f"{path.name}, row {number}: lacks {', '.join(lacking)}; a trace has {', '.join(_NEEDED)}")
        yield row


def _row(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a trace must be a JSON object with {', '.join(_NEEDED)}")
    return row
