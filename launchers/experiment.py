"""The experiment that a composed configuration describes."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ssgr import tracker
from ssgr.experiment import Experiment
from ssgr.select import Policy
from ssgr.stages.prune import Passing
from ssgr.store import Store

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number (without a point or exponent)"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a text (a number in quotes)"),
    "None": ((type(None),), "null"),
    "tuple[int, ...]": ((list,), "a list of whole numbers, such as [1,2]"),
    "tuple[str, ...]": ((list,), "a list of texts, such as [a,b]"),
}
_GROUPS = ("grader", "problems")  # of which a benchmark has its own
# Never null, nor a word:
_NODES = (".engine", ".decoding", ".columns", ".parts", ".options", ".thinking", "model.chat", "scope.bins", ".benches")


def build(cfg: DictConfig) -> Experiment:
    """The experiment that `cfg` describes.

    Raises:
        ValueError: a setting has no valid value; the message names it.
    """

    def make(node: str) -> Any:
        config = OmegaConf.select(cfg, node)
        if not isinstance(config, DictConfig):
            raise _no_node(node, config)
        try:
            made = hydra.utils.instantiate(config, _convert_="all")
        except InstantiationException as error:
            cause = error.__cause__
            if isinstance(cause, TypeError | AttributeError):
                _check(node, OmegaConf.to_container(config, resolve=True))
                # Else a key that the chosen class does not take:
                raise ValueError(f"{node}: {cause}; leave it out, or see conf/{node.split('.')[0]}") from error
            raise ValueError(str(cause or error)) from error
        except MissingMandatoryValue as error:
            raise ValueError(f"{error.full_key} has no value; type {error.full_key}=VALUE") from error
        except OmegaConfBaseException as error:
            raise ValueError(f"{error.full_key or node}: {error.msg or error}") from error
        _check(node, OmegaConf.to_container(config, resolve=True))
        return made

    for node in ("select", "collect"):
        if not isinstance(cfg[node], DictConfig):
            raise _no_node(node, cfg[node])
    chosen = OmegaConf.select(cfg, "tracker")  # it is not part of the experiment, and is refused before hours of work
    tracker.build(OmegaConf.to_container(chosen, resolve=True) if chosen is not None else None)  # type: ignore[arg-type]
    return Experiment(
        model=make("model"),
        problems=make("problems"),
        sampler=make("sampler.engine"),
        decoding=make("sampler.decoding"),
        grader=make("grader"),
        calib=make("calib"),
        policy=Policy(
            make("difficulty"), make("length"), cfg.select.balance, make("bins") if "_target_" in cfg.bins else None
        ),
        scope=make("scope"),
        budget=make("budget"),
        pruner=make("pruner"),
        sparsity=make("sparsity"),
        allocation=make("allocation"),
        bench=make("bench"),
        memory=make("memory"),
        passing=Passing(cfg.propagate, cfg.order),
        statistic=cfg.collect.statistic,
        export=make("export"),
        decontaminate=make("decontaminate"),
        shard=cfg.shard,
    )


def store_of(cfg: DictConfig) -> Store:
    """The store that `cfg` names.

    Raises:
        ValueError: it names none.
    """
    if not isinstance(cfg.store, DictConfig):
        raise _no_node("store", cfg.store)
    if not cfg.store.path or not isinstance(cfg.store.path, str):
        raise ValueError(f"store.path={cfg.store.path}: give the name of a folder (a number in quotes)")
    return Store(Path(cfg.store.path))


def _no_node(node: str, config: Any) -> ValueError:
    return ValueError(f"{node}={config}: it has settings of its own; leave it out, or type {node}.SETTING=VALUE")


def _check(node: str, config: Any) -> None:
    """See that each setting is of the kind that its class says: to Hydra `no` and `off` are words, and a word counts as true.

    Raises:
        ValueError: one is not; the message names it.
    """
    if not isinstance(config, dict):
        return
    chosen = hydra.utils.get_object(config["_target_"]) if "_target_" in config else None
    kinds = {one.name: str(one.type).split(" | ") for one in fields(chosen)} if is_dataclass(chosen) else {}
    for name, value in config.items():
        at = f"{node}.{name}"
        _check(at, value)
        if name in _GROUPS and not isinstance(value, dict | None):
            raise ValueError(f"{at}={value}: {name} is a group of settings; type +{name}@{at}={value}")
        if at == "pruner.base" and not isinstance(value, dict):
            raise ValueError(
                f"{at}={value}: it is a pruner; type pruner@{at}={value if isinstance(value, str) else 'wanda'}"
            )
        if node == "bench.benches" and not isinstance(value, dict):
            raise ValueError(f"{at}={value}: it is a benchmark with settings of its own; type ~{at} to leave it out")
        if at.endswith(_NODES) and not isinstance(value, dict):
            raise _no_node(at, value)
        if value == "???" or not all(kind in _KINDS for kind in kinds.get(name, ["unknown"])):
            continue  # Hydra tells of what is missing, and the class looks at other kinds
        if not any(_fits(value, kind) for kind in kinds[name]):
            raise ValueError(f"{at}={value}: give {' or '.join(_KINDS[kind][1] for kind in kinds[name])}")


def _fits(value: Any, kind: str) -> bool:
    """Whether a setting is of a kind; of a list, whether each of its members is."""
    of = kind.removeprefix("tuple[").partition(",")[0]
    return type(value) in _KINDS[kind][0] and (of == kind or all(_fits(one, of) for one in value))
