"""Scores and their intervals, against closed forms and scipy."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from transformers import PreTrainedTokenizerBase

from ssgr.intervals import cluster_bootstrap, majority, paired_bootstrap, pass_at_k, wilson
from ssgr.records import PERPLEXITY, Graded, Outcome, Trace, Verdict, shown
from ssgr.stages.evaluate import difference, is_looping, outcomes, score
from tests.conftest import SHARED

TRACES = SHARED / "data" / "traces" / "skyt1_aime24_multisample.jsonl"


def outcome(problem: str, attempt: int, right: bool, answer: str | None = None, tokens: int = 10) -> Outcome:
    verdict = Verdict.RIGHT if right else Verdict.WRONG
    return Outcome(problem, attempt, 1, verdict, answer or str(right), tokens, "stop", False)


def test_wilson_with_one_attempt_is_wilson() -> None:
    right = np.array([[1.0]] * 30 + [[0.0]] * 10)
    want = stats.binomtest(30, 40).proportion_ci(method="wilson")
    got = wilson(right)
    assert got == pytest.approx((want.low, want.high), abs=0.006)  # the variance is estimated with n - 1


def test_attempts_at_one_problem_are_not_independent() -> None:
    column = np.array([1.0] * 30 + [0.0] * 10)
    same = np.stack([column] * 8, 1)  # eight attempts that always agree tell no more than one
    (low, high), (one_low, one_high) = wilson(same), wilson(column[:, None])
    assert low <= one_low and one_high <= high and high - low < 1.04 * (one_high - one_low)


def test_a_perfect_score_is_not_certain() -> None:
    low, high = wilson(np.ones((50, 4)))
    assert low == pytest.approx(1 / (1 + 1.96**2 / 50), abs=1e-3)
    assert high == 1


@pytest.mark.parametrize(
    ("problems", "attempts", "ability"), [(60, 4, (2, 1)), (30, 8, (1, 2)), (10, 8, (1000, 1000)), (5, 8, (1000, 1000))]
)
def test_wilson_covers_its_mean_95_times_in_100(problems: int, attempts: int, ability: tuple[float, float]) -> None:
    """Also of few problems that are all equally hard, whose means may happen to lie close together."""
    rng = np.random.default_rng(0)
    hits, mean = 0, ability[0] / sum(ability)
    for p in rng.beta(*ability, size=(2000, problems)):
        low, high = wilson((rng.random((problems, attempts)) < p[:, None]).astype(float))
        hits += low <= mean <= high
    assert 0.93 <= hits / 2000 <= 0.985


def test_the_effective_size_is_never_above_the_number_of_attempts() -> None:
    low, high = wilson(np.array([[1, 1, 0, 0]] * 4 + [[1, 1, 1, 0]], dtype=float))
    want = stats.binomtest(11, 20).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((want.low, want.high))


def test_bootstrap_is_that_of_scipy() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(80), rng.random(80)
    want = stats.bootstrap((a - b,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(2))
    got = paired_bootstrap(a, b)
    assert got == pytest.approx((want.confidence_interval.low, want.confidence_interval.high), abs=0.01)


def test_bootstrap_over_draws_is_wider() -> None:
    rng = np.random.default_rng(3)
    draws = [np.clip(rng.normal(0.5 + shift, 0.05, 400), 0, 1) for shift in (-0.2, 0.0, 0.2)]
    narrow, wide = cluster_bootstrap([np.mean(draws, 0)]), cluster_bootstrap(draws)
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])


@pytest.mark.parametrize(("right", "n", "k"), [(0, 5, 2), (3, 8, 4), (5, 5, 1), (7, 8, 8), (2, 6, 5)])
def test_pass_at_k_counts_subsets(right: int, n: int, k: int) -> None:
    outcomes_ = [True] * right + [False] * (n - right)
    subsets = list(itertools.combinations(outcomes_, k))
    assert pass_at_k(right, n, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority() -> None:
    assert majority(["7", "7", "8"], [True, True, False]) == 1
    assert majority(["7", "8", "8"], [True, False, False]) == 0
    assert majority(["7", "8"], [True, False]) == 0.5
    assert majority([None, None, "7"], [False, False, True]) == 1  # no answer has no vote
    assert majority([None, None], [False, False]) == 0
    assert majority(["1000", "1,000", "7", "7", "8"], [True, True, False, False, False]) == 0.5  # one answer, two ways
    assert majority(["1 000", "1,000", "7"], [False, False, True]) == 0
    assert majority(["1,2", "1,2", "12", "5", "5"], [False, False, False, True, True]) == 0.5  # a pair is no number


def test_score_counts() -> None:
    attempts = [outcome("a", 0, True), outcome("a", 1, False, tokens=30), outcome("b", 0, True), outcome("b", 1, True)]
    found = score("x", attempts, 2.0, 100)
    assert (found.problems, found.attempts, found.accuracy) == (2, 2, 0.75)
    assert found.pass_at_k == {"1": 0.75, "2": 1.0}
    assert found.maj_at_k == 0.75
    assert (found.mean_tokens, found.tokens_per_second) == (15, 50)
    assert found.by_level == {"1": 0.75}
    without = [replace(one, level=None) for one in attempts]
    assert score("x", without, 2.0, 100).by_level == {}
    assert score("x", [*without[:2], *attempts[2:]], 2.0, 100).by_level == {"1": 1.0}, "level None is none"


def test_how_responses_end_is_told() -> None:
    def graded(ids: tuple[int, ...], finish: str, verdict: Verdict) -> Graded:
        return Graded(Trace("p", len(ids), (1,), ids, finish, 0), None, verdict, 1)  # type: ignore[arg-type]

    attempts = outcomes(
        [
            graded((5, 6) * 40, "length", Verdict.NO_ANSWER),
            graded(tuple(range(70)), "length", Verdict.NO_ANSWER),
            graded((5, 6) * 30, "stop", Verdict.RIGHT),
            graded((1, 2, 3), "stop", Verdict.GRADER_FAILED),
        ]
    )
    found = score("x", attempts, 1.0, 1)
    assert (found.truncated, found.looping, found.no_answer, found.grader_failed) == (0.5, 0.25, 0.5, 0.25)
    assert found.unclosed == 0, "who stopped to think may give no answer all the same"


@pytest.mark.parametrize("period", [1, 2, 7, 30, 128])
def test_loops_are_seen(period: int) -> None:
    start = list(range(1000, 1200))
    assert is_looping(start + list(range(period)) * max(4, -(-33 // period)))
    assert not is_looping(start + list(range(period)) * 3) or (period == 1 and not is_looping([*start, 0, 0, 0]))


def test_counting_and_short_repeats_are_no_loops() -> None:
    assert not is_looping(list(range(500)))
    assert not is_looping([1] * 8)
    assert not is_looping([])
    assert not is_looping([9, *range(1, 8), *[*range(8)] * 3])  # 32 tokens, and the first is not repeated
    assert not is_looping([*([1, 2] * 100), 3])


def test_difference_is_paired() -> None:
    dense = [outcome(f"p{i}", 0, i < 70) for i in range(100)]
    worse = [outcome(f"p{i}", 0, i < 60) for i in range(100)]
    gap, (low, high) = difference(list(reversed(worse)), dense)
    assert gap == pytest.approx(-0.1)
    assert -0.17 < low < high < -0.03  # unpaired it would reach zero


def test_losses_are_shown_as_a_perplexity_and_too_large_ones_as_infinity() -> None:
    assert shown(PERPLEXITY, 1.0) == pytest.approx(np.e) and shown(PERPLEXITY, 1000.0) == np.inf
    assert shown("acc", 0.25) == 0.25


@pytest.mark.skipif(not TRACES.exists(), reason="the collected traces (shared/data) are not beside this checkout")
def test_a_real_loop_is_found_and_no_other_trace_taken_for_one(tokenizer: PreTrainedTokenizerBase) -> None:
    """Of 76 traces of AIME 2024 one ends by writing = e^{i * (3π + π/4)} again and again, up to its cap."""
    rows = [json.loads(line) for line in TRACES.read_text(encoding="utf-8").split("\n") if line]
    loops = [row["id"] for row in rows if is_looping(tokenizer(row["response"], add_special_tokens=False)["input_ids"])]
    assert loops == ["sky-aime24/19/ckpt35"]
