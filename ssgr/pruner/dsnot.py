"""DSnoT: a mask refined without training (Zhang et al., ICLR 2024, arXiv 2310.08915).

Shapes: O outputs, I inputs, R some of the outputs, K swaps at most, M inputs of one n:m group; 2 signs of a shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor
from torch.nn.functional import pad

from ssgr.pruner import Moments, Pruned, Pruner, Statistic
from ssgr.sparsity import Sparsity

_SAMPLE = 2048  # tokens whose errors the published code adds up before it compares their sum with the threshold
_ROWS = 1024  # outputs refined at once: bounds the memory


@dataclass(frozen=True)
class DSnoT:
    """Swap weights in and out of the mask of `base` until each output is expected to be what it was (algorithm 1).

    The expected error of an output is the sum of w E[x] over its pruned weights. A swap brings back the pruned weight
    that lowers it most for the variance of its input, w E[x] / Var[x] ** `power`, and drops the kept weight of the
    smallest |w| ||x||_2 among those whose loss lowers it too; under n:m the one of the lowest score of `base` in the
    same group, whatever its sign, and a swap may not turn the sign of the error. No weight moves twice. An output is
    done after `max_cycles` swaps, when its error is at most `threshold`, or when a swap would not lower the error: the
    published code checks the last only by `same_sign`, which is off there, and can end above the error it began with.

    The weights are the dense ones under the refined mask, as published: weight updates of `base` are dropped. Layers
    that match `skip` keep the mask of `base`.
    """

    base: Pruner
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip: tuple[str, ...] = ("*.mlp.*",)
    max_cycles: int = 50
    threshold: float = 0.1
    power: float = 1.0
    same_sign: bool = False
    name: str = "dsnot"

    def __post_init__(self) -> None:
        for field in ("include", "exclude", "skip"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if self.max_cycles < 1 or self.threshold < 0 or self.power < 0:
            raise ValueError(
                f"pruner: max_cycles={self.max_cycles} threshold={self.threshold} power={self.power}: give max_cycles "
                ">= 1, threshold >= 0 and power >= 0"
            )
        if self.base.include or self.base.exclude:
            raise ValueError(
                f"pruner.base: include={list(self.base.include)} exclude={list(self.base.exclude)} would be ignored: "
                "type pruner.include or pruner.exclude"
            )
        if self.base.statistic == "gradient":
            raise ValueError(f"pruner.base={self.base.name} needs gradients: type pruner@pruner.base=wanda")

    @property
    def statistic(self) -> Statistic:
        """What the base needs, and at least mean and mean square of each input."""
        return "gram" if self.base.statistic == "gram" else "norm"

    @property
    def work(self) -> tuple[int, int]:
        """That of the base, and what the refinement takes, most where there are fewer outputs than are refined at once."""
        weight, pair = self.base.work
        return weight + 32, pair

    def score(self, w_OI: Tensor, inputs: Moments | None) -> Tensor:
        """What the base scores, (O, I)."""
        return self.base.score(w_OI, inputs)

    def prune(
        self, ws: Sequence[Tensor], inputs: Moments | None, sparsities: Sequence[Sparsity], names: Sequence[str]
    ) -> list[Pruned]:
        """Prune matrices (O, I) that have the same inputs.

        Raises:
            ValueError: as the base.
        """
        assert inputs is not None
        out, of_bases = [], self.base.prune(ws, inputs, sparsities, names)
        for w_OI, sparsity, of_base, name in zip(ws, sparsities, of_bases, names, strict=True):
            keep_OI = of_base.w_OI != 0
            if not any(fnmatch(name, pattern) for pattern in self.skip):
                grouped = sparsity.group is not None
                cost_OI = self.base.score(w_OI, inputs) if grouped else w_OI.abs() * inputs.square_I.sqrt()
                parts = zip(*(torch.split(whole_OI, _ROWS) for whole_OI in (w_OI, keep_OI, cost_OI)), strict=True)
                keep_OI = torch.cat([self._refined(w, keep, cost, inputs, sparsity.group) for w, keep, cost in parts])
            out.append(Pruned(w_OI * keep_OI, of_base.damping, of_base.condition))
        return out

    def _refined(self, w_RI: Tensor, keep_RI: Tensor, cost_RI: Tensor, inputs: Moments, group: int | None) -> Tensor:
        """The refined mask of some outputs, bool (R, I)."""
        shift_RI = w_RI.double() * inputs.mean_I.double()
        rounding_I = torch.finfo(inputs.square_I.dtype).eps * inputs.square_I  # no variance is known better
        variance_I = torch.maximum(inputs.variance_I, rounding_I).double()
        grow = _Queue(shift_RI.abs() / variance_I**self.power, shift_RI * ~keep_RI, self.max_cycles)
        drop = _Groups(cost_RI, keep_RI, group) if group else _Queue(-cost_RI, shift_RI * keep_RI, self.max_cycles)
        keep_RI, rows_R = keep_RI.clone(), torch.arange(len(w_RI), device=w_RI.device)
        error_R = (shift_RI * ~keep_RI).sum(1)
        first_R, going_R = error_R.sign(), torch.ones_like(error_R, dtype=torch.bool)
        for _ in range(self.max_cycles):
            going_R = going_R & (error_R.abs() * _SAMPLE > self.threshold)
            if not going_R.any():
                break
            back_R, found_R = grow.next(error_R > 0)
            gone_R, free_R = drop.next(error_R < 0, back_R)
            after_R = error_R + shift_RI[rows_R, gone_R] - shift_RI[rows_R, back_R]
            going_R = going_R & found_R & free_R & (after_R.abs() < error_R.abs())
            if self.same_sign or group:
                going_R = going_R & (after_R.sign() == first_R)
            keep_RI[rows_R[going_R], back_R[going_R]] = True
            keep_RI[rows_R[going_R], gone_R[going_R]] = False
            error_R = torch.where(going_R, after_R, error_R)
        return keep_RI


class _Queue:
    """The inputs of each output whose shift is negative, and those where it is positive, each by falling worth."""

    def __init__(self, worth_RI: Tensor, shift_RI: Tensor, most: int) -> None:
        worth_2RI = torch.where(torch.stack([shift_RI < 0, shift_RI > 0]), worth_RI, -torch.inf)
        best = worth_2RI.topk(min(most, worth_RI.shape[1]), dim=2)
        self.index_2RK, self.found_2RK = pad(best.indices, (0, 1)), pad(best.values > -torch.inf, (0, 1))
        self.at_2R = torch.zeros_like(best.indices[:, :, 0])

    def next(self, positive_R: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next input of each output, (R,), from the list of the sign it asks for, and whether there is one."""
        side_R, rows_R = positive_R.long(), torch.arange(len(positive_R), device=positive_R.device)
        at_R = self.at_2R[side_R, rows_R]
        self.at_2R[side_R, rows_R] = (at_R + 1).clamp(max=self.index_2RK.shape[2] - 1)
        return self.index_2RK[side_R, rows_R, at_R], self.found_2RK[side_R, rows_R, at_R]


class _Groups:
    """The kept inputs of each output in groups of m, by rising cost."""

    def __init__(self, cost_RI: Tensor, keep_RI: Tensor, m: int) -> None:
        self.cost_RI, self.m = cost_RI.masked_fill(~keep_RI, torch.inf), m

    def next(self, _: Tensor, back_R: Tensor) -> tuple[Tensor, Tensor]:
        """The cheapest input that is left in the group of input `back_R` of each output, (R,), and whether there is one."""
        first_R1 = (back_R // self.m * self.m)[:, None]
        index_RM = first_R1 + torch.arange(self.m, device=back_R.device)
        least_R, at_R = self.cost_RI.gather(1, index_RM).min(1)
        gone_R1 = first_R1 + at_R[:, None]
        self.cost_RI.scatter_(1, gone_R1, torch.inf)
        return gone_R1[:, 0], least_R < torch.inf
