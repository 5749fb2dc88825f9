"""Workers: forked processes of one thread each, that share the rows on a processor.

The products of a step are small, and threads that share them mostly wait for each other; processes do not (LOG.md). A fork
has the weights at once, and they lie in memory once.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from ssgr.errors import first_line

T = TypeVar("T")

# Sent to all processes of a job, and for the parent alone: it requeues the job, or ends with its workers.
_PARENTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
_FEWER = (
    "type a smaller sampler.engine.workers, bench.engine.workers or, in a suite, bench.benches.NAME.engine.workers "
    "(1: no processes but this one)"
)
_ROWS = 32  # of a worker at least, where nobody asks for workers: with fewer, reading the weights is what a step takes


def count(asked: int | None, model: PreTrainedModel, rows: int) -> int:
    """How many workers decode `rows` rows: as many as are `asked` for, or one a thread where that is known to be faster.

    It is known of float32 and of at least 32 rows a worker; 16-bit numbers were not measured.

    Raises:
        ValueError: they are asked for where processes cannot share a model.
    """
    serves = model.device.type == "cpu" and sys.platform == "linux"  # elsewhere a process with threads cannot be forked
    if asked is not None:
        if asked > 1 and not serves:
            raise ValueError(
                f"workers={asked}: workers share a model on a processor, with Linux; this one is on {model.device.type} with "
                f"{sys.platform}: type sampler.engine.workers=1, or bench.engine.workers=1"
            )
        return max(1, min(asked, rows))
    threads = torch.get_num_threads()
    return threads if serves and model.dtype is torch.float32 and rows >= threads * _ROWS else 1


def together(jobs: Sequence[Callable[[], Iterable[T]]]) -> Iterator[T]:
    """What `jobs` yield, as it comes, each job in a worker of its own.

    Raises:
        Exception: what the first worker that failed raised; the others are ended.
        ValueError: a worker cannot be started, or ended before its job.
    """
    workers: dict[Connection, BaseProcess] = {}

    def end() -> None:
        for here, worker in workers.items():
            if worker.pid is not None:
                worker.kill()  # it holds nothing that is to be kept, and heeds no other signal
                worker.join()
            here.close()
        workers.clear()

    atexit.register(end)  # a reader that failed may still hold this generator when Python ends
    try:
        for job in jobs:
            _start(job, workers)
        reading = set(workers)
        while reading:
            for here in wait(reading):
                assert isinstance(here, Connection)
                try:
                    said: _Said[T] = here.recv()
                except (EOFError, OSError):
                    raise _ended_early(workers[here]) from None
                if said is None:
                    reading.remove(here)
                elif isinstance(said, Exception):
                    raise said
                else:
                    yield said[0]
    finally:
        end()
        atexit.unregister(end)  # last: where a second interrupt came before, it is called when Python ends


_Said = tuple[T] | Exception | None  # something of what a job yields, what it raised, or that it is done


def _start(job: Callable[[], Iterable[T]], workers: dict[Connection, BaseProcess]) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    # Until the worker is known here, and ignores them there:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS)
    workers[here] = worker = context.Process(target=_work, args=(job, there, before), daemon=True)
    try:
        with warnings.catch_warnings():  # of Python 3.12: a fork has none of the parent's threads, and needs none
            warnings.simplefilter("ignore", DeprecationWarning)
            worker.start()
    except OSError as error:
        raise ValueError(f"a worker cannot be started ({first_line(error)}); {_FEWER}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        there.close()  # so that the death of the worker ends what is read here


def _work(job: Callable[[], Iterable[T]], there: Connection, mask: Iterable[int]) -> None:
    """The worker: do the job, and say what comes of it."""
    for number in _PARENTS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        for some in job():
            there.send((some,))
        there.send(None)
    except Exception as error:
        there.send(_readable(error))


def _readable(error: Exception) -> Exception:
    """`error` as another process can read it, with its traceback."""
    plain = type(error).__module__ == "builtins" and all(isinstance(one, str | int) for one in error.args)
    sent = error if plain else (ValueError if isinstance(error, ValueError) else RuntimeError)(first_line(error))
    sent.add_note("".join(traceback.format_exception(error)))
    return sent


def _ended_early(worker: BaseProcess) -> ValueError:
    worker.join()
    code = worker.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended early with code {code}"
    why = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return ValueError(
        f"a worker {how}{why}; what was sampled is kept, and the same command goes on from there: {_FEWER}"
    )


def end_with_the_parent() -> None:
    """Wait until the process that started this one is dead, and end this one; for a thread of its own."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
