"""Replay of saved traces: nothing is generated.

Three kinds of files are read: our own (by problem and attempt), and those of the RAC recipes of SGLang and of
DeepSpeedExamples, which know no problems: there a trace belongs to the problem whose prompt has the same token ids, and
attempts are counted in the order of the file.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from ssgr.files import lines, parquet_rows, parsed
from ssgr.loadable import Loadable
from ssgr.records import Trace
from ssgr.sampler import Decoding, Request, stop_ids

_log = logging.getLogger("ssgr")
_OWN = ("problem_id", "attempt", "generated_ids", "finish")
_SGLANG = ("input_ids", "num_prompt_tokens")  # its rac_collect_traces.py
_DEEPSPEED = ("prompt", "completion", "completion_tokens")  # its collect_traces.py: text, without the stop token
_Saved = Mapping[str, Any]


@dataclass(frozen=True)
class ReplaySampler:
    """Traces from a Parquet or JSONL file: ours, or those of the RAC recipes of SGLang and DeepSpeedExamples.

    The latter's are text: they are refused unless `allow_retokenise`, since the ids of a text may differ from those that
    the model drew.
    """

    runs_model: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    path: str
    on_policy: bool = False
    allow_retokenise: bool = False

    def key_content(self) -> object:
        """Saved traces are keyed by what they hold."""
        path = _file(self.path)
        read = 2  # how recipes are read: raised when other traces come of the same file
        return {"read": read, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "on_policy": self.on_policy}

    def sample(
        self,
        checkpoint: Loadable,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        decoding: Decoding,
    ) -> Iterator[list[Trace]]:
        """Yield the saved trace of each request.

        Raises:
            ValueError: the file is missing or is not of a form, lacks an attempt, or has one twice; the first is named.
        """
        numbered = list(_rows(_file(self.path)))
        rows = [row for _, row in numbered]
        kind = next((kind for kind in (_SGLANG, _DEEPSPEED) if rows and set(kind) <= rows[0].keys()), _OWN)
        for number, row in numbered:
            if lacking := [name for name in kind if row.get(name) is None]:
                raise ValueError(
                    f"{Path(self.path).name}, row {number}: lacks {', '.join(lacking)}; a trace has {', '.join(kind)}"
                )
            _check(row, f"{Path(self.path).name}, row {number}", _DEEPSPEED[:2] if kind is _DEEPSPEED else ())
        if kind is _OWN:
            find = self._by_name(rows, requests)
        else:
            if kind is _DEEPSPEED and not self.allow_retokenise:
                raise ValueError(
                    f"sampler.engine.path={self.path} holds text and no token ids: type sampler.engine.allow_retokenise=true "
                    "to tokenise it, whose ids may not be those the model drew"
                )
            stop = stop_ids(checkpoint.generation(), tokenizer)
            find = self._by_prompt(rows, kind, tokenizer, stop, requests, decoding)
        traces = [find(r) for r in requests]
        if other := sum(t.prompt_ids != r.prompt_ids for t, r in zip(traces, requests, strict=True)):
            _log.warning(
                "%s: %d of %d traces answer prompts that are not those of these problems now: see that they are of these "
                "problems, by whose answers they are graded", self.path, other, len(traces),
            )  # fmt: skip
        for trace in traces:
            if not all(0 <= i < len(tokenizer) for i in (*trace.prompt_ids, *trace.generated_ids)):
                raise ValueError(
                    f"sampler.engine.path={self.path}: attempt {trace.attempt} of {trace.problem_id} holds token ids outside "
                    f"the model's vocabulary of {len(tokenizer)}: these are traces of another model"
                )
        yield traces

    def _lacks(self, missing: Sequence[Request], requests: Sequence[Request], hint: str) -> ValueError:
        return ValueError(
            f"sampler.engine.path={self.path} lacks {len(missing)} of {len(requests)} traces, the first is attempt "
            f"{missing[0].attempt} of {missing[0].problem_id}; {hint}"
        )

    def _by_name(self, rows: Sequence[_Saved], requests: Sequence[Request]) -> Callable[[Request], Trace]:
        saved: dict[tuple[str, int], _Saved] = {}
        for row in rows:
            problem, attempt = at = str(row["problem_id"]), int(row["attempt"])
            if at in saved:
                raise ValueError(
                    f"sampler.engine.path={self.path}: attempt {attempt} of {problem} is there twice; give each once"
                )
            saved[at] = row
        if missing := [r for r in requests if (r.problem_id, r.attempt) not in saved]:
            raise self._lacks(missing, requests, "lower sampler.decoding.attempts or give the file of these problems")

        def find(r: Request) -> Trace:
            row = saved[r.problem_id, r.attempt]
            if row["finish"] not in ("stop", "length"):
                raise ValueError(f"{self.path}: finish is {row['finish']!r} in {r.problem_id}; valid are stop, length")
            ids = tuple(row.get("prompt_ids") or r.prompt_ids), tuple(row["generated_ids"])
            return Trace(r.problem_id, r.attempt, *ids, row["finish"], int(row.get("seed") or 0), self.on_policy)

        return find

    def _by_prompt(
        self,
        rows: Sequence[_Saved],
        kind: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        stop: frozenset[int],
        requests: Sequence[Request],
        decoding: Decoding,
    ) -> Callable[[Request], Trace]:
        """Traces of a recipe; one that is shorter than the cap it was sampled with has stopped."""
        tokenize: Callable[[str], tuple[int, ...]] = lambda text: tuple(
            tokenizer.encode(text, add_special_tokens=False)
        )
        # By prompt, of each attempt: its ids, and how many were drawn.
        saved: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = defaultdict(list)
        odd = 0
        for row in rows:
            if kind is _SGLANG:
                whole, asked = tuple(row["input_ids"]), int(row["num_prompt_tokens"])
                prompt, ids = whole[:asked], whole[asked:]
                drawn = len(ids)
            else:
                prompt, ids, drawn = tokenize(row["prompt"]), tokenize(row["completion"]), int(row["completion_tokens"])
                if len(ids) == drawn - 1:  # the other is what ended it, which is no text
                    drawn = len(ids)
                odd += len(ids) != drawn
            saved[prompt].append((ids, drawn))
        if odd:
            _log.warning(
                "%s: %d of %d texts have other numbers of tokens than the model drew", self.path, odd, len(rows)
            )
        if missing := [r for r in requests if len(saved.get(r.prompt_ids, ())) <= r.attempt]:
            first = tokenizer.decode(list(next(iter(saved))))
            raise self._lacks(
                missing,
                requests,
                "traces are found by their prompts' token ids: set model.system and problems.columns.prompt as the recipe did, "
                f"whose first prompt is {first[:200]!r}, or lower sampler.decoding.attempts and problems.limit",
            )

        def find(r: Request) -> Trace:
            whole, drawn = saved[r.prompt_ids][r.attempt]
            ids = whole[: decoding.max_new_tokens]
            stopped = bool(ids) and ids[-1] in stop
            if not stopped and max(len(ids), drawn) < decoding.max_new_tokens and tokenizer.eos_token_id is not None:
                ids, stopped = (*ids, int(tokenizer.eos_token_id)), True
            return Trace(r.problem_id, r.attempt, r.prompt_ids, ids, "stop" if stopped else "length", 0, self.on_policy)

        return find


def _check(row: _Saved, where: str, texts: Sequence[str]) -> None:
    for name in ("prompt_ids", "generated_ids", "input_ids"):
        ids = row.get(name)
        if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
            raise ValueError(f"{where}: {name} is {str(ids)[:60]!r}; give a list of token ids")
    for name in texts:
        if not isinstance(row[name], str):
            raise ValueError(f"{where}: {name} is {str(row[name])[:60]!r}; give a text")
    for name in ("attempt", "seed", "num_prompt_tokens", "completion_tokens"):
        number = row.get(name)
        if number is not None and not re.fullmatch(r"-?\d+", str(number)):
            raise ValueError(f"{where}: {name} is {str(number)[:60]!r}; give a whole number")


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"sampler.engine.path={name}: there is no such file; give a .parquet or .jsonl file of traces")
    return path


def _rows(path: Path) -> Iterator[tuple[int, _Saved]]:
    if path.suffix == ".parquet":
        yield from parquet_rows(path)
        return
    for number, line in lines(path):
        bare = line.removeprefix("\ufeff").strip()
        if not bare:
            continue
        where = f"{path.name}, row {number}"
        row = parsed(bare, where)
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a trace must be a JSON object with {', '.join(_OWN)}")
        yield number, row
