"""Prune with llm-compressor, through its public call and with its own defaults: one row at a time, block after block."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from measure import Job, measured
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def pruned(job: Job, loaded: tuple[PreTrainedModel, Any], ids: list[list[int]]) -> tuple[PreTrainedModel, Any]:
    """Prune every linear layer but the head, which none of the engines prunes."""
    model, tokenizer = loaded
    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[job.pruner]
    structure = {"mask_structure": f"{job.m - job.n}:{job.m}"} if job.m else {}
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=rows,
        recipe=kind(sparsity=job.ratio, ignore=["re:.*lm_head"], **structure),
        num_calibration_samples=len(ids),
        max_seq_length=max(map(len, ids)),
    )
    return loaded


def save(job: Job, loaded: tuple[PreTrainedModel, Any]) -> None:
    """Save in plain form."""
    model, tokenizer = loaded
    model.save_pretrained(job.checkpoint, save_compressed=False)
    tokenizer.save_pretrained(job.checkpoint)


measured(
    load=lambda job: (
        AutoModelForCausalLM.from_pretrained(job.model, dtype="auto"),
        AutoTokenizer.from_pretrained(job.model),
    ),
    prune=pruned,
    save=save,
    packages=["torch", "transformers", "llmcompressor"],
)
