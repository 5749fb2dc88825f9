"""Continuous batching: what a row says is its own, whoever shares the step, whenever it came and whatever place it has."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)  # fmt: skip
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ssgr.problems.arithmetic import ArithmeticProblems
from ssgr.records import Trace
from ssgr.sampler import Decoding, Request, cache_argument, positions, slots, stop_ids
from ssgr.sampler.batch import decode as decode_batch
from ssgr.sampler.hf import HfSampler
from ssgr.stages.sample import sample
from tests.conftest import TINY, Loaded, Run, random_model
from tests.test_sampler import requests

SIZE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.4,
}  # fmt: skip
FAMILIES = ["llama", "qwen2", "qwen3", "olmo2", "phi3", "granite", "gpt_neox", "qwen3_moe", "mixtral", "gpt2"]


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    own = {"head_dim": 8} if kind.startswith("qwen3") else {}
    own |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2} if kind == "qwen3_moe" else {}
    own |= {"num_local_experts": 4, "sliding_window": None} if kind == "mixtral" else {}
    own |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256} if kind == "gpt2" else {}
    config = AutoConfig.for_model(kind, **{**SIZE, **own})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def ragged(rows: int = 23, seed: int = 0) -> list[Request]:
    """Prompts of one to thirty tokens, some the same, each with a limit of its own."""
    rng = random.Random(seed)
    prompts = [tuple(rng.choices(range(3, 96), k=rng.randrange(1, 30))) for _ in range(rows // 2)]
    return [Request(str(i), i % 2, rng.choice(prompts), rng.randrange(1, 60)) for i in range(rows)]


def by_id(traces: list[Trace]) -> dict[tuple[str, int], Trace]:
    return {(t.problem_id, t.attempt): t for t in traces}


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_decoding_is_that_of_generate_one_row_at_a_time(kind: str) -> None:
    model, rows = made(kind), ragged()
    assert slots.serves(model)
    got = by_id([t for some in slots.decode(model, rows, Decoding(1, 0, 1, 60, 0), frozenset({2}), 9) for t in some])
    assert len(got) == len(rows)
    for row in rows:
        config = GenerationConfig(do_sample=False, max_new_tokens=row.limit, eos_token_id=2, pad_token_id=0)
        ids_NT = torch.tensor([row.prompt_ids])
        want = model.generate(ids_NT, attention_mask=torch.ones_like(ids_NT), generation_config=config)
        trace = got[row.problem_id, row.attempt]
        assert list(trace.generated_ids) == want[0, len(row.prompt_ids) :].tolist()
        assert trace.finish == ("stop" if trace.generated_ids[-1] == 2 else "length")


@pytest.mark.parametrize("kind", ["qwen2", "phi3"])
def test_sixteen_bits_say_what_the_same_weights_say_in_64(kind: str) -> None:
    model, rows = made(kind).to(torch.bfloat16), ragged(40)
    got = [t for some in slots.decode(model, rows, Decoding(1, 0, 1, 60, 0), frozenset({2}), 19) for t in some]
    exact = made(kind)
    exact.load_state_dict(model.state_dict())
    exact.double()
    away, tokens = 0, 0
    for trace in got:
        ids, first = [*trace.prompt_ids, *trace.generated_ids], len(trace.prompt_ids)
        with torch.inference_mode():
            logits_TV = exact(torch.tensor([ids])).logits[0, first - 1 : -1]
        drawn_T = logits_TV.gather(1, torch.tensor(trace.generated_ids)[:, None])[:, 0]
        spread_T = logits_TV.amax(1) - logits_TV.amin(1)
        away += int(((logits_TV.amax(1) - drawn_T) > 0.03 * spread_T).sum())
        tokens += len(trace.generated_ids)
    assert tokens > 500 and away <= 0.01 * tokens, f"{away} of {tokens} tokens are not the likeliest but for rounding"


@pytest.mark.parametrize("size", [1, 7, 64, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 16))])
def test_traces_are_those_of_single_rows_whatever_the_slots(size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    model = TINY.load()
    rows = [
        Request(r.problem_id, r.attempt, r.prompt_ids, 5 + 13 * i % 90) for i, r in enumerate(requests(tokenizer, 16))
    ]
    decoding, stop = Decoding(2, 0.6, 0.95, 120, 3), stop_ids(model.generation_config, tokenizer)
    got = by_id([t for some in slots.decode(model, rows, decoding, stop, size) for t in some])
    want = by_id([t for row in rows for t in decode_batch(model, [row], decoding, stop)])
    assert got == want
    assert {t.finish for t in got.values()} == {"stop", "length"}


def test_the_longest_rows_keep_the_first_shelves() -> None:
    """The invariant that makes shelves worth it, through many arrivals and departures."""
    model, rng = made("llama"), random.Random(1)
    rows = [Request(str(i), 0, tuple(rng.choices(range(3, 96), k=4)), rng.randrange(1, 90)) for i in range(160)]
    read, least = 0, 0
    before = slots.Slots.step

    def step(self: slots.Slots, decoding: Decoding) -> list[int]:
        nonlocal read, least
        out = before(self, decoding)
        lengths = self.length_N[: len(self.rows)]
        read += sum((last - first) * tokens for first, last, tokens, _ in self.shelves)
        ideal = sorted(lengths, reverse=True)
        least += sum((last - first) * int(ideal[first]) for first, last, *_ in self.shelves)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots.Slots, "step", step)
        done = [t for some in slots.decode(model, rows, Decoding(1, 1, 1, 90, 0), frozenset(), 32) for t in some]
    assert sorted(len(t.generated_ids) for t in done) == sorted(row.limit or 0 for row in rows)
    assert read <= 1.1 * least


def test_room_grows_with_the_rows_and_not_past_what_they_may_need(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, decoding = made("qwen2"), ragged(), Decoding(1, 0.9, 0.95, 60, 0)
    want = by_id([trace for some in slots.decode(model, asked, decoding, frozenset({2}), 4) for trace in some])
    rooms: list[int] = []
    larger = slots._Layer._larger
    monkeypatch.setattr(slots._Layer, "_larger", lambda *args: (rooms.append(args[-1]), larger(*args))[1])
    monkeypatch.setattr(slots, "_ROOM", 4)
    got = by_id([trace for some in slots.decode(model, asked, decoding, frozenset({2}), 4) for trace in some])
    assert got == want
    assert len(set(rooms)) > 1, "it grew"
    assert max(rooms) <= max(len(request.prompt_ids) + request.most(decoding) for request in asked)


def test_traces_come_as_they_are_finished(tokenizer: PreTrainedTokenizerBase) -> None:
    model = TINY.load()
    rows = requests(tokenizer, problems=20)
    some = [len(batch) for batch in HfSampler(8).sample(Loaded(model), tokenizer, rows, Decoding(2, 0.6, 0.95, 100, 0))]
    assert sum(some) == 40 and len(some) >= 4 and max(some) <= 15
    assert model.config._attn_implementation == "sdpa"  # as it was


def test_models_that_slots_do_not_serve_are_decoded_in_batches(tokenizer: PreTrainedTokenizerBase) -> None:
    config: PretrainedConfig = Gemma3TextConfig(**{**SIZE, "head_dim": 8, "sliding_window": 8})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    assert not slots.serves(model)
    rows = [Request(str(i), 0, tuple(range(3, 9 + i)), 4 + i) for i in range(5)]
    got = [t for some in HfSampler(2).sample(Loaded(model), tokenizer, rows, Decoding(1, 0, 1, 20, 0)) for t in some]
    assert all(len(t.generated_ids) <= 4 + int(t.problem_id) for t in got) and len(got) == 5
    eager = random_model()
    eager.set_attn_implementation("eager")
    assert not slots.serves(eager)


LATENT: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LATENT |= {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
CHOOSING = {
    "index_n_heads": 32,
    "index_head_dim": 8,
    "index_topk": 4,
    "num_experts_per_tok": 2,
}  # so many heads never tie
UNLIKE: dict[str, dict[str, Any]] = {
    "doge": {},  # says of each key how much it counts, which slots would leave out
    "deepseek_v32": {**LATENT, **CHOOSING},  # masks the tokens that it does not choose, for kernels that it knows by name
    "deepseek_v4": {**CHOOSING, "head_dim": 8, "q_lora_rank": 24, "o_lora_rank": 16, "n_routed_experts": 4,
        "moe_intermediate_size": 16, "sliding_window": 6, "layer_types": ["compressed_sparse_attention"] * 2},  # blocks
    "mbart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},  # counts positions
}  # fmt: skip


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_model_that_sees_tokens_in_its_own_way_says_what_it_says_alone(
    kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {kind} yet")
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZE, **UNLIKE[kind]})
    model, rows, decoding = AutoModelForCausalLM.from_config(config).eval(), ragged(12), Decoding(1, 0, 1, 60, 0)
    for param in model.parameters():
        if param.is_floating_point():
            param.data += 0.3 * torch.randn_like(param)
    got = [t for some in HfSampler(5).sample(Loaded(model), tokenizer, rows, decoding) for t in some]
    for trace in got:
        ids, first = [*trace.prompt_ids, *trace.generated_ids], len(trace.prompt_ids)
        with torch.inference_mode():
            assert (
                model(torch.tensor([ids]), use_cache=False).logits[0, first - 1 : -1].argmax(-1).tolist() == ids[first:]
            )
    assert len(got) == len(rows)


@pytest.mark.parametrize("size", [1, 5, 12])
def test_positions_do_not_depend_on_the_rows_beside(size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Phi's turn otherwise beyond 32 tokens; where rows may become so long, all are turned so from the first token on."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    long = {"rope_parameters": rope, "original_max_position_embeddings": 32}
    model, short = (AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **SIZE, **own)) for own in (long, {}))
    short.config.rope_parameters["partial_rotary_factor"] = 1.0
    short.load_state_dict(model.state_dict())
    short.model.rotary_emb.inv_freq /= torch.tensor(rope["long_factor"])
    scale = model.model.rotary_emb.attention_scaling
    short.model.rotary_emb.attention_scaling = scale
    rows, decoding = [replace(row, limit=9) for row in ragged(12)], Decoding(1, 0, 1, 9, 0)
    got = by_id([t for some in HfSampler(size).sample(Loaded(model.eval()), tokenizer, rows, decoding) for t in some])
    want = by_id([t for some in HfSampler(size).sample(Loaded(short.eval()), tokenizer, rows, decoding) for t in some])
    assert got == want and "forward" not in vars(model.model.rotary_emb)  # as it was
    assert [positions._turns_long(model.model.rotary_emb, most) for most in (32, 33)] == [False, True]


@pytest.mark.parametrize("kind", ["lfm2", "falcon"])
def test_what_is_kept_of_rows_leaves_with_them(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Recurrent states too."""
    config = AutoConfig.for_model(
        kind, **SIZE, **({"layer_types": ["conv", "full_attention"]} if kind == "lfm2" else {})
    )
    model, rows = AutoModelForCausalLM.from_config(config).eval(), ragged()
    apart, together = (
        by_id(
            [t for some in HfSampler(n).sample(Loaded(model), tokenizer, rows, Decoding(1, 0, 1, 60, 0)) for t in some]
        )
        for n in (1, 9)
    )
    assert apart == together


def test_a_prompt_of_tokens_that_the_model_lacks_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"prompt of a has token 96, .* tokens 0 to 95 only .*resize_token_embeddings"):
        next(HfSampler(2).sample(Loaded(made("llama")), tokenizer, [Request("a", 0, (3, 96))], Decoding(1, 0, 1, 9, 0)))


def test_the_cache_is_named_as_the_model_names_it() -> None:
    """transformers has other words before 5.24 and from then on, and models may come with code of their own."""
    models: list[Any] = [
        SimpleNamespace(forward=lambda input_ids, cache=None: None),
        SimpleNamespace(forward=lambda input_ids, past_key_values=None: None),
        SimpleNamespace(forward=lambda input_ids, cache_params=None: None),
    ]
    assert [cache_argument(model) for model in models] == ["cache", "past_key_values", ""]


@pytest.mark.parametrize("kind", ["mamba", "recurrent_gemma", "minimax"])
def test_a_model_that_keeps_its_state_elsewhere_is_refused(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    config = AutoConfig.for_model(kind, **SIZE, state_size=4, lru_width=32, head_dim=8)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"keeps its state elsewhere.*calib=corpus bench=perplexity"):
        next(HfSampler(2).sample(Loaded(model), tokenizer, ragged(), Decoding(1, 0, 1, 60, 0)))


def test_a_larger_cap_goes_on_with_what_was_cut(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Through the whole chain of the stage: other traces are taken or gone on with, and end as if drawn at once."""
    problems = ArithmeticProblems((2, 3), 1, 10, 5).read("test")
    prompt = lambda question: TINY.prompt_ids(tokenizer, question)
    steps = 0
    before = slots.Slots.step

    def step(self: slots.Slots, decoding: Decoding) -> list[int]:
        nonlocal steps
        steps += len(self.rows)
        return before(self, decoding)

    def run(name: str, attempts: int, cap: int, earlier: list[Trace]) -> list[Trace]:
        (tmp_path / name).mkdir()
        given = (
            problems,
            HfSampler(8),
            Decoding(attempts, 0.6, 0.95, cap, 0),
            tmp_path / name,
            "sample",
            lambda: earlier,
        )
        return sample(TINY, tokenizer, prompt, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots.Slots, "step", step)
        short = run("short", 1, 40, [])
        whole = run("whole", 2, 120, [])
        steps = 0
        assert run("on", 2, 120, short) == whole
        assert steps == sum(len(t.generated_ids) for t in whole) - sum(len(t.generated_ids) for t in short)
        steps = 0
        assert run("less", 1, 40, whole) == short and steps == 0
    assert {trace.finish for trace in short} == {"stop", "length"}


def test_a_larger_cap_finds_the_traces_of_the_smaller_one_in_the_store(run: Run) -> None:
    given = ["calib=self", "problems.calibration=16", "sampler.decoding.attempts=2", "budget.tokens=128"]
    first = run(*given, "sampler.decoding.max_new_tokens=60")
    assert first.returncode == 0 and "of other runs" not in first.stdout + first.stderr, first.stderr
    then = run(*given, "sampler.decoding.max_new_tokens=120", "sampler.decoding.attempts=3")
    assert then.returncode == 0, then.stderr
    assert re.search(r"sample: \d+ traces of other runs are taken, and \d+ are gone on with", then.stdout + then.stderr)
