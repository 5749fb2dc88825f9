"""SparseGPT: one-shot pruning with weight update (Frantar and Alistarh, arXiv 2301.00774).

Shapes: O outputs, I inputs, B columns of one block.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ssgr.pruner import Pruned, Statistic
from ssgr.sparsity import Sparsity

_log = logging.getLogger("ssgr")
_TRIES = 8  # dampings tried, each ten times the last


@dataclass(frozen=True)
class SparseGPT:
    """Prune column by column and let the later columns make up for it (algorithm 1).

    `block` columns choose their mask together (Bs = B = 128 as published), compared over the whole layer; `damping` is
    the share of the mean diagonal added to the Hessian (0.01 as published).
    """

    exclude: tuple[str, ...] = ()
    block: int = 128
    damping: float = 0.01
    name: str = "sparsegpt"

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", tuple(self.exclude))
        if self.block < 1 or self.damping <= 0:
            raise ValueError(f"pruner: block={self.block} damping={self.damping}: give block >= 1 and damping > 0")

    @property
    def statistic(self) -> Statistic:
        """The Gram matrix of the inputs."""
        return "gram"

    def prune(self, w_OI: Tensor, statistic: Tensor | None, sparsity: Sparsity, name: str) -> Pruned:
        """Prune one matrix (O, I) with the Gram matrix of its inputs (I, I).

        Raises:
            ValueError: the Hessian is not finite, or stays indefinite at every damping; or n:m does not divide I.
        """
        assert statistic is not None
        dead_I = statistic.diagonal() == 0
        h_II = statistic.clone()
        h_II.diagonal()[dead_I] = 1
        w_OI = w_OI.clone()
        w_OI[:, dead_I] = 0
        u_II, damping = inverse_factor(h_II, self.damping, name)
        block = (
            self.block if sparsity.group is None else max(sparsity.group, self.block // sparsity.group * sparsity.group)
        )
        for first in range(0, w_OI.shape[1], block):
            last = min(first + block, w_OI.shape[1])
            u_BB = u_II[first:last, first:last]
            error_OB = _prune_block(w_OI[:, first:last], u_BB, sparsity)
            w_OI[:, last:] -= error_OB @ u_II[first:last, last:]
        return Pruned(w_OI, damping)


def _prune_block(w_OB: Tensor, u_BB: Tensor, sparsity: Sparsity) -> Tensor:
    """Prune the columns of `w_OB` in place; return the error of each, scaled, for the later columns."""
    scale_B = u_BB.diagonal()
    keep_OB = None if sparsity.group else sparsity.keep((w_OB / scale_B) ** 2, "layer")
    kept: list[Tensor] = []
    error_OB = torch.zeros_like(w_OB)
    for i in range(w_OB.shape[1]):
        if keep_OB is not None:
            keep_O = keep_OB[:, i]
        else:  # n:m: the mask of a group is chosen when its first column is reached, on weights updated so far
            assert sparsity.group is not None
            if i % sparsity.group == 0:
                group = slice(i, i + sparsity.group)
                kept = list(sparsity.keep((w_OB[:, group] / scale_B[group]) ** 2, "row").unbind(1))
            keep_O = kept[i % sparsity.group]
        dropped_O = w_OB[:, i] * ~keep_O
        error_OB[:, i] = dropped_O / scale_B[i]
        w_OB[:, i] *= keep_O
        w_OB[:, i + 1 :] -= error_OB[:, i : i + 1] * u_BB[i, i + 1 :]
    return error_OB


def inverse_factor(h_II: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """The upper Cholesky factor U of H^-1 = U^T U, and the damping that made it possible.

    Raises:
        ValueError: H is not finite, or no damping helps.
    """
    if not torch.isfinite(h_II).all():
        raise ValueError(
            f"{name}: the statistics of its inputs hold NaN or infinity; the model overflows on these rows"
        )
    mean = float(h_II.diagonal().mean())
    for _ in range(_TRIES):
        damped = h_II + torch.eye(len(h_II), dtype=h_II.dtype, device=h_II.device) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper, damping
        _log.warning("%s: the Hessian is not positive definite at damping %g; trying %g", name, damping, damping * 10)
        damping *= 10
    raise ValueError(
        f"{name}: the Hessian stays indefinite up to damping {damping / 10:g}; use more calibration tokens"
    )
