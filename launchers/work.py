"""What a job does: some stages of a cell, or the report of a sweep. This is what submitit pickles, so it imports lightly."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.helpers import DelayedSubmission

from ssgr.graph import Stage

_PATIENCE = 3  # seconds
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_MAX_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True)
class Work:
    """Make `stages` of the cell whose configuration lies in `config`."""

    config: Path
    store: Path
    stages: tuple[Stage, ...]
    parts: int
    cpus: int

    def __call__(self) -> None:
        """Make them in their order.

        Raises:
            ValueError: one cannot be made; the message is kept in the store too.
        """
        _quieten(self.cpus)
        _quieten_libraries(self.cpus)
        import json

        from omegaconf import OmegaConf

        from launchers.experiment import build
        from ssgr import pipeline
        from ssgr.queue import Records
        from ssgr.store import Artefact, Store

        store = Store(self.store)
        records = Records(store.root)
        left = list(self.stages)

        def done(made: Artefact) -> None:
            stage = left.pop(0)
            records.forgive(stage.folder, stage.key)
            how = "was there" if made.run.cached else f"{made.run.seconds:.1f} s, {made.run.peak_rss_mib:.0f} MiB"
            print(f"{stage.name}: {stage.folder}/{stage.key} ({how})", file=sys.stderr)

        crew = None
        try:
            crew = _crew()
            experiment = build(OmegaConf.create(json.loads(self.config.read_text())))
            pipeline.make(experiment, store, [stage.key for stage in left], self.parts, done, crew)
        except Exception as error:
            said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            if crew is not None and not isinstance(error, ValueError):
                time.sleep(_PATIENCE)  # another task may have failed first, and this one only missed it
            if crew is None or isinstance(error, ValueError) or not records.failure(left[0].folder, left[0].key):
                records.fail(left[0].folder, left[0].key, said, str(_log()))
            print(f"[ERROR] {left[0].name}: {said}", file=sys.stderr)
            raise

    def checkpoint(self) -> DelayedSubmission:
        """After a preemption or a time limit: the same again, which goes on where this one was."""
        return DelayedSubmission(self)


@dataclass(frozen=True)
class Report:
    """Write result.json of every cell of a sweep that is complete, and the table."""

    folder: Path

    def __call__(self) -> None:
        """Assemble; holes are named, and are no error of the report."""
        _quieten(1)
        from ssgr import assemble

        assemble.report(self.folder)

    def checkpoint(self) -> DelayedSubmission:
        """The same again."""
        return DelayedSubmission(self)


def _quieten(cpus: int) -> None:
    """As many threads as the job has CPUs: two jobs that take all of a node's slow each other hundredfold."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.update(dict.fromkeys(THREADS, str(cpus)))
    logging.basicConfig(level=logging.INFO, format="[%(levelname)s] %(message)s")
    for noisy in ("httpx", "submitit"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _quieten_libraries(cpus: int) -> None:
    """The same of those that take seconds to load; a report needs neither."""
    from ssgr import lean

    lean.load_transformers()
    import torch
    import transformers

    torch.set_num_threads(cpus)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _crew() -> Any:
    """The tasks of this job, where it has several: they meet at a file beside its logs, of this start of it."""
    from submitit import JobEnvironment

    from ssgr.stages.ranks import Crew

    try:
        job = JobEnvironment()
        if job.num_tasks == 1:
            return None
        board = job.paths.folder / f"{job.job_id}_{os.environ.get('SLURM_RESTART_COUNT', '0')}_board.json"
        return Crew(job.global_rank, job.num_tasks, board, socket.gethostname())
    except RuntimeError:  # not within a job
        return None


def _log() -> Any:
    from submitit import JobEnvironment

    try:
        return JobEnvironment().paths.stderr
    except RuntimeError:  # not within a job
        return "standard error"
