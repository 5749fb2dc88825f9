"""Evaluate: graded attempts at a benchmark, or the items of a measure -> its score, and paired differences between models."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssgr.grader import Grader
from ssgr.intervals import cluster_bootstrap, linear, majority, paired_bootstrap, pass_at_k, wilson
from ssgr.measure import Measure
from ssgr.problems import Problems, Split
from ssgr.records import Graded, Item, Outcome, Problem, Reading, Score, Text, Verdict, shown
from ssgr.sampler import Decoding, Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # by name only: its import takes seconds

VERSION = 10
OUTCOMES, TEXTS, SCORE = "outcomes.parquet", "texts.parquet", "score.json"

_PERIOD, _REPEATS, _LOOP_TOKENS = 128, 4, 32  # a loop: the last 4 periods (32 tokens or more) are the same


@dataclass(frozen=True)
class Bench:
    """A benchmark: which problems, and how each is attempted."""

    name: str
    decoding: Decoding
    engine: Sampler
    problems: Problems | None = None  # None: the test split of the problems group
    grader: Grader | None = None  # None: that of the grader group

    def asks(self, otherwise: Problems) -> Problems:
        """Its own problems, or those that there are `otherwise`."""
        return otherwise if self.problems is None else Asked(self.problems)


@dataclass(frozen=True)
class Asked:
    """The problems of a benchmark, whose settings are called otherwise than those of the calibration."""

    problems: Problems

    def read(self, split: Split) -> list[Problem]:
        """Its problems.

        Raises:
            ValueError: what reading them raises, with the names of the settings.
        """
        try:
            return self.problems.read(split)
        except ValueError as error:
            hint = "; of a benchmark, problems is bench.problems, of one in a suite bench.benches.NAME.problems"
            raise ValueError(f"{error}{hint if 'problems.' in str(error) else ''}") from error


@dataclass(frozen=True)
class Suite:
    """Several benchmarks; `decoding` holds settings that all of those share that sample, such as the seed (None: their own).

    Raises:
        ValueError: there is none, or a setting is none of `Decoding`.
    """

    name: str
    benches: Mapping[str, Bench | Measure]
    decoding: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.benches:
            raise ValueError(f"bench={self.name}: a suite has at least one benchmark under bench.benches")
        valid = {one.name: one.type for one in fields(Decoding)}
        for name, value in self.decoding.items():
            if name not in valid:
                raise ValueError(f"bench.decoding.{name}: there is no such setting; valid are {', '.join(valid)}")
            if type(value) not in (int, type(None), *((float,) if valid[name] == "float" else ())):
                kind = "number" if valid[name] == "float" else "whole number (without a point or exponent)"
                raise ValueError(f"bench.decoding.{name}={value}: give a {kind} or null")


def _sharing(one: Bench | Measure, decoding: Mapping[str, Any]) -> Bench | Measure:
    """A benchmark, or one that reads traces of another, that samples with these settings."""
    if isinstance(one, Bench):
        given = {name: value for name, value in decoding.items() if value is not None}
        return replace(one, decoding=replace(one.decoding, **given))
    traces = getattr(one, "traces", None)
    return replace(one, traces=_sharing(traces, decoding)) if isinstance(traces, Bench) else one  # type: ignore[type-var]


def members(bench: Bench | Measure | Suite) -> list[Bench | Measure]:
    """The benchmarks of a suite, or the one that it is.

    Raises:
        ValueError: two have the same name or would write the same file, or a name cannot be that of a file.
    """
    if not isinstance(bench, Suite):
        some: list[Bench | Measure] = [bench]
    else:
        some = [_sharing(one, bench.decoding) for one in bench.benches.values()]
    names = [one.name for one in some]
    for name in names:
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(f"bench.name={name!r}: give letters, digits and . _ + - only: files are named by it")
        if names.count(name) > 1:
            raise ValueError(f"bench={bench.name}: two of its benchmarks are called {name}; give one another name")
        if f"{name}_dense" in names:
            raise ValueError(
                f"bench={bench.name}: its benchmarks {name} and {name}_dense would write the same file, as {name}_dense is what "
                f"the dense model did on {name}; give one another name"
            )
    return some


def is_looping(ids: Sequence[int]) -> bool:
    """Whether `ids` end in a loop: some period of at most 128 tokens stands there four times, over at least 32 tokens."""
    for period in range(1, min(_PERIOD, len(ids) // _REPEATS) + 1):
        span = max(_REPEATS * period, _LOOP_TOKENS)
        if len(ids) >= span and all(ids[-i] == ids[-i - period] for i in range(1, span - period + 1)):
            return True
    return False


def outcomes(graded: Sequence[Graded]) -> list[Outcome]:
    """What is kept of each attempt; only a response that was cut can be looping."""
    return [
        Outcome(
            g.trace.problem_id,
            g.trace.attempt,
            g.level,
            g.verdict,
            g.answer,
            len(g.trace.generated_ids),
            g.trace.finish,
            g.trace.finish == "length" and is_looping(g.trace.generated_ids),
            g.thinking,
            g.closed,
        )
        for g in graded
    ]


def texts(graded: Sequence[Graded], problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """What was asked and answered, special tokens as text."""
    by_id = {problem.id: problem for problem in problems}
    return [
        Text(
            g.trace.problem_id,
            g.trace.attempt,
            by_id[g.trace.problem_id].question,
            by_id[g.trace.problem_id].answer,
            str(tokenizer.decode(list(g.trace.prompt_ids))),
            str(tokenizer.decode(list(g.trace.generated_ids))),
        )
        for g in graded
    ]


def score(bench: str, attempts: Sequence[Outcome], seconds: float, drawn: int) -> Score:
    """The score of a model: avg@k with its interval, pass@k, maj@k and how the responses ended.

    `drawn` tokens were sampled in `seconds`: of attempts that were taken from other runs neither is known.
    """
    by_problem: dict[str, list[Outcome]] = defaultdict(list)
    for one in attempts:
        by_problem[one.problem_id].append(one)
    groups = list(by_problem.values())
    right_PG = _right(attempts)
    k_max = right_PG.shape[1]
    counts = right_PG.sum(1).astype(int)
    ks = sorted({1, k_max, *(k for k in (2, 4, 8, 16, 32, 64) if k <= k_max)})
    tokens = sum(o.tokens for o in attempts)
    levels: dict[str, list[float]] = defaultdict(list)
    for o in attempts:
        if o.level is not None:
            levels[str(o.level)].append(float(o.verdict is Verdict.RIGHT))
    return Score(
        bench=bench,
        problems=len(groups),
        attempts=k_max,
        accuracy=float(right_PG.mean()),
        ci95=wilson(right_PG),
        pass_at_k={str(k): float(np.mean([pass_at_k(c, k_max, k) for c in counts])) for k in ks},
        maj_at_k=float(
            np.mean([majority([o.answer for o in g], [o.verdict is Verdict.RIGHT for o in g]) for g in groups])
        ),
        mean_tokens=tokens / len(attempts),
        truncated=_share(attempts, lambda o: o.finish == "length"),
        looping=_share(attempts, lambda o: o.looping),
        no_answer=_share(attempts, lambda o: o.verdict is Verdict.NO_ANSWER),
        unclosed=_share(attempts, lambda o: not o.closed),
        grader_failed=_share(attempts, lambda o: o.verdict is Verdict.GRADER_FAILED),
        seconds=seconds,
        tokens_per_second=drawn / seconds if seconds else 0.0,
        by_level={k: float(np.mean(v)) for k, v in sorted(levels.items())},
    )


def _share(attempts: Sequence[Outcome], test: Callable[[Outcome], bool]) -> float:
    return sum(map(test, attempts)) / len(attempts)


def _right(attempts: Sequence[Outcome]) -> NDArray[np.float64]:
    """(P, G) outcomes in the order of problem ids, then attempts."""
    rows: dict[str, list[float]] = defaultdict(list)
    for o in sorted(attempts, key=lambda o: (o.problem_id, o.attempt)):
        rows[o.problem_id].append(float(o.verdict is Verdict.RIGHT))
    return np.array(list(rows.values()))


def difference(pruned: Sequence[Outcome], dense: Sequence[Outcome]) -> tuple[float, tuple[float, float]]:
    """Accuracy of `pruned` minus that of `dense` on the same problems and seeds, with its paired 95 % interval."""
    a_P, b_P = _right(pruned).mean(1), _right(dense).mean(1)
    return float((a_P - b_P).mean()), paired_bootstrap(a_P, b_P)


def reading(measure: Measure, items: Sequence[Item], seconds: float) -> Reading:
    """The weighted mean of `items` with its 95 % bootstrap interval; of losses the exponential, which is the perplexity."""
    values_N = weighted(items)
    mean, ci95 = float(values_N.mean()), cluster_bootstrap([values_N])
    value, low, high = (shown(measure.metric, one) for one in (mean, *ci95))
    return Reading(measure.name, measure.metric, value, (low, high), len(items), seconds)


def weighted(items: Sequence[Item]) -> NDArray[np.float64]:
    """(N,) values in the order of ids, scaled so that their plain mean is the weighted one."""
    ordered = sorted(items, key=lambda item: item.id)
    return linear(np.array([item.value for item in ordered]), np.array([item.weight for item in ordered], dtype=float))


def item_difference(pruned: Sequence[Item], dense: Sequence[Item]) -> tuple[float, tuple[float, float]]:
    """Mean of `pruned` minus that of `dense` over the same items (of losses: nats a token), with its paired 95 % interval."""
    a_N, b_N = weighted(pruned), weighted(dense)
    return float((a_N - b_N).mean()), paired_bootstrap(a_N, b_N)
