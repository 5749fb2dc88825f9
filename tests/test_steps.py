"""One pass a block: each set of matrices is pruned before it runs, whatever the block looks like."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ssgr.model import Model
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.pruner.wanda import Wanda
from ssgr.records import CalibrationSet
from ssgr.sparsity import Unstructured
from ssgr.stages import activations
from ssgr.stages.plan import Memory
from ssgr.stages.prune import Passing, prune
from tests.conftest import random_model
from tests.test_prune import calibration, stopped_at, uniform
from tests.test_stream import weights

SETS = (  # of a Qwen2 block, in the order in which they run
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
)  # fmt: skip
ONCE = Passing("pruned", "layer")


def naive(model: nn.Module, cal: CalibrationSet) -> nn.Module:
    """Wanda in float64: for each set of each block, the whole model is run on one row at a time."""
    model = copy.deepcopy(model).double()
    for block in model.model.layers:
        for names in SETS:
            square = torch.zeros(())

            def hear(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                nonlocal square
                square = square + (args[0][0] ** 2 * w_T[:, None]).sum(0)  # noqa: B023

            handle = block.get_submodule(names[0]).register_forward_pre_hook(hear)
            for row, w in zip(cal.rows, cal.weights, strict=True):
                w_T = torch.tensor(w).double()
                with torch.no_grad():
                    model(input_ids=torch.tensor([row.ids]), use_cache=False)
            handle.remove()
            for name in names:
                layer = block.get_submodule(name)
                score = layer.weight.abs() * square.sqrt()
                drop = score.argsort(1)[:, : score.shape[1] // 2]
                layer.weight.data.scatter_(1, drop, 0)
    return model


def saved(folder: Path, layers: int = 3) -> Model:
    random_model(layers=layers).save_pretrained(folder)
    return Model("random", str(folder), device="cpu")


@pytest.mark.parametrize("batch", [1, 100, 4096])
@pytest.mark.parametrize("scope", ["both", "response"])
def test_masks_are_those_of_a_naive_walk_layer_by_layer(
    scope: str, batch: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cal = saved(tmp_path / "source"), calibration(scope)
    monkeypatch.setattr(activations, "_BATCH_TOKENS", batch)
    prune(source, tokenizer, cal, uniform(Wanda(), Unstructured(0.5)), Memory(1), tmp_path / "work", ONCE)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "checkpoint")
    want = naive(random_model(layers=3), cal)
    for (name, a), (_, b) in zip(got.named_parameters(), want.named_parameters(), strict=True):
        assert torch.equal(a != 0, b != 0), name


def test_the_rows_pass_through_a_block_once(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, counts = saved(tmp_path / "source"), {}
    monkeypatch.setattr(activations, "_BATCH_TOKENS", 64)
    through = activations.Batch.through
    for order in ("block", "layer"):
        seen: list[int] = []
        monkeypatch.setattr(
            activations.Batch, "through", lambda b, block, i, d, seen=seen: seen.append(i) or through(b, block, i, d)
        )
        method = uniform(SparseGPT(), Unstructured(0.5))
        prune(source, tokenizer, calibration(), method, Memory(1), tmp_path / order, Passing("pruned", order))  # type: ignore[arg-type]
        counts[order] = [seen.count(i) for i in range(3)]
    batches = counts["block"][2]  # the last block is only listened to
    assert batches > 3
    assert counts == {"block": [2 * batches, 2 * batches, batches], "layer": [batches + 1, batches, batches]}


def test_a_failure_leaves_no_thread_behind(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, before = saved(tmp_path / "source"), threading.active_count()
    monkeypatch.setattr(activations, "_BATCH_TOKENS", 64)

    class Fails(Wanda):
        def score(self, w_OI: Tensor, inputs: object) -> Tensor:
            if w_OI.shape[1] == 48:  # down_proj: every batch stands in the middle of the block
                raise ValueError("no")
            return super().score(w_OI, inputs)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="no"):
        prune(source, tokenizer, calibration(), uniform(Fails(), Unstructured(0.5)), Memory(1), tmp_path / "work", ONCE)
    assert threading.active_count() == before


def test_a_killed_prune_goes_on_with_the_same_bytes(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source, method = saved(tmp_path / "source", 5), uniform(SparseGPT(), Unstructured(0.5))
    prune(source, tokenizer, calibration(), method, Memory(1), tmp_path / "whole", ONCE)
    with stopped_at(3):
        prune(source, tokenizer, calibration(), method, Memory(1), tmp_path / "parts", ONCE)
    prune(source, tokenizer, calibration(), method, Memory(1), tmp_path / "parts", ONCE)
    assert weights(tmp_path / "parts" / "checkpoint") == weights(tmp_path / "whole" / "checkpoint")


def test_other_ways_are_refused() -> None:
    with pytest.raises(ValueError, match=r"order='matrix': valid choices are layer, block"):
        Passing("pruned", "matrix")  # type: ignore[arg-type]
