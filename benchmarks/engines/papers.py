"""Prune with the code of the papers: prune_wanda and prune_sparsegpt of locuslab/wanda, as they stand.

Around them only what a CPU and today's transformers need: our rows in place of a download, no CUDA, and for each block
the position embeddings, which transformers computed inside the blocks when that code was written.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from measure import Job, measured
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "build" / "peers" / "wanda"))
from lib import prune as papers


def pruned(job: Job, model: PreTrainedModel, ids: list[list[int]]) -> PreTrainedModel:
    """Prune with the settings of the papers' main script."""
    rows = [(torch.tensor([row]),) for row in ids]
    prepare = papers.prepare_calibration_input

    def as_many_as_there_are(*given: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        inputs, outputs, mask, positions = prepare(*given)  # it always makes room for 128
        return inputs[: len(ids)].clone(), outputs[: len(ids)].clone(), mask, positions

    papers.get_loaders = lambda *given, **named: (rows, None)
    papers.prepare_calibration_input = as_many_as_there_are
    torch.cuda.synchronize = lambda: None
    model.seqlen, model.hf_device_map = len(ids[0]), {}
    positions = torch.arange(model.seqlen)[None]
    rotary = model.model.rotary_emb(torch.empty(0, dtype=model.dtype), positions)

    def with_rotary(block: torch.nn.Module, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return given, {"position_embeddings": rotary} | named

    for block in model.model.layers:
        block.register_forward_pre_hook(with_rotary, with_kwargs=True)
    args = Namespace(nsamples=len(ids), seed=0, sparsity_ratio=job.ratio, use_variant=False)
    prune = {"wanda": papers.prune_wanda, "sparsegpt": papers.prune_sparsegpt}[job.pruner]
    prune(args, model, None, torch.device("cpu"), prune_n=job.m - job.n, prune_m=job.m)
    return model


def save(job: Job, model: PreTrainedModel) -> None:
    """Save as the papers' main script does."""
    model.save_pretrained(job.checkpoint)
    AutoTokenizer.from_pretrained(job.model).save_pretrained(job.checkpoint)


measured(
    load=lambda job: AutoModelForCausalLM.from_pretrained(job.model, dtype="auto").eval(),
    prune=pruned,
    save=save,
    packages=["torch", "transformers"],
)
