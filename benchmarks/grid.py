"""What dense propagation saves: a grid of pruners, sparsities and mixtures against one prune: python benchmarks/grid.py.

The statistics are collected once; every cell reads them. Beside it stands one prune of the published kind (statistics of
the pruned blocks before), which a grid without dense propagation would repeat for every cell.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from ssgr.allocation.uniform import Uniform
from ssgr.model import Model
from ssgr.pruner import Pruner
from ssgr.pruner.ria import RIA
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.pruner.wanda import Wanda
from ssgr.records import CalibrationSet, Row
from ssgr.scope import Scope
from ssgr.sparsity import Unstructured
from ssgr.stages.plan import Memory
from ssgr.stages.prune import Passing, prune
from ssgr.stages.solve import Method
from ssgr.stages.statistics import collect

PRUNERS: dict[str, Pruner] = {"wanda": Wanda(), "ria": RIA(), "sparsegpt": SparseGPT()}
MIXTURES = [Scope("both"), Scope("response", 0, 1), Scope("prompt", 1, 0), Scope("mostly response", 0.25, 1)]


def rows(model: Model, count: int, tokens: int) -> CalibrationSet:
    """Rows of random tokens, a quarter of each the prompt: what they say does not change the time."""
    rng, words = random.Random(0), len(model.tokenizer())
    made = tuple(Row(tuple(rng.choices(range(words), k=tokens)), tokens // 4, str(i)) for i in range(count))
    return CalibrationSet("random", made, tuple((1.0,) * tokens for _ in made), (), count * tokens)


def main() -> None:
    """Print the seconds of each part and their ratio to one prune."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pkg://ssgr.model.tiny/weights", help="checkpoint directory")
    parser.add_argument("--rows", type=int, default=64, help="calibration rows")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--pruners", default="wanda,ria,sparsegpt", help=f"some of {', '.join(PRUNERS)}")
    parser.add_argument("--sparsities", type=int, default=4, help="shares of zeros: 0.3, 0.4, ...")
    parser.add_argument("--mixtures", type=int, default=len(MIXTURES), help="mixtures of prompt and response")
    parser.add_argument("--alone", type=lambda s: s.split(","), default=[*PRUNERS], help="pruners that also run alone")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = Model("grid", args.model, dtype="float32", device="cpu")
    tokenizer, calibration, memory = model.tokenizer(), rows(model, args.rows, args.tokens), Memory(16)
    pruners = [PRUNERS[name] for name in args.pruners.split(",")]
    shares = [0.3 + 0.1 * i for i in range(args.sparsities)]
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        statistics = Path(folder, "statistics")
        statistics.mkdir()
        start = time.perf_counter()
        collect(model, tokenizer, calibration, "gram", memory, statistics)
        seconds["collect"] = time.perf_counter() - start
        for n, (pruner, share, scope) in enumerate(
            (p, s, m) for p in pruners for s in shares for m in MIXTURES[: args.mixtures]
        ):
            start = time.perf_counter()
            method = Method(pruner, Unstructured(share), Uniform(), scope)
            prune(model, tokenizer, None, method, memory, Path(folder, str(n)), Passing("dense"), statistics)
            seconds[pruner.name] = seconds.get(pruner.name, 0) + time.perf_counter() - start
        alone = [pruner for pruner in pruners if pruner.name in args.alone]
        for pruner in alone:
            for order in ("layer", "block"):
                start = time.perf_counter()
                method = Method(pruner, Unstructured(0.5), Uniform())
                how = Passing("pruned", order)  # type: ignore[arg-type]
                prune(model, tokenizer, calibration, method, memory, Path(folder, f"{pruner.name}.{order}"), how)
                seconds[f"one {pruner.name}, order={order}"] = time.perf_counter() - start
    each = args.sparsities * args.mixtures
    grid = seconds["collect"] + sum(seconds[p.name] for p in pruners)
    orders = ("layer", "block") if len(alone) == len(pruners) else ()
    apart = {o: each * sum(seconds[f"one {p.name}, order={o}"] for p in pruners) for o in orders}
    slowest = max((seconds[f"one {p.name}, order=block"] for p in alone), default=float("nan"))
    for what, value in seconds.items():
        print(f"{what:32} {value:8.1f} s")
    print(f"the grid of {each * len(pruners)} cells: {grid:.1f} s, {grid / slowest:.2f} times one published prune")
    for order, value in apart.items():
        print(
            f"the same without dense propagation, order={order}: about {value:.1f} s; the grid takes {grid / value:.3f} of it"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"seconds": seconds, "grid": grid, "apart": apart, "cells": each * len(pruners)})
        )


if __name__ == "__main__":
    sys.exit(main())
