"""What a prune costs against tokens, depth, width and the number of sparsities: python benchmarks/cost.py.

Random Llamas whose sizes vary one at a time. Beside the seconds stands the share that forward pass and statistics reach of
the rate at which this machine multiplies large matrices in float32, measured in the same run.
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
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ssgr.allocation.uniform import Uniform
from ssgr.model import Model
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.records import CalibrationSet, PruneResult, Row
from ssgr.sparsity import Unstructured
from ssgr.stages.plan import Memory
from ssgr.stages.prune import Passing, prune
from ssgr.stages.solve import Method
from ssgr.stages.statistics import collect

BASE = {"tokens": 16384, "depth": 4, "width": 512}
VARIED = {"tokens": [4096, 8192, 16384, 32768], "depth": [2, 4, 8], "width": [256, 512, 1024]}
ROW = 512


def rate(size: int = 2048, seconds: float = 2.0) -> float:
    """Multiplications and additions a second of large matrices."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ b
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - start)


def made(depth: int, width: int, folder: Path) -> tuple[Model, PreTrainedTokenizerFast]:
    """A random Llama of `depth` blocks, in the proportions of SmolLM2-135M."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=depth,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 256),
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), pad_token="a")
    return Model("cost", str(folder), dtype="float32", device="cpu"), tokenizer


def rows(tokens: int) -> CalibrationSet:
    """Random tokens."""
    rng = random.Random(0)
    own = tuple(Row(tuple(rng.choices(range(1024), k=ROW)), 0, str(i)) for i in range(tokens // ROW))
    return CalibrationSet("random", own, tuple((1.0,) * ROW for _ in own), (), tokens)


def work(result: PruneResult, tokens: int) -> dict[str, float]:
    """Multiplications and additions of the forward pass through the matrices, and of the Gram matrices' upper halves."""
    shared = {"k_proj", "v_proj", "up_proj"}  # their inputs are those of the matrix before
    inputs = [layer.shape[1] for layer in result.layers if layer.name.rpartition(".")[2] not in shared]
    return {
        "forward": 2.0 * tokens * sum(layer.shape[0] * layer.shape[1] for layer in result.layers),
        "statistics": 1.0 * tokens * sum(n * (n + 1) for n in inputs),
    }


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peak, out, seen = rate(), [], {}
    print(f"large matrices: {peak / 1e9:.0f} GFLOP/s")
    for what, values in VARIED.items():
        for value in values:
            size = {**BASE, what: value}
            key = tuple(size.items())
            if key not in seen:
                with tempfile.TemporaryDirectory() as folder:
                    model, tokenizer = made(size["depth"], size["width"], Path(folder, "model"))
                    method = Method(SparseGPT(), Unstructured(0.5), Uniform())
                    given = (model, tokenizer, rows(size["tokens"]), method, Memory(16), Path(folder, "out"))
                    start = time.perf_counter()
                    result = prune(*given, Passing("pruned", "layer"))
                    seen[key] = (time.perf_counter() - start, result)
            seconds, result = seen[key]
            parts = {name: result.seconds[name] for name in ("forward", "statistics", "solve")}
            share = {name: flop / parts[name] / peak for name, flop in work(result, size["tokens"]).items()}
            told = ", ".join(f"{name} {spent:.2f} s" for name, spent in parts.items())
            shares = ", ".join(f"{name} {100 * one:.0f} %" for name, one in share.items())
            print(
                f"{what} {value}: {seconds:.2f} s ({told}; of the rate {shares})",
                flush=True,
            )
            out.append({"varied": what, "value": value, "seconds": seconds, **parts, "share": share})
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = made(BASE["depth"], BASE["width"], Path(folder, "model"))
        statistics = Path(folder, "statistics")
        statistics.mkdir()
        start = time.perf_counter()
        collect(model, tokenizer, rows(BASE["tokens"]), "gram", Memory(16), statistics)
        for n in range(8):
            if n in (0, 1, 2, 4):
                print(f"sparsities {n}, propagate=dense: {time.perf_counter() - start:.2f} s", flush=True)
                out.append({"varied": "sparsities", "value": n, "seconds": time.perf_counter() - start})
            method = Method(SparseGPT(), Unstructured(0.1 + 0.1 * n), Uniform())
            prune(model, tokenizer, None, method, Memory(16), Path(folder, str(n)), Passing("dense"), statistics)
        print(f"sparsities 8, propagate=dense: {time.perf_counter() - start:.2f} s")
        out.append({"varied": "sparsities", "value": 8, "seconds": time.perf_counter() - start})
    if args.json:
        args.json.write_text(json.dumps({"rate": peak, "costs": out}))


if __name__ == "__main__":
    sys.exit(main())
