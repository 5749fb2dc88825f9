"""Run one cell, or a sweep with -m: compose the config, build the experiment, run it, print the table."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked workers of `datasets` must not hang
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of the loading of weights, too

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from launchers import outcome, typed
from ssgr import lean, tracker
from ssgr.files import write_json
from ssgr.records import RunResult
from ssgr.sweep import MANIFEST, PART

sys.path.append(str(Path(__file__).parent / "launchers"))  # where Hydra finds hydra_plugins
logging.raiseExceptions = False  # a line that a full disk keeps out of run.log is no traceback on the terminal
_log = logging.getLogger("ssgr")


def run_cell(cfg: DictConfig) -> RunResult | None:
    """Run one cell and write its result.json into the folder that Hydra made for it; a part only samples."""
    lean.load_transformers()  # it and torch take seconds: a wrong flag is told before
    from launchers.experiment import build, store_of
    from ssgr import pipeline, results

    own = HydraConfig.get()
    if _alone() and any(o.startswith("hydra/launcher=") for o in own.overrides.hydra):
        raise ValueError("hydra/launcher launches sweeps alone, and this is a single run, here: type -m before it")
    folder = Path(own.runtime.output_dir)
    sweep = Path(own.sweep.dir) if own.mode == RunMode.MULTIRUN else folder
    if (sweep / MANIFEST).exists():  # whose cells the tables and the page would show instead of these
        raise ValueError(
            f"{sweep} is the folder of a sweep of hydra/launcher=local or slurm: type that launcher, or another hydra.sweep.dir"
        )
    store = store_of(cfg)
    experiment = build(cfg)
    check_apart(folder, experiment.model.path)
    if experiment.shard is not None:
        with store.working():
            keys, traces = pipeline.sample_shard(experiment, store)
            write_json(folder / PART, {"keys": keys})
        _log.info("%s: %d traces are in %s; the same command without shard= goes on", label(), traces, store.root)
        return None
    with store.working():
        result = pipeline.run(experiment, store, OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
        results.write(result, store, folder)
    tracker.track(tracker.Cell(result, folder, sweep, store.root, tuple(own.overrides.task)))
    hits, misses = sum(store.hits.values()), sum(store.misses.values())
    _log.info("%s: %d stages read from the store, %d made; results in %s", label(), hits, misses, folder)
    outcome.add(folder, hits, misses)
    return result


def check_apart(folder: Path, model: str) -> None:
    """See that no result comes among the files of the model, which the next run would take for another one.

    Raises:
        ValueError: the output folder is that of the model.
    """
    from ssgr.model import locate

    if locate(model).is_dir() and locate(model).samefile(folder):
        raise ValueError(
            f"the output folder {folder} is that of the model, which a result among its files would change: choose another "
            "with hydra.run.dir=DIR"
        )


def label() -> str:
    """The overrides of this cell, or `defaults`."""
    return HydraConfig.get().job.override_dirname or "defaults"


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """One cell. A cell of a sweep that fails is named at the end; the others go on."""
    try:
        result = run_cell(cfg)
        if result is None:
            return None
        return outcome.value(result)
    except ValueError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        outcome.fail(f"{label()}: {error}", _alone())
        _log.error("%s", error)
        return None
    except Exception as error:  # a bug of ours: say so in full, and let the other cells go on
        outcome.fail(f"{label()}: {type(error).__name__}: {error}", _alone())
        _log.exception("this should not happen; please report it")
        return None


def _alone() -> bool:
    """Whether this is a single run."""
    return bool(HydraConfig.get().mode == RunMode.RUN)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Defaults list is missing `_self_`")
    asked = get_args_parser().parse_args()
    try:
        typed.check(asked)
    except ValueError as error:
        sys.exit(f"[ERROR] {error}")
    try:
        main()
    except KeyboardInterrupt:
        print("stopped: the same command goes on where this one was", file=sys.stderr)
        sys.exit(130)  # as shells say of what Ctrl-C ended
    except SystemExit as stop:  # Hydra could not compose the config, and said so
        if stop.code == 1 and not outcome.DONE and not outcome.FAILED:
            print(typed.hint(asked), file=sys.stderr)
        raise
    finally:
        outcome.finish()
    sys.exit(1 if outcome.FAILED else 0)
