"""Wanda++: gradients of each row, against a walk in float64 that takes them one row at a time with autograd."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ssgr.pruner.dsnot import DSnoT
from ssgr.pruner.wandapp import WandaPP
from ssgr.records import CalibrationSet
from ssgr.sparsity import NM, Sparsity, Unstructured
from ssgr.stages import activations
from ssgr.stages import prune as prune_stage
from ssgr.stages.prune import Passing
from tests.conftest import random_model
from tests.test_prune import calibration, prune
from tests.test_pruners import naive_keep


def naive(model: nn.Module, cal: CalibrationSet, sparsity: Sparsity, alpha: float) -> dict[str, Tensor]:
    """The masks: for each block, a hook on its output, and the gradients of one row of the whole model at a time."""
    model = copy.deepcopy(model).double()
    keep: dict[str, Tensor] = {}
    out: list[Tensor] = []
    for i, block in enumerate(model.model.layers):
        linear = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        square = {name: torch.zeros_like(m.weight) for name, m in linear.items()}
        norm = {name: torch.zeros(m.in_features, dtype=torch.float64) for name, m in linear.items()}
        handles = [block.register_forward_hook(lambda m, a, o: out.append(o[0] if isinstance(o, tuple) else o))]
        for name, m in linear.items():

            def hear(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                norm[name] += (args[0][0].detach() ** 2 * w_T[:, None]).sum(0)  # noqa: B023

            handles.append(m.register_forward_pre_hook(hear))
        for row, weights in zip(cal.rows, cal.weights, strict=True):
            w_T = torch.tensor(weights).double()
            model(input_ids=torch.tensor([row.ids]), use_cache=False)
            loss = (out.pop().reshape(len(row.ids), -1) * w_T.sqrt()[:, None]).norm()
            for name, grad in zip(linear, torch.autograd.grad(loss, [m.weight for m in linear.values()]), strict=True):
                square[name] += grad**2
        for handle in handles:
            handle.remove()
        for name, m in linear.items():
            rows = len(cal.rows)
            score = (alpha * (square[name] / rows).sqrt() + (norm[name] / rows).sqrt()) * m.weight.detach().abs()
            keep[f"model.layers.{i}.{name}"] = naive_keep(score, sparsity, "row")
            m.weight.data *= keep[f"model.layers.{i}.{name}"]
    return keep


@pytest.mark.parametrize("scope", ["both", "response"])
@pytest.mark.parametrize("batch", [1, 100, 4096])
@pytest.mark.parametrize("sparsity", [Unstructured(0.5), NM(2, 4)], ids=["0.5", "2:4"])
def test_masks_are_those_of_autograd_row_by_row(
    sparsity: Sparsity, batch: int, scope: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, cal = random_model(), calibration(scope)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    want = naive(model, cal, sparsity, 100.0)
    other = naive(model, cal, sparsity, 0.0)
    monkeypatch.setattr(activations, "_BATCH_TOKENS", batch)
    result = prune(model, tokenizer, cal, WandaPP(), sparsity, tmp_path, passing=Passing("pruned", "layer"))
    for name, mask in want.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask), name
    assert any(not torch.equal(mask, other[name]) for name, mask in want.items()), "the gradients change nothing"
    assert all(layer.error is not None and 0 < layer.error < 1 for layer in result.layers)


def test_held_out_rows_change_no_mask(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    cal, masks = calibration(), []
    for held_out in ((), calibration(seed=1, rows=4).rows):
        model = random_model()
        result = prune(
            model,
            tokenizer,
            replace(cal, held_out=held_out),
            WandaPP(),
            Unstructured(0.5),
            tmp_path / str(len(held_out)),
        )
        masks.append({name: p != 0 for name, p in model.named_parameters()})
        assert (result.layers[0].error_held_out is not None) == bool(held_out)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_experts_negative_alpha_and_a_base_of_dsnot_are_refused() -> None:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with pytest.raises(ValueError, match=r"wandapp needs gradients.*experts; type pruner=wanda.*exclude=\[\"mlp"):
        prune_stage.check(model, WandaPP(), Unstructured(0.5))
    prune_stage.check(model, WandaPP(exclude=("mlp.*",)), Unstructured(0.5))
    with pytest.raises(ValueError, match=r"alpha=-1"):
        WandaPP(alpha=-1)
    with pytest.raises(ValueError, match="base=wandapp needs gradients"):
        DSnoT(WandaPP())


def test_the_model_is_left_as_transformers_loads_it(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = random_model()
    prune(model, tokenizer, calibration(), WandaPP(), Unstructured(0.5), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert torch.isfinite(loaded(torch.tensor([[1, 2, 3]])).logits).all()
