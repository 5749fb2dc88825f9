"""Run one cell, or a sweep with -m: compose the config, build the experiment, run it, print the table."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import tempfile
import warnings
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked workers of `datasets` must not hang
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of the loading of weights, too

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launchers import outcome
from ssgr import lean, tracker
from ssgr.records import RunResult
from ssgr.store import Store
from ssgr.sweep import MANIFEST

CONF = Path(__file__).parent / "conf"
sys.path.append(str(CONF.parent / "launchers"))  # where Hydra finds hydra_plugins
_log = logging.getLogger("ssgr")


def run_cell(cfg: DictConfig) -> RunResult | None:
    """Run one cell and write its result.json into the folder that Hydra made for it; a part only samples."""
    lean.load_transformers()  # it and torch take seconds: a wrong flag is told before
    from launchers.experiment import build
    from ssgr import pipeline, results

    own = HydraConfig.get()
    if own.mode == RunMode.RUN and any(o.startswith("hydra/launcher=") for o in own.overrides.hydra):
        raise ValueError("hydra/launcher launches sweeps alone, and this is a single run, here: type -m before it")
    folder = Path(own.runtime.output_dir)
    sweep = Path(own.sweep.dir) if own.mode == RunMode.MULTIRUN else folder
    if (sweep / MANIFEST).exists():  # whose cells the tables and the page would show instead of these
        raise ValueError(
            f"{sweep} is the folder of a sweep of hydra/launcher=local or slurm: type that launcher, or another hydra.sweep.dir"
        )
    store = Store(Path(cfg.store.path))
    experiment = build(cfg)
    check_apart(folder, experiment.model.path)
    if experiment.shard is not None:
        traces = pipeline.sample_shard(experiment, store)
        _log.info("%s: %d traces are in %s; the same command without shard= goes on", label(), traces, store.root)
        return None
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
        outcome.FAILED.append(f"{label()}: {error}")
        _log.error("%s", error)
        return None
    except Exception as error:  # a bug of ours: say so in full, and let the other cells go on
        outcome.FAILED.append(f"{label()}: {type(error).__name__}: {error}")
        _log.exception("this should not happen; please report it")
        return None


def hint(asked: Namespace) -> str:
    """For each override whose key is in no config, and a config that is not there: where it was looked for, and what there is."""
    out = [f"{o}: type $HOME in place of ~, which the shell leaves alone there." for o in asked.overrides if "=~" in o]
    name = asked.config_name
    if name not in (None, "config", "config.yaml") and not (asked.config_path or asked.config_dir):
        out.append(f"--config-name={name}: {CONF.name} has config.yaml alone. Leave it out, or type experiment=NAME.")
    for key in (o.split("=")[0].lstrip("+~") for o in asked.overrides if "=" in o):
        if key.startswith("hydra"):
            continue
        out += _of_another(key, asked.overrides)
        group, _, rest = key.partition(".")
        files = [CONF / "config.yaml"] if not rest else sorted((CONF / group).glob("*.yaml"))
        names = {str(name) for file in files for name in OmegaConf.load(file)} - {"defaults", "_target_", "hydra"}
        if not rest:
            names |= {path.name for path in CONF.iterdir() if path.is_dir()}
        elif not files:
            names = set(OmegaConf.select(OmegaConf.load(CONF / "config.yaml"), group) or ())
        wanted = rest.split(".")[0] if rest else group.split("@")[0]
        if names and wanted not in names:
            place = f"config group {group}" if files and rest else group if rest else "the top level"
            near = difflib.get_close_matches(wanted, names, 1)
            meant = f"; did you mean {near[0]}?" if near else "."
            out.append(f"{key}: {place} has no {wanted}{meant} Valid are {', '.join(sorted(names))}.")
    return "\n".join(out)


def _of_another(key: str, overrides: list[str]) -> list[str]:
    """Of an option that the choice of its group lacks, those that have it: Hydra advises to append it, which leads nowhere."""
    group = key.partition(".")[0]
    names = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    with suppress(HydraException, OmegaConfBaseException), initialize_config_dir(str(CONF), version_base="1.3"):
        if key != group and names and not _has([o for o in overrides if o.split("=")[0] in (group, "experiment")], key):
            have = "|".join(name for name in names if _has([f"{group}={name}"], key))
            return [f"{key} is an option of {group}={have}: choose one of these for it."] if have else []
    return []


def _has(overrides: list[str], key: str) -> bool:
    """Whether what these overrides compose has an option of this name."""
    place, _, name = key.rpartition(".")
    node = OmegaConf.select(compose("config", overrides), place)
    return isinstance(node, DictConfig) and (name in node or OmegaConf.is_missing(node, name))


def check(asked: Namespace) -> None:
    """See that the output folder can be written, before Hydra fails on it with a traceback, and that one experiment is asked for.

    Raises:
        ValueError: it cannot, or several are; the message names it.
    """
    if any((asked.help, asked.hydra_help, asked.cfg, asked.info, asked.shell_completion)):
        return  # nothing is run
    try:
        overrides = OverridesParser.create().parse_overrides(asked.overrides)
    except HydraException:
        return  # Hydra says what it cannot read
    if any(one.key_or_group == "experiment" and one.is_sweep_override() for one in overrides):
        # Hydra reads the axes of a sweep before it chooses among values: each would be one cell without any
        raise ValueError(
            "each experiment is a sweep with axes of its own: give one command for each, with experiment=NAME"
        )
    given = {one.key_or_group: one.value() for one in overrides}
    for group in (one.key_or_group for one in overrides if not one.is_delete()):
        if (CONF / group).is_dir() and isinstance(given[group], int | float | dict | None):  # Hydra fails on it
            files = (CONF / group).rglob("*.yaml")
            names = ", ".join(sorted(str(file.relative_to(CONF / group).with_suffix("")) for file in files))
            raise ValueError(f"{group} is the name of a choice: type {group}=NAME, of {names}")
    places = {key: str(given[key]) for key in ("hydra.run.dir", "hydra.sweep.dir") if key in given}
    for option, value in (places or {"hydra.run.dir": "outputs"}).items():
        folder = Path(value.split("${")[0])
        if folder.parts[:1] == ("~",):
            raise ValueError(f"{option}={value}: type $HOME in place of ~, which Hydra takes for the name of a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"the output folder {folder} cannot be written ({error.strerror}): choose another with {option}=DIR"
            ) from error


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Defaults list is missing `_self_`")
    asked = get_args_parser().parse_args()
    try:
        check(asked)
    except ValueError as error:
        sys.exit(f"[ERROR] {error}")
    try:
        main()
    except KeyboardInterrupt:
        print("stopped: the same command goes on where this one was", file=sys.stderr)
        sys.exit(130)  # as shells say of what Ctrl-C ended
    except SystemExit as stop:  # Hydra could not compose the config, and said so
        if stop.code == 1 and not outcome.DONE and not outcome.FAILED:
            print(hint(asked), file=sys.stderr)
        raise
    finally:
        outcome.finish()
    sys.exit(1 if outcome.FAILED else 0)
