"""Workers: forked processes of one thread each, that share the rows on a processor.

The products of a step are small, and threads that share them mostly wait for each other; processes do not (LOG.md). A fork
has the weights at once, and they lie in memory once.
"""

from __future__ import annotations

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

_ROWS = 32  # of a worker at least, where nobody asks for workers: with fewer, reading the weights is what a step takes


def count(asked: int | None, model: PreTrainedModel, rows: int) -> int:
    """How many workers decode `rows` rows: as many as are `asked` for, or one a thread where that is known to be faster.

    It is known of float32 and of at least 32 rows a worker; 16-bit products pack the weights anew in each worker.

    Raises:
        ValueError: they are asked for where processes cannot share a model.
    """
    serves = model.device.type == "cpu" and sys.platform == "linux"  # elsewhere a process with threads cannot be forked
    if asked is not None:
        if asked > 1 and not serves:
            raise ValueError(
                f"sampler.engine.workers={asked}: workers share a model on a processor, with Linux; this one is on "
                f"{model.device.type} with {sys.platform}: type sampler.engine.workers=1"
            )
        return max(1, min(asked, rows))
    threads = torch.get_num_threads()
    return threads if serves and model.dtype is torch.float32 and rows >= threads * _ROWS else 1


def together(jobs: Sequence[Callable[[], Iterable[T]]]) -> Iterator[T]:
    """What `jobs` yield, as it comes, each job in a worker of its own.

    Raises:
        Exception: what the first worker that failed raised; the others are ended.
        ValueError: a worker was killed.
    """
    context = multiprocessing.get_context("fork")
    workers: dict[Connection, BaseProcess] = {}
    try:
        for job in jobs:
            here, there = context.Pipe(duplex=False)
            worker: BaseProcess = context.Process(target=_work, args=(job, there), daemon=True)
            with (
                warnings.catch_warnings()
            ):  # of Python 3.12: a fork inherits no thread; a worker runs on one and starts none
                warnings.simplefilter("ignore", DeprecationWarning)
                worker.start()
            there.close()  # so that the death of the worker ends what is read here
            workers[here] = worker
        reading = set(workers)
        while reading:
            for end in wait(reading):
                assert isinstance(end, Connection)
                try:
                    said: T | Exception = end.recv()
                except (EOFError, OSError):
                    reading.remove(end)
                    _see_that_it_ended(workers[end])
                    continue
                if isinstance(said, Exception):
                    raise said
                yield said
    finally:
        for here, worker in workers.items():
            worker.terminate()
            worker.join()
            here.close()


def _work(job: Callable[[], Iterable[T]], there: Connection) -> None:
    """The worker: do the job, and say what comes of it."""
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    for number in (
        signal.SIGINT,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGCONT,
    ):  # the parent's, which ends its workers
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    try:
        for some in job():
            there.send(some)
    except Exception as error:
        there.send(_sent(error))


def _sent(error: Exception) -> Exception:
    """`error` as the parent can read it."""
    sent = error if type(error).__module__ == "builtins" else RuntimeError(first_line(error))
    sent.add_note(traceback.format_exc())  # which the error itself leaves behind
    return sent


def _see_that_it_ended(worker: BaseProcess) -> None:
    worker.join()
    if code := worker.exitcode:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise ValueError(
            f"a worker of sampler.engine {how}, as the system does when memory runs out; what was sampled is kept: type a "
            "smaller sampler.engine.workers or sampler.engine.batch_size, and the same command goes on from there"
        )


def end_with_the_parent() -> None:
    """Wait until the process that started this one is dead, and end this one; for a thread of its own."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
