"""SparseGPT: one-shot pruning with weight update (Frantar and Alistarh, arXiv 2301.00774).

Shapes: O outputs (of all matrices that have the same inputs, one below the other), I inputs, B columns of one block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ssgr.pruner import Moments, Pruned, Statistic, alive, checked_gram
from ssgr.sparsity import Compare, Sparsity

_log = logging.getLogger("ssgr")
_TRIES = 8  # dampings tried, each ten times the last
_STEPS = 16  # of Lanczos: the condition number is then right to two percent
_COLUMNS = 32  # of a block, updated one by one; the others by one product of matrices (the same sums, in another order)


@dataclass(frozen=True)
class SparseGPT:
    """Prune column by column and let the later columns make up for it (algorithm 1).

    `block` columns choose their mask together (Bs = B = 128 as published), compared over the whole layer; `damping` is
    the share of the mean diagonal added to the Hessian (0.01 as published).
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    block: int = 128
    damping: float = 0.01
    name: str = "sparsegpt"
    work: ClassVar[tuple[int, int]] = (10, 20)

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", tuple(self.include))
        object.__setattr__(self, "exclude", tuple(self.exclude))
        if self.block < 1 or self.damping <= 0:
            raise ValueError(f"pruner: block={self.block} damping={self.damping}: give block >= 1 and damping > 0")

    @property
    def statistic(self) -> Statistic:
        """The Gram matrix of the inputs."""
        return "gram"

    def score(self, w_OI: Tensor, inputs: Moments | None) -> Tensor:
        """w^2 / [H^-1]_jj (eq. 3), (O, I): what losing each weight alone would cost, nothing where its input is always zero."""
        h_II = checked_gram(inputs, self.name)
        live_I = h_II.diagonal() != 0
        u_II, _ = inverse_factor(alive(h_II), self.damping, self.name)
        return w_OI.square() * live_I / u_II.square().sum(0)

    def prune(
        self, ws: Sequence[Tensor], inputs: Moments | None, sparsities: Sequence[Sparsity], names: Sequence[str]
    ) -> list[Pruned]:
        """Prune matrices (O, I) that have the same inputs, with one factor of their Gram matrix.

        Raises:
            ValueError: the Hessian is not finite, or stays indefinite at every damping; or n:m does not divide I.
        """
        assert len({s.group for s in sparsities}) == 1, "matrices of the same inputs have one kind of pattern"
        h_II = checked_gram(inputs, names[0])
        dead_I = h_II.diagonal() == 0
        u_II, damping = inverse_factor(alive(h_II), self.damping, names[0])
        w_OI = torch.cat(list(ws))  # a copy
        w_OI[:, dead_I] = 0
        condition = _condition(h_II, damping * float(h_II.diagonal().mean()), u_II)
        rows = [len(w) for w in ws]
        m = max(s.group or 1 for s in sparsities)
        block = max(m, self.block // m * m)
        for first in range(0, w_OI.shape[1], block):
            last = min(first + block, w_OI.shape[1])
            w_BO = w_OI[:, first:last].T.contiguous()
            error_BO = _prune_block(w_BO, u_II[first:last, first:last], sparsities, rows)
            w_OI[:, first:last] = w_BO.T
            w_OI[:, last:].addmm_(error_BO.T, u_II[first:last, last:], alpha=-1)
        return [Pruned(part_OI, damping, condition) for part_OI in torch.split(w_OI, rows)]


def _prune_block(w_BO: Tensor, u_BB: Tensor, sparsities: Sequence[Sparsity], rows: list[int]) -> Tensor:
    """Prune the columns `w_BO` (one a row here) in place; return the error of each, scaled, for the later columns."""
    scale_B1 = u_BB.diagonal()[:, None]
    group = sparsities[0].group
    drop_BO = torch.empty_like(w_BO)  # 1 / scale where a weight goes, else 0
    if group is None:
        drop_BO.copy_(_dropped(w_BO, scale_B1, sparsities, rows))
    error_BO = torch.empty_like(w_BO)
    columns = max(group, _COLUMNS // group * group) if group else _COLUMNS
    for first in range(0, len(w_BO), columns):
        last = min(first + columns, len(w_BO))
        for i in range(first, last):
            if group and i % group == 0:  # n:m: the mask is chosen when the group is reached, on weights updated so far
                drop_BO[i : i + group] = _dropped(w_BO[i : i + group], scale_B1[i : i + group], sparsities, rows)
            torch.mul(w_BO[i], drop_BO[i], out=error_BO[i])
            w_BO[i + 1 : last].addr_(u_BB[i, i + 1 : last], error_BO[i], alpha=-1)
        w_BO[last:].addmm_(u_BB[first:last, last:].T, error_BO[first:last], alpha=-1)
    w_BO.masked_fill_(drop_BO != 0, 0)
    return error_BO


def _dropped(w_BO: Tensor, scale_B1: Tensor, sparsities: Sequence[Sparsity], rows: list[int]) -> Tensor:
    """1 / scale where a weight goes, else 0: each matrix chooses among its own rows."""
    parts = zip(torch.split((w_BO / scale_B1).square(), rows, 1), sparsities, strict=True)
    compare: Compare = "row" if sparsities[0].group else "layer"
    keep_BO = torch.cat([sparsity.keep(score_BO.T, compare).T for score_BO, sparsity in parts], 1)
    return ~keep_BO / scale_B1


def _condition(h_II: Tensor, added: float, u_II: Tensor) -> float:
    """The condition number of H + `added` I, from below: a few Lanczos steps with it and with its inverse U^T U."""
    forth: Callable[[Tensor], Tensor] = lambda v_I: h_II @ v_I + added * v_I
    back: Callable[[Tensor], Tensor] = lambda v_I: u_II.T @ (u_II @ v_I)
    start_I = torch.full_like(h_II[0], len(h_II) ** -0.5)
    return _largest(forth, start_I) * _largest(back, start_I)


def _largest(times: Callable[[Tensor], Tensor], v_I: Tensor) -> float:
    """The largest eigenvalue of a symmetric matrix, known by its products: that of its part in a Krylov space of `v_I`."""
    before_I, beta = torch.zeros_like(v_I), v_I.new_zeros(())
    diagonal, beside = [], []
    for _ in range(_STEPS):
        next_I = times(v_I) - beta * before_I
        diagonal.append(next_I @ v_I)
        next_I = next_I - diagonal[-1] * v_I
        beta = next_I.norm()
        beside.append(beta)
        before_I, v_I = v_I, next_I / beta.clamp(min=torch.finfo(beta.dtype).tiny)  # zero where the space is whole
    part = torch.diag(torch.stack(diagonal)) + torch.diag(torch.stack(beside[:-1]), -1)  # only this half is looked at
    return float(torch.linalg.eigvalsh(part.cpu().double())[-1])


def inverse_factor(h_II: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """The upper Cholesky factor U of H^-1 = U^T U, and the damping that made it possible.

    Raises:
        ValueError: no damping helps.
    """
    mean = float(h_II.diagonal().mean())
    for _ in range(_TRIES):
        damped = h_II + torch.eye(len(h_II), dtype=h_II.dtype, device=h_II.device) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:  # H = R R^T with R = flip(L) upper, and U = R^-1: H^-1 itself is never formed
            inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), out=damped), upper=False)
            return inverse.flip(0, 1), damping
        _log.warning("%s: the Hessian is not positive definite at damping %g; trying %g", name, damping, damping * 10)
        damping *= 10
    raise ValueError(
        f"{name}: the Hessian stays indefinite up to damping {damping / 10:g}; use more calibration tokens"
    )
