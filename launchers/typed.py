"""What is typed after run.py: looked at before Hydra reads it, and explained where Hydra cannot compose it."""

from __future__ import annotations

import difflib
import tempfile
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).parent.parent / "conf"
_ROOM = 1 << 16  # bytes: the copies of the config that Hydra writes before anything is run


def check(asked: Namespace) -> None:
    """See that the output folder can be written, before Hydra fails on it with a traceback, and that one experiment is asked for.

    Raises:
        ValueError: it cannot, or several are; the message names it.
    """
    if asked.multirun and asked.cfg:  # Hydra fails on it
        raise ValueError("--cfg shows the config of one cell: leave out -m, and give each option one value")
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
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(_ROOM))
        except OSError as error:
            raise ValueError(
                f"the output folder {folder} cannot be written ({error.strerror}): choose another with {option}=DIR"
            ) from error


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
        names = {str(name) for file in files for name in OmegaConf.load(file)}
        if not rest:
            names |= {path.name for path in CONF.iterdir() if path.is_dir()}
        elif not files:
            names = set(OmegaConf.select(OmegaConf.load(CONF / "config.yaml"), group) or ())
        names -= {"defaults", "_target_", "hydra"}
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
    if not any(f"{key.rpartition('.')[2]}:" in file.read_text() for file in CONF.rglob("*.yaml")):
        return []  # as what is mistyped, for which nothing needs to be composed
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
