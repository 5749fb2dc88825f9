"""Sample: problems -> traces, batch by batch, continuing where a killed run stopped."""

from __future__ import annotations

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ssgr.errors import first_line
from ssgr.loadable import Loadable
from ssgr.progress import Progress
from ssgr.records import Problem, Trace
from ssgr.sampler import Decoding, Request, Sampler
from ssgr.stages import heap
from ssgr.tables import read_traces, write_traces

_log = logging.getLogger("ssgr")
VERSION = 6
TRACES, SPENT = "traces.parquet", "spent.json"
# Where memory ended:
_REMEDY = "type a smaller model.batch_size, or sampler.engine.batch_size or bench.engine.batch_size where you gave that"


def sample(
    checkpoint: Loadable,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Callable[[str], tuple[int, ...]],
    problems: Sequence[Problem],
    sampler: Sampler,
    decoding: Decoding,
    work: Path,
    what: str = "sample",
    earlier: Callable[[], Iterable[Trace]] = tuple,
) -> list[Trace]:
    """Draw `decoding.attempts` traces of each problem into `work`/traces.parquet, ordered by problem and attempt.

    Finished batches lie in `work`/parts; a run that is started again samples only what is missing. `earlier` gives traces
    that were drawn likewise under another cap: those that ended are taken, those that were cut are gone on with.

    Raises:
        ValueError: a prompt leaves no room in the context, or the sampler's saved traces do not serve.
    """
    parts, whole = work / "parts", work / TRACES
    parts.mkdir(exist_ok=True)
    saved = [
        file for file in (*sorted(parts.glob("*.parquet")), whole) if file.exists()
    ]  # whole: killed while published
    have = {(t.problem_id, t.attempt): t for part in saved for t in _saved(part)}
    asked = {(problem.id, attempt) for problem in problems for attempt in range(decoding.attempts)}
    taken, begun = _taken(earlier() if asked - have.keys() else (), asked - have.keys(), decoding.max_new_tokens)
    if taken or begun:
        _log.info("%s: %d traces of other runs are taken, and %d are gone on with", what, len(taken), len(begun))
        write_traces(parts / f"{uuid.uuid4().hex}.parquet", list(taken.values()))
        have |= taken
    requests = [
        Request(problem.id, attempt, prompt_ids(problem.question), begun=begun.get((problem.id, attempt), ()))
        for problem in problems
        for attempt in range(decoding.attempts)
    ]
    missing = [r for r in requests if (r.problem_id, r.attempt) not in have]
    if missing:
        start, tokens, (seconds, drawn) = time.perf_counter(), 0, spent(work)
        told = Progress(what, len(requests), len(requests) - len(missing))
        with told as progress, heap.reused(), heap.enough(_REMEDY):
            for batch in sampler.sample(checkpoint, tokenizer, missing, decoding):
                write_traces(parts / f"{uuid.uuid4().hex}.parquet", batch)
                tokens += sum(len(t.generated_ids) - len(begun.get((t.problem_id, t.attempt), ())) for t in batch)
                beside = parts / SPENT  # which goes with the parts, where a kill or a full disk leaves it
                beside.write_text(json.dumps([seconds + time.perf_counter() - start, drawn + tokens]))
                beside.replace(work / SPENT)
                have |= {(t.problem_id, t.attempt): t for t in batch}
                progress.step(len(batch), f"{tokens / (time.perf_counter() - start):,.0f} tokens/s")
    traces = [have[r.problem_id, r.attempt] for r in requests]
    write_traces(whole, traces)
    shutil.rmtree(parts)
    return traces


_At = tuple[str, int]  # problem and attempt


def _taken(earlier: Iterable[Trace], asked: set[_At], cap: int) -> tuple[dict[_At, Trace], dict[_At, tuple[int, ...]]]:
    """Of `earlier` traces those that are what would be drawn with this cap, and the beginnings of others."""
    taken: dict[_At, Trace] = {}
    begun: dict[_At, tuple[int, ...]] = {}
    for trace in earlier:
        at, ids = (trace.problem_id, trace.attempt), trace.generated_ids
        if at not in asked:
            continue
        if len(ids) > cap:
            taken[at] = replace(trace, generated_ids=ids[:cap], finish="length")
        elif trace.finish == "stop" or len(ids) == cap:
            taken[at] = trace
        elif len(ids) > len(begun.get(at, ())):
            begun[at] = ids
    return taken, {at: ids for at, ids in begun.items() if at not in taken}


def _saved(part: Path) -> list[Trace]:
    """The traces of one finished batch; one that was damaged on its way to the disk is dropped, to be sampled again.

    Raises:
        OSError: the system cannot read it now, which says nothing of what it holds.
    """
    try:
        return read_traces(part)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # Arrow's own, of damaged pages, have none
            raise
        _log.warning("%s is damaged (%s); its traces are sampled again", part, first_line(error))
        part.unlink()
        return []


def spent(folder: Path) -> tuple[float, int]:
    """Seconds of sampling in `folder` and tokens that were drawn in them, those of killed runs included, of others none."""
    try:
        seconds, tokens = json.loads((folder / SPENT).read_bytes())
    except (FileNotFoundError, ValueError, TypeError):  # it may be damaged, as a part may
        return 0.0, 0
    return float(seconds), int(tokens)
