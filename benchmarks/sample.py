"""Useful tokens a second of the hf engine and of its peers: python benchmarks/sample.py [--json FILE].

A useful token is one of a response up to its own end; the prompts' forward passes are within the time. Every row has a
length of its own, at which it ends whatever it says: 256 tokens in the equal case, log-normal with median 115 and at most
512 in the mixed one. A batch of `generate` runs until its longest row ends; ours gives the place to the next prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from perplexity import DATA, found
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from ssgr.sampler import Decoding, Request, slots
from ssgr.stages import heap

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS = Path("problems", "gsm8k_train.jsonl")
TINY = ROOT / "ssgr" / "model" / "tiny" / "weights"
TEMPERATURE, TOP_P = 0.6, 0.95


def lengths(case: str, count: int) -> list[int]:
    """Tokens of each response."""
    if case == "equal":
        return [256] * count
    rng = random.Random(0)
    return [max(1, min(512, round(rng.lognormvariate(4.745, 0.9)))) for _ in range(count)]  # exp(4.745) = 115


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
        decoded = slots.decode(model, requests, Decoding(1, TEMPERATURE, TOP_P, 512, 0), frozenset(), batch)
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


def rate(engine: Callable[..., None], model: PreTrainedModel, asked: Any, tokens: Sequence[int], batch: int) -> float:
    """Useful tokens a second."""
    start = time.perf_counter()
    engine(model, asked, tokens, batch)
    return sum(tokens) / (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "prune" / "smollm2-float32")
    parser.add_argument("--tiny", action="store_true", help="the model that ships with the project")
    parser.add_argument("--cases", type=lambda s: s.split(","), default=["equal", "mixed"])
    parser.add_argument("--rows", type=int, default=64, help="of the equal case; the mixed one has twice as many")
    parser.add_argument(
        "--batches", type=lambda s: [int(n) for n in s.split(",")], default=[64], help="such as 1,16,64"
    )
    parser.add_argument("--peers", type=lambda s: [n for n in s.split(",") if n], default=["generate"])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the data")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = TINY if args.tiny else args.model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ratios, rates = [], []
    for case in args.cases:
        count = args.rows * (1 if case == "equal" else 2)
        asked, tokens = prompts(tokenizer, args.data, count), lengths(case, count)
        for batch in args.batches:
            mine = rate(ours, model, asked, tokens, batch)
            rates.append({"engine": "ssgr", "case": case, "batch": batch, "rate": mine})
            print(f"{case}, batch {batch}: ssgr {mine:.0f} tokens/s", flush=True)
            for peer in args.peers:
                other = rate({"generate": generate}[peer], model, asked[:batch], tokens[:batch], batch)
                rates.append({"engine": peer, "case": case, "batch": batch, "rate": other})
                ratios.append({"peer": peer, "case": f"{case}, batch {batch}", "ratio": mine / other})
                print(f"{case}, batch {batch}: {peer} {other:.0f} tokens/s, ratio {mine / other:.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"ratios": ratios, "rates": rates}))


if __name__ == "__main__":
    sys.exit(main())
