"""Each pruner against a naive float64 version written from its paper."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssgr.pruner import Moments, Pruner
from ssgr.pruner.alps import ALPS, refit
from ssgr.pruner.dsnot import DSnoT
from ssgr.pruner.magnitude import Magnitude
from ssgr.pruner.ria import RIA
from ssgr.pruner.sparsegpt import SparseGPT, inverse_factor
from ssgr.pruner.wanda import Wanda
from ssgr.sparsity import NM, Compare, Sparsity, Unstructured
from ssgr.stages.collect import relative_error

PATTERNS = [Unstructured(0.5), Unstructured(0.3), NM(2, 4), NM(4, 8)]
PRUNERS: list[Pruner] = [Magnitude(), Wanda(), RIA(), SparseGPT(), SparseGPT(block=8), ALPS()]


def problem(outputs: int = 24, inputs: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight matrix and correlated inputs, without ties."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=g, dtype=torch.float64) / inputs**0.5 + 2 * torch.eye(inputs)
    x_TI = torch.randn(600, inputs, generator=g, dtype=torch.float64) @ mix
    return torch.randn(outputs, inputs, generator=g, dtype=torch.float64), x_TI


def moments(x_TI: Tensor, dtype: torch.dtype = torch.float32) -> Moments:
    """What the inputs `x_TI`, all of weight 1, amount to."""
    gram_II = (x_TI.T @ x_TI / len(x_TI)).to(dtype)
    return Moments(float(len(x_TI)), x_TI.mean(0).to(dtype), x_TI.square().mean(0).to(dtype), gram_II)


def test_inputs_that_are_always_zero_give_no_nan() -> None:
    """All of them: no damping, which is a share of their mean, would help."""
    w_OI = problem(8, 16)[0].float()
    nothing = Moments(10.0, torch.zeros(16), torch.zeros(16), torch.zeros(16, 16))
    (found,) = ALPS().prune([w_OI], nothing, [Unstructured(0.5)], ["w"])
    assert torch.isfinite(found.w_OI).all() and int((found.w_OI == 0).sum()) == 64
    kept = found.w_OI != 0
    assert torch.allclose(found.w_OI[kept], w_OI[kept])


def prune(pruner: Pruner, w_OI: Tensor, inputs: Moments | None, sparsity: Sparsity) -> Tensor:
    """One matrix pruned."""
    return pruner.prune([w_OI], inputs, [sparsity], ["w"])[0].w_OI


def naive_keep(score_OI: Tensor, sparsity: Sparsity, compare: str) -> Tensor:
    """The mask by sorting, one compared set at a time; what a row cannot share evenly goes where it matters least."""
    keep, score = torch.ones_like(score_OI, dtype=torch.bool), score_OI.tolist()
    if isinstance(sparsity, NM):
        for row in range(score_OI.shape[0]):
            for first in range(0, score_OI.shape[1], sparsity.m):
                order = sorted(range(first, first + sparsity.m), key=lambda i: score[row][i])
                keep[row, order[: sparsity.m - sparsity.n]] = False
        return keep
    sets = [[(r, c) for c in range(score_OI.shape[1])] for r in range(score_OI.shape[0])]
    if compare == "layer":
        sets = [[rc for one in sets for rc in one]]
    ordered = [sorted(one, key=lambda rc: score[rc[0]][rc[1]]) for one in sets]
    each, more = divmod(round(score_OI.numel() * sparsity.target), len(sets))
    gone = [rc for one in ordered for rc in one[:each]]
    gone += sorted((one[each] for one in ordered if each < len(one)), key=lambda rc: score[rc[0]][rc[1]])[:more]
    for rc in gone:
        keep[rc] = False
    return keep


@pytest.mark.parametrize("sparsity", PATTERNS)
def test_magnitude_is_naive_magnitude(sparsity: Sparsity) -> None:
    w_OI, _ = problem()
    got = prune(Magnitude(), w_OI.float(), None, sparsity)
    assert torch.equal(got != 0, naive_keep(w_OI.abs(), sparsity, "layer"))
    assert torch.equal(got[got != 0], w_OI.float()[got != 0])


@pytest.mark.parametrize("sparsity", [*PATTERNS, Unstructured(0.47), Unstructured(0.01)])
def test_wanda_is_naive_wanda(sparsity: Sparsity) -> None:
    w_OI, x_TI = problem()
    got = prune(Wanda(), w_OI.float(), moments(x_TI), sparsity)
    score = w_OI.abs() * torch.linalg.vector_norm(x_TI, dim=0)
    assert torch.equal(got != 0, naive_keep(score, sparsity, "row"))


def naive_sparsegpt(w_OI: Tensor, x_TI: Tensor, sparsity: Sparsity, block: int, damping: float) -> Tensor:
    """Algorithm 1 with a fresh inverse of the remaining Hessian for every column."""
    w = w_OI.clone()
    h = x_TI.T @ x_TI / len(x_TI)
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    inverses = [torch.linalg.inv(h[i:, i:]) for i in range(len(h))]
    d = torch.tensor([float(inv[0, 0]) for inv in inverses], dtype=torch.float64)
    keep = torch.ones_like(w, dtype=torch.bool)
    for i in range(w.shape[1]):
        if isinstance(sparsity, NM):
            if i % sparsity.m == 0:
                group = slice(i, i + sparsity.m)
                keep[:, group] = naive_keep(w[:, group] ** 2 / d[group], sparsity, "row")
        elif i % block == 0:
            group = slice(i, min(i + block, w.shape[1]))
            keep[:, group] = naive_keep(w[:, group] ** 2 / d[group], sparsity, "layer")
        error_O = w[:, i] * ~keep[:, i] / d[i]
        w[:, i:] -= error_O[:, None] * inverses[i][0]
        w[:, i] *= keep[:, i]
    return w


@pytest.mark.parametrize("sparsity", PATTERNS)
@pytest.mark.parametrize("block", [8, 16, 128])
def test_sparsegpt_is_naive_sparsegpt(sparsity: Sparsity, block: int) -> None:
    w_OI, x_TI = problem()
    got = prune(SparseGPT(block=block), w_OI.float(), moments(x_TI), sparsity).double()
    want = naive_sparsegpt(w_OI, x_TI, sparsity, block, 0.01)
    assert torch.equal(got != 0, want != 0)
    assert float((got - want).norm() / want.norm()) < 1e-4


@pytest.mark.parametrize(
    ("inputs", "sparsity"),
    [
        (100, Unstructured(0.5)),
        (33, Unstructured(0.3)),
        (31, Unstructured(0.7)),
        (100, NM(2, 4)),
        (88, NM(4, 8)),
        (85, NM(3, 5)),
        (72, NM(1, 36)),
    ],
)
@pytest.mark.parametrize("block", [1, 20, 40, 48, 128])
def test_sparsegpt_takes_any_inputs_and_blocks(inputs: int, sparsity: Sparsity, block: int) -> None:
    w_OI, x_TI = problem(8, inputs)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        got = prune(SparseGPT(block=block), w_OI.to(dtype), moments(x_TI, dtype), sparsity).double()
        want = naive_sparsegpt(w_OI, x_TI, sparsity, block, 0.01)
        assert torch.equal(got != 0, want != 0)
        assert float((got - want).norm() / want.norm()) < tolerance


def naive_ria(w_OI: Tensor, x_TI: Tensor) -> Tensor:
    """Equations 2 and 4, one weight at a time."""
    score = torch.zeros_like(w_OI)
    for i in range(w_OI.shape[0]):
        for j in range(w_OI.shape[1]):
            share = w_OI[i, j].abs() / w_OI[:, j].abs().sum() + w_OI[i, j].abs() / w_OI[i].abs().sum()
            score[i, j] = share * torch.linalg.vector_norm(x_TI[:, j]) ** 0.5
    return score


@pytest.mark.parametrize("sparsity", PATTERNS)
def test_ria_is_naive_ria(sparsity: Sparsity) -> None:
    w_OI, x_TI = problem()
    got = prune(RIA(), w_OI.float(), moments(x_TI), sparsity)
    assert torch.equal(got != 0, naive_keep(naive_ria(w_OI, x_TI), sparsity, "layer"))


def test_ria_survives_dead_rows_and_columns() -> None:
    w_OI, x_TI = problem()
    w_OI[3], w_OI[:, 7] = 0, 0
    got = prune(RIA(), w_OI.float(), moments(x_TI), Unstructured(0.5))
    assert torch.isfinite(got).all() and int((got == 0).sum()) == w_OI.numel() // 2


def naive_alps(w_OI: Tensor, x_TI: Tensor, sparsity: Sparsity) -> Tensor:
    """Section 3 of the paper in its own orientation, with a fresh inverse in every iteration and exact refits."""
    h = x_TI.T @ x_TI / len(x_TI)
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    norm = torch.diag(h.diagonal().sqrt())
    h = norm.inverse() @ h @ norm.inverse()
    dense = norm @ w_OI.T
    rho, eye = 0.1, torch.eye(len(h), dtype=torch.float64)
    project = lambda m: m * naive_keep((m**2).T, sparsity, "layer").T
    d, v, support, moved = project(dense), torch.zeros_like(dense), project(dense) != 0, False
    for t in range(1, 301):
        w = (h + rho * eye).inverse() @ (h @ dense - v + rho * d)
        d = project(w + v / rho)
        v = v + rho * (w - d)
        if t % 3:
            continue
        change = int(((d != 0) != support).sum()) / int(support.sum())
        support = d != 0
        if not moved and change <= 0.005:
            rho, d, v = rho / 5, project(dense), torch.zeros_like(dense)
            support = d != 0
            continue
        moved = True
        if change == 0 or (t > 30 and change < 0.0003):
            break
        rho *= 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1
    out = project(w)
    for column in range(out.shape[1]):
        on = out[:, column] != 0
        out[on, column] = torch.linalg.solve(h[on][:, on], (h @ dense[:, column])[on])
    return (norm.inverse() @ out).T


@pytest.mark.parametrize("sparsity", PATTERNS)
def test_alps_is_naive_alps(sparsity: Sparsity) -> None:
    w_OI, x_TI = problem()
    want = naive_alps(w_OI, x_TI, sparsity)
    for dtype in (torch.float64, torch.float32):
        got = prune(ALPS(refits=40), w_OI.to(dtype), moments(x_TI, dtype), sparsity).double()
        assert torch.equal(got != 0, want != 0)
        assert float((got - want).norm() / want.norm()) < 1e-4
    few = prune(ALPS(), w_OI.float(), moments(x_TI), sparsity).double()
    assert float((few - want).norm() / want.norm()) < 1e-2  # ten conjugate gradients, as published


def test_a_refit_never_raises_the_error_and_keeps_the_support() -> None:
    w_OI, x_TI = problem()
    h = x_TI.T @ x_TI / len(x_TI)
    start = prune(Wanda(), w_OI, moments(x_TI, torch.float64), Unstructured(0.5))
    start[2] = 0  # a row with nothing left has nothing to solve
    errors = [relative_error(w_OI, refit(start, w_OI, h, n), h) for n in (0, 1, 2, 5, 20)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.95 * errors[0]
    assert torch.equal(refit(start, w_OI, h, 20) != 0, start != 0)


def errors_of(pruners: Sequence[Pruner], w_OI: Tensor, x_TI: Tensor, sparsity: Sparsity) -> list[float]:
    """The relative error of the outputs that each pruner leaves."""
    w, inputs = w_OI.float(), moments(x_TI)
    assert inputs.gram_II is not None
    return [relative_error(w, prune(pruner, w, inputs, sparsity), inputs.gram_II) for pruner in pruners]


@pytest.mark.parametrize("sparsity", [Unstructured(0.5), Unstructured(0.7), NM(2, 4)])
def test_alps_reconstructs_better_than_sparsegpt_and_sparsegpt_than_wanda(sparsity: Sparsity) -> None:
    for seed in range(3):
        w_OI, x_TI = problem(96, 256, seed)
        pruners: Sequence[Pruner] = (ALPS(), SparseGPT(), Wanda())
        assert (errors := errors_of(pruners, w_OI, x_TI, sparsity)) == sorted(errors)


def test_sparsegpt_reconstructs_better_than_wanda_and_wanda_than_magnitude() -> None:
    errors = []
    for seed in range(5):
        w_OI, x_TI = problem(64, 256, seed)
        x_TI = x_TI * torch.linspace(0.5, 2, 256, dtype=torch.float64)[torch.randperm(256)]  # norms differ, in no order
        errors.append(errors_of((SparseGPT(), Wanda(), Magnitude()), w_OI, x_TI, Unstructured(0.5)))
    mean = torch.tensor(errors).mean(0)
    assert mean[0] < mean[1] < mean[2]


def test_relative_error_is_that_of_the_outputs() -> None:
    w_OI, x_TI = problem()
    new = prune(Magnitude(), w_OI, None, Unstructured(0.5))
    want = float((x_TI @ (w_OI - new).T).norm() / (x_TI @ w_OI.T).norm())
    assert relative_error(w_OI, new, x_TI.T @ x_TI) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("inputs", [8, 64, 512])
@pytest.mark.parametrize("pruner", [SparseGPT(), DSnoT(SparseGPT()), ALPS()], ids=lambda pruner: pruner.name)
def test_the_condition_is_that_of_the_damped_hessian(pruner: Pruner, inputs: int) -> None:
    w_OI, x_TI = problem(8, inputs)
    seen = moments(x_TI * torch.logspace(0, 1.5, inputs, dtype=torch.float64))
    assert seen.gram_II is not None
    h_II = seen.gram_II.double() + 0.01 * float(seen.gram_II.diagonal().mean()) * torch.eye(inputs)
    if pruner.name == "alps":  # it solves for inputs of norm 1
        h_II = h_II / h_II.diagonal().sqrt() / h_II.diagonal().sqrt()[:, None]
    found = pruner.prune([w_OI.float()], seen, [Unstructured(0.5)], ["w"])[0].condition
    assert found == pytest.approx(np.linalg.cond(h_II.numpy()), rel=0.01)


@pytest.mark.parametrize("pruner", [SparseGPT(), ALPS()], ids=lambda pruner: pruner.name)
def test_the_condition_of_inputs_that_are_alike_and_independent_is_one(pruner: Pruner) -> None:
    seen = Moments(9.0, torch.zeros(16), torch.ones(16), torch.eye(16))
    assert pruner.prune([problem(8, 16)[0].float()], seen, [NM(2, 4)], ["w"])[0].condition == pytest.approx(1, rel=1e-5)


def test_a_failing_cholesky_raises_damping_step_by_step_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    indefinite = torch.diag(torch.tensor([1.0] * 7 + [-0.3]))
    with caplog.at_level(logging.WARNING, "ssgr"):
        _, damping = inverse_factor(indefinite, 0.01, "model.layers.3.mlp.down_proj")
    assert damping == pytest.approx(1.0)
    assert [r.getMessage().split(" at ")[1] for r in caplog.records] == [
        "damping 0.01; trying 0.1",
        "damping 0.1; trying 1",
    ]
    assert "model.layers.3.mlp.down_proj" in caplog.text


def test_as_many_conjugate_gradients_as_weights_are_kept_solve_for_them() -> None:
    h_II = torch.diag(torch.tensor([1.0, 4.0, 9.0, 16.0])) + 0.5
    dense_OI, kept_OI = torch.tensor([[1.0, -2.0, 3.0, 4.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    wanted_I = torch.linalg.solve(h_II[:3, :3], h_II[:3] @ dense_OI[0])
    assert torch.allclose(refit(kept_OI, dense_OI, h_II, 3)[0], torch.cat([wanted_I, torch.zeros(1)]), atol=1e-5)


def test_hopeless_statistics_are_an_error() -> None:
    bad = Moments(9.0, torch.zeros(4), torch.ones(4), torch.full((4, 4), float("nan")))
    for pruner in (SparseGPT(), ALPS()):
        with pytest.raises(ValueError, match=r"layer: .*NaN or infinity"):
            pruner.prune([torch.ones(4, 4)], bad, [Unstructured(0.5)], ["layer"])
    with pytest.raises(ValueError, match="layer: the Hessian stays indefinite"):
        inverse_factor(-torch.eye(4), 0.01, "layer")


def test_dead_inputs_are_pruned() -> None:
    w_OI, x_TI = problem()
    x_TI[:, 5] = 0
    got = prune(SparseGPT(), w_OI.float(), moments(x_TI), Unstructured(0.5))
    assert torch.all(got[:, 5] == 0) and torch.isfinite(got).all()


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_dead_inputs_change_nothing_of_the_others(unit: float) -> None:
    w_OI, x_TI = problem()
    dead = torch.zeros(len(x_TI), 8, dtype=x_TI.dtype)
    wider_OI, seen = torch.cat([w_OI, w_OI[:, :8]], 1).float(), moments(unit * torch.cat([x_TI, dead], 1))
    want = prune(SparseGPT(), w_OI.float(), moments(x_TI), NM(2, 4))
    got = prune(SparseGPT(), wider_OI, seen, NM(2, 4))[:, :-8]
    assert torch.equal(got != 0, want != 0)
    assert float((got - want).norm() / want.norm()) < 1e-4
    score = SparseGPT().score(wider_OI, seen) / unit**2
    assert torch.all(score[:, -8:] == 0)
    assert torch.allclose(score[:, :-8], SparseGPT().score(w_OI.float(), moments(x_TI)), rtol=1e-3)


SHAPES = (st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 0.99), st.sampled_from(["row", "layer"]))


@given(*SHAPES)
def test_unstructured_prunes_exactly(outputs: int, inputs: int, ratio: float, compare: Compare) -> None:
    gone = ~Unstructured(ratio).keep(torch.rand(outputs, inputs), compare)
    count = round(outputs * inputs * ratio)
    assert int(gone.sum()) == count
    if compare == "row":
        assert set(gone.sum(1).tolist()) <= {count // outputs, -(-count // outputs)}


@given(*SHAPES, st.sampled_from([torch.float32, torch.float16]))  # numpy's partition, and topk as on a GPU
def test_of_equal_scores_the_first_goes(
    outputs: int, inputs: int, ratio: float, compare: Compare, dtype: torch.dtype
) -> None:
    score_OI = torch.randint(0, 4, (outputs, inputs)).to(dtype)
    sparsity = Unstructured(ratio)
    assert torch.equal(sparsity.keep(score_OI, compare), naive_keep(score_OI, sparsity, compare))


@given(st.integers(1, 20), st.integers(1, 6), st.integers(2, 9), st.data(), st.sampled_from([0, 1 << 14]))
def test_n_of_every_m_are_kept_and_none_that_goes_scores_more(
    outputs: int, groups: int, m: int, data: Any, few: int
) -> None:
    sparsity = NM(data.draw(st.integers(1, m - 1)), m)
    score_OI = torch.randint(0, 9, (outputs, groups * m)).float()  # with ties
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssgr.sparsity._FEW", few)  # group by group, and all at once
        keep_OI = sparsity.keep(score_OI, "row")
    score, keep = score_OI.view(-1, m), keep_OI.view(-1, m)
    assert (keep.sum(1) == sparsity.n).all()
    assert (score.masked_fill(~keep, 10).amin(1) >= score.masked_fill(keep, -1).amax(1)).all()


@given(*SHAPES, st.integers(0, 2**31))
def test_a_row_loses_all_its_weights_only_if_its_scores_say_so(
    outputs: int, inputs: int, ratio: float, compare: Compare, seed: int
) -> None:
    score_OI = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    keep_OI = Unstructured(ratio).keep(score_OI, compare)
    emptied = (~keep_OI).all(1)
    if compare == "layer" and keep_OI.any():
        assert (score_OI[emptied] <= score_OI[keep_OI].min()).all()
    if compare == "row" and emptied.any() and not emptied.all():  # then every other row has one weight left
        assert (keep_OI.sum(1)[~emptied] == 1).all()
        assert score_OI[emptied].max(1).values.max() <= score_OI[keep_OI].min()


@pytest.mark.parametrize("sparsity", [Unstructured(0.5), Unstructured(0.9), NM(2, 4), NM(3, 5)])
@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_zeros_are_counted_exactly(pruner: Pruner, sparsity: Sparsity) -> None:
    w_OI, x_TI = problem(18, 60)
    gone_OI = prune(pruner, w_OI.float(), moments(x_TI), sparsity) == 0
    if isinstance(sparsity, NM):
        assert (gone_OI.view(18, -1, sparsity.m).sum(2) == sparsity.m - sparsity.n).all()
    else:
        blocks = gone_OI.split(pruner.block, 1) if isinstance(pruner, SparseGPT) else [gone_OI]
        for block_OB in blocks:
            assert int(block_OB.sum()) == round(block_OB.numel() * sparsity.target)


@pytest.mark.parametrize(
    "sparsities",
    [
        [Unstructured(0.5), Unstructured(0.3), Unstructured(0.8)],
        [NM(2, 4), NM(2, 4), NM(2, 4)],
        [NM(3, 5), NM(3, 5), NM(3, 5)],
    ],
    ids=str,
)
@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_matrices_pruned_together_are_what_each_is_alone(pruner: Pruner, sparsities: list[Sparsity]) -> None:
    w_OI, x_TI = problem(48, 60)
    inputs, ws = moments(x_TI, torch.float64), list(w_OI.split([24, 7, 17]))
    before = [w.clone() for w in ws]
    together = pruner.prune(ws, inputs, sparsities, ["w"] * len(ws))
    for w, old, new, sparsity in zip(ws, before, together, sparsities, strict=True):
        alone = pruner.prune([w], inputs, [sparsity], ["w"])[0]
        assert torch.equal(new.w_OI != 0, alone.w_OI != 0) and new.damping == alone.damping
        assert torch.allclose(new.w_OI, alone.w_OI, rtol=1e-9, atol=1e-12)
        assert torch.equal(w, old)  # what was given is as it was
    assert inputs.gram_II is not None and torch.equal(inputs.gram_II, x_TI.T @ x_TI / len(x_TI))


def test_scores_are_the_naive_ones() -> None:
    w_OI, x_TI = problem()
    norm_I = torch.linalg.vector_norm(x_TI, dim=0) / len(x_TI) ** 0.5
    h_II = x_TI.T @ x_TI / len(x_TI)
    inverse_II = torch.linalg.inv(h_II + 0.01 * h_II.diagonal().mean() * torch.eye(len(h_II)))
    naive: list[tuple[Pruner, Tensor]] = [
        (Magnitude(), w_OI.abs()),
        (Wanda(), w_OI.abs() * norm_I),
        (RIA(), naive_ria(w_OI, x_TI) / len(x_TI) ** 0.25),
        (SparseGPT(), w_OI**2 / inverse_II.diagonal()),
        (ALPS(), w_OI**2 * norm_I**2),
    ]
    for pruner, want in naive:
        got = pruner.score(w_OI.float(), moments(x_TI))
        assert torch.allclose(got.double(), want, rtol=1e-4, atol=0), pruner


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5])
def test_ratios_outside_0_1_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"strictly between 0 and 1, such as sparsity\.ratio=0\.5"):
        Unstructured(ratio)


def test_n_m_must_divide() -> None:
    with pytest.raises(ValueError, match="2:4 does not divide a layer of 6 inputs"):
        NM(2, 4).keep(torch.rand(3, 6), "row")
    with pytest.raises(ValueError, match="0 < n < m"):
        NM(4, 4)
