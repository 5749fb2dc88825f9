"""Evaluate: graded attempts at a benchmark -> its score, and paired differences between models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssgr.grader import Grader
from ssgr.intervals import majority, paired_bootstrap, pass_at_k, wilson
from ssgr.problems import Problems
from ssgr.records import Graded, Outcome, Score, Verdict
from ssgr.sampler import Decoding, Sampler

VERSION = 2
OUTCOMES, SCORE = "outcomes.parquet", "score.json"

_PERIOD, _REPEATS, _LOOP_TOKENS = 128, 4, 32  # a loop: the last 4 periods (32 tokens or more) are the same


@dataclass(frozen=True)
class Bench:
    """A benchmark: which problems, and how each is attempted."""

    name: str
    decoding: Decoding
    engine: Sampler
    problems: Problems | None = None  # None: the test split of the problems group
    grader: Grader | None = None  # None: that of the grader group


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


def score(bench: str, attempts: Sequence[Outcome], seconds: float) -> Score:
    """The score of a model: avg@k with its interval, pass@k, maj@k and how the responses ended."""
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
        tokens_per_second=tokens / seconds if seconds else 0.0,
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


def difference(pruned: Sequence[Outcome], dense: Sequence[Outcome]) -> dict[str, Any]:
    """Accuracy of `pruned` minus that of `dense` on the same problems and seeds, with its paired 95 % interval."""
    a_P, b_P = _right(pruned).mean(1), _right(dense).mean(1)
    return {"accuracy": float((a_P - b_P).mean()), "ci95": list(paired_bootstrap(a_P, b_P))}
