"""The whole flow: problems -> traces -> graded -> calibration -> pruned -> scores, a method a stage."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ssgr import keys, tables
from ssgr.calib import Material
from ssgr.experiment import Experiment, part
from ssgr.grader import Grader
from ssgr.graph import Planned
from ssgr.measure import Measure
from ssgr.model import Model
from ssgr.problems import Problems, Split
from ssgr.problems.decontaminate import Hit
from ssgr.records import (
    MANY_CUT,
    CalibrationSet,
    Problem,
    PruneResult,
    Score,
    Trace,
    to_json,
)
from ssgr.results import read_score, versions
from ssgr.sampler import Decoding, Sampler
from ssgr.stages import card, evaluate, grade, heap, prune, sample, select, statistics
from ssgr.stages.pruned import CHECKPOINT, RESULT
from ssgr.stages.solve import Method
from ssgr.store import Artefact, Store

_log = logging.getLogger("ssgr")


class Shelf(Protocol):
    """Where the result of a stage is found, or made: the store, or one that only plans."""

    def run(
        self, stage: str, key: str, make: Callable[[Path], None], *, config: object, inputs: dict[str, str]
    ) -> Artefact:
        """The result of `stage` under `key`."""
        ...


class Flow:
    """The stages of one experiment; `done` collects their artefacts by name."""

    def __init__(
        self, experiment: Experiment, store: Store, converted: dict[str, Any] | None = None, parts: int = 1
    ) -> None:
        self.x, self.store, self.converted, self.parts = experiment, store, converted, parts
        self.shelf: Shelf = store
        self.done: dict[str, Artefact] = {}
        self.planned: list[Planned] = []
        self._read: list[tuple[Problems, Split, list[Problem]]] = []

    def walk(self) -> None:
        """Every stage, each after what it needs."""
        chosen = self.selected()  # first, as it is what most often fails: on filters, bins and budgets
        for bench in self.x.benches:
            self.evaluated("dense", bench, None)
        pruned = self.pruned(chosen)
        for bench in self.x.benches:
            self.evaluated("pruned", bench, pruned)

    @cached_property
    def tokenizer(self) -> Any:
        return self.x.model.tokenizer()

    def problems(self, source: Problems, split: Split) -> list[Problem]:
        """The problems of a split, which are read once."""
        for known, of, read in self._read:
            if (known, of) == (source, split):
                return read
        self._read.append((source, split, source.read(split)))
        return self._read[-1][-1]

    def prompt_ids(self, question: str) -> tuple[int, ...]:
        return self.x.model.prompt_ids(self.tokenizer, question)

    def _stage(
        self,
        name: str,
        stage: str,
        version_: int,
        config: dict[str, Any],
        inputs: dict[str, str],
        make: Callable[[Path], None],
        parts: Sequence[str] = (),
    ) -> Artefact:
        """A stage that reads `inputs`, and if it is made of `parts`, those.

        Raises:
            ValueError: a file that its key was made of is no longer what it was.
        """
        known = {k: keys.describe(v) for k, v in config.items()}
        key = keys.key(stage, version_, known, inputs)
        self.planned.append(Planned(name, stage, key, (*inputs.values(), *parts)))

        def check() -> None:
            now = {k: keys.describe(v.again() if isinstance(v, Model) else v) for k, v in config.items()}
            if changed := " and ".join(k for k, v in now.items() if v != known[k]):
                raise ValueError(
                    f"{name}: files of the {changed} changed since this run began, and nothing is made of old and new ones; "
                    "give the command again"
                )

        def checked(work: Path) -> None:
            check()
            make(work)
            try:
                check()
            except ValueError:
                shutil.rmtree(work)  # or the next attempt would go on with it
                raise

        self.done[name] = artefact = self.shelf.run(stage, key, checked, config=known, inputs=inputs)
        return artefact

    def sampled(
        self, name: str, problems: Problems, split: Split, engine: Sampler, decoding: Decoding, pruned: Artefact | None
    ) -> tuple[Artefact, list[Problem]]:
        """Traces of the dense model (`pruned` is None) or of a pruned one."""
        model, read = self.x.model, self.problems(problems, split)
        asked = [(problem.id, problem.question) for problem in read]
        whole = {"model": model, "problems": keys.digest(asked), "sampler": engine, "decoding": decoding}
        inputs = {"prune": pruned.key} if pruned else {}

        def stage(shard: str | None, parts: Sequence[str] = ()) -> Artefact:
            config = whole if shard is None else {**whole, "shard": shard}

            def make(work: Path) -> None:
                earlier = lambda: self._earlier(config, inputs) if engine.draws else ()
                asked = read if shard is None else read[part(shard)]
                how = (asked, engine, decoding, work, name, earlier)
                sample.sample(self._at(pruned), self.tokenizer, self.prompt_ids, *how)

            called = name if shard is None else f"{name} {shard}"
            return self._stage(called, "sample", sample.VERSION, config, inputs, make, parts)

        if self.x.shard is not None:
            return stage(self.x.shard), read[part(self.x.shard)]
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
        problems = self.problems(x.problems, "calibration") if needs in ("traces", "problems") else []
        hits = self._hits(problems)  # before hours of sampling: what cannot be read, or leaves nothing, is told at once
        graded: Artefact | None = None
        if needs == "traces":
            if x.policy.balance == "level" and all(problem.level is None for problem in problems):
                raise ValueError(
                    "select.balance=level: these problems have no level; name its column with problems.columns.level=COLUMN"
                )
            sampled, _ = self.sampled("sample", x.problems, "calibration", x.sampler, x.decoding, None)
            graded = self.graded("grade", sampled, problems, x.grader)
            inputs["grade"] = graded.key
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
            traces = tables.read_graded(graded.path / grade.GRADED, ids=False) if graded else []
            material = Material(
                self.tokenizer,
                self.prompt_ids,
                clean,
                [one for one in traces if one.trace.problem_id not in gone],
                x.budget,
                x.model.thinking,
            )
            chosen = select.select(x.calib, material, x.policy, x.budget)
            if graded:
                chosen = tables.with_ids(chosen, graded.path / grade.GRADED)
                select.warn_copies(chosen)
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
        asked = [(bench.name, self.problems(bench.asks(x.problems), "test")) for bench in x.sampled_benches]
        if not problems:
            return []
        hits: list[Hit] = []
        for name, theirs in asked:
            found = x.decontaminate.hits(problems, theirs)
            if found:
                _log.warning(
                    "%d of %d calibration problems are in the benchmark and are left out, the first is %s (%s of %s: %s)",
                    len(found), len(problems), found[0].id, found[0].benchmark_id, name, found[0].why,
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
        listens = x.pruner.statistic != "none" and x.passing.propagate == "pruned"
        inputs = {"select": chosen.key} if listens else {}
        inputs |= {"collect": collected.key} if collected else {}
        config = {
            "model": x.model,
            "pruner": x.pruner,
            "sparsity": x.sparsity,
            "allocation": x.allocation,
            "passing": x.passing.heeded(x.pruner.statistic),
            "scope": x.scope if inputs and "scope" in x.calib.uses else None,
        }

        def make(work: Path) -> None:
            calibration = _calibration(chosen) if listens else None
            method = Method(x.pruner, x.sparsity, x.allocation, x.scope)
            dense = collected.path if collected else None
            how = (x.memory, work, x.passing, dense)
            result = prune.prune(x.model, self.tokenizer, calibration, method, *how)
            (work / RESULT).write_text(json.dumps(to_json(result), indent=1))
            own = {**inputs, "prune": keys.key("prune", prune.VERSION, config, inputs)}
            self._write_card(work / CHECKPOINT, result, config, _calibration(chosen) if inputs else None, own)

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
        found = card.provenance(x.model, to_json(result), settings, rows, keys_, versions(), self.converted)
        card.write(checkpoint, found, x.model.files())

    def evaluated(self, name: str, bench: evaluate.Bench | Measure, pruned: Artefact | None) -> Artefact:
        """What the dense or the pruned model is worth on a benchmark."""
        if not isinstance(bench, evaluate.Bench):
            return self._measured(name, bench, pruned)
        problems = bench.asks(self.x.problems)
        at = f"{name}.{bench.name}"
        sampled, read = self.sampled(f"sample_{at}", problems, "test", bench.engine, bench.decoding, pruned)
        graded = self.graded(f"grade_{at}", sampled, read, bench.grader or self.x.grader)

        def make(work: Path) -> None:
            each = tables.read_graded(graded.path / grade.GRADED)
            attempts = evaluate.outcomes(each)
            tables.write_outcomes(work / evaluate.OUTCOMES, attempts)
            tables.write_texts(work / evaluate.TEXTS, evaluate.texts(each, read, self.tokenizer))
            found = evaluate.score(bench.name, attempts, *sample.spent(sampled.path))
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
        if isinstance(score, Score) and score.grader_failed:
            _log.warning(
                "bench=%s: the grader failed on %.1f %% of the answers of the %s model, which are not right in its accuracy; "
                "they have the verdict grader_failed in the file of outcomes",
                bench.name, 100 * score.grader_failed, name,
            )  # fmt: skip
        return out

    def _measured(self, name: str, measure: Measure, pruned: Artefact | None) -> Artefact:
        """What a measure finds, on traces of the dense model where it asks for them."""
        inputs = {"prune": pruned.key} if pruned else {}
        traces: Artefact | None = None
        if (bench := measure.traces) is not None:
            on = bench.asks(self.x.problems)
            at = f"sample_dense.{measure.name}"
            traces, _ = self.sampled(at, on, "test", bench.engine, bench.decoding, None)
            inputs["sample"] = traces.key

        def make(work: Path) -> None:
            saved = tables.read_traces(traces.path / sample.TRACES) if traces else []
            start = time.perf_counter()
            with heap.reused():
                items = measure.measure(self._at(pruned), self.tokenizer, saved)
            tables.write_items(work / evaluate.OUTCOMES, items)
            found = evaluate.reading(measure, items, time.perf_counter() - start)
            (work / evaluate.SCORE).write_text(json.dumps(to_json(found), indent=1))

        config = {"measure": measure, "model": self.x.model}
        return self._stage(f"evaluate_{name}.{measure.name}", "evaluate", evaluate.VERSION, config, inputs, make)

    def _at(self, pruned: Artefact | None) -> Model:
        """The dense model, or the pruned one."""
        model = self.x.model
        return model if pruned is None else dataclasses.replace(model, path=str(pruned.path / CHECKPOINT))


def _calibration(chosen: Artefact) -> CalibrationSet:
    rows, held_out = tables.read_rows(chosen.path / select.ROWS)
    summary = json.loads((chosen.path / select.SUMMARY).read_text())
    funnel = tuple((name, count) for name, count in summary["funnel"])
    weights = tuple((1.0,) * len(row) for row in rows)
    asked = summary["tokens"]["asked"]
    return CalibrationSet(summary["source"], rows, weights, funnel, asked, summary["parts"], held_out)
