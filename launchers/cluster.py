"""SLURM through submitit: which resources a kind of stage gets, and how an array of jobs is submitted."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from launchers.work import THREADS
from ssgr.queue import Submitted, ask

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = "default"
SHARED = ("collect", "prune")  # kinds of stages whose work several nodes share
_SOONER = 60  # seconds by which SLURM may send a signal before the time that it was asked for: sbatch(1), --signal
_ANSWER = 120  # seconds that sbatch may take to say whether it would take a job
_EXTRA = "additional_parameters"  # flags of sbatch that submitit has no word for
_NO_FLAGS = (
    "setup",
    "teardown",
    "signal_delay_s",
    "array_parallelism",
    "use_srun",
    "srun_args",
    "stderr_to_stdout",
    _EXTRA,
)
_OWN = {"timeout_min": "time", "tasks_per_node": "ntasks_per_node"}  # submitit's words -> those of its SLURM executor


@dataclass(frozen=True)
class Resources:
    """What the jobs of a kind of stage ask for."""

    cpus: int
    gpus: int  # of all nodes
    asked: Mapping[str, Any]  # in the words of submitit's SLURM executor
    python: str | None  # the command that starts Python, such as one of a container


_MEMORY = {"mem", "mem_gb", "mem_per_cpu", "mem_per_gpu"}


def resources(given: Mapping[str, Mapping[str, Any] | None], kind: str) -> Resources:
    """The resources of `kind`: those of `default`, changed by its own.

    Raises:
        ValueError: one cannot be.
    """
    default, own = _given(given, DEFAULT), _given(given, kind)
    if _MEMORY & own.keys():  # one of them stands for all
        default = {k: v for k, v in default.items() if k not in _MEMORY}
    asked = {k: v for k, v in {**default, **own}.items() if k == "use_srun" or _wanted(v)}
    for name, form, example in (("setup", Sequence, "[module load cuda]"), (_EXTRA, Mapping, "{reservation: mylab}")):
        if name in asked and (isinstance(asked[name], str) or not isinstance(asked[name], form)):
            raise ValueError(f"hydra.launcher.resources.{kind}.{name}={asked[name]}: give it a form such as {example}")
    if _EXTRA in asked:
        asked[_EXTRA] = {k: v for k, v in asked[_EXTRA].items() if _wanted(v)}
    python, setup = asked.pop("python", None), [*(asked.pop("setup", ()))]
    cpus, gpus, nodes = asked.get("cpus_per_task", 1), asked.get("gpus_per_node", 0), asked.get("nodes", 1)
    minutes, told = asked.get("timeout_min", 5), asked.get("signal_delay_s", 90)  # submitit's defaults
    for name, value, least in (
        ("cpus_per_task", cpus, 1),
        ("gpus_per_node", gpus, 0),
        ("nodes", nodes, 1),
        ("timeout_min", minutes, 1),
        ("signal_delay_s", told, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"hydra.launcher.resources.{kind}.{name}={value}: give a whole number of at least {least}")
    if minutes * 60 <= told + _SOONER:
        raise ValueError(
            f"hydra.launcher.resources.{kind}.timeout_min={minutes} with signal_delay_s={told}: SLURM tells a job up to "
            f"{_SOONER} s sooner, so this one may be told as it starts, and dies of it; give at least "
            f"timeout_min={(told + _SOONER) // 60 + 1}"
        )
    if asked.get("tasks_per_node", 1) != 1:
        raise ValueError(
            f"hydra.launcher.resources.{kind}.tasks_per_node={asked['tasks_per_node']}: a job has one task a node; "
            "memory.ranks=auto uses all GPUs of it"
        )
    if nodes > 1 and kind not in SHARED:
        raise ValueError(
            f"hydra.launcher.resources.{kind}.nodes={nodes}: of all stages {' and '.join(SHARED)} alone run on several nodes; "
            "hydra.launcher.parts=8 shares sampling among jobs"
        )
    if nodes > 1:
        asked |= {"tasks_per_node": 1, "srun_args": [*asked.get("srun_args", ()), "--kill-on-bad-exit=1"]}
    if "mem_gb" in asked:
        asked["mem"] = f"{asked.pop('mem_gb')}GB"
    if not gpus:
        asked.pop("gpus_per_node", None)
    threads = " ".join(f"{name}={cpus}" for name in THREADS)
    asked["setup"] = [
        f"export {threads}",
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",  # since SLURM 22.05 srun does not take it from sbatch
        f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        *setup,
    ]
    return Resources(cpus, gpus * nodes, {_OWN.get(k, k): v for k, v in asked.items()}, python)


def _given(given: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    if not isinstance(own := given.get(kind) or {}, Mapping):
        raise ValueError(f"hydra.launcher.resources.{kind}={own}: give words and values, such as {{gpus_per_node: 1}}")
    return own


def _wanted(value: Any) -> bool:
    """Whether sbatch is to be told: a flag that takes no value is left out, not set to False."""
    return value is not None and value is not False


class Cluster(Protocol):
    """Where arrays of jobs are submitted."""

    def check(self, kinds: Mapping[str, Resources]) -> None:
        """See that it would take such jobs.

        Raises:
            ValueError: it would not; the message names the kind and what to change.
        """
        ...

    def submit(
        self,
        work: Sequence[Any],
        name: str,
        asked: Resources,
        dependency: str | None,
        folder: Path,
        parallel: int | None,
    ) -> str:
        """Submit an array and return its id.

        Raises:
            ValueError: it was refused.
        """
        ...

    def give(self, one: Submitted, i: int, work: Any, asked: Resources) -> None:
        """Let element `i` find what it is to do, where a driver died before it had written that."""
        ...

    def cancel(self, jobs: Sequence[str]) -> None:
        """Take jobs out of the queue."""
        ...


class Slurm:
    """The cluster whose `sbatch` is on the path."""

    def __init__(self, max_timeouts: int = 20) -> None:
        self.max_timeouts = max_timeouts

    def check(self, kinds: Mapping[str, Resources]) -> None:
        """See that `sbatch` is there and takes jobs of these kinds."""
        for command in ("sbatch", "srun", "squeue", "scancel"):
            if shutil.which(command) is None:
                raise ValueError(
                    f"there is no {command} on the path: log in to the cluster, or type hydra/launcher=local to run here"
                )
        for kind, one in kinds.items():
            flags = ["--test-only", "--wrap=true", "--output=/dev/null", *self._flags(one)]
            try:
                done = subprocess.run(["sbatch", *flags], capture_output=True, text=True, timeout=_ANSWER, check=False)
            except subprocess.TimeoutExpired:
                raise ValueError(
                    f"sbatch did not answer in {_ANSWER} s: SLURM's controller may be down; nothing was submitted; try later"
                ) from None
            if done.returncode:
                said = " ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.strip().splitlines())
                raise ValueError(
                    f"SLURM refuses jobs of kind {kind} ({said.strip()}): nothing was submitted; change "
                    f"hydra.launcher.resources.{kind} (see sinfo for partitions and their limits)"
                )

    def _flags(self, one: Resources) -> list[str]:
        """What submitit writes into the file for `sbatch`, as far as it is a flag."""
        flags = {k: v for k, v in one.asked.items() if k not in _NO_FLAGS} | one.asked.get(_EXTRA, {})
        return [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in flags.items()]

    def submit(
        self,
        work: Sequence[Any],
        name: str,
        asked: Resources,
        dependency: str | None,
        folder: Path,
        parallel: int | None,
    ) -> str:
        """Submit through submitit; a job whose dependency can no longer be met is ended by SLURM."""
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = submitit.SlurmExecutor(folder, max_num_timeout=self.max_timeouts, python=asked.python)
        extra = dict(asked.asked.get(_EXTRA, {}))
        if dependency:
            extra |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
        given = {**asked.asked, "job_name": name, _EXTRA: extra}
        given["array_parallelism"] = parallel or len(work)
        try:
            executor.update_parameters(**given)
            with executor.batch():
                jobs = [executor.submit(one) for one in work]
            return str(jobs[0].job_id).partition("_")[0]
        except FailedJobError as error:
            raise ValueError(f"SLURM refused {name}: {_last(error)}") from error
        except FailedSubmissionError as error:  # its first line is what sbatch said, the others are about Python
            raise ValueError(f"sbatch told no id of {name}: {str(error).splitlines()[0]}") from error

    def give(self, one: Submitted, i: int, work: Any, asked: Resources) -> None:
        """Write the pickle that submitit writes after `sbatch` has told it the id."""
        from submitit.core.utils import DelayedSubmission, JobPaths

        file = JobPaths(one.folder, one.id(i)).submitted_pickle
        if not file.exists():
            submission = DelayedSubmission(work)
            submission.set_timeout(asked.asked.get("time", 5), self.max_timeouts)
            submission.dump(file)

    def cancel(self, jobs: Sequence[str]) -> None:
        """scancel; where it fails or hangs, what is submitted next matters more."""
        try:
            if jobs:
                ask(["scancel", *jobs])
        except ValueError as error:
            left = f"of the dropped jobs {', '.join(jobs)} some may go on: the same command again cancels what is left"
            print(f"[WARNING] {error}; {left}", file=sys.stderr)


def _last(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
