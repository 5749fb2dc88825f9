"""Collect: the statistics of what goes into linear layers, weighted per token.

Shapes: N rows of a batch, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ssgr.pruner import Statistic


@dataclass
class Accumulator:
    """The weighted mean of x_t x_t^T (gram), or of its diagonal (norm), summed in float32 with float64 weights."""

    statistic: Statistic
    total: Tensor | None = None
    weight: float = 0.0

    def add(self, x_TI: Tensor, w_T: Tensor) -> None:
        """Add tokens with weights; tokens of weight zero (padding among them) are dropped before any product."""
        used = w_T > 0
        x_TI, w_T = x_TI[used].float(), w_T[used].float()
        new = (x_TI * w_T[:, None]).T @ x_TI if self.statistic == "gram" else (x_TI.square() * w_T[:, None]).sum(0)
        self.total = new if self.total is None else self.total + new
        self.weight += float(w_T.double().sum())

    def mean(self) -> Tensor:
        """The statistic: (I, I) or (I,)."""
        assert self.total is not None and self.weight > 0
        return self.total / self.weight


@dataclass
class Collector:
    """Statistics of several linear layers; layers that are given the same tensor share one accumulator."""

    statistic: Statistic
    layers: Mapping[str, nn.Linear]
    weights_NT: Tensor | None = None  # of the batch that is running
    _owner: dict[str, str] = field(default_factory=dict)
    _sums: dict[str, Accumulator] = field(default_factory=dict)
    _last: tuple[Tensor, str] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Collect from every forward pass inside the block."""
        handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hear(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, owner = args[0], self._owner.get(name)
            if owner is None:
                shared = self._last is not None and self._last[0] is x
                owner = self._owner[name] = self._last[1] if shared and self._last else name
            self._last = (x, owner)
            if owner == name:
                assert self.weights_NT is not None
                sums = self._sums.setdefault(name, Accumulator(self.statistic))
                sums.add(x.reshape(-1, x.shape[-1]), self.weights_NT.reshape(-1))

        return hear

    def of(self, name: str) -> Tensor:
        """The statistic of layer `name`."""
        return self._sums[self._owner[name]].mean()


@torch.no_grad()
def relative_error(w_OI: Tensor, new_OI: Tensor, statistic: Tensor) -> float:
    """||(W - W') X|| / ||W X|| from the Gram matrix (I, I) of X, or from its diagonal (I,) alone."""

    def energy(m_OI: Tensor) -> Tensor:
        return ((m_OI @ statistic) * m_OI).sum() if statistic.ndim == 2 else (m_OI.square() * statistic).sum()

    whole = energy(w_OI)
    return float((energy(w_OI - new_OI).clamp(min=0) / whole).sqrt()) if whole > 0 else 0.0
