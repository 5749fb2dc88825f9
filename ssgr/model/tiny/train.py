"""Train the tiny reasoning model: python -m ssgr.model.tiny.train [--out DIR] [--seed N].

Muon (arXiv 2502.16982) for the matrices of the blocks, AdamW for embeddings and norms; loss on responses and prose
only, as in supervised fine-tuning. Everything random is a function of (seed, step), so a killed run that is started
again with the same arguments continues from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from torch.multiprocessing.spawn import ProcessExitedException, spawn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from ssgr.model.tiny import corpus, tokenizer
from ssgr.model.tiny.muon import Muon

DOCUMENTS = 56  # a step: about 6,000 tokens
MICRO_TOKENS = 600  # a micro-batch: rows of nearly equal length, so that little is padding and attention is short
RANKS = 2  # processes of one thread each: a third more tokens a second than one process of two threads
MUON_LR, ADAM_LR = 0.02, 3e-3
WARMUP_STEPS = 48
IGNORE = -100


@dataclass(frozen=True)
class Phase:
    """Steps on one mix of documents, while the learning-rate factor goes linearly from `start` to `end`."""

    steps: int
    start: float
    end: float
    mix: corpus.Mix


PHASES = (
    Phase(1300, 1.0, 1.0, corpus.WIDE),
    Phase(2100, 1.0, 0.0, corpus.SHORT),
)


def schedule(phases: Sequence[Phase]) -> list[tuple[float, corpus.Mix]]:
    """Learning-rate factor and mix of every step; the first WARMUP_STEPS rise from nothing."""
    steps = [(p.start + (p.end - p.start) * i / p.steps, p.mix) for p in phases for i in range(p.steps)]
    return [(rate * min(1.0, (step + 1) / WARMUP_STEPS), mix) for step, (rate, mix) in enumerate(steps)]


def model_config(tok: PreTrainedTokenizerFast) -> Qwen2Config:
    """The architecture: that of DeepSeek-R1-Distill-Qwen at 2.5 million parameters."""
    return Qwen2Config(
        vocab_size=len(tok),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )


def encode(tok: PreTrainedTokenizerFast, question: str | None, response: str) -> tuple[list[int], list[int]]:
    """Token ids and labels of one document; the labels of the question and of mistakes are ignored."""
    answer: list[int] = []
    labels: list[int] = []
    for i, part in enumerate(corpus.MISTAKE.split(response)):  # every second part is a mistake
        ids = cast(list[int], tok(part)["input_ids"])
        answer += ids
        labels += [IGNORE] * len(ids) if i % 2 else ids
    answer, labels = [*answer, tok.eos_token_id], [*labels, tok.eos_token_id]
    if question is None:
        return [tok.bos_token_id, *answer], [IGNORE, *labels]
    turn = [{"role": "user", "content": question}]
    prompt = cast(list[int], tok.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))
    return prompt + answer, [IGNORE] * len(prompt) + labels


def batches(
    tok: PreTrainedTokenizerFast, seed: int, step: int, mix: corpus.Mix = corpus.WIDE
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Draw the documents of one step as (ids, labels) micro-batches, each (N, T), of nearly equal lengths."""
    rng = random.Random(f"{seed}/{step}")
    documents = [encode(tok, *corpus.document(rng, mix)) for _ in range(DOCUMENTS)]
    documents.sort(key=lambda document: len(document[0]))
    out, group = [], []
    for i, document in enumerate(documents):
        group.append(document)
        if i + 1 == DOCUMENTS or (len(group) + 1) * len(documents[i + 1][0]) > MICRO_TOKENS:
            width = len(document[0])
            ids_NT = torch.tensor([ids + [tok.pad_token_id] * (width - len(ids)) for ids, _ in group])
            labels_NT = torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in group])
            out.append((ids_NT, labels_NT))
            group = []
    return out


def optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        Muon(matrices, lr=MUON_LR, momentum=0.95),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` beside `path`, then rename: a kill leaves the last whole checkpoint."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def share(
    micro: list[tuple[torch.Tensor, torch.Tensor]], rank: int, ranks: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The micro-batches of one of several processes: the largest first, each to the one with the fewest tokens."""
    loads, mine = [0] * ranks, []
    for pair in sorted(micro, key=lambda pair: -pair[0].numel()):
        to = loads.index(min(loads))
        loads[to] += pair[0].numel()
        if to == rank:
            mine.append(pair)
    return mine


def _sum_over_ranks(model: Qwen2ForCausalLM, mean: torch.Tensor) -> None:
    """Sum the gradients and the loss of all processes, in one message."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    flat = torch.cat([*(g.flatten() for g in grads), mean[None]])
    torch.distributed.all_reduce(flat)
    *parts, total = flat.split([*(g.numel() for g in grads), 1])
    for p, part in zip(model.parameters(), parts, strict=True):
        p.grad = part.view_as(p)
    mean.copy_(total[0])


def train(
    out: Path, phases: Sequence[Phase], seed: int, every: int = 50, rank: int = 0, ranks: int = 1
) -> Qwen2ForCausalLM:
    """Train through `phases`, checkpointing to `out` every `every` steps, and export the model; rank 0 writes."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    tok = tokenizer.build()
    model = Qwen2ForCausalLM(model_config(tok))
    plan = [phase.steps for phase in phases]
    rates = schedule(phases)
    steps = len(rates)
    opts = optimizers(model)
    checkpoint, first = out / "train.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if (state["seed"], state["plan"]) != (seed, plan):
            sys.exit(
                f"{checkpoint} is of another run (seed {state['seed']}, phases {state['plan']}): choose a new --out"
            )
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        first = state["step"]
        if rank == 0:
            print(f"continuing at step {first} of {steps}", flush=True)
    start, tokens = time.perf_counter(), 0
    for step in range(first, steps):
        rate, mix = rates[step]
        for opt, base in zip(opts, (MUON_LR, ADAM_LR), strict=True):
            for group in opt.param_groups:
                group["lr"] = base * rate
        micro = batches(tok, seed, step, mix)
        tokens += sum(ids_NT.numel() for ids_NT, _ in micro)
        targets = sum(int((labels_NT != IGNORE).sum()) for _, labels_NT in micro)
        mean = torch.zeros(())
        for ids_NT, labels_NT in share(micro, rank, ranks):
            logits_NTV = model(input_ids=ids_NT[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits_NTV.flatten(0, 1), labels_NT[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
            )
            (loss / targets).backward()
            mean += loss.detach() / targets
        if ranks > 1:
            _sum_over_ranks(model, mean)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        done = step + 1
        if rank == 0 and (done % 20 == 0 or done == steps):
            seconds = time.perf_counter() - start
            left = seconds / (done - first) * (steps - done) / 60
            print(
                f"step {done}/{steps}  loss {mean:.4f}  {tokens / seconds:,.0f} tokens/s  ETA {left:.0f} min",
                flush=True,
            )
        if rank == 0 and (done % every == 0 or done == steps):
            states = [opt.state_dict() for opt in opts]
            save(checkpoint, dict(model=model.state_dict(), optimizers=states, step=done, plan=plan, seed=seed))
    if rank == 0:
        export(model, tok, out)
    return model


def _work(rank: int, out: Path, phases: Sequence[Phase], seed: int, ranks: int, meeting: str) -> None:
    """One of several training processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    try:
        train(out, phases, seed, rank=rank, ranks=ranks)
    finally:
        torch.distributed.destroy_process_group()


def launch(out: Path, phases: Sequence[Phase], seed: int, ranks: int) -> None:
    """Train in `ranks` processes of one thread each, which share the micro-batches of every step."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_work, (out, phases, seed, ranks, f"{folder}/meeting"), ranks)
        except ProcessExitedException as stop:  # it said why
            sys.exit(stop.exit_code)


def export(model: Qwen2ForCausalLM, tok: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the bfloat16 model, tokenizer and generation defaults to `out` in Hugging Face form."""
    torch.nn.Module.to(model, torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    model.save_pretrained(out)
    tok.save_pretrained(out)
    settings = out / "tokenizer_config.json"  # AutoTokenizer 5.19 goes by the model's type all the same
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))
    print(f"wrote {out}: {json.dumps({p.name: p.stat().st_size for p in sorted(out.glob('*.*'))})}")


def main() -> None:
    """Command line of the recipe; the defaults are those of the shipped weights."""
    parser = argparse.ArgumentParser(description="Train the tiny reasoning model that ships with ssgr.")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/tiny"), help="where checkpoint and model go (outputs/tiny)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the data (0)")
    parser.add_argument("--ranks", type=int, default=RANKS, help=f"processes of one thread each ({RANKS})")
    args = parser.parse_args()
    launch(args.out, PHASES, args.seed, args.ranks)


if __name__ == "__main__":
    main()
