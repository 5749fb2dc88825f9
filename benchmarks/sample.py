"""Useful tokens a second of the hf engine and of its peers: python benchmarks/sample.py [--json FILE] [--peers generate,vllm].

A useful token is one of a response up to its own end; the prompts' forward passes are within the time. Every row has a
length of its own, at which it ends whatever it says: 256 tokens in the equal case, log-normal with median 115 and at
most 512 in the mixed one, where the logarithm deviates by 0.9, or by the number that is given as a case. A batch of
`generate` runs until its longest row ends; ours gives the place to the next prompt. `generate` samples the first batch of
the rows alone, vLLM all of them, in an environment of its own (--vllm). With --repeat engines take turns, and medians of
the rates, and of the ratios of each turn, are told. Memory is the peak of the process above what it held before, and of what its
workers have beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from perplexity import DATA, found
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from ssgr.sampler import Decoding, Request, hf
from ssgr.stages import heap

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS = Path("problems", "gsm8k_train.jsonl")
TINY = ROOT / "ssgr" / "model" / "tiny" / "weights"
TEMPERATURE, TOP_P = 0.6, 0.95


def cases(text: str) -> list[str]:
    """Names of cases; a spread must be a number."""
    found = text.split(",")
    for case in found:
        if case not in ("equal", "mixed"):
            float(case)
    return found


def peers(text: str) -> list[str]:
    """Names of peers."""
    found = [name for name in text.split(",") if name]
    if unknown := set(found) - {"generate", "vllm"}:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: type some of generate,vllm, or nothing: ''")
    return found


def lengths(case: str, count: int) -> list[int]:
    """Tokens of each response."""
    if case == "equal":
        return [256] * count
    rng, spread = random.Random(0), 0.9 if case == "mixed" else float(case)
    return [max(1, min(512, round(rng.lognormvariate(4.745, spread)))) for _ in range(count)]  # exp(4.745) = 115


def prompts(tokenizer: Any, data: Path, count: int) -> list[list[int]]:
    """Chat prompts of real problems."""
    rows = [json.loads(line)["problem"] for line in found(data, PROBLEMS).read_text().split("\n")[:count]]
    ask = lambda text: tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return [list(ask(text)) for text in rows]


def ours(model: PreTrainedModel, asked: Sequence[list[int]], tokens: Sequence[int], batch: int) -> None:
    """Decode in slots."""
    requests = [Request(str(i), 0, tuple(ids), n) for i, (ids, n) in enumerate(zip(asked, tokens, strict=True))]
    with heap.reused():
        decoded = hf.decode(model, requests, Decoding(1, TEMPERATURE, TOP_P, 512, 0), frozenset(), batch)
        made = [trace for some in decoded for trace in some]
    assert sum(len(trace.generated_ids) for trace in made) == sum(tokens)


def generate(model: PreTrainedModel, asked: Sequence[list[int]], tokens: Sequence[int], batch: int) -> None:
    """transformers' generate, batch by batch, left-padded, until the longest row of each ends."""
    pad = model.config.eos_token_id
    pad = pad[0] if isinstance(pad, list) else pad
    for first in range(0, len(asked), batch):
        some = asked[first : first + batch]
        width = max(map(len, some))
        most = max(tokens[first : first + batch])
        config = GenerationConfig(
            do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0, max_new_tokens=most, min_new_tokens=most,
            pad_token_id=pad, eos_token_id=pad,
        )  # fmt: skip
        ids_NT = torch.tensor([[pad] * (width - len(ids)) + ids for ids in some])
        mask_NT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in some])
        out = model.generate(ids_NT, attention_mask=mask_NT, generation_config=config)
        assert out.shape[1] == width + most


def vllm(args: Any, folder: Path, asked: Sequence[list[int]], tokens: Sequence[int], batch: int) -> float:
    """Seconds of vLLM, its start left out."""
    with tempfile.TemporaryDirectory() as work:
        job, out = Path(work, "job.json"), Path(work, "out.json")
        context = max(len(ids) + n for ids, n in zip(asked, tokens, strict=True))
        how = {"temperature": TEMPERATURE, "top_p": TOP_P, "batch": batch, "context": context, "dtype": args.dtype}
        job.write_text(json.dumps({"model": str(folder), "asked": list(asked), "tokens": list(tokens), **how}))
        threads = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}"}
        command = [str(args.vllm), str(ROOT / "benchmarks" / "engines" / "vllm_sample.py"), str(job), str(out)]
        done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"sample: vLLM failed:\n{done.stderr[-2000:]}")
        told = json.loads(out.read_text())
        print(f"  vllm started in {told['start']:.0f} s", flush=True)
        return float(told["seconds"])


def memory() -> float:
    """Peak memory of this process in MiB since it was last asked."""
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return peak


def timed(
    engine: Callable[..., None], model: PreTrainedModel, asked: Any, tokens: Sequence[int], batch: int
) -> tuple[float, float]:
    """Useful tokens a second, and the peak of memory above what was held before."""
    memory()
    held = memory()
    with workers_memory() as own:
        start = time.perf_counter()
        engine(model, asked, tokens, batch)
        seconds = time.perf_counter() - start
    return sum(tokens) / seconds, memory() - held + max(own)


@contextmanager
def workers_memory() -> Iterator[list[float]]:
    """MiB that the workers of this process share with nobody, looked at five times a second."""
    found, over = [0.0], threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            with suppress(psutil.NoSuchProcess):
                found.append(sum(child.memory_full_info().uss for child in psutil.Process().children()) / 2**20)

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        yield found
    finally:
        over.set()
        watch.join()


def turn(
    args: Any, model: PreTrainedModel, folder: Path, asked: Any, tokens: Sequence[int], batch: int
) -> dict[str, tuple[float, float | None]]:
    """Useful tokens a second and MiB of ours and of each peer; no MiB of vLLM, which is another process."""
    out: dict[str, tuple[float, float | None]] = {}
    for engine in ("ssgr", *args.peers):
        if engine == "vllm":
            out[engine] = sum(tokens) / vllm(args, folder, asked, tokens, batch), None
        elif engine == "generate":
            out[engine] = timed(generate, model, asked[:batch], tokens[:batch], batch)
        else:
            out[engine] = timed(ours, model, asked, tokens, batch)
        print(f"  {engine} {out[engine][0]:.0f} tokens/s", flush=True)
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "prune" / "smollm2-bfloat16")
    parser.add_argument("--tiny", action="store_true", help="the model that ships with the project")
    parser.add_argument(
        "--cases", type=cases, default=["equal", "mixed"], help="equal, mixed, or spreads such as 0,0.5"
    )
    parser.add_argument("--rows", type=int, default=64, help="of the equal case; the mixed one has twice as many")
    parser.add_argument(
        "--batches", type=lambda s: [int(n) for n in s.split(",")], default=[64], help="such as 1,16,64"
    )
    parser.add_argument("--peers", type=peers, default=["generate"], help="generate, vllm, or nothing: ''")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="of the weights: bfloat16, and float32, its own, with --tiny"
    )
    parser.add_argument("--repeat", type=int, default=1, help="turns of each engine")
    parser.add_argument(
        "--vllm", type=Path, default=ROOT / "build" / "vllm" / "bin" / "python", help="Python with vLLM"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the data")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    if args.repeat < 1:
        parser.error(f"--repeat {args.repeat}: type a number of at least 1")
    args.dtype = args.dtype or ("float32" if args.tiny else "bfloat16")
    torch.set_num_threads(args.threads)
    folder = TINY if args.tiny else args.model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()
    ratios: list[dict[str, Any]] = []
    rates: list[dict[str, Any]] = []
    for case in args.cases:
        count = args.rows * (1 if case == "equal" else 2)
        asked, tokens = prompts(tokenizer, args.data, count), lengths(case, count)
        for batch in args.batches:
            at = {"case": case, "batch": batch}
            turns = [turn(args, model, folder, asked, tokens, batch) for _ in range(args.repeat)]
            for engine in turns[0]:
                rate = statistics.median(one[engine][0] for one in turns)
                mib = max(one[engine][1] or 0.0 for one in turns) or None
                rates.append({"engine": engine, **at, "rate": rate, "mib": mib})
                told = f"{case}, batch {batch}: {engine} {rate:.0f} tokens/s" + (f", {mib:.0f} MiB" if mib else "")
                if engine != "ssgr":
                    by_turn = [one["ssgr"][0] / one[engine][0] for one in turns]
                    ratio = statistics.median(by_turn)
                    ratios.append({"peer": engine, "case": f"{case}, batch {batch}", "ratio": ratio, "turns": by_turn})
                    told += f", ratio {ratio:.2f} ({', '.join(f'{one:.2f}' for one in by_turn)})"
                print(told, flush=True)
    if args.json:
        args.json.write_text(json.dumps({"ratios": ratios, "rates": rates}))


if __name__ == "__main__":
    sys.exit(main())
