"""The whole flow on one screen: problems -> traces -> graded -> calibration -> pruned -> scores."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ssgr import keys, tables
from ssgr.allocation import Allocation
from ssgr.calib import Material, Source
from ssgr.grader import Grader
from ssgr.graph import Planned
from ssgr.measure import Measure
from ssgr.model import Model, gguf
from ssgr.problems import Problems, Split
from ssgr.problems.decontaminate import Decontaminate, Hit
from ssgr.pruner import Pruner, Statistic
from ssgr.records import (
    MANY_CUT,
    BenchResult,
    CalibrationSet,
    Problem,
    PruneResult,
    Reading,
    RunResult,
    Score,
    StageRun,
    Trace,
    to_json,
)
from ssgr.sampler import Decoding, Sampler
from ssgr.scope import Scope
from ssgr.select import Budget, Policy
from ssgr.sparsity import Sparsity
from ssgr.stages import card, evaluate, grade, prune, sample, select, statistics
from ssgr.stages.export import Export
from ssgr.stages.plan import Memory
from ssgr.stages.prune import Passing
from ssgr.stages.ranks import Crew, Joined
from ssgr.stages.solve import Method
from ssgr.store import POLL_SECONDS, Artefact, Store

_log = logging.getLogger("ssgr")
LIBRARIES = ("ssgr", "torch", "transformers", "tokenizers", "safetensors", "numpy", "math-verify")


@dataclass(frozen=True)
class Experiment:
    """One cell of a grid: what every config group was set to."""

    model: Model
    problems: Problems
    sampler: Sampler
    decoding: Decoding
    grader: Grader
    calib: Source
    policy: Policy
    scope: Scope
    budget: Budget
    pruner: Pruner
    sparsity: Sparsity
    allocation: Allocation
    bench: evaluate.Bench | Measure | evaluate.Suite
    memory: Memory
    passing: Passing = Passing()  # noqa: RUF009 - it is frozen
    statistic: Statistic = "gram"
    export: Export = Export()  # noqa: RUF009 - it is frozen
    decontaminate: Decontaminate = Decontaminate()  # noqa: RUF009 - it is frozen
    shard: str | None = None

    def __post_init__(self) -> None:
        if self.shard is not None:
            _part(self.shard)
        if self.statistic not in ("norm", "gram"):
            raise ValueError(f"collect.statistic={self.statistic!r}: valid choices are norm, gram")
        if self.passing.propagate == "dense" and (self.pruner.statistic, self.statistic) == ("gram", "norm"):
            raise ValueError(f"collect.statistic=norm: pruner={self.pruner.name} needs Gram matrices; type gram")
        for bench in self.sampled_benches:
            if not bench.engine.runs_model:
                raise ValueError(
                    f"bench.engine={type(bench.engine).__name__} does not run the model that it is given, so the dense and the "
                    "pruned model would get the same answers: type bench.engine._target_=ssgr.sampler.hf.HfSampler"
                )
        if self.pruner.statistic == "gradient":
            if self.passing.propagate == "dense":
                raise ValueError(
                    f"propagate=dense: pruner={self.pruner.name} needs gradients, which are not mixed after collection: type "
                    "propagate=pruned"
                )
            if self.allocation.needs == "scores":
                raise ValueError(
                    f"allocation={self.allocation.name} needs the scores of the dense model, and those of "
                    f"pruner={self.pruner.name} are known as its rows pass: type allocation=uniform, or owl"
                )

    @property
    def benches(self) -> list[evaluate.Bench | Measure]:
        """The benchmarks that the model is tried on."""
        return evaluate.members(self.bench)

    @property
    def sampled_benches(self) -> list[evaluate.Bench]:
        """Those that attempt problems, also as the text of a measure."""
        some = [one if isinstance(one, evaluate.Bench) else one.traces for one in self.benches]
        return [one for one in some if one is not None]

    @property
    def collects(self) -> Statistic:
        """The statistic of the dense model that is wanted beside, or instead of, those of the pruned blocks."""
        if self.passing.propagate == "dense" and self.pruner.statistic != "none":
            return self.statistic
        return {"nothing": "none", "norms": "norm", "scores": self.pruner.statistic}[self.allocation.needs]  # type: ignore[return-value]


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


def result(done: Mapping[str, Artefact], benches: Sequence[str], config: dict[str, Any]) -> RunResult:
    """What came out of a cell whose stages are `done`, by their names."""
    return RunResult(
        config=config,
        keys={name: artefact.key for name, artefact in done.items()},
        versions=_versions(),
        stages={name: artefact.run for name, artefact in done.items()},
        calibration=json.loads((done["select"].path / select.SUMMARY).read_text()),
        prune=_read_prune(done["prune"]),
        scores={name: _compared(done[f"evaluate_dense.{name}"], done[f"evaluate_pruned.{name}"]) for name in benches},
    )


def _opened(experiment: Experiment, store: Store, parts: int = 1) -> _Flow:
    """The flow of an experiment that is checked as far as it can be before hours of sampling."""
    model, converted = gguf.stored(experiment.model, store)
    skeleton = model.skeleton()
    prune.check(skeleton, experiment.pruner, experiment.sparsity)
    budget = _within_context(experiment.budget, skeleton)
    flow = _Flow(dataclasses.replace(experiment, model=model, budget=budget), store, gguf.record(converted), parts)
    if converted:
        flow.done["convert"] = converted
        flow.planned.append(Planned("convert", converted.stage, converted.key, ()))
    return flow


def sample_shard(experiment: Experiment, store: Store) -> int:
    """Sample this job's part of what the dense model is to answer, and return the number of traces.

    The same command without `shard` takes the parts that are there, and samples what is missing.

    Raises:
        ValueError: a setting cannot work; the message says which and what to type next.
    """
    x = dataclasses.replace(experiment, model=gguf.stored(experiment.model, store)[0])
    flow = _Flow(x, store)
    parts = []
    if x.calib.needs == "traces":
        parts.append(flow.sampled("sample", x.problems, "calibration", x.sampler, x.decoding, None)[0])
    for bench in x.sampled_benches:
        on = bench.problems or x.problems
        parts.append(flow.sampled(f"sample_dense.{bench.name}", on, "test", bench.engine, bench.decoding, None)[0])
    return sum(len(tables.read_traces(part.path / sample.TRACES)) for part in parts)


def _part(shard: str) -> slice:
    """Which of the problems the job `shard` samples, such as 2/8."""
    found = re.fullmatch(r"(\d+)/(\d+)", str(shard))
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"shard={shard}: give the number of a part and how many there are, 1/8 to 8/8")
    return slice(int(found[1]) - 1, None, int(found[2]))


def _within_context(budget: Budget, model: PreTrainedModel) -> Budget:
    """`budget` with rows no longer than the model's context: past it the model was never trained."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not context or budget.max_row_tokens <= context:
        return budget
    _log.warning("budget.max_row_tokens=%d is cut to the model's context of %d", budget.max_row_tokens, context)
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

    def __init__(self, store: Store, left: list[str], flow: _Flow, done: Callable[[Artefact], None]) -> None:
        super().__init__(store.root)
        self.store, self.left, self.flow, self.done = store, left, flow, done

    def run(self, stage: str, key: str, make: Callable[[Path], None], **manifest: Any) -> Artefact:
        if key not in self.left:
            return super().run(stage, key, make)
        own = self.flow.planned[-1]
        for one in self.flow.planned:
            if one.key in own.needs and self.store.find(one.stage, one.key, checksums=True) is None:
                raise ValueError(
                    f"{own.name} needs {one.name}, and the store has no {one.stage}/{one.key}: it failed or did not run; give "
                    "the command of the sweep again"
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


class _Flow:
    """The stages of one experiment; `done` collects their artefacts by name."""

    def __init__(
        self, experiment: Experiment, store: Store, converted: dict[str, Any] | None = None, parts: int = 1
    ) -> None:
        self.x, self.store, self.converted, self.parts = experiment, store, converted, parts
        self.shelf: Store | _Blank = store
        self.done: dict[str, Artefact] = {}
        self.planned: list[Planned] = []

    def walk(self) -> None:
        """Every stage, each after what it needs."""
        for bench in self.x.benches:
            self.evaluated("dense", bench, None)
        pruned = self.pruned(self.selected())
        for bench in self.x.benches:
            self.evaluated("pruned", bench, pruned)

    @cached_property
    def tokenizer(self) -> Any:
        return self.x.model.tokenizer()

    def prompt_ids(self, question: str) -> tuple[int, ...]:
        return self.x.model.prompt_ids(self.tokenizer, question)

    def _stage(
        self,
        name: str,
        stage: str,
        version_: int,
        config: object,
        inputs: dict[str, str],
        make: Callable[[Path], None],
        parts: Sequence[str] = (),
    ) -> Artefact:
        """A stage that reads `inputs`, and if it is made of `parts`, those."""
        key = keys.key(stage, version_, config, inputs)
        self.planned.append(Planned(name, stage, key, (*inputs.values(), *parts)))
        self.done[name] = artefact = self.shelf.run(stage, key, make, config=config, inputs=inputs)
        return artefact

    def sampled(
        self, name: str, problems: Problems, split: Split, engine: Sampler, decoding: Decoding, pruned: Artefact | None
    ) -> tuple[Artefact, list[Problem]]:
        """Traces of the dense model (`pruned` is None) or of a pruned one."""
        model, read = self.x.model, problems.read(split)
        asked = [(problem.id, problem.question) for problem in read]
        whole = {"model": model, "problems": keys.digest(asked), "sampler": engine, "decoding": decoding}
        inputs = {"prune": pruned.key} if pruned else {}

        def stage(shard: str | None, parts: Sequence[str] = ()) -> Artefact:
            config = whole if shard is None else {**whole, "shard": shard}

            def make(work: Path) -> None:
                earlier = lambda: self._earlier(config, inputs)
                asked = read if shard is None else read[_part(shard)]
                how = (asked, engine, decoding, work, name, earlier)
                sample.sample(self._at(pruned), self.tokenizer, self.prompt_ids, *how)

            called = name if shard is None else f"{name} {shard}"
            return self._stage(called, "sample", sample.VERSION, config, inputs, make, parts)

        if self.x.shard is not None:
            return stage(self.x.shard), read[_part(self.x.shard)]
        count = min(self.parts, len(read))
        parts = [stage(f"{i + 1}/{count}").key for i in range(count)] if count > 1 else []
        return stage(None, parts), read

    def _earlier(self, config: dict[str, Any], inputs: dict[str, str]) -> Iterator[Trace]:
        """Traces that were sampled alike, but for their cap and their number, or as a part."""

        def bare(described: Any) -> Any:
            decoding = {k: v for k, v in described["decoding"].items() if k not in ("attempts", "max_new_tokens")}
            return {**described, "decoding": decoding, "shard": None}

        wanted = bare(keys.describe(config))
        for folder, found in self.store.alike("sample", inputs):
            current = folder.name == keys.key("sample", sample.VERSION, found, inputs)  # not of older code
            if current and bare(found) == wanted:
                yield from tables.read_traces(folder / sample.TRACES)

    def graded(self, name: str, sampled: Artefact, problems: list[Problem], grader: Grader) -> Artefact:
        def make(work: Path) -> None:
            traces = tables.read_traces(sampled.path / sample.TRACES)
            graded = grade.grade(traces, problems, self.tokenizer, grader, self.x.model.thinking)
            tables.write_graded(work / grade.GRADED, graded)

        answers = [(problem.id, problem.answer, problem.level) for problem in problems]
        config = {"grader": grader, "answers": keys.digest(answers), "thinking": self.x.model.thinking}
        return self._stage(name, "grade", grade.VERSION, config, {"sample": sampled.key}, make)

    def selected(self) -> Artefact:
        """The calibration set; traces are sampled and graded only if the source needs them."""
        x, needs = self.x, self.x.calib.needs
        inputs: dict[str, str] = {}
        problems: list[Problem] = []
        graded: Artefact | None = None
        if needs == "traces":
            sampled, problems = self.sampled("sample", x.problems, "calibration", x.sampler, x.decoding, None)
            graded = self.graded("grade", sampled, problems, x.grader)
            inputs["grade"] = graded.key
        elif needs == "problems":
            problems = x.problems.read("calibration")
        hits = self._hits(problems)
        gone = {hit.id for hit in hits}
        clean = [problem for problem in problems if problem.id not in gone]
        uses = x.calib.uses
        config = {
            "source": x.calib,
            "model": x.model,
            "problems": keys.digest([dataclasses.replace(p, source="") for p in clean])
            if needs == "problems"
            else None,
            "thinking": x.model.thinking if needs == "problems" else None,
            "policy": x.policy if {"difficulty", "length"} & uses else None,
            "budget": x.budget,
        }
        if gone and needs == "traces":
            config["contaminated"] = sorted(gone)

        def make(work: Path) -> None:
            traces = tables.read_graded(graded.path / grade.GRADED) if graded else []
            material = Material(
                self.tokenizer,
                self.prompt_ids,
                clean,
                [one for one in traces if one.trace.problem_id not in gone],
                x.budget.tokens or (x.budget.rows or 0) * x.budget.max_row_tokens,
                x.budget.max_row_tokens,
                x.model.thinking,
            )
            chosen = select.select(x.calib, material, x.policy, x.budget)
            if problems:
                counted = (("problems", len(problems)), ("not in the benchmark", len(clean)))
                chosen = dataclasses.replace(chosen, funnel=(*counted, *chosen.funnel))
                (work / select.CONTAMINATED).write_text(json.dumps([to_json(hit) for hit in hits], indent=1))
            tables.write_rows(work / select.ROWS, chosen)
            (work / select.SUMMARY).write_text(json.dumps(chosen.summary(), indent=1))

        return self._stage("select", "select", select.VERSION, config, inputs, make)

    def _hits(self, problems: list[Problem]) -> list[Hit]:
        """The calibration problems that are those of the benchmark."""
        x = self.x
        if not problems:
            return []
        hits: list[Hit] = []
        for bench in x.sampled_benches:
            found = x.decontaminate.hits(problems, (bench.problems or x.problems).read("test"))
            if found:
                _log.warning(
                    "%d of %d calibration problems are in the benchmark and are left out, the first is %s (%s of %s: %s)",
                    len(found), len(problems), found[0].id, found[0].benchmark_id, bench.name, found[0].why,
                )  # fmt: skip
            seen = {hit.id for hit in hits}
            hits += [hit for hit in found if hit.id not in seen]
        if len(hits) == len(problems):
            raise ValueError(
                f"all {len(problems)} calibration problems are in the benchmark {x.bench.name}; choose another bench, other "
                "problems, or type decontaminate.enabled=false"
            )
        return hits

    def collected(self, chosen: Artefact) -> Artefact | None:
        """The statistics of the dense model, if anything wants them: of all streams, whatever the mixture and sparsity."""
        x, statistic = self.x, self.x.collects
        if statistic == "none":
            return None

        def make(work: Path) -> None:
            statistics.collect(x.model, self.tokenizer, _calibration(chosen), statistic, x.memory, work)

        config = {"model": x.model, "statistic": statistic}
        return self._stage("collect", "collect", statistics.VERSION, config, {"select": chosen.key}, make)

    def pruned(self, chosen: Artefact) -> Artefact:
        """The pruned checkpoint; what needs no statistics does not depend on the calibration."""
        x = self.x
        collected = self.collected(chosen)
        blind = x.pruner.statistic == "none"
        listens = x.pruner.statistic != "none" and x.passing.propagate == "pruned"
        inputs = {"select": chosen.key} if listens else {}
        inputs |= {"collect": collected.key} if collected else {}
        config = {
            "model": x.model,
            "pruner": x.pruner,
            "sparsity": x.sparsity,
            "allocation": x.allocation,
            "passing": x.passing if x.pruner.statistic != "none" else None,
            "scope": x.scope if inputs and "scope" in x.calib.uses else None,
        }

        def make(work: Path) -> None:
            calibration = _calibration(chosen) if listens else None
            method = Method(x.pruner, x.sparsity, x.allocation, x.scope)
            dense = collected.path if collected else None
            how = (x.memory, work, x.passing, dense)
            result = prune.prune(x.model, self.tokenizer, calibration, method, *how)
            (work / prune.RESULT).write_text(json.dumps(to_json(result), indent=1))
            own = {**inputs, "prune": keys.key("prune", prune.VERSION, config, inputs)}
            self._write_card(work / prune.CHECKPOINT, result, config, None if blind else _calibration(chosen), own)
            prune.finish(work)

        return self._stage("prune", "prune", prune.VERSION, config, inputs, make)

    def _write_card(
        self,
        checkpoint: Path,
        result: PruneResult,
        config: dict[str, Any],
        rows: CalibrationSet | None,
        keys_: dict[str, str],
    ) -> None:
        x = self.x
        told = ("pruner", "sparsity", "allocation", "scope", "passing")
        settings = {name: keys.describe(config[name]) for name in told}
        found = card.provenance(x.model, to_json(result), settings, rows, keys_, _versions(), self.converted)
        card.write(checkpoint, found, x.model.files())

    def evaluated(self, name: str, bench: evaluate.Bench | Measure, pruned: Artefact | None) -> Artefact:
        """What the dense or the pruned model is worth on a benchmark."""
        if not isinstance(bench, evaluate.Bench):
            return self._measured(name, bench, pruned)
        problems = bench.problems or self.x.problems
        at = f"{name}.{bench.name}"
        sampled, read = self.sampled(f"sample_{at}", problems, "test", bench.engine, bench.decoding, pruned)
        graded = self.graded(f"grade_{at}", sampled, read, bench.grader or self.x.grader)

        def make(work: Path) -> None:
            each = tables.read_graded(graded.path / grade.GRADED)
            attempts = evaluate.outcomes(each)
            tables.write_outcomes(work / evaluate.OUTCOMES, attempts)
            tables.write_texts(work / evaluate.TEXTS, evaluate.texts(each, read, self.tokenizer))
            found = evaluate.score(bench.name, attempts, sample.seconds(sampled.path))
            (work / evaluate.SCORE).write_text(json.dumps(to_json(found), indent=1))

        config = {"bench": bench.name}
        out = self._stage(f"evaluate_{at}", "evaluate", evaluate.VERSION, config, {"grade": graded.key}, make)
        if self.shelf is not self.store:  # a plan
            return out
        score = read_score(out)
        if isinstance(score, Score) and score.truncated > MANY_CUT:
            _log.warning(
                "bench=%s: %.1f %% of the answers of the %s model were cut at %d tokens and count as wrong unless they are right "
                "already; type a larger bench.decoding.max_new_tokens",
                bench.name, 100 * score.truncated, name, bench.decoding.max_new_tokens,
            )  # fmt: skip
        return out

    def _measured(self, name: str, measure: Measure, pruned: Artefact | None) -> Artefact:
        """What a measure finds, on traces of the dense model where it asks for them."""
        inputs = {"prune": pruned.key} if pruned else {}
        traces: Artefact | None = None
        if (bench := measure.traces) is not None:
            on = bench.problems or self.x.problems
            at = f"sample_dense.{measure.name}"
            traces, _ = self.sampled(at, on, "test", bench.engine, bench.decoding, None)
            inputs["sample"] = traces.key

        def make(work: Path) -> None:
            saved = tables.read_traces(traces.path / sample.TRACES) if traces else []
            start = time.perf_counter()
            items = measure.measure(self._at(pruned), self.tokenizer, saved)
            tables.write_items(work / evaluate.OUTCOMES, items)
            found = evaluate.reading(measure, items, time.perf_counter() - start)
            (work / evaluate.SCORE).write_text(json.dumps(to_json(found), indent=1))

        config = {"measure": measure, "model": self.x.model}
        return self._stage(f"evaluate_{name}.{measure.name}", "evaluate", evaluate.VERSION, config, inputs, make)

    def _at(self, pruned: Artefact | None) -> Model:
        """The dense model, or the pruned one."""
        model = self.x.model
        return model if pruned is None else dataclasses.replace(model, path=str(pruned.path / prune.CHECKPOINT))


def _calibration(chosen: Artefact) -> CalibrationSet:
    rows, held_out = tables.read_rows(chosen.path / select.ROWS)
    summary = json.loads((chosen.path / select.SUMMARY).read_text())
    funnel = tuple((name, count) for name, count in summary["funnel"])
    weights = tuple((1.0,) * len(row) for row in rows)
    asked = summary["tokens"]["asked"]
    return CalibrationSet(summary["source"], rows, weights, funnel, asked, summary["parts"], held_out)


def _read_prune(pruned: Artefact) -> PruneResult:
    checkpoint = str((pruned.path / prune.CHECKPOINT).resolve())
    return dataclasses.replace(prune.read(pruned.path / prune.RESULT), checkpoint=checkpoint)


def read_score(evaluated: Artefact) -> Score | Reading:
    """What an evaluate artefact found."""
    found = json.loads((evaluated.path / evaluate.SCORE).read_text())
    kind: type[Score] | type[Reading] = Score if "attempts" in found else Reading
    return kind(**{**found, "ci95": tuple(found["ci95"])})


def _compared(dense: Artefact, pruned: Artefact) -> BenchResult:
    one, other = read_score(dense), read_score(pruned)
    files = (pruned.path / evaluate.OUTCOMES, dense.path / evaluate.OUTCOMES)
    if isinstance(one, Score):
        gap = evaluate.difference(*map(tables.read_outcomes, files))
    else:
        gap = evaluate.item_difference(*map(tables.read_items, files))
    return BenchResult(one, other, *gap)


def write(result: RunResult, store: Store, folder: Path) -> None:
    """Write `folder`/result.json, with links to what is large and a copy of the outcomes beside it."""
    links = {
        folder / "checkpoint": Path(result.prune.checkpoint),
        folder / "calibration.parquet": store.root / "select" / result.keys["select"] / select.ROWS,
    }
    small: dict[Path, Path] = {}  # copied, so that the tables outlive the store
    for bench, which in product(result.scores, ("dense", "pruned")):
        at = store.root / "evaluate" / result.keys[f"evaluate_{which}.{bench}"]
        small[tables.outcomes_file(folder, bench, which)] = at / evaluate.OUTCOMES
        if (at / evaluate.TEXTS).exists():
            links[tables.outcomes_file(folder, bench, which, "texts")] = at / evaluate.TEXTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for link, target in links.items():
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(target.resolve())
        for copy, source in small.items():
            copy.parent.mkdir(exist_ok=True)
            copy.unlink(missing_ok=True)
            shutil.copyfile(source, copy)
        beside = folder / "result.json.tmp"
        beside.write_text(json.dumps(to_json(result), indent=1, default=str))
        beside.rename(folder / "result.json")
    except OSError as error:
        raise ValueError(
            f"the output folder {folder} cannot be written ({error.strerror}): type hydra.run.dir=DIR"
        ) from error


def _versions() -> dict[str, str]:
    out = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out
