"""The walk through the decoder: statistics from pruned blocks, weights per token, padding, bytes."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerBase,
)

from ssgr.allocation.uniform import Uniform
from ssgr.model import Model
from ssgr.model.blocks import decoder_blocks, matrices
from ssgr.pruner import Pruner
from ssgr.pruner.magnitude import Magnitude
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.pruner.wanda import Wanda
from ssgr.records import CalibrationSet, PruneResult, Row
from ssgr.scope import BOTH, Scope
from ssgr.sparsity import NM, Sparsity, Unstructured
from ssgr.stages import activations
from ssgr.stages import prune as prune_stage
from ssgr.stages.plan import Memory
from ssgr.stages.prune import Passing
from ssgr.stages.solve import Method, Solver
from tests.conftest import random_model


def calibration(weights: str = "both", seed: int = 0, rows: int = 12) -> CalibrationSet:
    """Random ragged rows; `response` leaves the first five tokens of each without weight."""
    rng = random.Random(seed)
    made = tuple(Row(tuple(rng.choices(range(64), k=rng.randrange(8, 40))), 5, str(i)) for i in range(rows))
    w = tuple(tuple(float(weights == "both" or t >= 5) for t in range(len(row))) for row in made)
    return CalibrationSet("test", made, w, (), 0)


PUBLISHED = Passing("pruned", "block")


@contextmanager
def stopped_at(block: int) -> Iterator[None]:
    """Let the prune inside stop before it solves this block, as if it were interrupted."""
    real = Solver.block

    def stops(self: Solver, i: int, *rest: Any) -> Any:
        if i == block:
            raise KeyboardInterrupt
        return real(self, i, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Solver, "block", stops)
        with pytest.raises(KeyboardInterrupt):
            yield


def uniform(pruner: Pruner, sparsity: Sparsity, scope: Scope = BOTH) -> Method:
    """The same sparsity in every layer."""
    return Method(pruner, sparsity, Uniform(), scope)


def prune(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, cal: CalibrationSet | None, pruner: Pruner, sparsity: Sparsity,
    work: Path, gib: float = 1.0, passing: Passing = PUBLISHED,
) -> PruneResult:  # fmt: skip
    """Prune a saved copy of `model`, and give `model` the weights of the checkpoint that this leaves."""
    source = work.with_name(f"{work.name}.source")
    model.save_pretrained(source)
    result = prune_stage.prune(
        Model("random", str(source), device="cpu"),
        tokenizer,
        cal,
        uniform(pruner, sparsity),
        Memory(gib),
        work,
        passing,
    )
    loaded = AutoModelForCausalLM.from_pretrained(work / "checkpoint", dtype="auto")
    model.load_state_dict(loaded.state_dict())
    return result


def naive_wanda(model: nn.Module, cal: CalibrationSet, ratio: float) -> dict[str, Tensor]:
    """Masks by an un-streamed walk in float64: one row at a time, the whole model run for every block."""
    model = copy.deepcopy(model).double()
    keep: dict[str, Tensor] = {}
    prefix, blocks = decoder_blocks(model)
    for i, block in enumerate(blocks):
        layers = matrices(block)
        square: dict[str, Tensor] = {}

        def hook(name: str, weight: Tensor, square: dict[str, Tensor] = square):  # type: ignore[no-untyped-def]
            def hear(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                square[name] = square.get(name, 0) + (args[0][0] ** 2 * weight[:, None]).sum(0)

            return hear

        for row, w in zip(cal.rows, cal.weights, strict=True):
            handles = [m.module.register_forward_pre_hook(hook(n, torch.tensor(w).double())) for n, m in layers.items()]
            with torch.no_grad():
                model(input_ids=torch.tensor([row.ids]), use_cache=False)
            for handle in handles:
                handle.remove()
        for name, layer in layers.items():
            score = layer.weight_OI.abs() * square[name].sqrt()
            drop = score.argsort(1)[:, : int(score.shape[1] * ratio)]
            mask = torch.ones_like(score, dtype=torch.bool).scatter_(1, drop, False)
            layer.weight_OI.data.mul_(mask)
            keep[f"{prefix}.{i}.{name}"] = mask
    return keep


@pytest.mark.parametrize("scope", ["both", "response"])
@pytest.mark.parametrize("batch", [1, 100, 4096])
def test_masks_are_those_of_a_naive_walk_whatever_the_batch(
    scope: str, batch: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cal = random_model(), calibration(scope)
    want = naive_wanda(model, cal, 0.5)
    monkeypatch.setattr(activations, "_BATCH_TOKENS", batch)
    prune(model, tokenizer, cal, Wanda(), Unstructured(0.5), tmp_path)
    for name, mask in want.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask), name


def gemma() -> nn.Module:
    """Blocks that attend in a window and blocks that see all, each with rotary positions of its own."""
    size = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    layers = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    config = Gemma3TextConfig(vocab_size=64, sliding_window=6, max_position_embeddings=128, **size, **layers)
    return Gemma3ForCausalLM(config)


def bloom() -> nn.Module:
    """Blocks that return a tuple, and whose inputs come by position."""
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("make", [gemma, bloom])
def test_other_decoders_have_the_masks_of_a_naive_walk(
    make: Callable[[], nn.Module], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, cal = make().eval(), calibration()
    for p in model.parameters():  # as initialised, every block is nearly the identity
        p.data += 0.3 * torch.randn_like(p)
    want = naive_wanda(model, cal, 0.5)
    prune(model, tokenizer, cal, Wanda(), Unstructured(0.5), tmp_path)  # type: ignore[arg-type]
    for name, mask in want.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask), name


def test_prompt_tokens_without_weight_still_give_context(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    full, response = calibration("both"), calibration("response")
    masks = []
    for cal in (full, response):
        model = random_model()
        prune(model, tokenizer, cal, Wanda(), Unstructured(0.5), tmp_path / str(len(masks)))
        masks.append(torch.cat([m.weight_OI.flatten() != 0 for b in model.model.layers for m in matrices(b).values()]))
    assert not torch.equal(*masks)


def test_sparsegpt_repairs_the_output_better_than_wanda(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    cal = calibration(rows=40)
    errors = {}
    for pruner in (SparseGPT(), Wanda(), Magnitude()):
        result = prune(random_model(), tokenizer, cal, pruner, Unstructured(0.5), tmp_path / pruner.name)
        errors[pruner.name] = [layer.error for layer in result.layers]
        assert result.sparsity_realised == pytest.approx(0.5, abs=0.01)
    assert errors["magnitude"] == [None] * len(errors["magnitude"])  # it asks for no statistics, and claims nothing
    pairs = list(zip(errors["sparsegpt"], errors["wanda"], strict=True))
    assert sum(s < w for s, w in pairs) > 0.8 * len(pairs)


@pytest.mark.parametrize("pruner", [SparseGPT(), Wanda(), Magnitude()], ids=lambda p: p.name)
def test_n_m_holds_in_every_group(pruner: SparseGPT, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = random_model()
    prune(model, tokenizer, calibration(), pruner, NM(2, 4), tmp_path)
    for layer in (m for block in model.model.layers for m in matrices(block).values()):
        assert ((layer.weight_OI.reshape(-1, 4) != 0).sum(1) <= 2).all()


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()


def test_the_same_calibration_gives_the_same_bytes_and_another_does_not(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    digests = []
    for i, seed in enumerate((0, 0, 1)):
        prune(random_model(), tokenizer, calibration(seed=seed), SparseGPT(), Unstructured(0.5), tmp_path / str(i))
        digests.append(digest(tmp_path / str(i)))
    assert digests[0] == digests[1] != digests[2]


def test_magnitude_gives_the_same_mask_for_any_calibration(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    digests = set()
    for i, cal in enumerate((None, calibration(seed=0), calibration(seed=1))):
        prune(model := random_model(), tokenizer, cal, Magnitude(), Unstructured(0.5), tmp_path / str(i))
        digests.add(digest(tmp_path / str(i)))
        old, new = (one.model.layers[0].mlp.up_proj.weight.abs() for one in (random_model(), model))
        assert old[new == 0].max() <= old[new != 0].min(), "over the layer, not row by row"
    assert len(digests) == 1


def test_the_checkpoint_is_plain_hugging_face(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = random_model().to(torch.bfloat16)
    prune(model, tokenizer, calibration(), Wanda(), Unstructured(0.5), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert not hasattr(loaded.config, "sparsity_config")
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_embeddings_head_and_norms_stay(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model, before = random_model(), random_model()
    prune(model, tokenizer, calibration(), SparseGPT(exclude=("*.down_proj",)), Unstructured(0.5), tmp_path)
    for (name, a), (_, b) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        dense = not name.endswith("proj.weight") or "down_proj" in name
        assert torch.equal(a, b) == dense, name


def test_an_n_m_that_does_not_divide_is_refused_before_any_work(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = random_model()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj has 32 inputs, which groups of 5"):
        prune(model, tokenizer, calibration(), Wanda(), NM(2, 5), tmp_path)
    assert not list(tmp_path.iterdir())
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, random_model().model.layers[0].mlp.up_proj.weight)


def test_a_scope_without_tokens_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    cal = calibration()
    empty = CalibrationSet("prompts", cal.rows, tuple((0.0,) * len(r) for r in cal.rows), (), 0)
    with pytest.raises(ValueError, match="every token weighs zero in this scope; type scope=both"):
        prune(random_model(), tokenizer, empty, Wanda(), Unstructured(0.5), tmp_path)


def test_padding_is_a_token_that_the_model_knows_and_does_not_matter(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = copy.deepcopy(tokenizer)
    added.add_special_tokens({"pad_token": "[PAD]"})  # and the embeddings were not resized
    assert added.pad_token_id >= 64
    found = []
    for padding in (activations._PADDING, 7, 63):
        monkeypatch.setattr(activations, "_PADDING", padding)
        model = random_model()
        prune(model, added, calibration(), SparseGPT(), Unstructured(0.5), tmp_path / str(padding))
        found.append(model.state_dict())
    assert all(torch.equal(value, other[name]) for other in found[1:] for name, value in found[0].items())


@pytest.mark.parametrize("held_out", [False, True])
def test_a_token_that_the_model_does_not_know(
    held_out: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    cal, unknown = calibration(), Row((3, 64, 5), 1, "x")
    rows = cal.rows if held_out else (*cal.rows[1:], unknown)
    weights = tuple((1.0,) * len(row) for row in rows)
    cal = CalibrationSet("test", rows, weights, (), 0, held_out=(unknown,) if held_out else ())
    wanted = (
        r"a row has token 64, and the model has embeddings of tokens 0 to 63 only.*calibrate with tokens of this model"
    )
    with pytest.raises(ValueError, match=wanted):
        prune(random_model(), tokenizer, cal, Wanda(), Unstructured(0.5), tmp_path / "work")


def test_overflowing_activations_name_their_block(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = random_model()
    model.model.layers[0].mlp.down_proj.weight.data *= 1e38
    with pytest.raises(ValueError, match=r"model\.layers\.0: its output holds NaN or infinity"):
        prune(model, tokenizer, calibration(), Wanda(), Unstructured(0.5), tmp_path)


def test_blocks_are_found_by_structure() -> None:
    assert decoder_blocks(random_model(layers=3))[0] == "model.layers"
    model = random_model()
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=r"num_hidden_layers=7.*model\.layers \(2\)"):
        decoder_blocks(model)
    with pytest.raises(ValueError, match="no linear layer is left"):
        matrices(model.model.layers[0], (), ("*",))
