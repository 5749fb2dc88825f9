"""Each pruner against a naive float64 version written from its paper."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssgr.pruner.alps import ALPS, refit
from ssgr.pruner.magnitude import Magnitude
from ssgr.pruner.ria import RIA
from ssgr.pruner.sparsegpt import SparseGPT, inverse_factor
from ssgr.pruner.wanda import Wanda
from ssgr.sparsity import NM, Sparsity, Unstructured
from ssgr.stages.collect import Accumulator, relative_error

PATTERNS = [Unstructured(0.5), Unstructured(0.3), NM(2, 4), NM(4, 8)]


def problem(outputs: int = 24, inputs: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight matrix and correlated inputs, without ties."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=g, dtype=torch.float64) / inputs**0.5 + 2 * torch.eye(inputs)
    x_TI = torch.randn(600, inputs, generator=g, dtype=torch.float64) @ mix
    return torch.randn(outputs, inputs, generator=g, dtype=torch.float64), x_TI


def naive_keep(score_OI: Tensor, sparsity: Sparsity, compare: str) -> Tensor:
    """The mask by sorting, one compared set at a time."""
    keep = torch.ones_like(score_OI, dtype=torch.bool)
    if isinstance(sparsity, NM):
        for row in range(score_OI.shape[0]):
            for first in range(0, score_OI.shape[1], sparsity.m):
                order = sorted(range(first, first + sparsity.m), key=lambda i: float(score_OI[row, i]))
                keep[row, order[: sparsity.m - sparsity.n]] = False
        return keep
    sets = [[(r, c) for c in range(score_OI.shape[1])] for r in range(score_OI.shape[0])]
    if compare == "layer":
        sets = [[rc for one in sets for rc in one]]
    for one in sets:
        for r, c in sorted(one, key=lambda rc: float(score_OI[rc]))[: int(len(one) * sparsity.target)]:
            keep[r, c] = False
    return keep


@pytest.mark.parametrize("sparsity", PATTERNS)
def test_magnitude_is_naive_magnitude(sparsity: Sparsity) -> None:
    w_OI, _ = problem()
    got = Magnitude().prune(w_OI.float(), None, sparsity, "w").w_OI
    assert torch.equal(got != 0, naive_keep(w_OI.abs(), sparsity, "layer"))
    assert torch.equal(got[got != 0], w_OI.float()[got != 0])


@pytest.mark.parametrize("sparsity", PATTERNS)
def test_wanda_is_naive_wanda(sparsity: Sparsity) -> None:
    w_OI, x_TI = problem()
    norm = Accumulator("norm")
    norm.add(x_TI.float(), torch.ones(len(x_TI)))
    got = Wanda().prune(w_OI.float(), norm.mean(), sparsity, "w").w_OI
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
    gram = Accumulator("gram")
    gram.add(x_TI.float(), torch.ones(len(x_TI)))
    got = SparseGPT(block=block).prune(w_OI.float(), gram.mean(), sparsity, "w").w_OI.double()
    want = naive_sparsegpt(w_OI, x_TI, sparsity, block, 0.01)
    assert torch.equal(got != 0, want != 0)
    assert float((got - want).norm() / want.norm()) < 1e-4


@pytest.mark.parametrize("sparsity", PATTERNS)
def test_ria_is_naive_ria(sparsity: Sparsity) -> None:
    w_OI, x_TI = problem()
    got = RIA().prune(w_OI.float(), (x_TI.square().mean(0)).float(), sparsity, "w").w_OI
    score = torch.zeros_like(w_OI)
    for i in range(w_OI.shape[0]):
        for j in range(w_OI.shape[1]):
            share = w_OI[i, j].abs() / w_OI[:, j].abs().sum() + w_OI[i, j].abs() / w_OI[i].abs().sum()
            score[i, j] = share * torch.linalg.vector_norm(x_TI[:, j]) ** 0.5
    assert torch.equal(got != 0, naive_keep(score, sparsity, "layer"))


def test_ria_survives_dead_rows_and_columns() -> None:
    w_OI, x_TI = problem()
    w_OI[3], w_OI[:, 7] = 0, 0
    got = RIA().prune(w_OI.float(), x_TI.square().mean(0).float(), Unstructured(0.5), "w").w_OI
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
    gram = x_TI.T @ x_TI / len(x_TI)
    want = naive_alps(w_OI, x_TI, sparsity)
    for dtype in (torch.float64, torch.float32):
        got = ALPS(refits=40).prune(w_OI.to(dtype), gram.to(dtype), sparsity, "w").w_OI.double()
        assert torch.equal(got != 0, want != 0)
        assert float((got - want).norm() / want.norm()) < 1e-4
    few = ALPS().prune(w_OI.float(), gram.float(), sparsity, "w").w_OI.double()
    assert float((few - want).norm() / want.norm()) < 1e-2  # ten conjugate gradients, as published


def test_a_refit_never_raises_the_error_and_keeps_the_support() -> None:
    w_OI, x_TI = problem()
    h = x_TI.T @ x_TI / len(x_TI)
    start = Wanda().prune(w_OI, h.diagonal(), Unstructured(0.5), "w").w_OI
    start[2] = 0  # a row with nothing left has nothing to solve
    errors = [relative_error(w_OI, refit(start, w_OI, h, n), h) for n in (0, 1, 2, 5, 20)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.95 * errors[0]
    assert torch.equal(refit(start, w_OI, h, 20) != 0, start != 0)


@pytest.mark.parametrize("sparsity", [Unstructured(0.5), Unstructured(0.7), NM(2, 4)])
def test_alps_reconstructs_better_than_sparsegpt_and_sparsegpt_than_wanda(sparsity: Sparsity) -> None:
    for seed in range(3):
        w_OI, x_TI = problem(96, 256, seed)
        gram = (x_TI.T @ x_TI / len(x_TI)).float()
        pruners = ((ALPS(), gram), (SparseGPT(), gram), (Wanda(), gram.diagonal()))
        errors = [relative_error(w_OI.float(), p.prune(w_OI.float(), s, sparsity, "w").w_OI, gram) for p, s in pruners]
        assert errors == sorted(errors), errors


def test_sparsegpt_reconstructs_better_than_wanda_and_wanda_than_magnitude() -> None:
    errors = []
    for seed in range(5):
        w_OI, x_TI = problem(64, 256, seed)
        x_TI = x_TI * torch.linspace(0.5, 2, 256, dtype=torch.float64)[torch.randperm(256)]  # norms differ, in no order
        gram = (x_TI.T @ x_TI / len(x_TI)).float()
        w = w_OI.float()
        pruned = [
            p.prune(w, s, Unstructured(0.5), "w").w_OI
            for p, s in ((SparseGPT(), gram), (Wanda(), gram.diagonal()), (Magnitude(), None))
        ]
        errors.append([relative_error(w, new, gram) for new in pruned])
    mean = torch.tensor(errors).mean(0)
    assert mean[0] < mean[1] < mean[2]


def test_relative_error_is_that_of_the_outputs() -> None:
    w_OI, x_TI = problem()
    new = Magnitude().prune(w_OI, None, Unstructured(0.5), "w").w_OI
    want = float((x_TI @ (w_OI - new).T).norm() / (x_TI @ w_OI.T).norm())
    assert relative_error(w_OI, new, x_TI.T @ x_TI) == pytest.approx(want, rel=1e-9)


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


def test_hopeless_statistics_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"layer: .*NaN or infinity"):
        inverse_factor(torch.full((4, 4), float("nan")), 0.01, "layer")
    with pytest.raises(ValueError, match="layer: the Hessian stays indefinite"):
        inverse_factor(-torch.eye(4), 0.01, "layer")


def test_dead_inputs_are_pruned() -> None:
    w_OI, x_TI = problem()
    x_TI[:, 5] = 0
    got = SparseGPT().prune(w_OI.float(), (x_TI.T @ x_TI).float(), Unstructured(0.5), "w").w_OI
    assert torch.all(got[:, 5] == 0) and torch.isfinite(got).all()


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 0.99), st.sampled_from(["row", "layer"]))
def test_unstructured_prunes_exactly(outputs: int, inputs: int, ratio: float, compare: str) -> None:
    keep = Unstructured(ratio).keep(torch.rand(outputs, inputs), compare)  # type: ignore[arg-type]
    if compare == "row":
        assert ((~keep).sum(1) == int(inputs * ratio)).all()
    else:
        assert (~keep).sum() == int(outputs * inputs * ratio)


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5])
def test_ratios_outside_0_1_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"strictly between 0 and 1, such as sparsity\.ratio=0\.5"):
        Unstructured(ratio)


def test_n_m_must_divide() -> None:
    with pytest.raises(ValueError, match="2:4 does not divide a layer of 6 inputs"):
        NM(2, 4).keep(torch.rand(3, 6), "row")
    with pytest.raises(ValueError, match="0 < n < m"):
        NM(4, 4)


def test_weights_of_zero_never_count_and_weights_scale() -> None:
    _, x_TI = problem()
    x_TI, w_T = x_TI.float(), torch.rand(len(x_TI))
    w_T[::3] = 0
    got = Accumulator("gram")
    for part in range(0, len(x_TI), 7):
        got.add(x_TI[part : part + 7], w_T[part : part + 7])
    want = (x_TI.double() * w_T.double()[:, None]).T @ x_TI.double() / w_T.double().sum()
    assert torch.allclose(got.mean().double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    norm = Accumulator("norm")
    norm.add(x_TI, w_T)
    assert torch.allclose(norm.mean().double(), want.diagonal(), rtol=1e-4)
