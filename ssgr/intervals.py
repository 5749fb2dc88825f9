"""Rates, pass@k, majority vote and their intervals; everything is clustered by problem.

Shapes: P problems, G attempts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb, sqrt

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval
RESAMPLES = 10_000
_RIGHT = "\0right"  # one name for all ways to write the right answer


def wilson(right_PG: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the mean of (P, G) outcomes: Wilson's score interval at the effective sample size.

    The effective size is p (1 - p) / var, with var the between-problem variance of the mean, so that attempts at one
    problem are not taken for independent evidence; at p = 0 or 1 it is the number of problems.
    """
    mean_P = right_PG.mean(axis=1)
    problems, p = len(mean_P), float(mean_P.mean())
    variance = float(mean_P.var(ddof=1)) / problems if problems > 1 else 0.0
    n = p * (1 - p) / variance if variance > 0 and 0 < p < 1 else float(problems)
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(a_P: NDArray[np.float64], b_P: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of mean(a - b) over the same P problems."""
    return cluster_bootstrap([a_P - b_P], seed)


def cluster_bootstrap(values_DP: Sequence[NDArray[np.float64]], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean over D draws of P problems: both are resampled."""
    rng = np.random.default_rng(seed)
    table = np.stack(values_DP)
    draws, problems = table.shape
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        column_P = table.mean(0) if draws == 1 else table[rng.integers(draws, size=draws)].mean(0)
        means[i] = column_P[rng.integers(problems, size=problems)].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def pass_at_k(right: int, attempts: int, k: int) -> float:
    """Unbiased chance that one of k attempts is right: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, eq. 1)."""
    return 1 - comb(attempts - right, k) / comb(attempts, k)


def majority(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Whether the most frequent answer is right; among tied answers the share of right ones; no answer never votes.

    All right answers are one, however they are written; wrong ones are told apart by their text without spaces and
    thousands separators.
    """
    pairs = zip(answers, right, strict=True)
    plain = [_RIGHT if ok else "".join(a.replace(",", "").split()) for a, ok in pairs if a is not None]
    votes = Counter(plain)
    if not votes:
        return 0.0
    most = max(votes.values())
    tied = [answer for answer, n in votes.items() if n == most]
    return (_RIGHT in tied) / len(tied)
