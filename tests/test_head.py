"""The output layer, pruned where it is asked for by name: its inputs are what the whole model brings to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerBase,
)  # fmt: skip

from ssgr.allocation.owl import OWL
from ssgr.model import Model
from ssgr.pruner.magnitude import Magnitude
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.pruner.wanda import Wanda
from ssgr.records import CalibrationSet
from ssgr.sparsity import Unstructured
from ssgr.stages import activations
from ssgr.stages import prune as prune_stage
from ssgr.stages.plan import Memory
from ssgr.stages.prune import Passing
from ssgr.stages.solve import Method
from ssgr.stages.statistics import collect
from tests.test_prune import calibration, prune, uniform

SIZE = {"vocab_size": 64, "hidden_size": 32, "tie_word_embeddings": False}
FEW = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZE, **FEW))


def phi3() -> nn.Module:
    return Phi3ForCausalLM(Phi3Config(**SIZE, **FEW, pad_token_id=0, bos_token_id=0, eos_token_id=0))


def gemma3() -> nn.Module:  # scales its embeddings
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZE, **FEW, head_dim=8, sliding_window=6))


def bloom() -> nn.Module:  # its blocks return tuples
    return BloomForCausalLM(BloomConfig(**SIZE, n_layer=2, n_head=4))


@torch.no_grad()
def naive(model: nn.Module, cal: CalibrationSet, w_OI: Tensor) -> Tensor:
    """Wanda's mask of the output layer `w_OI`, from the model run whole in float64, a row at a time."""
    model = model.double()
    square = torch.zeros(w_OI.shape[1], dtype=torch.float64)

    def hear(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        square.add_(args[0][0].square().sum(0))

    handle = model.lm_head.register_forward_pre_hook(hear)
    for row in cal.rows:
        model(input_ids=torch.tensor([row.ids]))
    handle.remove()
    score = w_OI.double().abs() * square.sqrt()
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, score.argsort(1)[:, : score.shape[1] // 2], False)


@pytest.mark.parametrize("make", [llama, phi3, gemma3, bloom])
@pytest.mark.parametrize("batch", [1, 2048])
@pytest.mark.parametrize("order", ["layer", "block"])
@pytest.mark.parametrize("include", [("lm_head",), ("*", "lm_head")], ids=["head", "all"])
def test_the_output_layer_is_pruned_by_what_enters_it(
    include: tuple[str, ...], order: str, batch: int, make: Callable[[], nn.Module],
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    model, cal = make().eval(), calibration()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    head_OI = model.lm_head.weight.detach().clone()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(activations, "_BATCH_TOKENS", batch)
    how = Passing("pruned", order)  # type: ignore[arg-type]
    result = prune(model, tokenizer, cal, Wanda(include=include), Unstructured(0.5), tmp_path, passing=how)  # type: ignore[arg-type]
    found_OI = model.lm_head.weight.detach().clone()
    model.lm_head.weight.data = head_OI  # the blocks as they were pruned, if they were
    assert torch.equal(found_OI != 0, naive(model, cal, head_OI))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.float(), before[name])}
    assert ("*" in include) == bool(changed)
    assert all("norm" not in name and "embed" not in name for name in changed)
    last = result.layers[-1]
    assert last.name == "lm_head" and last.sparsity == 0.5 and last.error is not None and 0 < last.error < 1
    zeros = sum(int((p == 0).sum()) for name, p in model.named_parameters() if name in changed)
    whole = sum(p.numel() for p in model.parameters())
    assert result.sparsity_model == pytest.approx(
        zeros / (whole - head_OI.numel() - model.get_input_embeddings().weight.numel())
    )
    assert result.sparsity_with_embeddings == pytest.approx((zeros + int((found_OI == 0).sum())) / whole)


@pytest.mark.parametrize("pattern", ["lm_head", "*head"])
def test_it_stays_dense_where_it_is_excluded(pattern: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = llama()
    before = model.lm_head.weight.detach().clone()
    pruner = Wanda(include=("*", "lm_head"), exclude=(pattern,))
    result = prune(model, tokenizer, calibration(), pruner, Unstructured(0.5), tmp_path)
    assert torch.equal(model.lm_head.weight, before) and not any(layer.name == "lm_head" for layer in result.layers)


def test_it_is_pruned_without_rows_too(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = llama()
    prune(model, tokenizer, None, Magnitude(include=("lm_head",)), Unstructured(0.5), tmp_path)  # type: ignore[arg-type]
    assert float((model.lm_head.weight == 0).double().mean()) == 0.5


def test_a_killed_prune_ends_with_the_same_output_layer(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama().save_pretrained(tmp_path / "source")
    model, method = (
        Model("m", str(tmp_path / "source"), device="cpu"),
        uniform(SparseGPT(include=("*", "lm_head")), Unstructured(0.5)),
    )
    prune_stage.prune(model, tokenizer, calibration(), method, Memory(1), tmp_path / "whole")
    real, seen = prune_stage.Solver.block, []

    def once(self: object, i: int, *rest: object) -> object:
        seen.append(i)
        if i == 2:
            raise KeyboardInterrupt
        return real(self, i, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(prune_stage.Solver, "block", once)
    with pytest.raises(KeyboardInterrupt):
        prune_stage.prune(model, tokenizer, calibration(), method, Memory(1), tmp_path / "killed")
    monkeypatch.setattr(prune_stage.Solver, "block", real)
    prune_stage.prune(model, tokenizer, calibration(), method, Memory(1), tmp_path / "killed")
    assert 2 in seen
    for file in (tmp_path / "whole" / "checkpoint").glob("*.safetensors"):
        other = load_file(tmp_path / "killed" / "checkpoint" / file.name)
        assert all(torch.equal(value, other[name]) for name, value in load_file(file).items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "killed" / "checkpoint")


def test_what_cannot_be_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tied = LlamaForCausalLM(LlamaConfig(**{**SIZE, **FEW, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"lm_head of LlamaForCausalLM is its token embeddings, which stay dense"):
        prune_stage.check(tied, Wanda(include=("lm_head",)), Unstructured(0.5))
    with pytest.raises(ValueError, match=r"'head' matches no layer; layers are lm_head, "):
        prune_stage.check(llama(), Wanda(include=("head",)), Unstructured(0.5))  # type: ignore[arg-type]
    llama().save_pretrained(tmp_path / "source")
    model, statistics = Model("m", str(tmp_path / "source"), device="cpu"), tmp_path / "statistics"
    statistics.mkdir()
    collect(model, tokenizer, calibration(), "gram", Memory(1), statistics)
    method = Method(Wanda(include=("*", "lm_head")), Unstructured(0.5), OWL())
    with pytest.raises(ValueError, match=r"output layer is not among the stored statistics.*type propagate=pruned"):
        prune_stage.prune(model, tokenizer, calibration(), method, Memory(1), tmp_path / "out", statistics=statistics)


def test_a_star_leaves_it_dense(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = llama()
    before = model.lm_head.weight.detach().clone()
    prune(model, tokenizer, calibration(), Wanda(include=("*",)), Unstructured(0.5), tmp_path)  # type: ignore[arg-type]
    assert torch.equal(model.lm_head.weight, before)
