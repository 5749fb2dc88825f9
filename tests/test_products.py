"""Products in bfloat16: as exact as in float32 where the numbers are bfloat16, on any processor."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from ssgr.model import attention
from ssgr.products import bfloat16_products, finite
from ssgr.stages.collect import Sums


def test_products_of_bfloat16_numbers_are_exact_in_float32() -> None:
    torch.manual_seed(0)
    x_TI = torch.randn(700, 300).bfloat16()
    want = x_TI.double().T @ x_TI.double()
    bound = (len(x_TI) + 2) * 2.0**-24 * (x_TI.double().abs().T @ x_TI.double().abs())
    with bfloat16_products():
        got = x_TI.float().T @ x_TI.float()
    assert ((got - want).abs() <= bound).all()
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16", "what was set before is set again"


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_bfloat16_batches_keep_the_stated_bound(weighted: bool) -> None:
    torch.manual_seed(1)
    batches = [torch.randn(tokens, 260).bfloat16() for tokens in (90, 300, 7)]
    weights = [torch.rand(len(x)) if weighted else None for x in batches]
    sums = Sums.zero(260, "gram", torch.device("cpu"))
    want, bound = torch.zeros(260, 260).double(), torch.zeros(260, 260).double()
    for x_TI, w_T in zip(batches, weights, strict=True):
        sums.add(x_TI, w_T)
        wx_TI = x_TI.double() if w_T is None else x_TI.double() * w_T.double()[:, None]
        want += wx_TI.T @ x_TI.double()
        bound += (len(x_TI) + 2) * 2.0**-24 * (wx_TI.abs().T @ x_TI.double().abs())
    assert sums.gram_II is not None
    assert ((sums.gram_II - want).abs() <= bound)[torch.ones(260, 260).triu().bool()].all()


@pytest.mark.parametrize("shape", [(2, 6, 2, 300, 16), (1, 4, 4, 128, 32), (3, 2, 1, 2, 8), (1, 3, 3, 129, 64)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attention_is_that_of_torch(
    shape: tuple[int, ...], scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)  # blocks alone
    rows, heads, groups, tokens, size = shape
    query = torch.randn(rows, heads, tokens, size).bfloat16() * 2
    key, value = (torch.randn(rows, groups, tokens, size).bfloat16() for _ in range(2))
    module = SimpleNamespace(is_causal=True, num_key_value_groups=heads // groups)
    with torch.no_grad():
        got, nothing = attention._attend(module, query, key, value, None, scaling)  # type: ignore[arg-type]
    many = [one.double().repeat_interleave(heads // groups, 1) for one in (key, value)]
    how = {"is_causal": True, "scale": scaling}
    want = scaled_dot_product_attention(query.double(), *many, **how).transpose(1, 2)
    torchs = scaled_dot_product_attention(query, *[one.bfloat16() for one in many], **how).transpose(1, 2)
    assert nothing is None and got.shape == want.shape
    assert (got - want).abs().mean() <= 1.5 * (torchs - want).abs().mean() + 1e-6
    assert (got - want).abs().max() <= 2 * (torchs - want).abs().max() + 1e-3


def test_a_model_attends_so_in_bfloat16_and_as_before_otherwise() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids_NT = torch.randint(0, 64, (3, 200))
    with torch.no_grad():
        want = model(ids_NT).logits
        attention.attend_causally(model)
        assert torch.equal(model(ids_NT).logits, want), "float32 goes to torch's kernel"
        padded_NT = torch.ones_like(ids_NT).tril(150)
        assert model(ids_NT, attention_mask=padded_NT).logits.isfinite().all()
        half = model.bfloat16()(ids_NT).logits
    assert (half.float() - want).abs().max() < 0.05 * want.abs().max()
    model.set_attn_implementation("sdpa")
    model.config.index_topk = 4  # a model that chooses tokens: it would mask none of them for a kernel it does not know
    attention.attend_causally(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("odd", [None, float("nan"), float("inf"), -float("inf")])
def test_finite_sees_every_odd_number(dtype: torch.dtype, odd: float | None) -> None:
    x = torch.randn(3, 70).to(dtype)
    for at in (0, 100, 209):
        y = x.clone()
        if odd is not None:
            y.view(-1)[at] = odd
        assert bool(finite(y)) == (odd is None) == bool(torch.isfinite(y).all())
    assert finite(torch.empty(0))
