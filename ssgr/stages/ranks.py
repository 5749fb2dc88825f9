"""Ranks: processes that share a prune: each passes some of the rows, their sums are added, the matrices are dealt out."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from ssgr.stages.collect import Collector, Sums

_MEETING = "meeting"  # a file in the work folder
_PATIENCE = timedelta(days=30)  # one rank may solve while the others wait; that one died, their parent sees


class Ranks:
    """One of `count` processes; with a count of 1 nothing is shared."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    def device(self, device: torch.device) -> torch.device:
        """The device of this rank: a GPU of its own."""
        return torch.device("cuda", self.rank) if self.count > 1 and device.type == "cuda" else device

    def mine(self, i: int) -> bool:
        """Whether piece `i` of work falls to this rank."""
        return i % self.count == self.rank

    def add_up(self, collector: Collector, device: torch.device) -> None:
        """Let the sums of every rank be those of all."""
        if self.count == 1:
            return
        own = {key: sums.shape for key, sums in collector.sums.items()}
        every: list[Any] = [None] * self.count
        dist.all_gather_object(every, (own, collector.owner))
        shapes = {key: shape for sizes, _ in every for key, shape in sizes.items()}
        collector.owner = {name: owner for _, owners in every for name, owner in owners.items()}
        for key in sorted(shapes):
            outputs, inputs = shapes[key]
            sums = collector.sums.setdefault(key, Sums.zero(inputs, collector.statistic, device, outputs))
            counts = torch.tensor([sums.tokens, sums.rows], dtype=torch.float64, device=device)
            for part in (counts, sums.sum_I, sums.square_I, sums.gram_II, sums.gradient_OI):
                if part is not None:
                    dist.all_reduce(part)
            sums.tokens, sums.rows = counts.tolist()

    def deal(self, costs: Sequence[float]) -> list[int]:
        """The rank that does each piece of work, so that all end at about the same time."""
        load, out = [0.0] * self.count, [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            out[i] = load.index(min(load))
            load[out[i]] += costs[i]
        return out

    def give(self, tensor: Tensor, owner: int) -> None:
        """Let `tensor` be on every rank what it is on `owner`."""
        if self.count > 1:
            dist.broadcast(tensor, owner)

    def tell(self, what: Any, owner: int) -> Any:
        """`what` of the rank `owner`, on every rank."""
        if self.count == 1:
            return what
        box = [what]
        dist.broadcast_object_list(box, owner)
        return box[0]

    def meet(self) -> None:
        """Wait until every rank is here."""
        if self.count > 1:
            dist.barrier()


def run(count: int, work: Path, device: str, job: Callable[..., None], *args: Any) -> None:
    """Run `job(ranks, *args)` in `count` processes that can speak with each other; here, where it is one.

    Raises:
        ValueError, OSError: what the first rank that failed raised; the others are stopped.
        RuntimeError: any other error of a rank, with its traceback.
    """
    meeting = work / _MEETING
    meeting.unlink(missing_ok=True)
    if count == 1:
        return job(Ranks(), *args)
    threads = max(1, torch.get_num_threads() // count)
    failures = multiprocessing.get_context("spawn").SimpleQueue()
    own = (count, os.getpid(), meeting, device, threads, failures, job, args)
    processes: Any = torch.multiprocessing.start_processes(_begin, own, nprocs=count, join=False)  # type: ignore[attr-defined, no-untyped-call]
    try:
        while not processes.join():
            pass
    except (ProcessExitedException, ProcessRaisedException) as error:
        first = None if failures.empty() else failures.get()  # of the others, some only missed the one that failed
        ended = [(i, -p.exitcode) for i, p in enumerate(processes.processes) if p.exitcode < 0]
        killed = [f"rank {i} was ended by {signal.Signals(s).name}" for i, s in ended if s != signal.SIGTERM]
        if killed and not isinstance(first, (ValueError, OSError)):
            raise ValueError(
                f"memory.ranks={count}: {killed[0]}, as the system does when memory runs out; type a smaller memory.ranks, "
                "memory.activations_gib=0 or a smaller budget.tokens"
            ) from error
        raise first or error from error
    finally:
        for process in processes.processes:
            process.terminate()  # those that are left, after an interrupt
        meeting.unlink(missing_ok=True)


def _begin(
    rank: int, count: int, parent: int, meeting: Path, device: str, threads: int, failures: Any,
    job: Callable[..., None], args: Any,
) -> None:  # fmt: skip
    # What the death of the parent sends; whatever a shell starts with & ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.getppid() != parent:  # it was killed before its death would be a signal to this process
        return
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.set_device(rank)
    elif Path("/sys/class/net/lo").exists():  # the ranks are on one host
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        store = dist.FileStore(str(meeting.absolute()), count)  # type: ignore[attr-defined]
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_PATIENCE)
        job(Ranks(rank, count), *args)
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        failures.put(_sent(error))
        raise


def _sent(error: Exception) -> Exception:
    """`error` as another process can read it."""
    if isinstance(error, ValueError):
        return ValueError(str(error))
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    return RuntimeError(traceback.format_exc())
