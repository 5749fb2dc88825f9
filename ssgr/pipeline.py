"""Run a cell, plan its stages, or make some of them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssgr.experiment import Experiment
from ssgr.flow import Flow
from ssgr.graph import Planned
from ssgr.loadable import context_of
from ssgr.model import gguf
from ssgr.records import RunResult, StageRun
from ssgr.results import result
from ssgr.select import Budget
from ssgr.stages import evaluate, prune, select
from ssgr.stages.ranks import Crew, Joined
from ssgr.store import POLL_SECONDS, Artefact, Store

_log = logging.getLogger("ssgr")


def run(experiment: Experiment, store: Store, config: dict[str, Any] | None = None) -> RunResult:
    """Run one cell; whatever the store already holds is read from it.

    Raises:
        ValueError: a setting cannot work; the message says which and what to type next.
    """
    flow = _opened(experiment, store)
    select.warn_unused(flow.x.calib, flow.x.policy, flow.x.scope)
    flow.walk()
    return result(flow.done, [bench.name for bench in flow.x.benches], config or {})


def plan(experiment: Experiment, store: Store, parts: int = 1) -> list[Planned]:
    """The stages of one cell in an order in which they can be made; nothing is made but a converted GGUF file.

    With `parts`, whatever is sampled is sampled in as many parts, each a stage that the whole needs.

    Raises:
        ValueError: a setting cannot work; the message says which and what to type next.
    """
    flow = _opened(experiment, store, parts)
    flow.shelf = _Blank(store.root)
    flow.walk()
    return flow.planned


def make(
    experiment: Experiment,
    store: Store,
    keys_: Sequence[str],
    parts: int = 1,
    done: Callable[[Artefact], None] = lambda _: None,
    crew: Crew | None = None,
) -> None:
    """Make the stages `keys_` of `plan(experiment, store, parts)`, in their order; all else that they need must be in the store.

    `done` hears of each that is there. Of the tasks of a `crew` the leader makes them, and the others lend it their ranks.

    Raises:
        ValueError: what one needs is not there, no stage of the cell has this key, or a setting cannot work.
    """
    if crew is not None:
        experiment = dataclasses.replace(experiment, memory=dataclasses.replace(experiment.memory, crew=crew))
    flow = _opened(experiment, store, parts)
    kind = _Only if experiment.memory.leads else _Lent
    flow.shelf = shelf = kind(store, list(keys_), flow, done)
    try:
        flow.walk()
    except _AllMade:
        return
    raise ValueError(
        f"no stage of this cell is called {shelf.left[0]} any more: the code, the model or the problems changed since it was "
        "planned; give the command of the sweep again"
    )


def sample_shard(experiment: Experiment, store: Store) -> tuple[dict[str, str], int]:
    """Sample this job's part of what the dense model is to answer; the keys of its stages by name, and how many traces they hold.

    The same command without `shard` takes the parts that are there, and samples what is missing.

    Raises:
        ValueError: a setting cannot work; the message says which and what to type next.
    """
    flow, traces = _opened(experiment, store), 0
    x = flow.x
    if x.calib.needs == "traces":
        _, read = flow.sampled("sample", x.problems, "calibration", x.sampler, x.decoding, None)
        traces += len(read) * x.decoding.attempts
    for bench in x.sampled_benches:
        name, on = f"sample_dense.{bench.name}", bench.asks(x.problems)
        _, read = flow.sampled(name, on, "test", bench.engine, bench.decoding, None)
        traces += len(read) * bench.decoding.attempts
    return {name: made.key for name, made in flow.done.items()}, traces


def _opened(experiment: Experiment, store: Store, parts: int = 1) -> Flow:
    """The flow of an experiment that is checked as far as it can be before hours of sampling."""
    model, converted = gguf.stored(experiment.model, store)
    skeleton = model.skeleton()
    prune.check(skeleton, experiment.pruner, experiment.sparsity, experiment.collects != "none")
    context = context_of(skeleton.config)
    for bench in experiment.benches:
        if not isinstance(bench, evaluate.Bench):
            bench.check(context)
    budget = _within_context(experiment.budget, context)
    flow = Flow(dataclasses.replace(experiment, model=model, budget=budget), store, gguf.record(converted), parts)
    _see_vocabulary(flow.tokenizer, skeleton)
    if converted:
        flow.done["convert"] = converted
        flow.planned.append(Planned("convert", converted.stage, converted.key, ()))
    return flow


def _see_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """See that the model has an embedding for every token; those that were added to a tokenizer may lie beyond and never come.

    Raises:
        ValueError: it has not.
    """
    known = len(next(model.get_input_embeddings().parameters()))
    if tokenizer.vocab_size > known:
        raise ValueError(
            f"model.path: its tokenizer has {tokenizer.vocab_size} tokens, and the model embeds {known}: they are of two models; "
            "put the model's own tokenizer files beside it"
        )


def _within_context(budget: Budget, context: int | None) -> Budget:
    """`budget` with rows no longer than the model's context: past it the model was never trained."""
    if not context or budget.max_row_tokens <= context:
        return budget
    _log.info("budget.max_row_tokens=%d is cut to the model's context of %d", budget.max_row_tokens, context)
    return dataclasses.replace(budget, max_row_tokens=context)


class _Blank:
    """A shelf on which nothing is made, for plans."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, stage: str, key: str, make: Callable[[Path], None], **_: object) -> Artefact:
        return Artefact(self.root / stage / key, key, stage, StageRun(0.0, False, 0.0))


class _AllMade(Exception):
    """Nothing is left to make."""


class _Only(_Blank):
    """A shelf on which only the stages `left` are made, of what must be there."""

    def __init__(self, store: Store, left: list[str], flow: Flow, done: Callable[[Artefact], None]) -> None:
        super().__init__(store.root)
        self.store, self.left, self.flow, self.done = store, left, flow, done

    def run(self, stage: str, key: str, make: Callable[[Path], None], **manifest: Any) -> Artefact:
        if key not in self.left:
            return super().run(stage, key, make)
        own = self.flow.planned[-1]
        for one in self.flow.planned:
            if one.key in own.needs and not self.store.sound(one.stage, one.key):
                raise ValueError(
                    f"{own.name} needs {one.name}, and the store has no sound {one.stage}/{one.key}: it failed, did not run "
                    "or was damaged; give the command of the sweep again"
                )
        artefact = self._made(stage, key, make, **manifest)
        self.done(artefact)
        self.left.remove(key)
        if not self.left:
            raise _AllMade
        return artefact

    def _made(self, stage: str, key: str, make: Callable[[Path], None], **manifest: Any) -> Artefact:
        return self.store.run(stage, key, make, **manifest)


class _Lent(_Only):
    """A shelf of a task that lends its ranks to the leader of its crew, which makes the stages."""

    def _made(self, stage: str, key: str, make: Callable[[Path], None], **_: Any) -> Artefact:
        crew, joined = self.flow.x.memory.crew, None
        assert crew is not None
        while (found := self.store.find(stage, key)) is None:
            invited = crew.invited()
            if invited is not None and invited != joined and key in Path(invited["work"]).name:
                joined = invited
                with contextlib.suppress(Joined):
                    make(Path(invited["work"]))
            time.sleep(POLL_SECONDS[0])
        return found
