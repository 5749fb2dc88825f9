"""Workers: what one process samples, several sample too; whatever ends one of them, the run knows, and none is left."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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


@pytest.mark.parametrize("number", [2, 50])
def test_workers_draw_what_one_process_draws(number: int, tokenizer: PreTrainedTokenizerBase) -> None:
    assert drawn(HfSampler(8, number), tokenizer) == drawn(HfSampler(8, 1), tokenizer)
    assert not multiprocessing.active_children()


def test_where_it_is_faster_they_come_unasked(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, together, started = requests(tokenizer, 40), workers.together, []
    short = replace(SAMPLING, max_new_tokens=20)

    def counted(jobs: Sequence[Callable[[], Any]]) -> Iterator[Any]:
        started.append(len(jobs))
        return together(jobs)

    alone = [t for some in HfSampler(64, 1).sample(TINY, tokenizer, asked, short) for t in some]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(workers, "together", counted)
    shared = [t for some in HfSampler(64).sample(TINY, tokenizer, asked, short) for t in some]
    at = lambda t: (t.problem_id, t.attempt)
    assert started == [2] and sorted(shared, key=at) == sorted(alone, key=at)


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
        ValueError, match=r"^workers=2: workers share a model on a processor, .*type sampler.engine.workers=1"
    ):
        workers.count(2, elsewhere, 512)
    with pytest.raises(ValueError, match="workers=0: type 1 or more, or null"):
        HfSampler(8, 0)


def raising(error: Exception) -> Iterator[int]:
    yield 1
    raise error


class Own(Exception):
    """An error that pickle cannot make again."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(kind)


@pytest.mark.parametrize(
    ("error", "read"),
    [
        (ValueError("a prompt"), ValueError("a prompt")),
        (Own("a kind", "in two parts"), RuntimeError("Own: a kind")),
        (ValueError(lambda: 0, "cannot be sent"), ValueError("ValueError: (<function")),
        (MemoryError(), MemoryError()),
    ],
)
def test_what_one_raises_comes_out(error: Exception, read: Exception) -> None:
    with pytest.raises(type(read)) as raised:
        list(workers.together([lambda: raising(error), lambda: forever([])]))
    assert type(raised.value) is type(read) and str(raised.value).startswith(str(read))
    assert any("in raising" in note for note in raised.value.__notes__)  # where it was raised
    assert not multiprocessing.active_children()


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
        ValueError, match=r"a worker was ended by SIGKILL, as .*memory.*; what was sampled is kept, .*type a smaller"
    ):
        next(some)
    assert not multiprocessing.active_children()


def test_one_that_ends_early_is_told() -> None:
    def leaving() -> Iterator[int]:
        yield 1
        raise SystemExit(0)

    some = workers.together([leaving])
    assert next(some) == 1
    with pytest.raises(ValueError, match=r"^a worker ended early with code 0; what was sampled is kept"):
        next(some)


def test_one_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(
        ValueError, match=r"a worker cannot be started \(OSError.*; type a smaller sampler.engine.workers"
    ):
        list(workers.together([lambda: [1]]))


def test_those_of_a_reader_that_stops_are_ended() -> None:
    some = workers.together([lambda: forever([1])] * 2)
    assert next(some) == 1
    assert len(multiprocessing.active_children()) == 2
    some.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_signals_to_all_of_a_job_are_the_parents() -> None:
    def signalled() -> Iterator[int]:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
            os.kill(os.getpid(), number)
            yield number

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert len(list(workers.together([signalled]))) == 5
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_reader_that_fails_ends_them_with_python() -> None:
    script = (
        "import os, tests.test_workers as t\n"
        "some = t.workers.together([lambda: t.forever([os.getpid()])] * 2)\n"
        "for pid in some: print(pid, flush=True); 1 / 0"
    )
    assert ended(script, "ZeroDivisionError")


def test_two_interrupts_leave_none() -> None:
    """As a job of hydra/launcher=local gets them: from the terminal, and from the command that it belongs to."""
    script = (
        "import os, tests.test_workers as t\n"
        "def interrupted(process): t.workers.BaseProcess.kill = kill; raise KeyboardInterrupt\n"
        "kill, t.workers.BaseProcess.kill = t.workers.BaseProcess.kill, interrupted\n"
        "some = t.workers.together([lambda: t.forever([os.getpid()])] * 2)\n"
        "for pid in some: print(pid, flush=True); some.throw(KeyboardInterrupt())"
    )
    assert ended(script, "KeyboardInterrupt")


def ended(script: str, error: str) -> bool:
    """Whether a script that fails with `error` ended, and so did the worker whose number it printed."""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=120)
    return error in done.stderr and not alive(int(done.stdout))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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
    while any(map(alive, pids)):
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
