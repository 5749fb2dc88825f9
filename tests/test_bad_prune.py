"""What cannot be pruned is refused in one sentence, and what was there before stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerBase

from ssgr.allocation.owl import OWL
from ssgr.allocation.uniform import Uniform
from ssgr.model import Model
from ssgr.model.blocks import Matrix, decoder_blocks, weightless
from ssgr.pipeline import _see_vocabulary, sample_shard
from ssgr.pruner import Pruner
from ssgr.pruner.alps import ALPS
from ssgr.pruner.magnitude import Magnitude
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.pruner.wanda import Wanda
from ssgr.records import CalibrationSet, Row
from ssgr.sparsity import NM, Unstructured
from ssgr.stages import prune as prune_stage
from ssgr.stages.activations import ALL, HELD_OUT
from ssgr.stages.collect import Sums
from ssgr.stages.plan import Memory
from ssgr.stages.prune import Passing
from ssgr.stages.solve import Method, Solver
from ssgr.stages.statistics import collect
from ssgr.stages.walk import Walk
from tests.conftest import random_model
from tests.test_prune import calibration, stopped_at, uniform

HALF = Unstructured(0.5)


def saved(folder: Path, change: Callable[[nn.Module], object] = lambda model: None) -> Model:
    model = random_model()
    change(model)
    model.save_pretrained(folder)
    return Model("random", str(folder), device="cpu")


def prune(model: Model, tokenizer: PreTrainedTokenizerBase, work: Path, method: Method, cal: CalibrationSet | None = None,
          **how: object) -> None:  # fmt: skip
    cal = calibration() if cal is None else cal
    prune_stage.prune(model, tokenizer, cal, method, Memory(1), work, **how)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_row_of_one_token(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    cal = calibration()
    short = replace(cal, rows=(*cal.rows, Row((3,), 0, "one")), weights=(*cal.weights, (1.0,)))
    with pytest.raises(ValueError, match=r"row one has 1 token\(s\), and a row needs two at least"):
        prune(saved(tmp_path / "m"), tokenizer, tmp_path / "out", uniform(Wanda(), HALF), short)


def test_positions_that_depend_on_the_rows_beside(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Dynamic NTK turns all rows of a batch by the length of the longest, once one is longer than the context."""
    model = random_model()
    longest = max(len(row) for row in calibration().rows)
    for context in (longest, longest - 1):
        model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        model.config.max_position_embeddings = context
        model.save_pretrained(tmp_path / f"m{context}")
        how = (Model("m", str(tmp_path / f"m{context}"), device="cpu"), tokenizer, tmp_path / f"out{context}")
        if context == longest:
            prune(*how, uniform(Wanda(), HALF))
            continue
        with pytest.raises(
            ValueError, match=rf"a row has {longest} tokens, and beyond {context} .*max_row_tokens={context}$"
        ):
            prune(*how, uniform(Wanda(), HALF))


@pytest.mark.parametrize("kind", ["bert", "roformer", "gemma3_text", "bart"])
def test_encoders_are_refused(kind: str, tmp_path: Path) -> None:
    """transformers loads them as causal models, and each token would see what comes after it."""
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    own = {
        "intermediate_size": 32,
        "num_key_value_heads": 2,
        "use_bidirectional_attention": True,
        "layer_types": ["full_attention"] * 2,
    }
    config = AutoConfig.for_model(kind, **size, **(own if kind == "gemma3_text" else {}))
    if kind != "bart":
        with (
            weightless(),
            pytest.raises(ValueError, match=r"is an encoder: its tokens see those .* decoder-only model"),
        ):
            decoder_blocks(AutoModelForCausalLM.from_config(config))
        return
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder and a decoder \(bart\); use a decoder-only model"):
        Model("m", str(tmp_path), device="cpu").skeleton()


def test_a_part_of_the_sampling_is_refused_what_the_whole_is(tmp_path: Path) -> None:
    """An encoder, before a token is sampled from it."""
    size = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model("roberta", **size)).save_pretrained(tmp_path)
    experiment: Any = SimpleNamespace(
        model=Model("m", str(tmp_path), device="cpu"), pruner=Wanda(), sparsity=HALF, collects="none", shard="1/2"
    )
    with pytest.raises(ValueError, match="RobertaForCausalLM is an encoder"):
        sample_shard(experiment, SimpleNamespace(root=tmp_path))  # type: ignore[arg-type]


def test_layers_that_only_the_weights_have_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As where num_hidden_layers was edited; not those of other parts, nor what transformers passes over on purpose."""
    model = saved(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    more = {"mtp.layers.9.weight": torch.ones(2), "model.layers.0.attn.bias": torch.ones(2)}
    save_file(load_file(file) | more, file, {"format": "pt"})
    told = lambda: [record.getMessage() for record in caplog.records if record.name == "ssgr"]
    model.load()
    assert not told()
    edited = json.loads(config.read_text())
    depth = edited["num_hidden_layers"]
    config.write_text(json.dumps(edited | {"num_hidden_layers": depth - 1, "layer_types": edited["layer_types"][:-1]}))
    model.again().load()
    model.again().load()
    (said,) = told()
    assert f"its weights hold model.layers.{depth - 1}, and its config.json has no such layers" in said


def test_a_tokenizer_of_a_larger_model_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    _see_vocabulary(tokenizer, random_model(vocabulary=512))
    with pytest.raises(
        ValueError, match="its tokenizer has 512 tokens, and the model embeds 511: they are of two models"
    ):
        _see_vocabulary(tokenizer, random_model(vocabulary=511))


def test_files_of_another_model_or_none_are_told(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = random_model(vocabulary=512)
    for name, changed, said in (
        (
            "config.json",
            {"intermediate_size": 47},
            r"down_proj.weight is \[32, 48\] .* config.json asks for \[32, 47\]",
        ),
        ("config.json", {"num_hidden_layers": 3}, r"loaded: `num_hidden_layers` \(3\) must be equal"),
        ("config.json", {"hidden_act": "nope"}, "loaded: KeyError: 'nope'"),
        ("tokenizer_config.json", [], "cannot be loaded: AttributeError: 'list' object"),
        ("tokenizer.json", None, "has no vocabulary, so a file such as tokenizer.json is missing"),
    ):
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        file, own = tmp_path / name, Model("m", str(tmp_path), device="cpu")
        file.write_text(json.dumps(json.loads(file.read_text()) | changed if isinstance(changed, dict) else changed))
        if changed is None:
            file.unlink()
        with pytest.raises(ValueError, match=said):
            _ = own.tokenizer(), own.load()


def test_a_weight_that_is_used_without_its_module_is_told_of(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Mamba does; the rule for experts that no token reached would hide it."""
    config = MambaConfig(vocab_size=512, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "m")
    with caplog.at_level("WARNING", "ssgr"):
        prune(Model("m", str(tmp_path / "m"), device="cpu"), tokenizer, tmp_path / "out", uniform(Wanda(), HALF))
    told = [record.getMessage() for record in caplog.records]
    assert [text.partition(":")[0] for text in told if "nothing was seen to enter it" in text] == [
        f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)
    ]


@pytest.mark.parametrize("order", ["layer", "block"])
def test_a_layer_that_would_lose_many_outputs(order: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def weaken(model: nn.Module) -> None:
        model.model.layers[1].mlp.up_proj.weight.data[:5] *= 1e-6
        model.model.layers[1].mlp.up_proj.weight.data[5:9] = 0  # these had none to lose

    model = saved(tmp_path / "m", weaken)
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.up_proj: 5 of its 48 outputs would lose all their weights.*compare=row"
    ):
        prune(
            model, tokenizer, tmp_path / "out", uniform(Wanda(compare="layer"), HALF), passing=Passing("pruned", order)
        )  # type: ignore[arg-type]
    prune(model, tokenizer, tmp_path / "other", uniform(Wanda(), HALF))


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT(), ALPS(), ALPS(compare="row")])
def test_a_ratio_that_leaves_nothing(pruner: Pruner, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    advice = "pruner.compare=row, a smaller" if getattr(pruner, "compare", "") == "layer" else "a smaller"
    with pytest.raises(ValueError, match=rf"outputs would lose all their weights, .*; type {advice} sparsity\.ratio"):
        prune(saved(tmp_path / "m"), tokenizer, tmp_path / "out", uniform(pruner, Unstructured(0.9999)))


def test_a_source_that_changes_between_two_runs(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = saved(tmp_path / "m")
    with stopped_at(1):
        prune(model, tokenizer, tmp_path / "out", uniform(Wanda(), HALF))
    before = files(tmp_path / "out")
    shard = tmp_path / "m" / "model.safetensors"
    original = load_file(shard)
    save_file({**original, "model.norm.weight": original["model.norm.weight"] + 1}, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=r"the model changed since this work began; bring back the files"):
        prune(model, tokenizer, tmp_path / "out", uniform(Wanda(), HALF))
    assert files(tmp_path / "out") == before, "what the killed run left is intact"


def test_an_output_that_is_the_input(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = saved(tmp_path / "work" / "checkpoint")
    before = files(tmp_path / "work")
    with pytest.raises(ValueError, match=r"a model cannot be pruned into its own files; give another folder"):
        prune(model, tokenizer, tmp_path / "work", uniform(Magnitude(), HALF))
    assert {name: content for name, content in files(tmp_path / "work").items() if name in before} == before


def test_patterns_and_allocations_that_cannot_be(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = saved(tmp_path / "m")
    with pytest.raises(ValueError, match=r"has 32 inputs, which groups of 5 do not divide.*pruner.exclude"):
        prune(model, tokenizer, tmp_path / "out", uniform(Wanda(), NM(2, 5)))
    (tmp_path / "statistics").mkdir()
    collect(model, tokenizer, calibration(), "norm", Memory(1), tmp_path / "statistics")
    with pytest.raises(ValueError, match=r"2:4 is the same in every layer: type allocation=uniform"):
        prune(model, tokenizer, tmp_path / "out", Method(Wanda(), NM(2, 4), OWL()), statistics=tmp_path / "statistics")
    method = Method(SparseGPT(), HALF, Uniform())
    with pytest.raises(ValueError, match=r"no Gram matrices, which this pruner needs; type collect.statistic=gram"):
        prune(model, tokenizer, tmp_path / "out", method, passing=Passing("dense"), statistics=tmp_path / "statistics")


@pytest.mark.parametrize("ranks", [0, -1, 1.5, "all"])
def test_ranks_that_are_none(ranks: object) -> None:
    with pytest.raises(ValueError, match=r"memory.ranks=.*: give a whole number of processes from 1 up, or auto"):
        Memory(1, ranks)  # type: ignore[arg-type]


def test_activations_beyond_float16_are_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def enlarge(model: nn.Module) -> None:
        model.model.layers[0].mlp.down_proj.weight.data *= 1e38

    model = saved(tmp_path / "m", enlarge)
    with pytest.raises(ValueError, match=r"model.layers.\d.*NaN or infinity"):
        prune(model, tokenizer, tmp_path / "out", uniform(Wanda(), HALF))


def test_what_is_not_finite_in_any_batch_is_told() -> None:
    fine = torch.ones(1, 2, 3)
    for outputs in ((fine * torch.nan, fine), (fine, fine * torch.inf)):
        walk: Any = SimpleNamespace(device=fine.device, full=lambda i: f"block.{i}", remedy="use another")
        batches: Any = [(SimpleNamespace(hidden_NTD=torch.zeros(1, 2, 3)), out) for out in outputs]
        with pytest.raises(ValueError, match=r"^block\.3: its output holds NaN or infinity .*; use another$"):
            Walk.keep(walk, 3, batches)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("float16", "type model.dtype=float32"),
        ("bfloat16", "type model.dtype=float32"),
        ("float32", "use another copy"),
    ],
)
def test_what_overflows_has_a_remedy(dtype: str, said: str) -> None:
    walk: Any = SimpleNamespace(dtype=getattr(torch, dtype))
    assert Walk.remedy.fget(walk).endswith(said)  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [ALL, HELD_OUT + ALL])
def test_inputs_that_are_not_finite_are_told(stream: str) -> None:
    """Also where only rows that are held out bring them in."""
    each = {name: Sums.zero(2, "norm", torch.device("cpu")) for name in (ALL, HELD_OUT + ALL)}
    for name, sums in each.items():
        sums.add(torch.full((3, 2), torch.inf if name == stream else 1.0), None)
    layer = nn.Linear(2, 2)
    walk: Any = SimpleNamespace(
        ranks=None, device=torch.device("cpu"), full=lambda i, name: name, weight_OI=lambda i, matrix: matrix.weight_OI,
        remedy="use another",
    )  # fmt: skip
    solver, heard = (
        Solver(uniform(Wanda(), HALF), {"q": 0.5}, walk),
        {("q", name): each[name].tensors() for name in each},
    )
    with pytest.raises(ValueError, match=r"^q: what enters it holds NaN or infinity .*; use another$"):
        solver._group(0, [Matrix("q", "weight", layer)], {"q": "q"}, heard)


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()])
@pytest.mark.parametrize("order", ["layer", "block"])
def test_held_out_rows_are_only_measured_on(
    order: str, pruner: Pruner, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, how = saved(tmp_path / "m"), Passing("pruned", order)  # type: ignore[arg-type]
    for name, held_out in (("none", ()), ("some", calibration(seed=3, rows=5).rows)):
        prune(
            model,
            tokenizer,
            tmp_path / name,
            uniform(pruner, HALF),
            replace(calibration(), held_out=held_out),
            passing=how,
        )
    a, b = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("none", "some"))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    found = [json.loads((tmp_path / name / "prune.json").read_text())["layers"] for name in ("none", "some")]
    assert all(layer["error_held_out"] is None for layer in found[0])
    assert all(layer["error_held_out"] > layer["error"] * 0.5 for layer in found[1])
