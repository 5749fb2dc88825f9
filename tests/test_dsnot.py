"""DSnoT against a naive float64 version written from its paper, and what it promises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssgr import keys
from ssgr.pruner import Moments, Pruner
from ssgr.pruner.alps import ALPS
from ssgr.pruner.dsnot import DSnoT
from ssgr.pruner.magnitude import Magnitude
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.pruner.wanda import Wanda
from ssgr.sparsity import NM, Sparsity, Unstructured

CONF = Path(__file__).parent.parent / "conf"
SAMPLE = 2048  # tokens over which the published code adds errors up
BASES: list[Pruner] = [Wanda(), Magnitude(), SparseGPT(), ALPS()]


def problem(outputs: int = 24, inputs: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight matrix and correlated inputs whose means are not zero, without ties."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    x_TI = draw(300, inputs) @ (draw(inputs, inputs) / inputs**0.5 + torch.eye(inputs)) + draw(inputs)
    return draw(outputs, inputs), x_TI


def moments(x_TI: Tensor, dtype: torch.dtype) -> Moments:
    """What the inputs `x_TI`, all of weight 1, amount to."""
    gram_II = (x_TI.T @ x_TI / len(x_TI)).to(dtype)
    return Moments(float(len(x_TI)), x_TI.mean(0).to(dtype), x_TI.square().mean(0).to(dtype), gram_II)


def prune(pruner: Pruner, w_OI: Tensor, inputs: Moments, sparsity: Sparsity, name: str = "w") -> Tensor:
    """One matrix pruned."""
    return pruner.prune([w_OI], inputs, [sparsity], [name])[0].w_OI


def test_what_is_skipped_is_told_by_each_name() -> None:
    """Not by that of the first matrix with the same inputs."""
    ws, x_TI = [problem(seed=seed)[0].float() for seed in (1, 2, 3)], problem()[1]
    inputs, sparsities, names = moments(x_TI, torch.float32), [Unstructured(0.5)] * 3, ["m.gate", "m.up", "m.late"]
    base = Wanda().prune(ws, inputs, sparsities, names)
    found = DSnoT(Wanda(), skip=("*.up",), threshold=0.0).prune(ws, inputs, sparsities, names)
    same = [torch.equal(a.w_OI != 0, b.w_OI != 0) for a, b in zip(base, found, strict=True)]
    assert same == [False, True, False]


def expected_error(w_OI: Tensor, new_OI: Tensor, mean_I: Tensor) -> Tensor:
    """|sum of w E[x] over what was pruned|, of each output (O,)."""
    return ((w_OI.double() * mean_I.double()) * (new_OI == 0)).sum(1).abs()


def naive_dsnot(w_OI: Tensor, x_TI: Tensor, keep_OI: Tensor, cost_OI: Tensor, m: int | None, x: DSnoT) -> Tensor:
    """Algorithm 1, one output and one swap at a time; the mask."""
    mean, var = x_TI.mean(0), x_TI.var(0, correction=0)
    out = keep_OI.clone()
    for row in range(len(w_OI)):
        w, shift, moved = w_OI[row], w_OI[row] * mean, set[int]()
        error = sum(float(shift[i]) for i in range(len(w)) if not out[row, i])
        positive_at_first = error > 0
        for _ in range(x.max_cycles):
            if abs(error) * SAMPLE <= x.threshold:
                break
            sign = 1 if error > 0 else -1
            there = [i for i in range(len(w)) if out[row, i] and i not in moved]
            away = [i for i in range(len(w)) if not out[row, i] and i not in moved and sign * shift[i] > 0]
            if not away:
                break
            back = max(away, key=lambda i: float(sign * shift[i] / var[i] ** x.power))
            pool = [i for i in there if (i // m == back // m if m else sign * shift[i] < 0)]
            if not pool:
                break
            gone = min(pool, key=lambda i: float(cost_OI[row, i]))
            after = error + float(shift[gone] - shift[back])
            if abs(after) >= abs(error) or ((x.same_sign or m) and (after > 0) != positive_at_first):
                break
            out[row, back], out[row, gone], error = True, False, after
            moved |= {back, gone}
    return out


@pytest.mark.parametrize("sparsity", [Unstructured(0.5), Unstructured(0.83), NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 5)])
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_dsnot_is_naive_dsnot(base: Pruner, sparsity: Sparsity) -> None:
    variants: Sequence[dict[str, Any]] = (
        {},
        {"max_cycles": 3},
        {"power": 0.0},
        {"threshold": 300.0},
        {"same_sign": True},
    )
    for seed, changes in enumerate(variants):
        x = DSnoT(base, **changes)
        w_OI, x_TI = problem(seed=seed)
        exact = moments(x_TI, torch.float64)
        keep_OI = prune(base, w_OI, exact, sparsity) != 0
        cost_OI = base.score(w_OI, exact) if sparsity.group else w_OI.abs() * exact.square_I.sqrt()
        want_OI = naive_dsnot(w_OI, x_TI, keep_OI, cost_OI, sparsity.group, x)
        assert not torch.equal(want_OI, keep_OI)
        for dtype in (torch.float64, torch.float32):
            got_OI = prune(x, w_OI.to(dtype), moments(x_TI, dtype), sparsity)
            assert torch.equal(got_OI != 0, want_OI)
            assert torch.equal(
                got_OI[want_OI], w_OI.to(dtype)[want_OI]
            )  # dense weights, whatever the base made of them


@given(
    st.integers(1, 12), st.integers(1, 5), st.floats(0.02, 0.98), st.sampled_from([None, NM(2, 4), NM(1, 4), NM(3, 4)]),
    st.booleans(), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_no_expected_error_ever_rises_and_the_sparsity_stays(
    outputs: int, fours: int, ratio: float, pattern: Sparsity | None, ties: bool, constant: bool, seed: int
) -> None:
    sparsity = pattern or Unstructured(ratio)
    g = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(outputs, 4 * fours, generator=g)
    x_TI = torch.randn(6, 4 * fours, generator=g) + torch.randn(4 * fours, generator=g)
    if ties:  # and weights and inputs that are zero
        w_OI, x_TI = w_OI.round(), x_TI.round()
    if constant:  # an input without variance
        x_TI[:, 0] = 3.0
    inputs = moments(x_TI.double(), torch.float32)
    base_OI = prune(Wanda(), w_OI, inputs, sparsity)
    new_OI = prune(DSnoT(Wanda()), w_OI, inputs, sparsity)
    before_O, after_O = (expected_error(w_OI, one_OI, inputs.mean_I) for one_OI in (base_OI, new_OI))
    assert (after_O <= before_O * (1 + 1e-12) + 1e-12).all()
    assert torch.equal((new_OI == 0).sum(1), (base_OI == 0).sum(1))
    if m := sparsity.group:
        zeros = lambda one_OI: (one_OI == 0).view(outputs, -1, m).sum(2)
        assert torch.equal(zeros(new_OI), zeros(base_OI))


def test_the_expected_error_falls_with_every_swap() -> None:
    w_OI, x_TI = problem(64, 256)
    inputs = moments(x_TI, torch.float32)
    errors = [
        expected_error(w_OI, prune(p, w_OI.float(), inputs, Unstructured(0.5)), inputs.mean_I).mean()
        for p in (Wanda(), DSnoT(Wanda()), DSnoT(Wanda(), max_cycles=1))
    ]
    assert errors[1] < 0.25 * errors[0] and errors[1] < errors[2] < errors[0]


def test_a_swap_that_overshoots_into_a_larger_error_is_not_made() -> None:
    w_OI = torch.tensor([[1.0, -8.0]])
    inputs = Moments(1.0, torch.ones(2), torch.full((2,), 2.0))
    assert torch.equal(prune(DSnoT(Wanda()), w_OI, inputs, Unstructured(0.5)) != 0, torch.tensor([[False, True]]))
    milder_OI = torch.tensor([[1.0, -8.0, 3.0, -3.5]])  # pruned: 1 and 3; 3 for -3.5 turns 4 into -2.5
    refined_OI = prune(DSnoT(Wanda()), milder_OI, Moments(1.0, torch.ones(4), torch.full((4,), 2.0)), Unstructured(0.5))
    assert torch.equal(refined_OI, torch.tensor([[0.0, -8.0, 3.0, 0.0]]))
    same_OI = prune(
        DSnoT(Wanda(), same_sign=True), milder_OI, Moments(1.0, torch.ones(4), torch.full((4,), 2.0)), Unstructured(0.5)
    )
    assert torch.equal(same_OI, torch.tensor([[0.0, -8.0, 0.0, -3.5]]))


def test_skipped_layers_keep_the_mask_of_the_base() -> None:
    w_OI, x_TI = problem()
    inputs = moments(x_TI, torch.float64)
    base_OI = w_OI * (prune(SparseGPT(), w_OI, inputs, Unstructured(0.5)) != 0)
    assert torch.equal(
        prune(DSnoT(SparseGPT()), w_OI, inputs, Unstructured(0.5), "model.layers.3.mlp.up_proj"), base_OI
    )
    for x, name in ((DSnoT(SparseGPT()), "model.layers.3.self_attn.o_proj"), (DSnoT(SparseGPT(), skip=()), "a.mlp.b")):
        assert not torch.equal(prune(x, w_OI, inputs, Unstructured(0.5), name), base_OI)


def test_matrices_refined_together_are_what_each_is_alone() -> None:
    w_OI, x_TI = problem(1500, 40)  # more outputs than are refined at once
    inputs, x = moments(x_TI, torch.float64), DSnoT(SparseGPT())
    ws, sparsities = list(torch.split(w_OI, [1100, 400])), [Unstructured(0.5), Unstructured(0.7)]
    for w, sparsity, new in zip(ws, sparsities, x.prune(ws, inputs, sparsities, ["w"] * len(ws)), strict=True):
        alone = x.prune([w], inputs, [sparsity], ["w"])[0]
        assert torch.equal(new.w_OI, alone.w_OI) and new.damping == alone.damping == 0.01


def test_it_scores_and_needs_what_its_base_does() -> None:
    w_OI, x_TI = problem()
    inputs = moments(x_TI, torch.float64)
    assert torch.equal(DSnoT(SparseGPT()).score(w_OI, inputs), SparseGPT().score(w_OI, inputs))
    assert [DSnoT(base).statistic for base in BASES] == ["norm", "norm", "gram", "gram"]


@pytest.mark.parametrize("changes", [{"max_cycles": 0}, {"threshold": -1.0}, {"power": -0.5}])
def test_impossible_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give max_cycles >= 1, threshold >= 0 and power >= 0"):
        DSnoT(Wanda(), **changes)


def test_patterns_of_the_base_are_refused() -> None:
    with pytest.raises(ValueError, match=r"type pruner\.include or pruner\.exclude"):
        DSnoT(Wanda(exclude=("*.down_proj",)))


def composed(*overrides: str) -> DSnoT:
    """The pruner of a command line."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["pruner=dsnot", *overrides])
    pruner = hydra.utils.instantiate(cfg.pruner, _convert_="all")
    assert isinstance(pruner, DSnoT)
    return pruner


def test_the_base_is_chosen_on_the_command_line() -> None:
    assert composed() == DSnoT(Wanda())  # the published defaults
    assert composed("pruner@pruner.base=sparsegpt").base == SparseGPT()
    assert composed("pruner@pruner.base=magnitude", "pruner.base.compare=row").base == Magnitude(compare="row")
    assert composed("pruner.skip=[]", "pruner.max_cycles=7").max_cycles == 7
    a, b = composed(), composed("pruner@pruner.base=sparsegpt")
    assert keys.key("prune", 1, a, {}) != keys.key("prune", 1, b, {})
