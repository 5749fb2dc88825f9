"""How many attempts tell how hard a problem is: python benchmarks/difficulty.py [--problems 200].

The shipped model attempts each problem 64 times. The difficulty measured with the first 4, 8, 16 or 32 attempts is compared
with that of the last 32; pass@k and maj@k are over all 64, and over the first k of them.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from scipy import stats

from ssgr.difficulty import wrong_shares
from ssgr.grader.exact import Exact
from ssgr.intervals import cluster_bootstrap, majority, pass_at_k
from ssgr.model import Model
from ssgr.problems.arithmetic import ArithmeticProblems
from ssgr.records import Graded, Verdict
from ssgr.sampler import Decoding, Request
from ssgr.sampler.hf import HfSampler
from ssgr.stages.grade import grade

BANDS = (0.25, 0.501)  # of the wrong share: easy below the first, hard from the second on, as conf/difficulty


def band(share: float) -> int:
    """Easy, medium or hard."""
    return int(np.searchsorted(BANDS, share, side="right"))


def sampled(count: int, seed: int) -> dict[str, list[Graded]]:
    """Graded attempts by problem, in their order."""
    model = Model("tiny", "pkg://ssgr.model.tiny/weights")
    tokenizer = model.tokenizer()
    problems = ArithmeticProblems((1, 2, 3, 4, 5, 6), count, 1, seed).read("calibration")
    asked = [Request(p.id, a, model.prompt_ids(tokenizer, p.question)) for p in problems for a in range(64)]
    decoding = Decoding(64, 0.6, 0.95, 448, seed)
    traces = [t for some in HfSampler(256).sample(model, tokenizer, asked, decoding) for t in some]
    out: dict[str, list[Graded]] = {problem.id: [] for problem in problems}
    graded = grade(traces, problems, tokenizer, Exact(), model.thinking)
    for one in sorted(graded, key=lambda g: (g.trace.problem_id, g.trace.attempt)):
        out[one.trace.problem_id].append(one)
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    by_id = sampled(args.problems, args.seed)
    right_PG = np.array([[g.verdict is Verdict.RIGHT for g in some] for some in by_id.values()], dtype=float)
    print(f"{len(by_id)} problems, 64 attempts each: avg@64 {right_PG.mean():.3f}")
    for k in (1, 2, 4, 8, 16, 32, 64):
        passed = float(np.mean([pass_at_k(int(row.sum()), 64, k) for row in right_PG]))
        voted = np.array(
            [majority([g.answer for g in s[:k]], [g.verdict is Verdict.RIGHT for g in s[:k]]) for s in by_id.values()]
        )
        low, high = cluster_bootstrap([voted])
        print(f"k={k:<3} pass@k {passed:.3f}  maj@k {voted.mean():.3f} [{low:.3f}, {high:.3f}]")
    truth = wrong_shares(g for some in by_id.values() for g in some[32:])
    names = list(by_id)
    true_P = np.array([truth[name] for name in names])
    print("attempts  mean error of the share  rank correlation  same band  hard ones found  of those found hard")
    for k in (4, 8, 16, 32):
        found = wrong_shares(g for some in by_id.values() for g in some[:k])
        found_P = np.array([found[name] for name in names])
        same = np.array([band(a) == band(b) for a, b in zip(found_P, true_P, strict=True)])
        hard, told = true_P >= BANDS[1], found_P >= BANDS[1]
        rank = stats.spearmanr(found_P, true_P).statistic
        low, high = cluster_bootstrap([same.astype(float)])
        print(
            f"{k:>8}  {np.abs(found_P - true_P).mean():>23.3f}  {rank:>16.3f}  {same.mean():.3f} [{low:.3f}, {high:.3f}]"
            f"  {(hard & told).sum() / max(1, hard.sum()):.3f}  {(hard & told).sum() / max(1, told.sum()):.3f}"
        )


if __name__ == "__main__":
    main()
