"""ALPS: the layer-wise problem by ADMM, then refitted on its support (Meng et al., arXiv 2406.07831).

Shapes: O outputs, I inputs. All in the scaled problem, in which every input has norm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ssgr.pruner import Moments, Pruned, Statistic, alive, checked_gram
from ssgr.sparsity import Compare, Sparsity, check_compare

_EVERY = 3  # iterations between two looks at the support (section 3.1)
_GROWTH = (
    (0.1, 1.3),
    (0.005, 1.2),
    (0.0, 1.1),
)  # share of the support that changed more than this: rho grows by (eq. 8)
_SETTLED = (30, 0.0003)  # after so many iterations a smaller change than this ends the search, as in the published code
_MOVING = 0.005  # rho starts where the first iterations change more than this, as in the published code
_SHRINK, _LEAST_RHO, _MOST_RHO = 5.0, 1e-6, 1e6


@dataclass(frozen=True)
class ALPS:
    """Find the support by ADMM (eq. 4 to 7), then solve for the weights on it by conjugate gradients (algorithm 2).

    `rho` is the first penalty, `iterations` the most of ADMM, `refits` those of conjugate gradients, and `damping` the
    share of the mean diagonal added to the Hessian; all as in the published code.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    compare: Compare = "layer"
    damping: float = 0.01
    rho: float = 0.1
    iterations: int = 300
    refits: int = 10
    name: str = "alps"
    work: ClassVar[tuple[int, int]] = (36, 38)

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", tuple(self.include))
        object.__setattr__(self, "exclude", tuple(self.exclude))
        check_compare(self.compare)
        if self.damping <= 0 or self.rho <= 0 or self.iterations < _EVERY or self.refits < 0:
            raise ValueError(
                f"pruner: damping={self.damping} rho={self.rho} iterations={self.iterations} refits={self.refits}: give "
                f"damping > 0, rho > 0, iterations >= {_EVERY} and refits >= 0"
            )

    @property
    def statistic(self) -> Statistic:
        """The Gram matrix of the inputs."""
        return "gram"

    def score(self, w_OI: Tensor, inputs: Moments | None) -> Tensor:
        """w^2 H_jj, (O, I): the magnitude in the scaled problem, where the search begins."""
        assert inputs is not None
        return w_OI.square() * inputs.square_I

    def prune(
        self, ws: Sequence[Tensor], inputs: Moments | None, sparsities: Sequence[Sparsity], names: Sequence[str]
    ) -> list[Pruned]:
        """Prune matrices (O, I) that have the same inputs, with one decomposition of their Gram matrix.

        Raises:
            ValueError: the Gram matrix is not finite.
        """
        h_II = checked_gram(inputs, names[0])
        h_II.diagonal().add_(self.damping * float(h_II.diagonal().mean()))
        alive(h_II)  # where all are always zero, the damping is
        norm_I = h_II.diagonal().sqrt()
        h_II = h_II / norm_I / norm_I[:, None]
        values_I, vectors_II = (part.to(h_II.dtype) for part in torch.linalg.eigh(h_II.double()))
        condition = float(values_I[-1] / values_I[0].clamp(min=torch.finfo(values_I.dtype).tiny))
        out = []
        for w_OI, sparsity in zip(ws, sparsities, strict=True):
            dense_OI = w_OI * norm_I
            found_OI = self._support(dense_OI, h_II, values_I, vectors_II, sparsity)
            out.append(Pruned(refit(found_OI, dense_OI, h_II, self.refits) / norm_I, self.damping, condition))
        return out

    def _support(
        self, dense_OI: Tensor, h_II: Tensor, values_I: Tensor, vectors_II: Tensor, sparsity: Sparsity
    ) -> Tensor:
        """ADMM on min ||(W - W^) X|| subject to the pattern; the sparse iterate it ends with."""
        keep: Callable[[Tensor], Tensor] = lambda m_OI: sparsity.keep(m_OI.square(), self.compare)
        target_OI, rho, searching = dense_OI @ h_II, self.rho, True
        before_OI = keep(dense_OI)
        w_OI, d_OI, v_OI = dense_OI, dense_OI * before_OI, torch.zeros_like(dense_OI)
        kept = max(1, int(before_OI.sum()))
        for done in range(1, self.iterations + 1):
            if done % _EVERY == 1:  # rho may have changed
                inverse_II = vectors_II * (values_I + rho).reciprocal() @ vectors_II.T
            w_OI = (target_OI - v_OI + rho * d_OI) @ inverse_II
            d_OI = w_OI + v_OI / rho
            keep_OI = keep(d_OI)
            d_OI = d_OI * keep_OI
            v_OI = v_OI + rho * (w_OI - d_OI)
            if done % _EVERY:
                continue
            changed, before_OI = int((keep_OI ^ before_OI).sum()) / kept, keep_OI
            if (
                searching and changed <= _MOVING and rho > _LEAST_RHO
            ):  # too stiff to leave the magnitude mask: again, softer
                rho, before_OI = rho / _SHRINK, keep(dense_OI)
                d_OI, v_OI = dense_OI * before_OI, torch.zeros_like(dense_OI)
                continue
            searching = False
            if changed == 0 or (done > _SETTLED[0] and changed < _SETTLED[1]):
                break
            rho = min(_MOST_RHO, rho * next(factor for share, factor in _GROWTH if changed > share))
        return w_OI * keep(w_OI)


def refit(start_OI: Tensor, dense_OI: Tensor, h_II: Tensor, iterations: int) -> Tensor:
    """Minimise (w - w^) H (w - w^)^T for each row over its support in `start_OI` by conjugate gradients (algorithm 2).

    The rows are independent problems and have step sizes of their own, as in the published code; an iteration is one
    product of matrices for all.
    """
    w_OI, keep_OI = start_OI, start_OI != 0
    residual_OI = ((dense_OI - w_OI) @ h_II) * keep_OI
    direction_OI, energy_O1 = residual_OI, residual_OI.square().sum(1, keepdim=True)
    for _ in range(iterations):
        curved_OI = (direction_OI @ h_II) * keep_OI
        step_O1 = _ratio(energy_O1, (direction_OI * curved_OI).sum(1, keepdim=True))
        w_OI = w_OI + step_O1 * direction_OI
        residual_OI = residual_OI - step_O1 * curved_OI
        before_O1, energy_O1 = energy_O1, residual_OI.square().sum(1, keepdim=True)
        direction_OI = residual_OI + _ratio(energy_O1, before_O1) * direction_OI
    return w_OI


def _ratio(a_O1: Tensor, b_O1: Tensor) -> Tensor:
    """a / b, and 0 for a row that is solved already."""
    return torch.where(b_O1 > 0, a_O1 / b_O1.clamp(min=torch.finfo(b_O1.dtype).tiny), 0)
