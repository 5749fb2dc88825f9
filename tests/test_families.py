"""Every family of decoders, pruned from disk to disk, against an un-streamed naive walk over transformers' own model.

The naive walk runs in float64, one row at a time, the whole model for every block, with hooks on the modules that
transformers runs; stacked experts are computed again in plain loops.

Shapes: T tokens, I inputs, O outputs, K experts a token; of one expert T are the tokens that it is given.
"""

from __future__ import annotations

import copy
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from ssgr.model import Model
from ssgr.model.blocks import decoder_blocks, matrices
from ssgr.model.checkpoint import Checkpoint
from ssgr.model.layout import Layout
from ssgr.pruner import Pruner
from ssgr.pruner.alps import ALPS
from ssgr.pruner.dsnot import DSnoT
from ssgr.pruner.ria import RIA
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.pruner.wanda import Wanda
from ssgr.records import CalibrationSet, PruneResult, Row
from ssgr.scope import BOTH
from ssgr.sparsity import NM, Sparsity, Unstructured
from ssgr.stages import activations
from ssgr.stages.collect import Collector, Stream
from ssgr.stages.plan import Memory, plan
from ssgr.stages.prune import Passing, check, prune
from ssgr.stages.ranks import Ranks
from ssgr.stages.statistics import collect
from ssgr.stages.walk import Walk
from tests.test_prune import PUBLISHED, uniform
from tests.test_pruners import naive_alps, naive_keep, naive_ria, naive_sparsegpt

HALF = Unstructured(0.5)
Order = Literal["layer", "block"]
SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LINEAR = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class Family:
    """A kind of decoder: its configuration, what of its blocks stays dense, and how it is stored."""

    kind: str
    own: Mapping[str, Any] = field(default_factory=dict)
    dense: tuple[str, ...] = ()  # what stays: weights inside a block that choose experts or convolve
    routers: tuple[str, ...] = ()  # those that are linear layers, and so may be named
    shard: str = "5GB"
    blocks: str = "model.layers"
    transposed: bool = False  # the stacked experts are (I, O)
    seed: int = (
        0  # such that the scores on both sides of every threshold differ by 4e-5 or more: float32 tells them apart
    )

    def model(self) -> PreTrainedModel:
        """A random one, in which no block is near the identity and no router near a tie."""
        torch.manual_seed(self.seed)
        config = AutoConfig.for_model(self.kind, **(SIZE | dict(self.own)))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, param in model.named_parameters():
            param.data += (1.0 if name.endswith(self.dense) else 0.3) * torch.randn_like(param)
        for name, buffer in model.named_buffers():
            if name in model.state_dict() and buffer.is_floating_point():
                buffer.copy_(0.1 * torch.randn_like(buffer))
        return model  # type: ignore[no-any-return]


FAMILIES = {
    "llama": Family("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}}, shard="20KB", seed=3),
    "smollm2": Family("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen2": Family("qwen2", {"tie_word_embeddings": True}, shard="20KB", seed=3),
    "qwen3": Family("qwen3", {"head_dim": 16}, seed=2),
    "mistral": Family("mistral", {"sliding_window": 6, "head_dim": 8}),
    "gemma2": Family("gemma2", {"sliding_window": 6, "head_dim": 8, "attn_logit_softcapping": 2.0}),
    "gemma3": Family("gemma3_text", {"sliding_window": 6, "head_dim": 8, "layer_types": [
        "sliding_attention", "sliding_attention", "full_attention"]}),
    "phi3": Family("phi3", {"partial_rotary_factor": 0.5}, seed=1),
    "olmo2": Family("olmo2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "gpt2": Family("gpt2", {"n_inner": 48}, blocks="transformer.h", seed=1),
    "bloom": Family("bloom", blocks="transformer.h"),
    "qwen3_moe": Family("qwen3_moe", {**MOE, "mlp_only_layers": [1]}, ("mlp.gate.weight",), shard="20KB", seed=2),
    "mixtral": Family("mixtral", {"num_local_experts": 4, "intermediate_size": 16, "sliding_window": 6},
        ("mlp.gate.weight", "block_sparse_moe.gate.weight")),
    "qwen2_moe": Family("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 24},
        ("mlp.gate.weight", "shared_expert_gate.weight"), ("mlp.shared_expert_gate",)),
    "phimoe": Family("phimoe", {"num_local_experts": 4, "intermediate_size": 16}, (
        "mlp.router.weight", "block_sparse_moe.gate.weight"), ("mlp.router",)),
    "olmoe": Family("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}, ("mlp.gate.weight",), seed=1),
    "deepseek_v3": Family("deepseek_v3", {
        "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
        "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1}, ("mlp.gate.weight",)),
    "gpt_oss": Family("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16,
        "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4}, ("mlp.router.weight",), transposed=True, seed=2),
    "qwen3_next": Family("qwen3_next", {**MOE, **LINEAR, "num_experts": 8, "num_experts_per_tok": 3,  # 8 of other things too
        "num_key_value_heads": 1, "shared_expert_intermediate_size": 8},
        ("mlp.gate.weight", "shared_expert_gate.weight", "conv1d.weight"), ("mlp.shared_expert_gate",), seed=2),
    "nemotron_h": Family("nemotron_h", {"layers_block_type": ["mamba", "attention", "moe", "mlp"], "num_hidden_layers": 4,
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "n_routed_experts": 4, "head_dim": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
        ("mixer.gate.weight", "conv1d.weight"), seed=1),
}  # fmt: skip
ODD = {
    "gemma3n": Family("gemma3n_text", {  # several hidden states, inputs of each block's own, keys of an earlier block
        "head_dim": 8, "num_kv_shared_layers": 2, "num_hidden_layers": 4, "sliding_window": 6, "altup_num_inputs": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "vocab_size_per_layer_input": 64, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]}),
    "gemma4": Family("gemma4_text", {  # the same of E2B and E4B, whose states are cut, by nothing, before those without keys
        "head_dim": 8, "global_head_dim": 16, "num_kv_shared_layers": 2, "num_hidden_layers": 4, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64}),
    "bamba": Family("bamba", {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
        "attn_layer_indices": [1]}, ("conv1d.weight",)),  # blocks return pairs
    "openai-gpt": Family("openai-gpt", blocks="transformer.h"),  # blocks return lists
    "gpt_neox": Family("gpt_neox", blocks="gpt_neox.layers", seed=1),  # attention and perceptron side by side
}  # fmt: skip
ONE = {"phi3 of one block": Family("phi3", {"partial_rotary_factor": 0.5, "num_hidden_layers": 1}, seed=1)}
EVERY = pytest.mark.parametrize("family", (FAMILIES | ODD).values(), ids=FAMILIES | ODD)


def weighted(seed: int = 0) -> CalibrationSet:
    """Random ragged rows; tokens weigh 0, 0.5, 1 or 2, those at the end of some rows and all of one row nothing."""
    rng = random.Random(seed)
    rows = tuple(Row(tuple(rng.choices(range(64), k=rng.randrange(8, 40))), 5, str(i)) for i in range(14))
    weights = [[rng.choice((0.0, 0.5, 1.0, 2.0)) for _ in row.ids] for row in rows]
    weights[3][-4:], weights[5] = [0.0] * 4, [0.0] * len(rows[5])
    return CalibrationSet("test", rows, tuple(map(tuple, weights)), (), 0)


def pruned(
    family: Family, model: PreTrainedModel, cal: CalibrationSet, pruner: Pruner, sparsity: Sparsity,
    tokenizer: PreTrainedTokenizerBase, folder: Path, statistics: Path | None = None, order: Order = "block",
) -> tuple[PreTrainedModel, PruneResult]:  # fmt: skip
    """What the checkpoint holds after `model` was saved in `folder`/source and pruned into `folder`/work."""
    model.save_pretrained(folder / "source", max_shard_size=family.shard)
    source = Model("random", str(folder / "source"), dtype="float32", device="cpu")
    passing = Passing("dense" if statistics else "pruned", order)
    method = uniform(pruner, sparsity)
    result = prune(source, tokenizer, cal, method, Memory(1), folder / "work", passing, statistics)
    return reloaded(folder / "work" / "checkpoint"), result


def reloaded(folder: Path) -> PreTrainedModel:
    """The checkpoint in `folder`, as anyone would load it."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    return model  # type: ignore[no-any-return]


Solve = Callable[[Tensor, Tensor], Tensor]  # from a matrix (O, I) and what enters it (T, I) to the pruned matrix


def wanda(w_OI: Tensor, x_TI: Tensor) -> Tensor:
    order_OI = (w_OI.abs() * x_TI.square().sum(0).sqrt()).argsort(1)
    return w_OI.scatter(1, order_OI[:, : w_OI.shape[1] // 2], 0)


SOLVES: dict[str, tuple[Pruner, Sparsity, Solve]] = {
    "wanda": (Wanda(), HALF, wanda),
    "sparsegpt": (SparseGPT(), HALF, lambda w, x: naive_sparsegpt(w, x, HALF, 128, 0.01)),
    "wanda 2:4": (Wanda(), NM(2, 4), lambda w, x: w * naive_keep(w.abs() * x.square().sum(0).sqrt(), NM(2, 4), "row")),
    "sparsegpt 2:4": (SparseGPT(), NM(2, 4), lambda w, x: naive_sparsegpt(w, x, NM(2, 4), 128, 0.01)),
    "ria": (RIA(), HALF, lambda w, x: w * naive_keep(naive_ria(w, x), HALF, "layer")),
    "alps": (ALPS(), HALF, lambda w, x: naive_alps(w, x, HALF)),
}


class Naive:
    """A float64 copy of `model`, pruned block by block with the whole of it run for each."""

    def __init__(self, family: Family, model: PreTrainedModel) -> None:
        self.family, self.model = family, copy.deepcopy(model).double()
        self.model.set_attn_implementation("eager")
        self.model.set_experts_implementation("eager")
        self.blocks = self.model.get_submodule(family.blocks)
        self.unseen = 0

    def matrices(self, block: nn.Module) -> dict[str, Tensor]:
        """Every matrix that is to be pruned, as a view (O, I)."""
        out = {}
        for name, module in block.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and not f".{name}.weight".endswith(self.family.dense):
                out[name] = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
            for leaf, param in module.named_parameters(recurse=False):
                if param.ndim == 3 and not isinstance(module, nn.Conv1d):
                    views = [p.T if self.family.transposed else p for p in param.data]
                    out |= {f"{name}.{e}.{leaf}": view for e, view in enumerate(views)}
        return out

    def heard(self, block: nn.Module, cal: CalibrationSet) -> dict[str, Tensor]:
        """What enters every matrix of `block` (T, I), each token times the root of its weight."""
        parts: dict[str, list[Tensor]] = defaultdict(list)
        matrices = self.matrices(block)
        weight_T = torch.empty(0)

        def hear(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                parts[name].append(args[0].reshape(len(weight_T), -1) * weight_T.sqrt()[:, None])

            return hook

        def hear_experts(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                hidden_TI, chosen_TK = args[0].reshape(len(weight_T), -1), args[1].tolist()
                for e in range(len(module.down_proj)):  # type: ignore[arg-type]
                    tokens = [t for t, chosen in enumerate(chosen_TK) if e in chosen]
                    x_TI, root_T1 = hidden_TI[tokens], weight_T[tokens, None].sqrt()
                    first = next(own for own in (f"{name}.{e}.gate_up_proj", f"{name}.{e}.up_proj") if own in matrices)
                    y_TI = self.gated(module, e, x_TI @ matrices[first].T)
                    parts[first].append(x_TI * root_T1)
                    parts[f"{name}.{e}.down_proj"].append(y_TI * root_T1)

            return hook

        handles = []
        for name, module in block.named_modules():
            if name in matrices:
                handles.append(module.register_forward_pre_hook(hear(name)))
            elif f"{name}.0.down_proj" in matrices:
                handles.append(module.register_forward_pre_hook(hear_experts(name)))
        for row, weights in zip(cal.rows, cal.weights, strict=True):
            weight_T = torch.tensor(weights, dtype=torch.float64)
            self.model(input_ids=torch.tensor([row.ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        heard = {name: torch.cat(part) for name, part in parts.items()}
        return {name: x_TI[(x_TI != 0).any(1)] for name, x_TI in heard.items()}

    def gated(self, experts: Any, e: int, y_TO: Tensor) -> Tensor:
        """What lies between the two matrices of an expert."""
        if self.family.transposed:  # gate and up take turns, as the one family that stores them so has them
            y_TO = y_TO + experts.gate_up_proj_bias[e]
            gate_TI, up_TI = y_TO[:, ::2].clamp(max=7.0), y_TO[:, 1::2].clamp(-7.0, 7.0)
            return (up_TI + 1) * gate_TI * torch.sigmoid(1.702 * gate_TI)
        gate_TI, up_TI = y_TO.chunk(2, 1) if hasattr(experts, "gate_up_proj") else (y_TO, torch.ones(()))
        out_TI: Tensor = experts.act_fn(gate_TI) * up_TI
        return out_TI

    @torch.no_grad()
    def prune(self, cal: CalibrationSet, solve: Solve, order: Order | Literal["dense"] = "block") -> PreTrainedModel:
        """Prune every block from what its matrices are given, by the pruned blocks before it or by the dense ones."""
        dense = [self.heard(block, cal) for block in self.blocks] if order == "dense" else []
        for i, block in enumerate(self.blocks):
            for names in self.sets(block, cal) if order == "layer" else [set(self.matrices(block))]:
                heard = dense[i] if dense else self.heard(block, cal)
                for name, w_OI in self.matrices(block).items():
                    if name in names and name in heard and len(heard[name]):
                        w_OI.copy_(solve(w_OI, heard[name]))
                    elif name in names:
                        self.unseen += 1
                        w_OI.copy_(w_OI.scatter(1, w_OI.abs().argsort(1)[:, : w_OI.shape[1] // 2], 0))
        return self.model

    def sets(self, block: nn.Module, cal: CalibrationSet) -> list[set[str]]:
        """The matrices that are given the same tensor, set by set as they run; all at once where there are experts."""
        left = set(self.matrices(block))
        if any(name not in dict(block.named_modules()) for name in left):
            return [left]
        given: list[Tensor] = []
        out: list[set[str]] = []

        def hear(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                if not given or given[-1] is not args[0]:
                    given.append(args[0])
                    out.append(set())
                out[-1].add(name)

            return hook

        handles = [block.get_submodule(name).register_forward_pre_hook(hear(name)) for name in left]
        self.model(input_ids=torch.tensor([cal.rows[0].ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        return [*out, left - set().union(*out)]


def alike(got: PreTrainedModel, want: PreTrainedModel, tolerance: float, flips: float = 0.0) -> None:
    """See that both have the same zeros, but for a share `flips`, and the same weights up to `tolerance` of the largest."""
    assert [name for name, _ in got.named_parameters()] == [name for name, _ in want.named_parameters()]
    for (name, a), (_, b) in zip(got.named_parameters(), want.named_parameters(), strict=True):
        wrong = (a == 0) != (b == 0)
        assert int(wrong.sum()) <= flips * a.numel(), f"{name}: {int(wrong.sum())} of {a.numel()}"
        assert bool((a - b)[~wrong].abs().max() <= tolerance * b.abs().max()), name


def tensors(folder: Path) -> dict[str, tuple[str, Tensor]]:
    """Every stored tensor, with its file."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:  # type: ignore[no-untyped-call]
            out |= {name: (file.name, stored.get_tensor(name)) for name in stored.keys()}  # noqa: SIM118
    return out


def see_disk(family: Family, folder: Path) -> None:
    """See that only the matrices of the blocks differ from the source, and that all lies where it lay."""
    before, after = tensors(folder / "source"), tensors(folder / "work" / "checkpoint")
    assert {name: file for name, (file, _) in before.items()} == {name: file for name, (file, _) in after.items()}
    assert family.shard == "5GB" or len({file for file, _ in before.values()}) > 3
    for name, (_, old) in before.items():
        new = after[name][1]
        inside = (
            re.search(r"\b(layers|h)[.][0-9]+[.]", name)
            and old.ndim > 1
            and not name.endswith((*family.dense, "bias", "sinks"))
        )
        assert old.dtype == new.dtype and torch.equal(old, new) == (not inside), name
        assert not inside or float((new == 0).float().mean()) == pytest.approx(0.5, abs=0.2), name


def see_counts(result: PruneResult, model: PreTrainedModel) -> None:
    """See that the counts of `result` are those of the pruned `model`."""
    assert result.unseen == 0 and all(layer.error is not None for layer in result.layers)
    zeros = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in result.layers)
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    whole, embedded = sum(p.numel() for p in model.parameters()), sum({id(p): p.numel() for p in ends}.values())
    assert result.sparsity_with_embeddings == pytest.approx(zeros / whole)
    assert result.sparsity_model == pytest.approx(zeros / (whole - embedded))


LAYERWISE = ["gemma2", "phi3", "gpt2", "bloom", "gpt_neox", "qwen3_moe", "gemma4"]  # blocks that look different
MORE = [(name, how) for name in ONE for how in ("wanda 2:4", "sparsegpt 2:4", "ria", "alps")] + [
    ("mixtral", "sparsegpt 2:4")
]
CASES = [(name, how) for name in FAMILIES for how in ("wanda", "sparsegpt")] + [(name, "wanda") for name in ODD] + MORE


@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_family_is_pruned_as_a_naive_walk_prunes_it(
    name: str, how: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, cal = (FAMILIES | ODD | ONE)[name], weighted()
    model = family.model()
    pruner, sparsity, solve = SOLVES[how]
    want = Naive(family, model).prune(cal, solve)
    monkeypatch.setattr(activations, "_BATCH_TOKENS", 100)
    got, result = pruned(family, model, cal, pruner, sparsity, tokenizer, tmp_path)
    if how == "alps":  # it chooses again and again, near ties included, and its conjugate gradients stop half-way
        alike(got, want, 0.02, flips=0.01)
    else:
        alike(got, want, 1e-4)
    see_disk(family, tmp_path)
    see_counts(result, got)


@pytest.mark.parametrize("pauses", [True, False])
@pytest.mark.parametrize("name", LAYERWISE)
def test_a_family_is_pruned_layer_by_layer_as_a_naive_walk_prunes_it(
    name: str, pauses: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all rows do not fit in the middle of a block, and pass through it again for each set."""
    monkeypatch.setattr("ssgr.stages.prune.plan", lambda *given: replace(plan(*given), pauses=pauses))
    family, cal = (FAMILIES | ODD)[name], weighted()
    model = family.model()
    want = Naive(family, model).prune(cal, wanda, "layer")
    monkeypatch.setattr(activations, "_BATCH_TOKENS", 100)
    got, _ = pruned(family, model, cal, Wanda(), HALF, tokenizer, tmp_path, order="layer")
    alike(got, want, 1e-4)


@pytest.mark.parametrize("pauses", [True, False])
def test_a_layer_that_runs_twice_asks_for_whole_blocks(
    pauses: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssgr.stages.prune.plan", lambda *given: replace(plan(*given), pauses=pauses))
    family = ODD["gemma3n"]
    with pytest.raises(
        ValueError, match=r"layers\.0\.altup\.modality_router runs twice in its block; type order=block"
    ):
        pruned(family, family.model(), weighted(), Wanda(), HALF, tokenizer, tmp_path, order="layer")


@pytest.mark.parametrize("how", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["qwen2", "qwen2_moe"])
def test_dense_propagation_is_a_naive_one(
    name: str, how: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, cal = FAMILIES[name], weighted()
    pruner, sparsity, solve = SOLVES[how]
    model = family.model()
    want = Naive(family, model).prune(cal, solve, "dense")
    monkeypatch.setattr(activations, "_BATCH_TOKENS", 100)
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "statistics").mkdir()
    source = Model("random", str(tmp_path / "source"), dtype="float32", device="cpu")
    collect(source, tokenizer, cal, pruner.statistic, Memory(1), tmp_path / "statistics")
    got, result = pruned(family, model, cal, pruner, sparsity, tokenizer, tmp_path, tmp_path / "statistics")
    alike(got, want, 1e-4)
    see_counts(result, got)


@pytest.mark.parametrize(
    ("name", "how", "bias", "lost"),
    [
        ("gpt_oss", "wanda", "mlp.router.bias", (1,)),
        ("deepseek_v3", "sparsegpt", "mlp.gate.e_score_correction_bias", (0, 1)),  # one group of experts
    ],
)
def test_an_expert_without_a_token_is_pruned_by_magnitude(
    name: str, how: str, bias: str, lost: tuple[int, ...], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    family, cal = FAMILIES[name], weighted()
    pruner, sparsity, solve = SOLVES[how]
    model = family.model()
    biases = [value for name, value in model.state_dict().items() if name.endswith(bias)]
    for value in biases:
        value[[*lost]] = -1e4
    naive = Naive(family, model)
    want = naive.prune(cal, solve)
    got, result = pruned(family, model, cal, pruner, sparsity, tokenizer, tmp_path)
    alike(got, want, 1e-4)
    unseen = [layer for layer in result.layers if layer.tokens == 0]
    assert result.unseen == naive.unseen == len(unseen) == 2 * len(lost) * len(biases)
    assert {layer.name.rpartition("experts.")[2] for layer in unseen} == {
        f"{e}.{leaf}" for e in lost for leaf in ("gate_up_proj", "down_proj")
    }
    assert all(layer.error is None and layer.sparsity == 0.5 for layer in unseen)


@EVERY
def test_a_skeleton_has_buffers_and_no_weights(family: Family, tmp_path: Path) -> None:
    model = family.model()
    model.save_pretrained(tmp_path)
    skeleton = Model("random", str(tmp_path), device="cpu").skeleton()
    assert all(p.is_meta for p in skeleton.parameters()) and not skeleton.training
    own = dict(model.named_buffers())
    assert set(own) == {name for name, _ in skeleton.named_buffers()}
    for name, buffer in skeleton.named_buffers():
        assert name in model.state_dict() or torch.equal(buffer, own[name]), name


@EVERY
def test_patterns_choose_among_the_layers_of_a_family(family: Family) -> None:
    model = family.model()
    naive = Naive(family, model)
    for block in model.get_submodule(family.blocks):
        every = list(naive.matrices(block))
        assert list(matrices(block)) == list(matrices(block, ("*",))) == every
        for name in (every[0], every[-1]):
            assert list(matrices(block, (name,))) == [name]
            assert list(matrices(block, (*every, "none"), (name,))) == [other for other in every if other != name]


def test_routers_are_pruned_only_by_their_full_name(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, family in FAMILIES.items():
        for block in family.model().get_submodule(family.blocks):
            for router in family.routers:
                assert router not in matrices(block) and router not in matrices(block, (f"{router}*", "*.down_proj"))
                assert list(matrices(block, (router,))) == [router]
                assert router in matrices(block, (router, "*experts*"), ("*.0.*",)), name
    family = FAMILIES["phimoe"]
    pruner = Wanda(include=("mlp.router", "*.q_proj"))
    caplog.set_level("INFO", "ssgr")
    _, result = pruned(family, family.model(), weighted(), pruner, HALF, tokenizer, tmp_path)
    assert {layer.name.partition(".layers.")[2][2:] for layer in result.layers} == {"mlp.router", "self_attn.q_proj"}
    share = sum(a * b for a, b in (layer.shape for layer in result.layers)) / sum(
        p.numel() for p in family.model().get_submodule(family.blocks).parameters())  # fmt: skip
    assert (
        f"prune: {len(result.layers)} matrices, {share:.1%} of the weights of the blocks; dense in them: "
        in caplog.text
    )
    assert "mlp.experts.down_proj (3 times)" in caplog.text and "router" not in caplog.text
    changed = {name for name, (_, old) in tensors(tmp_path / "source").items() if not torch.equal(
        old, tensors(tmp_path / "work" / "checkpoint")[name][1])}  # fmt: skip
    assert changed == {f"model.layers.{i}.{name}.weight" for i in range(3) for name in (
        "block_sparse_moe.gate", "self_attn.q_proj")}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "deepseek_v3"])
def test_a_pattern_without_a_layer_is_refused_with_the_layers_there_are(name: str) -> None:
    model = FAMILIES[name].model()
    last = {"phi3": r"self_attn\.qkv_proj", "gpt2": r"mlp\.c_proj", "deepseek_v3": r"mlp\.experts\.7\.gate_up_proj"}
    for wrong in (
        Wanda(include=("mlp.gate",)),
        Wanda(exclude=("mlp.gate",)),
    ):  # where there is one, it is no linear layer
        with pytest.raises(ValueError, match=rf"'mlp\.gate' matches no layer; layers are .*{last.get(name, 'q_proj')}"):
            check(model, wrong, HALF)


def test_a_skip_without_a_layer_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["llama"].model()
    check(model, DSnoT(Wanda()), HALF)
    assert not caplog.records
    check(model, DSnoT(Wanda(), skip=("mlp.up_proj",)), HALF)
    assert "'mlp.up_proj' matches no layer; its patterns are of full names, such as model.layers.0." in caplog.text


def test_experts_that_cannot_be_heard_are_refused() -> None:
    for kind in ("jetmoe", "llama4_text"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZE, num_local_experts=4))
        with pytest.raises(
            ValueError, match=r"holds stacked matrices .* that transformers' experts interface does not run"
        ):
            check(model, Wanda(), HALF)


def test_experts_in_one_matrix_are_refused() -> None:
    size = {"d_model": 32, "n_heads": 4, "n_layers": 2, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}}
    own = {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("dbrx", vocab_size=64, **size, ffn_config=own))
    with pytest.raises(
        ValueError, match=r"ffn\.experts\.mlp holds matrices as large as the largest linear layer \(w1, v1, w2\)"
    ):
        check(model, Wanda(), HALF)


def test_a_matrix_of_a_class_of_its_own_is_not_left_dense_in_silence() -> None:
    block = nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Module()})
    block["down"].weight = nn.Parameter(torch.ones(8, 12))
    with pytest.raises(ValueError, match=r"down holds matrices as large as the largest linear layer \(weight\)"):
        matrices(block)


class Listed(nn.Module):
    """Experts in a list, each given its own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x_TI: Tensor) -> Tensor:
        chosen_T = self.gate(x_TI).argmax(1)
        return torch.cat([expert(x_TI[chosen_T == i]) for i, expert in enumerate(self.experts)])


@torch.no_grad()
def test_experts_in_a_list_are_refused_where_their_tokens_are_unknown() -> None:
    block, x_TI = Listed(), torch.randn(20, 8)
    layers = matrices(block)
    assert list(layers) == ["experts.0", "experts.1", "experts.2"]
    collector = Collector("norm", layers)
    with (
        collector.listening(),
        pytest.raises(ValueError, match=r"experts\.0 is given .* vectors for 20 tokens.*exclude"),
    ):
        collector.run(lambda: block(x_TI), {"all": Stream(None, None)}, True, len(x_TI))


def test_blocks_that_are_no_chain_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    pytest.importorskip("transformers", "5.18", reason="transformers before 5.18 refuses its own zamba2")
    shared = {"layer_types": ["mamba", "hybrid", "hybrid"], "num_mem_blocks": 1}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("zamba2", **SIZE, **shared))
    with pytest.raises(ValueError, match=r"model\.layers\.2\..* is a weight of model\.layers\.1 too"):
        check(model, Wanda(), HALF)
    family = Family("zaya", {"num_experts": 4})
    with pytest.raises(ValueError, match="prev_router_hidden_states comes from the block before"):
        pruned(family, family.model(), weighted(), Wanda(), HALF, tokenizer, tmp_path)


def test_a_table_of_experts_is_not_quantised_and_states_side_by_side_are_one_token(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """DeepSeek-V4 has both; what enters one of its layers, which splits each token, cannot be told apart."""
    if "deepseek_v4" not in CONFIG_MAPPING:
        pytest.skip("transformers has no deepseek_v4 yet")
    own = {"head_dim": 8, "q_lora_rank": 24, "o_lora_rank": 16, "n_routed_experts": 4, "moe_intermediate_size": 16}
    family = Family("deepseek_v4", {**own, "num_experts_per_tok": 2, "layer_types": ["sliding_attention"] * 3})
    given = (family, family.model(), weighted())
    with pytest.raises(ValueError, match=r"self_attn\.o_a_proj is given .*; leave it out with 'pruner\.exclude="):
        pruned(*given, Wanda(), HALF, tokenizer, tmp_path)
    _, result = pruned(*given, Wanda(exclude=("self_attn.o_a_proj",)), HALF, tokenizer, tmp_path)
    assert all(layer.sparsity == 0.5 for layer in result.layers)


@pytest.mark.parametrize("between", ["again", "other order", "anew", "kept"])
def test_a_model_that_works_between_its_blocks_is_refused(between: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Dory does, which runs some of them twice, and Inkling 2, whose blocks see what several before them put out."""
    model = FAMILIES["llama"].model()
    first, second, third = model.model.layers

    def forward(input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden = model.get_input_embeddings()(input_ids)
        at = torch.arange(input_ids.shape[1])[None]
        given = {"position_embeddings": model.model.rotary_emb(hidden, at)}
        after = first(hidden, **given)
        if between == "again":
            after = first(after, **given)
        elif between == "other order":
            after = third(after, **given)
        elif between == "anew":
            after = 2 * after
        else:
            given["kept"] = torch.stack([hidden, after])
        return third(second(after, **given), **given)  # type: ignore[no-any-return]

    monkeypatch.setattr(model, "forward", forward)
    with torch.no_grad(), pytest.raises(ValueError, match="LlamaDecoderLayer: blocks run more than once, or the model"):
        activations.first_inputs(
            model, model.model.layers, activations.passages(weighted(), BOTH), torch.device("cpu"), None
        )


def test_a_decoder_that_also_attends_over_what_it_keeps_itself_is_no_encoder() -> None:
    model = FAMILIES["llama"].model()
    for block in model.model.layers:
        block.register_module("depth", nn.Module())
        block.depth.is_causal = False
    assert decoder_blocks(model)[0] == "model.layers"
    for block in model.model.layers:
        block.self_attn.is_causal = False
    with pytest.raises(ValueError, match="LlamaForCausalLM is an encoder"):
        decoder_blocks(model)


LAYOUTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "without a prefix": ("qwen2", lambda name: name.removeprefix("model.")),
    "without a prefix, experts": ("qwen3_moe", lambda name: name.removeprefix("model.")),
    "without a prefix, convolutions": ("gpt2", lambda name: name.removeprefix("transformer.")),
    "inside a larger model": ("qwen3_5_moe", lambda name: name.replace("model.", "model.language_model.", 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_keeps_the_names_it_has(layout: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    name, renamed = LAYOUTS[layout]
    family = FAMILIES.get(name) or Family(
        "qwen3_5_moe_text", {**MOE, **LINEAR, "shared_expert_intermediate_size": 24}, ("mlp.gate.weight",)
    )
    model = family.model()
    pruned(family, model, weighted(), Wanda(), HALF, tokenizer, tmp_path)
    source = tmp_path / "renamed"
    shutil.copytree(tmp_path / "source", source)
    for file in source.glob("model*"):
        file.unlink()
    more = {"visual.blocks.0.mlp.weight": torch.ones(2, 2), renamed(f"{family.blocks}.0.attn.bias"): torch.ones(3) > 0}
    stored = {renamed(name): tensor for name, (_, tensor) in tensors(tmp_path / "source").items()}
    save_file(stored | more, source / "model.safetensors", {"format": "pt"})
    prune(Model("renamed", str(source), dtype="float32", device="cpu"), tokenizer, weighted(), uniform(Wanda(), HALF),
          Memory(1), tmp_path / "other", PUBLISHED)  # fmt: skip
    want = {renamed(name): tensor for name, (_, tensor) in tensors(tmp_path / "work" / "checkpoint").items()} | more
    other = {name: tensor for name, (_, tensor) in tensors(tmp_path / "other" / "checkpoint").items()}
    assert set(other) == set(want) and all(torch.equal(other[name], want[name]) for name in want)


@pytest.mark.parametrize("family", [FAMILIES["qwen2"], FAMILIES["gemma2"]], ids=lambda family: family.kind)
def test_tied_weights_may_be_stored_under_the_name_of_the_output_layer(
    family: Family, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    family.model().save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    weights = {name: value for name, (_, value) in tensors(tmp_path / "source").items()}
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, file, {"format": "pt"})
    source = Model("random", str(tmp_path / "source"), device="cpu")
    prune(source, tokenizer, weighted(), uniform(Wanda(), HALF), Memory(1), tmp_path / "work")
    checkpoint = tmp_path / "work" / "checkpoint"
    old, new = (tensors(folder) for folder in (tmp_path / "source", checkpoint))
    assert set(new) == set(old) and torch.equal(new["lm_head.weight"][1], old["lm_head.weight"][1])
    loaded = Model("pruned", str(checkpoint), device="cpu").load()
    assert torch.equal(loaded.get_input_embeddings().weight, old["lm_head.weight"][1])
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_masks_of_shorter_rows_take_no_memory(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAMILIES["gemma2"].model().save_pretrained(tmp_path)
    walk = Walk(Model("random", str(tmp_path), dtype="float32", device="cpu"), Ranks())
    monkeypatch.setattr(activations, "_BATCH_TOKENS", 100)
    with torch.no_grad():
        batches = walk.begin(activations.passages(weighted(), BOTH), tokenizer, None)
    masks = [given["attention_mask"] for batch in batches for given in batch.given]
    assert len(batches) > 3 and len({mask.shape for mask in masks}) > 3
    assert len({mask.untyped_storage().data_ptr() for mask in masks}) == 2  # one kind sees a window, the other all
    for batch in batches:
        rows, tokens = batch.hidden_NTD.shape[:2]
        assert all(given["attention_mask"].shape == (rows, 1, tokens, tokens) for given in batch.given)


def test_experts_are_stored_as_they_were_whatever_they_run_in(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    FAMILIES["qwen3_moe"].model().save_pretrained(tmp_path / "source")
    source = Model("random", str(tmp_path / "source"), dtype="bfloat16", device="cpu")
    prune(source, tokenizer, weighted(), uniform(Wanda(), HALF), Memory(1), tmp_path / "work")
    old, new = (tensors(folder) for folder in (tmp_path / "source", tmp_path / "work" / "checkpoint"))
    for name, (_, value) in new.items():
        assert torch.equal(value[value != 0], old[name][1][value != 0]), name
    assert sum((value == 0).any() for name, (_, value) in new.items() if "experts" in name) == 2 * 4 * 3


def test_a_matrix_that_is_not_stored_by_itself_is_refused_with_what_stores_it(tmp_path: Path) -> None:
    """Sarvam's checkpoints hold one matrix for queries, keys and values, of which transformers makes three."""
    model = FAMILIES["llama"].model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"splits what is stored there: .*save_original_format=False"):
        Layout(model, Checkpoint(tmp_path)).stored("model.layers.0.self_attn.other.weight")


def test_biases_of_routers_stay_in_float32(tmp_path: Path) -> None:
    family = FAMILIES["deepseek_v3"]
    family.model().to(torch.bfloat16).save_pretrained(tmp_path)
    walk = Walk(Model("random", str(tmp_path), dtype="bfloat16", device="cpu"), Ranks())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for i, block in walk.filled(range(3), lambda i: None):
        want = whole.get_submodule(f"model.layers.{i}").state_dict()
        assert {name: value.dtype for name, value in block.state_dict().items()} == {
            n: v.dtype for n, v in want.items()
        }
    assert want["mlp.gate.e_score_correction_bias"].dtype == torch.float32
