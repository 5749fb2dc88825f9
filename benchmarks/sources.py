"""What the calibration text is worth on a real model: python benchmarks/sources.py [--json FILE].

SmolLM2-135M is pruned with equal tokens of WikiText, C4, problem prompts and its own traces, by every pruner, and its
perplexity is measured on WikiText-2 (raw test) and on reasoning traces of DeepSeek-R1-Distill-Qwen-32B. The statistics of
the dense model are collected once a source and draw (propagate=dense), and every pruner and pattern reads them.
Finished cells stay in --work: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from perplexity import DATA, WIKITEXT, found
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ssgr.allocation.uniform import Uniform
from ssgr.model import Model
from ssgr.pruner import Pruner
from ssgr.pruner.alps import ALPS
from ssgr.pruner.dsnot import DSnoT
from ssgr.pruner.magnitude import Magnitude
from ssgr.pruner.ria import RIA
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.pruner.wanda import Wanda
from ssgr.records import CalibrationSet, Row
from ssgr.sampler import Decoding, Request
from ssgr.sampler.hf import HfSampler
from ssgr.sparsity import NM, Sparsity, Unstructured
from ssgr.stages import heap
from ssgr.stages.plan import Memory
from ssgr.stages.prune import Passing, prune
from ssgr.stages.solve import Method
from ssgr.stages.statistics import collect

ROOT = Path(__file__).resolve().parent.parent
PRUNERS: dict[str, Pruner] = {
    "magnitude": Magnitude(compare="row"), "wanda": Wanda(), "ria": RIA(), "dsnot": DSnoT(Wanda()), "sparsegpt": SparseGPT(),
    "alps": ALPS(),
}  # fmt: skip
PATTERNS: dict[str, Sparsity] = {"0.5": Unstructured(0.5), "2:4": NM(2, 4)}
TEXTS = {"wikitext": WIKITEXT, "traces": Path("traces", "mip_math_r1style.jsonl")}
WIKI_VALID, C4 = Path("text", "wikitext2_tokenized_valid.txt"), Path("text", "c4_sample.jsonl")
POOL = Path("problems", "gsm8k_train.jsonl")  # not an evaluation set
MEMORY = Memory(16)

Documents = list[list[int]]


def lines(data: Path, file: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in found(data, file).read_text().split("\n") if line]


def prompts(tokenizer: PreTrainedTokenizerBase, data: Path, rng: random.Random) -> Documents:
    """Problems as the model is asked them, in an order drawn by `rng`."""
    problems = [row["problem"] for row in lines(data, POOL)]
    rng.shuffle(problems)
    ask = lambda text: tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return [list(ask(text)) for text in problems[:1000]]


def traces(model: Model, tokenizer: PreTrainedTokenizerBase, asked: Documents, tokens: int, seed: int) -> Documents:
    """Prompts with the model's own answers, `tokens` of them in all at least."""
    made: Documents = []
    requests = [Request(str(i), 0, tuple(ids)) for i, ids in enumerate(asked[: tokens // 100])]
    with tqdm(total=tokens, unit=" tokens", desc="own traces") as bar:
        for batch in HfSampler(32).sample(model, tokenizer, requests, Decoding(1, 0.6, 0.95, 384, seed)):
            for trace in batch:
                made.append([*trace.prompt_ids, *trace.generated_ids])
                bar.update(len(made[-1]))
            if bar.n >= tokens:
                return made
    raise ValueError("the model's answers are too short")


def documents(source: str, model: Model, tokenizer: PreTrainedTokenizerBase, args: Any, draw: int) -> Documents:
    """The documents of a calibration source in the order of this draw."""
    rng = random.Random(draw)
    ids: Callable[[str], list[int]] = lambda text: list(tokenizer(text, verbose=False).input_ids)
    if source == "wikitext":
        articles = [text for text in found(args.data, WIKI_VALID).read_text().split("\n \n") if len(text) > 200]
        return [ids(text) for text in rng.sample(articles, len(articles))]
    if source == "c4":
        rows = lines(args.data, C4)
        return [ids(row["text"]) for row in rng.sample(rows, len(rows))]
    asked = prompts(tokenizer, args.data, rng)
    return asked if source == "prompts" else traces(model, tokenizer, asked, args.rows * args.tokens, draw)


def calibration(source: str, made: Documents, eos: int, args: Any) -> CalibrationSet:
    """Rows of equal length: the documents one after the other, cut."""
    ids = [token for document in made for token in [*document, eos]]
    if len(ids) < args.rows * args.tokens:
        raise ValueError(f"--rows {args.rows} --tokens {args.tokens}: {source} has {len(ids)} tokens; type fewer")
    rows = tuple(Row(tuple(ids[i * args.tokens : (i + 1) * args.tokens]), 0, str(i)) for i in range(args.rows))
    return CalibrationSet(source, rows, tuple((1.0,) * args.tokens for _ in rows), (), args.rows * args.tokens)


def windows(tokenizer: PreTrainedTokenizerBase, args: Any) -> dict[str, Tensor]:
    """Windows of tokens to measure on: of WikiText the first, of traces the beginnings of those of several problems."""
    wiki = tokenizer(found(args.data, WIKITEXT).read_text(), verbose=False).input_ids
    rows = {row["problem_id"]: row for row in lines(args.data, TEXTS["traces"]) if "R1-Distill" in row["model"]}
    texts = [tokenizer(f"{row['problem']}\n\n{row['response']}", verbose=False).input_ids for row in rows.values()]
    long = [ids[: args.context] for ids in texts if len(ids) >= args.context][: args.windows]
    whole = [wiki[i * args.context : (i + 1) * args.context] for i in range(args.windows)]
    return {"wikitext": torch.tensor(whole), "traces": torch.tensor(long)}


@torch.inference_mode()
def losses(folder: str | Path, ids_WT: Tensor) -> list[float]:
    """The mean loss of each window, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with heap.reused():
        return [float(cross_entropy(model(ids_T[None]).logits[0, :-1], ids_T[1:])) for ids_T in ids_WT]


def measure(args: Any) -> dict[str, dict[str, list[float]]]:
    """The losses of every cell, by "source draw pruner pattern"; those of the dense model under "dense"."""
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "losses.json"
    done: dict[str, dict[str, list[float]]] = json.loads(file.read_text()) if file.exists() else {}
    model = Model("sources", str(args.model), dtype="float32", device="cpu")
    tokenizer = model.tokenizer()
    texts = windows(tokenizer, args)

    def keep(cell: str, folder: str | Path) -> None:
        done[cell] = {name: losses(folder, ids_WT) for name, ids_WT in texts.items()}
        file.write_text(json.dumps(done))

    def cell(name: str, pruner: Pruner, pattern: str, statistics: Path | None) -> None:
        start, out = time.perf_counter(), args.work / "pruned"
        shutil.rmtree(out, ignore_errors=True)
        method = Method(pruner, PATTERNS[pattern], Uniform())
        prune(model, tokenizer, None, method, MEMORY, out, Passing("dense"), statistics)
        seconds = time.perf_counter() - start
        keep(name, out / "checkpoint")
        each = ", ".join(f"{text} {np.exp(np.mean(values)):.2f}" for text, values in done[name].items())
        print(f"{name}: {each} ({seconds:.0f} s)", file=sys.stderr, flush=True)

    if "dense" not in done:
        keep("dense", args.model)
    blind = [name for name in args.pruners if PRUNERS[name].statistic == "none"]
    for pruner in blind:
        for pattern in args.patterns:
            if (name := f"- 0 {pruner} {pattern}") not in done:
                cell(name, PRUNERS[pruner], pattern, None)
    for draw in range(args.draws):
        for source in args.sources:
            names = {(p, s): f"{source} {draw} {p} {s}" for p in args.pruners if p not in blind for s in args.patterns}
            if set(names.values()) <= done.keys():
                continue
            statistics = args.work / "statistics"
            shutil.rmtree(statistics, ignore_errors=True)
            statistics.mkdir()
            chosen = calibration(
                source, documents(source, model, tokenizer, args, draw), tokenizer.eos_token_id or 0, args
            )
            collect(model, tokenizer, chosen, "gram", MEMORY, statistics)
            for (pruner, pattern), name in names.items():
                if name not in done:
                    cell(name, PRUNERS[pruner], pattern, statistics)
    return done


def interval(cells: Sequence[Sequence[float]], base: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """exp of the mean loss, with 95 % intervals of its ratio to `base`: over draws and windows, paired by window."""
    loss_DW, base_W = np.array(cells), np.array(base)
    rng, (draws, count) = np.random.default_rng(seed), loss_DW.shape
    means = []
    for _ in range(2000):
        pick_D, pick_W = rng.integers(draws, size=draws), rng.integers(count, size=count)
        means.append((loss_DW[pick_D][:, pick_W] - base_W[pick_W]).mean())
    low, high = np.exp(np.percentile(means, [2.5, 97.5]))
    return float(np.exp(loss_DW.mean())), float(low), float(high)


def table(done: dict[str, dict[str, list[float]]], args: Any) -> str:
    """Perplexities, and in brackets the interval of their ratio to that with C4 (for C4 and magnitude: to dense)."""
    out = []
    for text in TEXTS:
        for pattern in PATTERNS:
            out += [f"{text}, {pattern}", "", f"| pruner | {' | '.join(args.sources)} |"]
            out.append("| --- " * (1 + len(args.sources)) + "|")
            for pruner in args.pruners:
                shown = []
                for source in args.sources:
                    own = ("- 0" if PRUNERS[pruner].statistic == "none" else source).split()[0]
                    cells = [
                        v[text] for k, v in done.items() if k.split()[0] == own and k.split()[2:] == [pruner, pattern]
                    ]
                    if not cells:
                        shown.append("")
                        continue
                    c4 = [
                        v[text] for k, v in done.items() if k.split()[0] == "c4" and k.split()[2:] == [pruner, pattern]
                    ]
                    dense = own in ("-", "c4") or not c4
                    value, low, high = interval(cells, done["dense"][text] if dense else np.mean(c4, 0).tolist())
                    shown.append(f"{value:.1f} [{low:.2f}, {high:.2f}]{' of dense' if dense else ''}")
                out.append(f"| {pruner} | {' | '.join(shown)} |")
            out.append("")
    dense = {text: float(np.exp(np.mean(values))) for text, values in done["dense"].items()}
    return "\n".join([*out, "dense: " + ", ".join(f"{text} {value:.2f}" for text, value in dense.items())])


def main() -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "prune" / "smollm2-float32")
    parser.add_argument("--sources", type=lambda s: s.split(","), default=["c4", "wikitext", "prompts", "traces"])
    parser.add_argument("--pruners", type=lambda s: s.split(","), default=list(PRUNERS), help="some of them")
    parser.add_argument("--patterns", type=lambda s: s.split(","), default=list(PATTERNS), help="some of them")
    parser.add_argument("--draws", type=int, default=3, help="draws of each source")
    parser.add_argument("--rows", type=int, default=16, help="calibration rows")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--windows", type=int, default=8, help="windows of each text")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "sources", help="folder for what is finished")
    args = parser.parse_args()
    if unknown := (set(args.pruners) - PRUNERS.keys()) | (set(args.patterns) - PATTERNS.keys()):
        parser.error(f"--pruners, --patterns {','.join(sorted(unknown))}: valid are {', '.join([*PRUNERS, *PATTERNS])}")
    torch.set_num_threads(args.threads)
    try:
        print(table(measure(args), args))
    except ValueError as error:
        sys.exit(f"sources: {error}")


if __name__ == "__main__":
    main()
