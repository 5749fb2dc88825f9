"""Perplexity of a checkpoint on the WikiText-2 raw test split: python benchmarks/perplexity.py DIR [--windows 32]."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
WIKITEXT = Path("text", "wikitext2_raw_test.txt")


def found(data: Path, file: Path) -> Path:
    """The place of `file` under `data`.

    Raises:
        ValueError: it is not there.
    """
    if not (data / file).is_file():
        raise ValueError(f"--data {data} has no {file}; type --data DIR, a folder that has it")
    return data / file


@torch.inference_mode()
def perplexity(folder: Path, text: Path, context: int, windows: int) -> float:
    """Perplexity of the model in `folder`, in float32, over the first `windows` windows of `context` tokens (0: all)."""
    ids_T = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text(), verbose=False).input_ids)
    ids_WT = ids_T[: len(ids_T) // context * context].view(-1, context)[: windows or None]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = sum(float(cross_entropy(model(ids_T[None]).logits[0, :-1], ids_T[1:])) for ids_T in ids_WT)
    return math.exp(total / len(ids_WT))


def main() -> None:
    """Print the perplexity."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=32, help="how many of them, from the first; 0 for all")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the data")
    args = parser.parse_args()
    try:
        print(f"{perplexity(args.model, found(args.data, WIKITEXT), args.context, args.windows):.3f}")
    except ValueError as error:
        sys.exit(f"perplexity: {error}")


if __name__ == "__main__":
    main()
