"""Measure the shipped model against what its card says: python benchmarks/tiny.py [--model DIR] [--problems 512].

Accuracy by level on fresh problems, the share of each difficulty band at 8 attempts, and how far the lengths of right
traces spread at one level. Temperature 0.6, top-p 0.95.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict

import numpy as np

from ssgr.difficulty import wrong_shares
from ssgr.grader.exact import Exact
from ssgr.intervals import wilson
from ssgr.model import Model
from ssgr.problems.arithmetic import ArithmeticProblems
from ssgr.records import Graded, Verdict
from ssgr.sampler import Decoding, Request
from ssgr.sampler.hf import HfSampler
from ssgr.stages.grade import grade

LEVELS = tuple(range(1, 9))
CAP = 448  # of conf/model/tiny.yaml
SEED = 777  # used for nothing else: these problems were never looked at


def graded(model: Model, problems: int, attempts: int, batch: int) -> tuple[list[Graded], float]:
    """Sample and grade `problems` test problems a level; also tokens a second."""
    tokenizer = model.tokenizer()
    drawn = ArithmeticProblems(LEVELS, 1, problems * len(LEVELS), SEED).read("test")
    requests = [Request(p.id, a, model.prompt_ids(tokenizer, p.question)) for p in drawn for a in range(attempts)]
    start = time.perf_counter()
    sampled = HfSampler(batch).sample(model, tokenizer, requests, Decoding(attempts, 0.6, 0.95, CAP, SEED))
    traces = [trace for part in sampled for trace in part]
    rate = sum(len(t.generated_ids) for t in traces) / (time.perf_counter() - start)
    return grade(traces, drawn, tokenizer, Exact(), model.thinking), rate


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pkg://ssgr.model.tiny/weights", help="checkpoint directory")
    parser.add_argument("--problems", type=int, default=512, help="problems a level, one attempt each")
    parser.add_argument("--band-problems", type=int, default=64, help="problems a level, eight attempts each")
    parser.add_argument("--batch", type=int, default=256, help="rows decoded together")
    args = parser.parse_args()
    model = Model("tiny", args.model, dtype="float32")
    one, rate = graded(model, args.problems, 1, args.batch)
    by_level: dict[int, list[Graded]] = defaultdict(list)
    for g in one:
        by_level[g.level or 0].append(g)
    accuracy = {}
    for level, group in sorted(by_level.items()):
        right = np.array([[float(g.verdict is Verdict.RIGHT)] for g in group])
        accuracy[level] = [round(float(x), 3) for x in (right.mean(), *wilson(right))]
    spread = {}
    for level, group in sorted(by_level.items()):
        lengths = [len(g.trace.generated_ids) for g in group if g.verdict is Verdict.RIGHT]
        low, high = np.percentile(lengths, [10, 90])
        spread[level] = [round(float(x), 2) for x in (low, high, high / low)]
    eight, _ = graded(model, args.band_problems, 8, args.batch)
    shares = wrong_shares(eight).values()
    bands = Counter("easy" if s < 0.25 else "medium" if s <= 0.5 else "hard" if s < 1 else "never" for s in shares)
    print(
        json.dumps(
            {
                "accuracy_by_level": accuracy,
                "right_trace_length_p10_p90_ratio": spread,
                "bands": {band: round(n / len(shares), 3) for band, n in sorted(bands.items())},
                "cut_at_the_cap": round(sum(g.trace.finish == "length" for g in one) / len(one), 4),
                "tokens_per_second": round(rate),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
