"""Who was asked to make what: jobs of a scheduler, and why they failed, written beside the results in the store.

A job's record is written before it is submitted and again with its id, so that a driver that is killed between the two
loses nothing: the job is found by its name. The records are one small file an array of jobs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ssgr.files import write_json

FOLDER = "jobs"  # in the store
_AT_ONCE = 200  # names in one question to squeue
_ANSWER = 60  # seconds that a command of the scheduler may take
_LEAVING = "COMPLETING"  # it ends, or is put into the queue again
_ENDING = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
)


@dataclass(frozen=True)
class Submitted:
    """An array of jobs: `tasks` holds the keys of the stages of each element."""

    name: str
    kind: str
    tasks: tuple[tuple[str, ...], ...]
    folder: str  # of the logs
    job: str | None = None  # the scheduler's id, None between writing the record and the scheduler's answer
    ended: bool = False  # no element is in the queue any more
    when: str = ""

    def id(self, i: int) -> str:
        """The scheduler's name of element `i`; a single job is no array."""
        return f"{self.job}_{i}" if len(self.tasks) > 1 else str(self.job)

    def log(self, i: int) -> Path:
        """Where submitit writes the errors of element `i`."""
        return Path(self.folder) / f"{self.id(i)}_0_log.err"


@dataclass(frozen=True)
class Queued:
    """A job that is in the queue: its id, its state in the scheduler's words, and why it waits."""

    job: str
    state: str
    reason: str
    elapsed: str


@dataclass(frozen=True)
class Failure:
    """Why a stage failed: one line, and where to read more."""

    error: str
    job: str
    log: str
    when: str


class Records:
    """The jobs that were submitted for one store."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, one: Submitted) -> None:
        """Write a record whole, over an earlier one of its name."""
        folder = self.root / FOLDER
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{one.name}.json", asdict(one))

    def read(self) -> list[Submitted]:
        """All records, the latest last."""
        found = []
        for file in (self.root / FOLDER).glob("ssgr-*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                one = json.loads(file.read_text())
                found.append(Submitted(**{**one, "tasks": tuple(tuple(keys) for keys in one["tasks"])}))
        return sorted(found, key=lambda one: one.when)

    def live(self) -> dict[str, Queued]:
        """Every stage that a job in the queue makes or will make.

        Raises:
            ValueError: the scheduler does not answer.
        """
        out: dict[str, Queued] = {}
        for one, jobs in self._queue():
            one = one if one.job or not jobs else replace(one, job=_array(jobs))
            # no time used: it is pending again, and its nodes are still being cleared
            by_id = {job.job: job for job in jobs if job.state != _LEAVING or job.elapsed == "0:00"}
            for i, keys in enumerate(one.tasks):
                if (job := by_id.get(one.id(i))) is not None:
                    out |= dict.fromkeys(keys, job)
        return out

    def settle(self) -> list[Submitted]:
        """Mark what has left the queue, and return what a driver submitted that died before it could note the id.

        Raises:
            ValueError: the scheduler does not answer.
        """
        found = []
        for one, jobs in self._queue():
            if jobs and one.job is None:
                found.append(replace(one, job=_array(jobs)))
                self.write(found[-1])
            elif not jobs and one.job is None:
                (self.root / FOLDER / f"{one.name}.json").unlink(missing_ok=True)
            elif not jobs:
                self.write(replace(one, ended=True))
        return found

    def _queue(self) -> list[tuple[Submitted, list[Queued]]]:
        opened = [one for one in self.read() if not one.ended]
        queue = squeue(one.name for one in opened)
        return [(one, queue.get(one.name, [])) for one in opened]

    def last(self) -> dict[str, tuple[Submitted, int]]:
        """For every stage the last job that was to make it."""
        return {key: (one, i) for one in self.read() if one.job for i, keys in enumerate(one.tasks) for key in keys}

    def fail(self, stage: str, key: str, error: str, log: str) -> None:
        """Note why a stage failed, for whoever looks; nothing that failed is kept as a result."""
        job = os.environ.get("SLURM_JOB_ID", str(os.getpid()))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # such as a full disk: the log still has it
            (self.root / stage).mkdir(exist_ok=True)
            write_json(self._failure(stage, key), asdict(Failure(error, job, log, now)))

    def forgive(self, stage: str, key: str) -> None:
        """Forget an earlier failure."""
        self._failure(stage, key).unlink(missing_ok=True)

    def failure(self, stage: str, key: str) -> Failure | None:
        """Why a stage failed the last time that it was tried."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Failure(**json.loads(self._failure(stage, key).read_text()))
        return None

    def _failure(self, stage: str, key: str) -> Path:
        return self.root / stage / f"{key}.failed"


def _array(jobs: Sequence[Queued]) -> str:
    """The id of the array that `jobs` are elements of."""
    return jobs[0].job.partition("_")[0]


def squeue(names: Iterable[str]) -> dict[str, list[Queued]]:
    """The jobs of these names that are in SLURM's queue and will run or do.

    Raises:
        ValueError: the scheduler does not answer.
    """
    out: dict[str, list[Queued]] = {}
    for some in _cut(list(names)):
        command = ["squeue", "--noheader", "--array", "--format=%i|%j|%T|%r|%M", f"--name={','.join(some)}"]
        for line in ask(command).splitlines():
            try:
                job, name, state, reason, elapsed = line.split("|", 4)
            except ValueError:
                raise ValueError(
                    f"squeue answered what is no line of a job ({line.strip()}); try again later"
                ) from None
            if state not in _ENDING and reason != "DependencyNeverSatisfied":
                out.setdefault(name, []).append(Queued(job, state, reason, elapsed))
    return out


def ended(jobs: Sequence[str]) -> dict[str, str]:
    """How jobs that left the queue ended, in the scheduler's words, where it remembers."""
    if not jobs or shutil.which("sacct") is None:
        return {}
    out: dict[str, str] = {}
    with contextlib.suppress(ValueError):  # no accounting
        for some in _cut(list(jobs)):
            command = [
                "sacct",
                "--noheader",
                "--parsable2",
                "--allocations",
                "--format=JobID,State",
                f"--jobs={','.join(some)}",
            ]
            out |= dict(line.split("|")[:2] for line in ask(command).splitlines())
    return out


def ask(command: Sequence[str]) -> str:
    """What a command of the scheduler prints.

    Raises:
        ValueError: it is not there, or does not answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER, check=False)
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not on the path: is this a login node of a SLURM cluster?") from None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{command[0]} did not answer in {_ANSWER} s: SLURM's controller may be down; try again later"
        ) from None
    if done.returncode:
        raise ValueError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _cut(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for i in range(0, len(names), _AT_ONCE):
        yield names[i : i + _AT_ONCE]
