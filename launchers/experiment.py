"""The experiment that a composed configuration describes."""

from __future__ import annotations

from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssgr import tracker
from ssgr.experiment import Experiment
from ssgr.select import Policy
from ssgr.stages.prune import Passing


def build(cfg: DictConfig) -> Experiment:
    """The experiment that `cfg` describes.

    Raises:
        ValueError: a setting has no valid value; the message names it.
    """

    def make(node: str) -> Any:
        try:
            return hydra.utils.instantiate(OmegaConf.select(cfg, node), _convert_="all")
        except InstantiationException as error:
            cause = error.__cause__
            if isinstance(cause, TypeError):  # a key that the chosen class does not take
                raise ValueError(f"{node}: {cause}; leave it out, or see conf/{node.split('.')[0]}") from error
            raise ValueError(str(cause or error)) from error
        except OmegaConfBaseException as error:
            raise ValueError(f"{error.full_key or node}: {error.msg or error}") from error

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
