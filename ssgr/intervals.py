"""Rates, pass@k, majority vote and their intervals; everything is clustered by problem.

Shapes: P problems, G attempts, D draws of calibration sets, S seeds, B resamples, C columns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from math import comb, sqrt

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval
RESAMPLES = 10_000
TINY = 1e-12  # a difference below this is rounding
_COLUMNS = 512  # columns that are resampled together
_ENTRIES = 2**20  # counts that are held at once
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_RIGHT = "\0right"  # one name for all ways to write the right answer


def wilson(right_PG: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the mean of (P, G) outcomes: Wilson's score interval at the effective sample size.

    The effective size is p (1 - p) / var, with var the between-problem variance of the mean, so that attempts at one
    problem are not taken for independent evidence. As var is itself of P problems only, the size is scaled by the squared
    ratio of the t quantiles of P G - 1 and P - 1 degrees of freedom, and it is never above P G (Korn and Graubard 1998,
    Survey Methodology 24). At p = 0 or 1 it is the number of problems.
    """
    from scipy.special import stdtrit

    mean_P = right_PG.mean(axis=1)
    problems, p = len(mean_P), float(mean_P.mean())
    variance = float(mean_P.var(ddof=1)) / problems if problems > 1 else 0.0
    n = float(problems)
    if variance > 0 and 0 < p < 1:
        wider = stdtrit(right_PG.size - 1, 0.975) / stdtrit(problems - 1, 0.975)
        n = min(float(right_PG.size), p * (1 - p) / variance * float(wider) ** 2)
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def linear(values_N: NDArray[np.float64], weight_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) numbers whose plain mean is the weighted mean of `values_N`, and which vary as that does, to first order.

    It is a ratio of two sums: values times weights alone would vary with the weights, where all values are the same.
    """
    mean = np.average(values_N, weights=weight_N)
    return np.asarray(mean + (values_N - mean) * weight_N / weight_N.mean())


def paired_bootstrap(a_P: NDArray[np.float64], b_P: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of mean(a - b) over the same P problems."""
    return cluster_bootstrap([a_P - b_P], seed)


def cluster_bootstrap(values_DP: Sequence[NDArray[np.float64]], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean over D draws of P problems: both are resampled."""
    return bootstrap([np.stack(values_DP)[:, None]], seed)[0]


def bootstrap(tables_DSP: Sequence[NDArray[np.float64]], seed: int = 0) -> list[tuple[float, float]]:
    """95 % percentile bootstrap interval of the mean of each (D, S, P) table: draws, seeds and problems are resampled.

    The three are crossed, so each resample takes whole draws, whole seeds and whole problems (the pigeonhole bootstrap,
    Owen 2007, arXiv 0712.1111); what there is one of is kept. A draw that a seed lacks is a row of NaN.
    """
    out: dict[int, tuple[float, float]] = {}
    for problems in {table.shape[2] for table in tables_DSP}:
        batch: list[int] = []
        numbers = [i for i, table in enumerate(tables_DSP) if table.shape[2] == problems]
        for i in numbers:
            batch.append(i)
            if i == numbers[-1] or sum(tables_DSP[j][..., 0].size for j in batch) >= _COLUMNS:
                out |= zip(batch, _percentiles([tables_DSP[j] for j in batch], seed), strict=True)
                batch = []
    return [out[i] for i in range(len(tables_DSP))]


def _percentiles(tables_DSP: Sequence[NDArray[np.float64]], seed: int) -> Iterator[tuple[float, float]]:
    """The intervals of tables over the same number of problems, whose resamples they share."""
    sums_BC = _resampled_sums(np.concatenate([table.reshape(-1, table.shape[2]) for table in tables_DSP]), seed)
    first = 0
    for table in tables_DSP:
        draws, seeds, problems = table.shape
        own_BDS = sums_BC[:, first : first + draws * seeds].reshape(-1, draws, seeds)
        first += draws * seeds
        weight_BDS = _counts(draws, [seed, 1])[:, :, None] * _counts(seeds, [seed, 2])[:, None]
        weight_BDS = weight_BDS * ~np.isnan(table[..., 0])
        total_B = weight_BDS.sum((1, 2)) * problems
        means = (own_BDS * weight_BDS).sum((1, 2))[total_B > 0] / total_B[total_B > 0]
        low, high = np.percentile(means, [2.5, 97.5])
        yield float(low), float(high)


def _resampled_sums(columns_CP: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """(RESAMPLES, C) sums of each column over P problems drawn with replacement, the same ones for all columns."""
    rng, problems = np.random.default_rng(seed), columns_CP.shape[1]
    rows, filled_PC = max(1, _ENTRIES // problems), np.nan_to_num(columns_CP).T
    parts = []
    for start in range(0, RESAMPLES, rows):
        drawn = rng.integers(problems, size=(min(rows, RESAMPLES - start), problems))
        drawn += problems * np.arange(len(drawn))[:, None]
        parts.append(np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float) @ filled_PC)
    return np.concatenate(parts)


def _counts(levels: int, seed: list[int]) -> NDArray[np.int64]:
    """(RESAMPLES, levels) how often each of `levels` is drawn when as many are drawn with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(levels, np.full(levels, 1 / levels), size=RESAMPLES)


def clustered_t(gaps_DSP: NDArray[np.float64]) -> float:
    """Two-sided p of a mean difference of zero, by a t-test that is clustered by draw, by seed and by problem at once.

    The variance of the mean is the sum of its cluster-robust variances by draw, by seed and by problem, each with the
    small-sample factor n / (n - 1); what there is one of has none. The degrees of freedom are Satterthwaite's, so few
    draws tell little where it is draws that vary. With one draw and one seed it is the paired t-test over problems. It
    assumes that draws, seeds and problems are samples and that the mean is about normal; where both interact the
    variance counts the interaction more than once, which errs to the large side. Never below 2^(1 - P), the least that
    P problems can show by their signs.
    """
    from scipy.special import stdtr

    problems, here_DS = gaps_DSP.shape[2], ~np.isnan(gaps_DSP[..., 0])
    mean = float(gaps_DSP[here_DS].mean())
    if problems == 1 or abs(mean) < TINY:
        return 1.0
    rest_DSP = np.where(here_DS[..., None], gaps_DSP - mean, 0.0)
    parts = []
    for axis, n in enumerate(gaps_DSP.shape):
        if n > 1:
            totals = rest_DSP.sum(tuple({0, 1, 2} - {axis}))
            parts.append((n / (n - 1) * float(totals @ totals) / (here_DS.sum() * problems) ** 2, n - 1))
    variance = sum(part for part, _ in parts)
    if variance <= (TINY * mean) ** 2:
        return float(2.0 ** (1 - problems))
    freedom = variance**2 / sum(part**2 / n for part, n in parts)
    return float(max(2 * stdtr(freedom, -abs(mean) / sqrt(variance)), 2.0 ** (1 - problems)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of a family of p-values, in their order (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    out, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        out[i] = least
    return out


def pass_at_k(right: int, attempts: int, k: int) -> float:
    """Unbiased chance that one of k attempts is right: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, eq. 1)."""
    return 1 - comb(attempts - right, k) / comb(attempts, k)


def majority(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Whether the most frequent answer is right; among tied answers the share of right ones; no answer never votes.

    All right answers are one, however they are written; wrong ones are told apart by their text without spaces and
    thousands separators.
    """
    pairs = zip(answers, right, strict=True)
    plain = [_RIGHT if ok else "".join(_THOUSANDS.sub("", a).split()) for a, ok in pairs if a is not None]
    votes = Counter(plain)
    if not votes:
        return 0.0
    most = max(votes.values())
    tied = [answer for answer, n in votes.items() if n == most]
    return (_RIGHT in tied) / len(tied)
