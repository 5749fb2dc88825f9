"""Workers: what one process samples, several sample too; whatever ends one of them, the run knows, and none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from ssgr.problems.arithmetic import ArithmeticProblems
from ssgr.records import Trace
from ssgr.sampler import Sampler, hf, workers
from ssgr.sampler.hf import HfSampler
from ssgr.stages import heap
from ssgr.stages.sample import sample
from ssgr.tables import read_traces
from tests.conftest import TINY, Loaded
from tests.test_sampler import SAMPLING, requests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forks, which only Linux does safely here")


def drawn(sampler: Sampler, tokenizer: PreTrainedTokenizerBase) -> dict[tuple[str, int], Trace]:
    made = [trace for some in sampler.sample(TINY, tokenizer, requests(tokenizer), SAMPLING) for trace in some]
    assert len(made) == len(requests(tokenizer))
    return {(trace.problem_id, trace.attempt): trace for trace in made}


@pytest.mark.parametrize("number", [2, 3, 50])
def test_workers_draw_what_one_process_draws(number: int, tokenizer: PreTrainedTokenizerBase) -> None:
    assert drawn(HfSampler(8, number), tokenizer) == drawn(HfSampler(8, 1), tokenizer)
    assert not psutil.Process().children()


@pytest.mark.parametrize(
    ("asked", "rows", "threads", "dtype", "expected"),
    [
        (None, 64, 2, torch.float32, 2),
        (None, 63, 2, torch.float32, 1),
        (None, 64, 2, torch.bfloat16, 1),
        (None, 64, 1, torch.float32, 1),
        (3, 64, 2, torch.bfloat16, 3),
        (3, 2, 2, torch.float32, 2),
        (1, 64, 2, torch.float32, 1),
    ],
)
def test_how_many_there_are(
    asked: int | None, rows: int, threads: int, dtype: torch.dtype, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert workers.count(asked, TINY.load().to(dtype), rows) == expected


def test_they_share_a_model_on_a_processor_alone() -> None:
    elsewhere = TINY.load().to("meta")
    assert workers.count(None, elsewhere, 512) == workers.count(1, elsewhere, 512) == 1
    with pytest.raises(
        ValueError, match=r"workers=2: workers share a model on a processor, .*type sampler.engine.workers=1"
    ):
        workers.count(2, elsewhere, 512)
    with pytest.raises(ValueError, match="workers=0: type 1 or more, or null"):
        HfSampler(8, 0)


def raising(error: Exception) -> Iterator[int]:
    yield 1
    raise error


class Own(RuntimeError):
    """An error that the parent may not be able to read."""


@pytest.mark.parametrize(
    ("error", "read"),
    [(ValueError("a prompt"), ValueError("a prompt")), (Own("out\nof luck"), RuntimeError("Own: out"))],
)
def test_what_one_raises_comes_out(error: Exception, read: Exception) -> None:
    with pytest.raises(type(read)) as raised:
        list(workers.together([lambda: raising(error), lambda: forever([])]))
    assert (type(raised.value), str(raised.value)) == (type(read), str(read))
    assert any("in raising" in note for note in raised.value.__notes__)  # where it was raised
    assert not psutil.Process().children()


def test_memory_that_ends_in_one_is_told_as_anywhere() -> None:
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    with pytest.raises(ValueError, match=r"memory ended .*; type less"), heap.enough("type less"):
        list(workers.together([lambda: raising(error)]))


def forever(first: list[Any]) -> Iterator[Any]:
    yield from first
    while True:
        time.sleep(1)


def test_one_that_is_killed_is_told() -> None:
    some = workers.together([lambda: forever([os.getpid()]), lambda: forever([])])
    os.kill(next(some), signal.SIGKILL)
    with pytest.raises(
        ValueError, match=r"a worker of sampler\.engine was ended by SIGKILL, .*what was sampled is kept"
    ):
        next(some)
    assert not psutil.Process().children()


def test_those_of_a_reader_that_stops_are_ended() -> None:
    some = workers.together([lambda: forever([1])] * 2)
    assert next(some) == 1
    assert len(psutil.Process().children()) == 2
    some.close()  # type: ignore[attr-defined]
    assert not psutil.Process().children()


def test_signals_to_all_of_a_job_are_the_parents() -> None:
    def signalled() -> Iterator[int]:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
            os.kill(os.getpid(), number)
            yield number

    assert len(list(workers.together([signalled]))) == 4


def test_they_die_with_a_parent_that_is_killed() -> None:
    script = (
        "import os, tests.test_workers as t\n"
        "for pid in t.workers.together([lambda: t.forever([os.getpid()])] * 3): print(pid, flush=True)"
    )
    root = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root) as run:
        assert run.stdout is not None
        pids = [int(run.stdout.readline()) for _ in range(3)]
        assert all(map(psutil.pid_exists, pids))
        run.kill()
    due = time.monotonic() + 20
    while any(map(psutil.pid_exists, pids)):
        assert time.monotonic() < due, "a worker outlives the run"
        time.sleep(0.05)


def test_a_run_goes_on_from_what_a_killed_worker_had_said(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = ArithmeticProblems((1, 2), 1, 12, 5).read("test")
    ask = (tokenizer, lambda question: TINY.prompt_ids(tokenizer, question), problems, HfSampler(6, 2), SAMPLING)
    whole = hf._decode

    def deadly(*args: Any) -> Iterator[list[Trace]]:
        yield from (some for some, _ in zip(whole(*args), range(2), strict=False))
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(hf, "_decode", deadly)
    with pytest.raises(ValueError, match="SIGKILL"):
        sample(Loaded(TINY.load()), *ask, tmp_path)
    kept = sum(len(read_traces(part)) for part in (tmp_path / "parts").glob("*.parquet"))
    assert kept
    monkeypatch.setattr(hf, "_decode", whole)
    decode, asked = hf.decode, []
    monkeypatch.setattr(hf, "decode", lambda model, rows, *how: asked.append(len(rows)) or decode(model, rows, *how))
    traces = sample(Loaded(TINY.load()), *ask, tmp_path)
    (tmp_path / "clean").mkdir()
    assert traces == sample(Loaded(TINY.load()), *ask, tmp_path / "clean")
    assert asked == [24 - kept, 24]
