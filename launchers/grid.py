"""A grid: compose its cells, plan their stages, hand them to SLURM or to processes of this machine, say what became of it."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.live import Live
from rich.table import Table
from tqdm import tqdm

from launchers import local, outcome
from launchers.cluster import ROOT, Slurm
from launchers.experiment import build, store_of
from launchers.submit import Settings, Submission, kinds, plan, submit
from ssgr import assemble, pipeline, status
from ssgr.graph import KINDS, Stage
from ssgr.progress import Progress
from ssgr.queue import Records
from ssgr.store import Store
from ssgr.sweep import Sweep, code, read

T = TypeVar("T")
_log = logging.getLogger("ssgr")
_BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_POLL = 2.0  # seconds between two looks at the queue
_PAUSES = (15, 60, 120, 300, 405)  # seconds, where the scheduler does not answer
_LEAST = {"parts": 1, "max_array": 1, "max_parallel": 1, "max_timeouts": 0, "cpus_per_task": 1, "timeout_min": 1}
_NULL = ("max_parallel", "cpus_per_task")  # of these, what may be null


@contextlib.contextmanager
def explained(config: DictConfig) -> Iterator[None]:
    """Hydra's set-up of a launcher; what cannot be is one sentence and exit status 1."""
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    logging.basicConfig(level=logging.INFO, format="[%(levelname)s] %(message)s")
    try:
        yield
    except (ValueError, OSError) as error:
        said = (
            str(error)
            if isinstance(error, ValueError) or error.filename is None
            else f"{error.filename} cannot be written ({error.strerror}); what was submitted goes on"
        )
        outcome.fail(said, shown=True)
        print(f"[ERROR] {said}", file=sys.stderr)
        raise SystemExit(1) from error


def launch(
    context: HydraContext,
    config: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    first: int,
    kind: str,
    settings: Mapping[str, Any],
) -> Sequence[JobReturn]:
    """Run or submit the cells of a sweep; a cell that cannot be is in `outcome`, and never stops the others.

    Raises:
        ValueError: the sweep cannot be submitted or run.
    """
    _check(settings)
    wait = kind == "local" or settings["wait"]
    if not wait and not settings["dry_run"] and config.hydra.sweeper._target_ != _BASIC:
        raise ValueError(
            f"the sweeper {config.hydra.sweeper._target_.rpartition('.')[2]} chooses cells by the results of others: type "
            "hydra.launcher.wait=true; nothing was submitted"
        )
    if settings.get("cancel_dropped") and (
        config.hydra.sweeper._target_ != _BASIC or config.hydra.sweeper.get("max_batch_size") is not None
    ):
        raise ValueError(
            "hydra.launcher.cancel_dropped=true: the sweeper gives its cells in batches, and jobs of cells that are still to "
            "come would be cancelled; leave it out, or hydra.sweeper.max_batch_size; nothing was submitted"
        )
    folder = Path(str(config.hydra.sweep.dir)).absolute()
    store = store_of(config)
    before = read(folder)
    if before is not None and before.store != str(store.root):
        raise ValueError(
            f"{folder} is a sweep of the store {before.store}: type store.path={before.store}, or another hydra.sweep.dir"
        )
    sweep = _sweep(folder, store, settings["parts"])
    if before is not None:
        sweep.configs = before.configs
    if first and before is not None:  # the sweeper comes in batches
        sweep.graph, sweep.overrides, sweep.benches = before.graph, before.overrides, before.benches
        sweep.names, sweep.refused = before.names, before.refused
    returns = [
        _cell(context, config, sweep, store, first + i, overrides, settings["dry_run"])
        for i, overrides in _shown(job_overrides)
    ]
    cut = Settings(
        resources=settings.get("resources", {}),
        fold=settings["fold"],
        max_array=settings.get("max_array", len(sweep.graph.stages) + 1),
        max_parallel=settings["max_parallel"],
        cancel_dropped=settings.get("cancel_dropped", False),
    )
    if settings["dry_run"]:
        _dry(sweep, store, cut, kind)
    elif kind == "slurm":
        done = submit(sweep, store, Slurm(settings["max_timeouts"]), cut)
        _announce(sweep, done)
        if wait:
            try:
                _watch(sweep, store)
            except KeyboardInterrupt:
                raise ValueError(
                    f"no longer watched; the jobs go on: python -m ssgr.status {shlex.quote(str(sweep.folder))}"
                ) from None
    else:
        sweep.write()
        local.run(sweep, store, cut, settings["cpus_per_task"], settings["timeout_min"])
    numbers = range(first, first + len(job_overrides))
    values: dict[int, Any] = dict.fromkeys(numbers)
    if wait and not settings["dry_run"]:
        values |= _collect(sweep, store, numbers)
    else:
        for n in (n for n in numbers if n in sweep.refused):
            outcome.fail(f"{sweep.label(n)}: {sweep.refused[n]}")
        values = {n: {"sweep": str(folder), "cell": n} for n in numbers}
    for n, one in zip(numbers, returns, strict=True):
        one.status, one.return_value = JobStatus.COMPLETED, values[n]
    return returns


def _check(settings: Mapping[str, Any]) -> None:
    """See that the launcher's settings can be; those of `resources` are looked at for each kind of job."""
    for name in ("dry_run", "wait", "cancel_dropped"):
        if not isinstance(value := settings.get(name, False), bool):
            raise ValueError(f"hydra.launcher.{name}={value}: give true or false")
    for name, least in _LEAST.items():
        value, null = settings.get(name, least), name in _NULL
        if (value is not None or not null) and (type(value) is not int or value < least):
            raise ValueError(
                f"hydra.launcher.{name}={value}: give a whole number of at least {least}{', or null' if null else ''}"
            )
    for name in ("fold", "resources"):
        if not isinstance(value := settings.get(name, {}), Mapping):
            raise ValueError(f"hydra.launcher.{name}={value}: give kinds of stages in braces, or {{}} for none")
    for stage, home in settings["fold"].items():
        if wrong := {stage, home or stage} - {*KINDS}:
            raise ValueError(
                f"hydra.launcher.fold.{stage}={home}: no kind of stage is called {min(wrong)}; valid are {', '.join(KINDS)}"
            )


def _shown(job_overrides: Sequence[Sequence[str]]) -> Iterable[tuple[int, Sequence[str]]]:
    """The cells, with a line of progress where there are many."""
    with Progress("plan", len(job_overrides), shown=len(job_overrides) > 20) as progress:
        for i, overrides in enumerate(job_overrides):
            yield i, overrides
            progress.step()


def _sweep(folder: Path, store: Store, parts: int) -> Sweep:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        commit = code(ROOT, folder / "code.diff")
    except OSError as error:
        raise ValueError(
            f"the sweep folder {folder} cannot be written ({error.strerror}): type hydra.sweep.dir=DIR"
        ) from error
    return Sweep(folder, str(store.root), sys.argv, commit, parts)


def _cell(
    context: HydraContext,
    config: DictConfig,
    sweep: Sweep,
    store: Store,
    number: int,
    overrides: Sequence[str],
    dry: bool,
) -> JobReturn:
    """Compose and plan one cell; one that cannot be is refused, and the others go on."""
    cfg = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(cfg):
        cfg.hydra.job.id = cfg.hydra.job.num = number
    hydra_cfg = OmegaConf.masked_copy(cfg, "hydra")
    task = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    sweep.overrides[number] = list(filter_overrides(list(overrides)))
    try:
        container = OmegaConf.to_container(task, resolve=True)
        if task.shard is not None:
            raise ValueError("shard= is for jobs that are started by hand: here type hydra.launcher.parts=8")
        if (own := store_of(task).root) != store.root:
            raise ValueError(
                f"store.path={own}: a sweep of a launcher has one store, here {store.root}: give one command for each store"
            )
        experiment = build(task)
        planned = pipeline.plan(experiment, store, sweep.parts)
    except ValueError as error:
        sweep.refused[number] = str(error)
    else:
        sweep.refused.pop(number, None)
        sweep.benches[number] = [bench.name for bench in experiment.benches]
        sweep.names[number] = {one.name: one.key for one in planned}
        sweep.graph.add(number, planned)
        if not dry:
            sweep.compose(number, dict(container))  # type: ignore[arg-type]
    return JobReturn(
        overrides=list(overrides),
        cfg=task,
        hydra_cfg=hydra_cfg,
        working_dir=str(sweep.cell(number)),
        task_name=str(config.hydra.job.name),
    )


def _announce(sweep: Sweep, done: Submission) -> None:
    """Say what was submitted, and how to watch it."""
    joined = len(done.plan.live)
    parts = (
        [f"{done.jobs} jobs in {len(done.arrays)} arrays were submitted"]
        if done.arrays
        else ["nothing was left to submit"]
    )
    if joined:
        parts.append(f"{joined} stages are made by jobs that were there before")
    print(
        f"sweep {sweep.id}: {len(sweep.overrides)} cells, {len(sweep.graph.stages)} stages, {sum(done.plan.stored.values())} "
        f"of them in the store; {'; '.join(parts)}"
    )
    if sweep.refused:
        print(f"{len(sweep.refused)} cells cannot be run and were left out")
    folder = shlex.quote(str(sweep.folder))
    print(f"watch:   python -m ssgr.status {folder}\nresults: python -m ssgr.report {folder}")


def _dry(sweep: Sweep, store: Store, cut: Settings, kind: str) -> None:
    """Print what would be done."""
    found = plan(sweep, store, cut, (status.live(store) if kind == "slurm" else None) or {})
    shapes = kinds(found, cut) if kind == "slurm" else {}
    table = Table(
        title=f"{len(sweep.overrides)} cells, {len(sweep.graph.stages)} unique stages", title_justify="left", box=None
    )
    for name in ("stage", "in the store", "in the queue", "to make", "jobs", "arrays", "GPUs a job", "estimated time"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    missing = Counter(stage.kind for stage in found.missing)
    joined = Counter(sweep.graph.stages[key].kind for key in found.live)
    typical = _typical(store, [stage for stage in found.missing if stage.key not in found.live])
    for one in KINDS:
        if not (missing[one] or found.stored[one]):
            continue
        own = [array for array in found.arrays if array.kind == one]
        gpus = str(shapes[one].gpus) if one in shapes else ""
        left = missing[one] - joined[one]
        seconds = typical.get(one)
        time_ = "" if not left else "unknown" if seconds is None else tqdm.format_interval(left * seconds)
        jobs = sum(len(array.tasks) for array in own)
        table.add_row(one, *map(str, (found.stored[one], joined[one], left, jobs, len(own))), gpus, time_)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for number, why in sweep.refused.items():
        print(f"{sweep.label(number)} cannot be run: {why}")
    print("dry run: nothing was submitted; estimates are means of the same kinds of stages in the store")


def _typical(store: Store, todo: Sequence[Stage]) -> dict[str, float]:
    """Mean seconds of the results that the store has of these kinds of stages."""
    out: dict[str, float] = {}
    for kind, folder in {(stage.kind, stage.folder) for stage in todo}:
        seconds = [found.run.seconds for key in store.keys(folder) if (found := store.find(folder, key)) is not None]
        if seconds:
            out[kind] = sum(seconds) / len(seconds)
    return out


def _patiently(ask: Callable[[], T], sweep: Sweep) -> T:
    """What the scheduler answers; it may be away for minutes, while the jobs go on.

    Raises:
        ValueError: it did not answer for a quarter of an hour.
    """
    for pause in _PAUSES:
        try:
            return ask()
        except ValueError as error:
            print(f"[WARNING] {error}; asked again in {pause} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    try:
        return ask()
    except ValueError as error:
        raise ValueError(
            f"{error}; no longer watched, and the jobs go on: python -m ssgr.status {shlex.quote(str(sweep.folder))}"
        ) from error


def _watch(sweep: Sweep, store: Store) -> None:
    """Show how far it is until no job of it is left."""
    console = Console()
    with Live(console=console, refresh_per_second=1, transient=True) as screen:
        said = ""
        while True:
            live = _patiently(Records(store.root).live, sweep)
            found = status.states(sweep, store, live)
            if console.is_terminal:
                screen.update(status.show(sweep, found))
            else:
                count = Counter(one.state for one in found.values())
                line = ", ".join(f"{count[name]} {name}" for name in status.STATES if count[name])
                if line != said:
                    print(f"stages: {line}", file=sys.stderr, flush=True)
                said = line
            if not any(key in live for key in sweep.graph.stages):
                return
            time.sleep(_POLL)


def _collect(sweep: Sweep, store: Store, numbers: Sequence[int]) -> dict[int, float | None]:
    """The results of the cells, and the reasons of those that have none."""
    why = assemble.holes(sweep, store)
    out: dict[int, float | None] = {}
    for number, found in assemble.cells(sweep, store):
        if number not in numbers:
            continue
        if found is None:
            outcome.fail(
                f"{sweep.label(number)}: {why.get(number, 'its jobs ended without a result; see python -m ssgr.status')}"
            )
            out[number] = None
        else:
            outcome.add(sweep.cell(number))
            out[number] = outcome.value(found)
    return out
