"""Collect: the statistics of what enters the matrices of a block, weighted per token, stream by stream.

A stream is a set of tokens with a name of its own (the prompts, the responses, the held-out rows); statistics of streams
are sums, so any mixture of them can be formed after they were collected.

Accuracy: the sums over the tokens of one batch are formed in float32 (products of bfloat16 numbers are exact in it), those
over batches in float64. With T tokens a batch, |computed - exact| <= (T + 2) 2^-24 sum_t w_t |x_ti x_tj|, the bound of a
float32 inner product of T terms (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), whatever the number
of batches.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ssgr.products import bfloat16_products, native
from ssgr.pruner import Moments, Statistic
from ssgr.stages.clock import Clock

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
    """Sums over tokens: of weights, and in float64 of w x (I,), w x x (I,) and, right of the diagonal, w x x^T (I, I).

    And over rows: how many, and in float32 of the squared gradient with respect to the weights (O, I).
    """

    tokens: float
    sum_I: Tensor
    square_I: Tensor
    gram_II: Tensor | None = None
    gradient_OI: Tensor | None = None
    rows: float = 0.0

    @classmethod
    def zero(cls, inputs: int, statistic: Statistic, device: torch.device, outputs: int = 0) -> Sums:
        """Nothing added yet."""
        empty: Callable[..., Tensor] = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)
        gradient_OI = torch.zeros(outputs, inputs, device=device) if statistic == "gradient" else None
        gram_II = empty(inputs, inputs) if statistic == "gram" else None
        return cls(0.0, empty(inputs), empty(inputs), gram_II, gradient_OI)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs, where gradients are summed, and inputs."""
        return 0 if self.gradient_OI is None else len(self.gradient_OI), len(self.sum_I)

    def add(self, x_TI: Tensor, w_T: Tensor | None) -> None:
        """Add tokens (T, I) with weights."""
        exact = w_T is None and x_TI.dtype == torch.bfloat16 and x_TI.device.type == "cpu" and native(x_TI.dtype)
        x_TI = x_TI.float()
        wx_TI = x_TI if w_T is None else x_TI * w_T[:, None]
        self.tokens += len(x_TI) if w_T is None else float(w_T.double().sum())
        self.sum_I += wx_TI.sum(0)
        if self.gram_II is None:
            self.square_I += (wx_TI * x_TI).sum(0)
            return
        with bfloat16_products() if exact else nullcontext():
            for first in range(0, x_TI.shape[1], _STRIP):
                strip = slice(first, first + _STRIP)
                self.gram_II[strip, first:] += wx_TI[:, strip].T @ x_TI[:, first:]

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, with the diagonal of the Gram matrix as `square`."""
        if self.gram_II is not None:
            self.square_I = self.gram_II.diagonal().clone()
        out = {"tokens": torch.tensor([self.tokens], dtype=torch.float64), "sum": self.sum_I, "square": self.square_I}
        if self.gradient_OI is not None:
            out |= {"gradient": self.gradient_OI, "rows": torch.tensor([self.rows], dtype=torch.float64)}
        return out if self.gram_II is None else {**out, "gram": self.gram_II}


def moments(parts: Sequence[tuple[float, Mapping[str, Tensor]]], statistic: Statistic) -> Moments | None:
    """The moments of a mixture of `Sums.tensors`, each with its weight; None where no token came.

    The Gram matrix is formed only if `statistic` asks for it. Gradients are those of one stream: they do not add up.
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
    out = Moments(whole, mixed("sum"), mixed("square"), gram_II)
    if statistic == "gradient" and len(parts) == 1 and "gradient" in parts[0][1]:
        sums = parts[0][1]
        return replace(out, gradient_OI=sums["gradient"] / float(sums["rows"]), rows=float(sums["rows"]))
    return out


@dataclass
class Collector:
    """Sums of what enters several matrices, by stream; matrices that are given the same tensor share theirs."""

    statistic: Statistic
    matrices: Mapping[str, Matrix]
    streams: Mapping[str, Stream] = field(default_factory=dict)  # of the batch that is running
    tokens: int | None = None  # of that batch, with padding, where known
    owner: dict[str, str] = field(default_factory=dict)  # of each matrix that was heard: whose sums are its own
    sums: dict[tuple[str, str], Sums] = field(default_factory=dict)  # by owner and stream
    last: tuple[Tensor, str] | None = None  # what was heard last in this batch, and whose input it was
    clock: Clock = field(default_factory=partial(Clock, torch.device("cpu")))  # for the seconds spent on sums
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
        if self.statistic == "gradient":
            return self._with_gradients(forward)
        self._stop = self._once and not whole
        try:
            out = forward()
        except _Enough:
            return None
        self._once = bool(self._linear and self._calls) and not self.twice
        return out

    @property
    def twice(self) -> bool:
        """Whether a linear layer ran more than once in the last batch."""
        return max(self._calls.values(), default=0) > 1

    def _with_gradients(self, forward: Callable[[], Tensor]) -> Tensor:
        """Run a batch (N, T, D), and add to the sums of each linear layer the squared gradients of the norms of its rows.

        The gradient of a row with respect to the weights is that with respect to the layer's outputs, times its inputs: so
        one backward pass serves all rows.
        """
        heard: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str, module: nn.Module, args: tuple[Tensor, ...], out_: Tensor) -> None:
            if name in heard:
                raise ValueError(
                    f"{name} runs twice in its block, and its gradients are not collected; choose another pruner"
                )
            heard[name] = (args[0].detach(), out_)

        linear = [matrix for matrix in self.matrices.values() if matrix.expert is None]
        handles = [matrix.module.register_forward_hook(partial(keep, matrix.name)) for matrix in linear]
        try:
            with torch.enable_grad():
                for matrix in linear:
                    matrix.module.requires_grad_(True)
                out_NTD = forward()
                with self.clock.timed("statistics"):
                    self._add_gradients(out_NTD, heard)
        finally:
            for handle in handles:
                handle.remove()
            for matrix in linear:
                matrix.module.requires_grad_(False)
        return out_NTD.detach()

    def _add_gradients(self, out_NTD: Tensor, heard: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Of the layers in `heard`, each with its inputs and outputs."""
        outs = [out for _, out in heard.values()]
        for label, stream in self.streams.items():
            norms_N = _norms(out_NTD, stream)
            grads = torch.autograd.grad(norms_N.sum(), outs, retain_graph=True, allow_unused=True)
            for (name, (x, _)), grad in zip(heard.items(), grads, strict=True):
                sums = self.sums[name, label]
                sums.rows += len(norms_N)
                if grad is None:
                    continue
                for g, x_n in zip(_by_row(grad, out_NTD), _by_row(x, out_NTD), strict=True):
                    assert sums.gradient_OI is not None
                    sums.gradient_OI += (g.float().T @ x_n.float()).square()

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
                shared = self.last is not None and self.last[0] is x and self.statistic != "gradient"
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
        with self.clock.timed("statistics"):
            sums = self.sums.get((owner, label))
            if sums is None:
                outputs = self.matrices[owner].shape[0] if self.statistic == "gradient" else 0
                sums = self.sums[owner, label] = Sums.zero(x_TI.shape[1], self.statistic, x_TI.device, outputs)
            sums.add(x_TI.detach(), w_T)


def _norms(out_NTD: Tensor, stream: Stream) -> Tensor:
    """The norm of each row's output over the tokens of `stream`, each token counted as much as it weighs; of the rows that
    have any."""
    square_S = out_NTD.float().square().sum(-1).flatten()
    weights_S = torch.zeros_like(square_S, requires_grad=False)
    which = slice(None) if stream.which_T is None else stream.which_T
    weights_S[which] = 1.0 if stream.weights_T is None else stream.weights_T.to(weights_S.dtype)
    row_N = (square_S * weights_S).view(len(out_NTD), -1).sum(1)
    return row_N[row_N > 0].sqrt()


def _by_row(x: Tensor, out_NTD: Tensor) -> Tensor:
    """`x`, the inputs or outputs of a layer for all tokens, as (N, T, I)."""
    return x.reshape(*out_NTD.shape[:2], -1)


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
