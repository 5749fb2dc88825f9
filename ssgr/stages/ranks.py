"""Ranks: processes that share a prune: each passes some of the rows, their sums are added, the matrices are dealt out.

They run on one host, or on several: then each task of a job, one a host, starts as many.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from ssgr import files, lean, progress
from ssgr.stages.collect import Collector, Sums

_MEETING = "meeting"  # a file in the work folder
_POLL = 0.2  # seconds
_PATIENCE = timedelta(days=30)  # one rank may solve while the others wait; that one died, their parent sees


@dataclass(frozen=True)
class Crew:
    """The tasks of a job, one a host, that share its work; `task` is this one, and task 0 leads.

    `board` is a file that all of them see, of this start of the job alone: there the leader says what it works on. `host` is
    the name by which the others reach this one.
    """

    task: int
    tasks: int
    board: Path
    host: str

    def invited(self) -> dict[str, Any] | None:
        """What the leader works on: its `work` folder, its `count` of processes, and the `host` and `port` to meet at."""
        try:
            found: dict[str, Any] = json.loads(self.board.read_text())
        except FileNotFoundError:  # not yet, or no longer
            return None
        return found


class Joined(Exception):
    """This task did its part of what the leader ends."""


class Ranks:
    """One of `count` processes, `here` of them on this host; with a count of 1 nothing is shared."""

    def __init__(self, rank: int = 0, count: int = 1, here: int | None = None) -> None:
        self.rank, self.count, self.here = rank, count, count if here is None else here

    def device(self, device: torch.device) -> torch.device:
        """The device of this rank: a GPU of its own."""
        return torch.device("cuda", self.rank % self.here) if self.count > 1 and device.type == "cuda" else device

    def mine(self, i: int) -> bool:
        """Whether piece `i` of work falls to this rank."""
        return i % self.count == self.rank

    def add_up(self, collector: Collector, device: torch.device) -> None:
        """Let the sums of every rank be those of all."""
        if self.count == 1:
            return
        own = {key: sums.shape for key, sums in collector.sums.items()}
        every = self.every((own, collector.owner))
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

    def every(self, what: Any) -> list[Any]:
        """`what` of every rank, on every rank."""
        out = [what] * self.count
        if self.count > 1:
            dist.all_gather_object(out, what)
        return out

    def meet(self) -> None:
        """Wait until every rank is here."""
        if self.count > 1:
            dist.barrier()


def run(count: int, work: Path, device: str, job: Callable[..., None], *args: Any, crew: Crew | None = None) -> None:
    """Run `job(ranks, *args)` in `count` processes that can speak with each other; here, where it is one.

    With a `crew`, each of its tasks calls this, and the processes of all share the work.

    Raises:
        Joined: this task is not the leader of its crew, and the work is done.
        ValueError, OSError: what the first rank that failed raised; the others are stopped.
        RuntimeError: any other error of a rank, with its traceback.
    """
    meeting = work / _MEETING
    meeting.unlink(missing_ok=True)
    if count == 1 and crew is None:
        return job(Ranks(), *args)
    threads = max(1, torch.get_num_threads() // count)
    context = multiprocessing.get_context("spawn")
    failures, news = context.SimpleQueue(), context.SimpleQueue()
    own = (_Lean(), _Place(count, meeting, crew), os.getpid(), device, threads, failures, news, job, args)
    processes: Any = torch.multiprocessing.start_processes(_begin, own, nprocs=count, join=False)  # type: ignore[attr-defined, no-untyped-call]
    try:
        while not processes.join(timeout=1):
            while not news.empty():
                progress.latest = news.get()
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
        progress.latest = None
        for process in processes.processes:
            process.terminate()  # those that are left, after an interrupt
        meeting.unlink(missing_ok=True)
        if crew is not None and crew.task == 0:
            crew.board.unlink(missing_ok=True)
    if crew is not None and crew.task:
        raise Joined


@dataclass(frozen=True)
class _Place:
    """Where the processes of this host, `here` of them, meet the others."""

    here: int
    meeting: Path
    crew: Crew | None

    def store(self, rank: int, count: int) -> Any:
        """What they find each other through: a file on one host, else a port of the leader's host."""
        if self.crew is None:
            return dist.FileStore(str(self.meeting.absolute()), count)  # type: ignore[attr-defined]
        if rank:
            while (found := self.crew.invited()) is None:
                time.sleep(_POLL)
            if found["count"] != self.here:
                raise ValueError(
                    f"memory.ranks=auto: {found['host']} has {found['count']} processes and {self.crew.host} {self.here}; type "
                    f"memory.ranks={min(found['count'], self.here)}"
                )
            return dist.TCPStore(found["host"], found["port"], count, False, _PATIENCE, False)  # type: ignore[attr-defined]
        family, kind, _, _, address = socket.getaddrinfo(self.crew.host, 0, type=socket.SOCK_STREAM)[0]
        door = socket.socket(family, kind)
        door.bind(address)  # to this host's own address and no other
        door.listen()
        given = (self.crew.host, door.getsockname()[1], count, True, _PATIENCE, False)
        store = dist.TCPStore(*given, master_listen_fd=door.detach())  # type: ignore[attr-defined]
        here = {"work": str(self.meeting.parent), "count": self.here, "host": self.crew.host, "port": given[1]}
        files.write_json(self.crew.board, here)
        return store


class _Lean:
    """Where a rank reads this from what it is started with, it loads transformers, before what follows imports all of it."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return lean.load_transformers, ()


def _begin(
    local: int, _: None, place: _Place, parent: int, device: str, threads: int, failures: Any, news: Any,
    job: Callable[..., None], args: Any,
) -> None:  # fmt: skip
    # What the death of the parent sends; whatever a shell starts with & ignores it. Python's own handler would wait for the
    # collective call in which this rank may wait for one that is gone.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getppid() != parent:  # it was killed before its death would be a signal to this process
        return
    torch.set_num_threads(threads)
    if local == 0:
        progress.told = news.put
    if device == "cuda":
        torch.cuda.set_device(local)
    elif place.crew is None and Path("/sys/class/net/lo").exists():  # the ranks are on one host
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    tasks, task = (place.crew.tasks, place.crew.task) if place.crew else (1, 0)
    rank, count = task * place.here + local, tasks * place.here
    try:
        store = place.store(rank, count)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_PATIENCE)
        job(Ranks(rank, count, place.here), *args)
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
