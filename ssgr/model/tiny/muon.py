"""Muon (Jordan et al. 2024, arXiv 2502.16982) in float32.

torch.optim.Muon orthogonalises in bfloat16, which a CPU without such instructions emulates at a tenth of the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of the quintic iteration: fast rather than exact, singular values near 1
ITERATIONS = 5


def orthogonalised(m_OI: torch.Tensor) -> torch.Tensor:
    """The nearest matrix to `m_OI` with singular values of about 1 (0.7 to 1.2), by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    tall = m_OI.shape[0] > m_OI.shape[1]
    x = m_OI.T if tall else m_OI
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum of the gradient, looked ahead (Nesterov) and orthogonalised, as the step of each matrix."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` is not used."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state: dict[str, Any] = self.state[p]
                average = state.setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"])
                wider = max(1.0, p.shape[0] / p.shape[1]) ** 0.5  # one root-mean-square step for every shape
                p.add_(orthogonalised(ahead), alpha=-group["lr"] * wider)
