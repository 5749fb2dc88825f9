"""Collect: the statistics of what enters the matrices of a block, weighted per token, stream by stream.

A stream is a set of tokens with a name of its own (the prompts, the responses, the held-out rows); statistics of streams
are sums, so any mixture of them can be formed after they were collected.

Accuracy: the sums over the tokens of one batch are formed in float32, those over batches in float64. With T tokens a
batch, |computed - exact| <= (T + 2) 2^-24 sum_t w_t |x_ti x_tj|, the bound of a float32 inner product of T terms (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1), whatever the number of batches.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ssgr.pruner import Moments, Statistic

if TYPE_CHECKING:
    from ssgr.model.blocks import Matrix  # by name only: sums need no transformers, whose import takes seconds

_STRIP = 256  # columns of the Gram matrix formed at a time: only what lies right of the diagonal is


@dataclass(frozen=True)
class Stream:
    """Tokens of one batch: which (None for all of them) and the weight of each (None for 1)."""

    which_T: Tensor | None
    weights_T: Tensor | None


@dataclass
class Sums:
    """Sums over tokens: of weights, and in float64 of w x (I,), w x x (I,) and, right of the diagonal, w x x^T (I, I)."""

    tokens: float
    sum_I: Tensor
    square_I: Tensor
    gram_II: Tensor | None = None

    @classmethod
    def zero(cls, inputs: int, statistic: Statistic, device: torch.device) -> Sums:
        """Nothing added yet."""
        empty: Callable[..., Tensor] = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(0.0, empty(inputs), empty(inputs), empty(inputs, inputs) if statistic == "gram" else None)

    def add(self, x_TI: Tensor, w_T: Tensor | None) -> None:
        """Add tokens (T, I) with weights."""
        x_TI = x_TI.float()
        wx_TI = x_TI if w_T is None else x_TI * w_T[:, None]
        self.tokens += len(x_TI) if w_T is None else float(w_T.double().sum())
        self.sum_I += wx_TI.sum(0)
        if self.gram_II is None:
            self.square_I += (wx_TI * x_TI).sum(0)
            return
        for first in range(0, x_TI.shape[1], _STRIP):
            strip = slice(first, first + _STRIP)
            self.gram_II[strip, first:] += wx_TI[:, strip].T @ x_TI[:, first:]

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, with the diagonal of the Gram matrix as `square`."""
        if self.gram_II is not None:
            self.square_I = self.gram_II.diagonal().clone()
        out = {"tokens": torch.tensor([self.tokens], dtype=torch.float64), "sum": self.sum_I, "square": self.square_I}
        return out if self.gram_II is None else {**out, "gram": self.gram_II}


def moments(parts: Sequence[tuple[float, Mapping[str, Tensor]]], statistic: Statistic) -> Moments | None:
    """The moments of a mixture of `Sums.tensors`, each with its weight; None where no token came.

    The Gram matrix is formed only if `statistic` asks for it.
    """
    parts = [(weight, sums) for weight, sums in parts if weight > 0 and float(sums["tokens"]) > 0]
    if not parts:
        return None
    whole = sum(weight * float(sums["tokens"]) for weight, sums in parts)

    def mixed(name: str) -> Tensor:
        total, *others = [sums[name] if weight == 1 else sums[name] * weight for weight, sums in parts]
        for other in others:
            total = total + other
        return (total / whole).float()

    gram_II = None
    if statistic == "gram":
        gram_II = mixed("gram").triu_()
        gram_II += gram_II.triu(1).T
    return Moments(whole, mixed("sum"), mixed("square"), gram_II)


@dataclass
class Collector:
    """Sums of what enters several matrices, by stream; matrices that are given the same tensor share theirs."""

    statistic: Statistic
    matrices: Mapping[str, Matrix]
    streams: Mapping[str, Stream] = field(default_factory=dict)  # of the batch that is running
    tokens: int | None = None  # of that batch, with padding, where known
    seconds: float = 0.0  # spent on sums
    owner: dict[str, str] = field(default_factory=dict)  # of each matrix that was heard: whose sums are its own
    sums: dict[tuple[str, str], Sums] = field(default_factory=dict)  # by owner and stream
    last: tuple[Tensor, str] | None = None  # what was heard last in this batch, and whose input it was
    pause: Callable[[str], None] | None = None  # called before a matrix runs whose inputs were not heard of before
    _linear: int = 0  # matrices that are heard by a hook
    _calls: Counter[str] = field(default_factory=Counter)  # of each of these in this batch
    _once: bool = False  # none is called twice: a batch in which all were called has no more to say
    _stop: bool = False  # this batch as soon as that is so

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Collect from every forward pass inside."""
        linear = [m for m in self.matrices.values() if m.expert is None]
        stacked = {
            m.module: m.name.rpartition(f".{m.expert}.")[0] for m in self.matrices.values() if m.expert is not None
        }
        handles = [matrix.module.register_forward_pre_hook(self._hook(matrix.name)) for matrix in linear]
        for module, name in stacked.items():
            module.hear = self._hear_expert(name)  # type: ignore[assignment]
        self._linear = 0 if stacked else len(linear)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in stacked:
                del module.hear

    def run(
        self, forward: Callable[[], Tensor], streams: Mapping[str, Stream], whole: bool, tokens: int | None = None
    ) -> Tensor | None:
        """Run a batch; its output if it is wanted `whole`, else only as far as something is heard.

        Raises:
            ValueError: a linear layer is given something else than the `tokens` of the batch.
        """
        self.streams, self.tokens, self.last, self._calls = streams, tokens, None, Counter()
        self._stop = self._once and not whole
        try:
            out = forward()
        except _Enough:
            return None
        self._once = bool(self._linear) and max(self._calls.values(), default=0) == 1
        return out

    def turn(
        self, streams: Mapping[str, Stream], tokens: int, last: tuple[Tensor, str] | None, pause: Callable[[str], None]
    ) -> None:
        """Go on listening to another batch, which stops at `pause` before each set of matrices with the same inputs."""
        self.streams, self.tokens, self.last, self.pause, self._stop = streams, tokens, last, pause, False

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hear(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            self._calls[name] += 1
            owner = self.owner.get(name)
            if owner is None:
                shared = self.last is not None and self.last[0] is x
                owner = self.owner[name] = self.last[1] if shared and self.last else name
            elif self.pause and owner != name and not (self.last and self.last[0] is x):
                raise ValueError(f"{name} and {owner} had the same inputs in another block; type order=block")
            self.last = (x, owner)
            if owner == name:
                x_TI = x.reshape(-1, x.shape[-1])
                if self.tokens not in (None, len(x_TI)):
                    raise ValueError(
                        f"{name} is given {len(x_TI)} vectors for {self.tokens} tokens, and which are whose is not known "
                        "(experts that transformers' experts interface does not run, say); leave it out with "
                        f"'pruner.exclude=[{name}]'"
                    )
                for label, stream in self.streams.items():
                    which = stream.which_T
                    self._add(owner, label, x_TI if which is None else x_TI[which], stream.weights_T)
                if self.pause:
                    self.pause(name)
            if self._stop and len(self._calls) == self._linear:
                raise _Enough

        return hear

    def _hear_expert(self, experts: str) -> Callable[[str, int, Tensor, Tensor], None]:
        def hear(parameter: str, expert: int, x_TI: Tensor, tokens_T: Tensor) -> None:
            name = f"{experts}.{expert}.{parameter}"
            if name not in self.matrices:
                return
            self.owner[name] = name
            for label, stream in self.streams.items():
                if stream.which_T is None:
                    self._add(name, label, x_TI, None if stream.weights_T is None else stream.weights_T[tokens_T])
                    continue
                place_T = torch.searchsorted(stream.which_T, tokens_T).clamp(max=len(stream.which_T) - 1)
                inside_T = stream.which_T[place_T] == tokens_T
                weights_T = None if stream.weights_T is None else stream.weights_T[place_T[inside_T]]
                if inside_T.any():
                    self._add(name, label, x_TI[inside_T], weights_T)

        return hear

    def _add(self, owner: str, label: str, x_TI: Tensor, w_T: Tensor | None) -> None:
        start = time.perf_counter()
        sums = self.sums.get((owner, label))
        if sums is None:
            sums = self.sums[owner, label] = Sums.zero(x_TI.shape[1], self.statistic, x_TI.device)
        sums.add(x_TI, w_T)
        self.seconds += time.perf_counter() - start


class _Enough(Exception):
    """Nothing more will be heard in this batch."""


def sharing(matrices: Sequence[str], owner: Mapping[str, str]) -> list[list[str]]:
    """Matrices in groups that have the same inputs; those that were never heard stand alone."""
    groups: dict[str, list[str]] = {}
    for name in matrices:
        groups.setdefault(owner.get(name, name), []).append(name)
    return list(groups.values())


@torch.no_grad()
def relative_error(w_OI: Tensor, new_OI: Tensor, statistic: Tensor) -> float:
    """||(W - W') X|| / ||W X|| from the Gram matrix (I, I) of X, or from its diagonal (I,) alone."""

    def energy(m_OI: Tensor) -> Tensor:
        return ((m_OI @ statistic) * m_OI).sum() if statistic.ndim == 2 else (m_OI.square() * statistic).sum()

    whole = energy(w_OI)
    return float((energy(w_OI - new_OI).clamp(min=0) / whole).sqrt()) if whole > 0 else 0.0
