"""Activations: the calibration rows on their way through the blocks, in host memory or in a file.

Shapes: N rows of a batch, T tokens (padded on the right), D hidden size.
"""

from __future__ import annotations

import inspect
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssgr.records import CalibrationSet, Row
from ssgr.scope import Scope, streams
from ssgr.stages.collect import Stream

ALL, HELD_OUT = "all", "held out: "  # the stream of what is mixed already; before the streams of held-out rows
_PADDING = 0  # a token that every model knows; what it does is looked at by none
_BATCH_TOKENS = 2048  # padded tokens of one forward pass
Spans = list[tuple[str, int, int, float]]  # stream, first and last token, factor of the tokens' weights


@dataclass(frozen=True)
class Passage:
    """A row that passes through the model: its ids, and by what its tokens count."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    spans: Spans

    @property
    def held_out(self) -> bool:
        """Whether it is only measured on."""
        return self.spans[0][0].startswith(HELD_OUT)


@dataclass
class Batch:
    """Rows of like length: what enters the next block, its streams of tokens, and what else each block is given."""

    hidden_NTD: Tensor  # on the host; some models have several such states, one below the other or side by side
    streams: dict[str, Stream]
    given: list[dict[str, Any]]  # masks, positions
    form: Callable[[Tensor], Any]  # what a block puts out, of hidden states
    tokens: int  # of the rows with their padding

    def through(self, block: nn.Module, i: int, device: torch.device) -> Tensor:
        """The output of block `i` for these rows."""
        given = self.given[i] if i < len(self.given) else {"form": self.form}  # what follows the blocks
        out = block(self.hidden_NTD.to(device, non_blocking=True), **_moved(given, device))
        hidden: Tensor = out[0] if isinstance(out, (tuple, list)) else out
        return hidden


def passages(calibration: CalibrationSet, scope: Scope | None) -> list[Passage]:
    """The rows in order of length, the held-out ones last; with a `scope`, all of a row is one stream and ends with its
    last token that counts (causal attention never looks further), else its streams are kept apart.

    Raises:
        ValueError: a row has fewer than two tokens, or no token has any weight.
    """
    every = [(row, w, "") for row, w in zip(calibration.rows, calibration.weights, strict=True)]
    every += [(row, (1.0,) * len(row), HELD_OUT) for row in calibration.held_out]
    out = []
    for row, weights, held_out in every:
        if len(row) < 2:
            raise ValueError(
                f"calib={calibration.source}: row {row.id} has {len(row)} token(s), and a row needs two at least; give "
                "longer text, or drop it"
            )
        spans = _spans(row, weights, calibration.parts, scope, held_out)
        if stop := max((stop for _, _, stop, _ in spans), default=0):
            out.append(Passage(row.ids[:stop], weights[:stop], spans))
    if not any(not name.startswith(HELD_OUT) for passage in out for name, *_ in passage.spans):
        raise ValueError(f"calib={calibration.source}: every token weighs zero in this scope; type scope=both")
    return sorted(out, key=lambda passage: (passage.held_out, len(passage.ids)))


def _spans(row: Row, weights: Sequence[float], parts: bool, scope: Scope | None, before: str) -> Spans:
    spans = []
    for name, first, stop in streams(row, parts):
        factor = 1.0 if scope is None else scope.weight(name)
        while scope is not None and stop > first and not factor * weights[stop - 1]:
            stop -= 1
        if stop > first and any(weights[first:stop]):
            spans.append((before + (ALL if scope else name), first, stop, factor))
    return spans


def groups(rows: Sequence[Passage], apart: int | None = None) -> list[list[int]]:
    """Indices of the rows of `passages` in batches of at most _BATCH_TOKENS padded tokens.

    Held-out rows have batches of their own: without them the others are the same, and so is every rounding. So have rows of
    more than `apart` tokens.
    """
    out: list[list[int]] = []
    for i, row in enumerate(rows):
        fits = bool(out) and (len(out[-1]) + 1) * len(row.ids) <= _BATCH_TOKENS
        over = bool(apart and i and len(rows[i - 1].ids) <= apart < len(row.ids))
        if not fits or over or row.held_out != rows[i - 1].held_out:
            out.append([])
        out[-1].append(i)
    return out


def padded_tokens(rows: Sequence[Passage], apart: int | None = None) -> int:
    """Tokens of all batches with their padding."""
    return sum(len(group) * len(rows[group[-1]].ids) for group in groups(rows, apart))


def largest_batch(rows: Sequence[Passage], apart: int | None = None) -> tuple[int, int]:
    """Rows and padded tokens of a row of the batch that has the most tokens."""
    return max(((len(group), len(rows[group[-1]].ids)) for group in groups(rows, apart)), key=math.prod, default=(0, 0))


def first_inputs(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    rows: Sequence[Passage],
    device: torch.device,
    file: Path | None,
    mine: Callable[[int], bool] = lambda i: True,
    apart: int | None = None,
) -> list[Batch]:
    """What reaches the blocks, batch by batch: causal attention keeps padding on the right from real tokens.

    The first block and what comes before it must have weights; the others need none. The hidden states lie in `file`,
    mapped into memory, or in memory where it is None. Only batches whose number is `mine` are made.
    """
    members = [group for i, group in enumerate(groups(rows, apart)) if mine(i)]
    widths = [len(rows[group[-1]].ids) for group in members]
    tokens, room = sum(len(group) * width for group, width in zip(members, widths, strict=True)), torch.empty(0)
    batches: dict[int, Batch] = {}
    longest: list[dict[str, Any]] = []  # what the longest batch is given
    with _passing_through(blocks) as (heard, form):
        for i in sorted(range(len(members)), key=lambda i: (-widths[i], -i)):
            group, width = members[i], widths[i]
            ids_NT = torch.tensor([[*rows[n].ids, *[_PADDING] * (width - len(rows[n].ids))] for n in group])
            heard.clear()
            with suppress(_Reached):
                model(input_ids=ids_NT.to(device), use_cache=False)
            hidden_NTD = heard[0][0]
            if not batches:
                each = hidden_NTD.numel() // ids_NT.numel()
                room = _room(tokens * each, hidden_NTD.dtype, file, device)
            room, own = room[: -hidden_NTD.numel()], room[-hidden_NTD.numel() :]
            own.copy_(hidden_NTD.flatten())
            moved: dict[int, Any] = {}
            parts: dict[int, Any] = {}
            given = [_moved(kwargs, torch.device("cpu"), moved) for _, kwargs in heard]
            if not longest and any(x.is_floating_point() and x.isnan().any() for x in moved.values()):
                raise _no_chain(blocks)
            longest = longest or given
            given = [_part(value, whole, parts) for value, whole in zip(given, longest, strict=True)]
            streams = _streams([rows[n] for n in group], width, device)
            batches[i] = Batch(own.view_as(hidden_NTD), streams, given, form[0], ids_NT.numel())
    return [batches[i] for i in range(len(members))]


def _streams(rows: Sequence[Passage], width: int, device: torch.device) -> dict[str, Stream]:
    """The streams of a batch; tokens without weight, padding among them, are in none."""
    which: dict[str, list[int]] = defaultdict(list)
    weights: dict[str, list[float]] = defaultdict(list)
    for n, row in enumerate(rows):
        for name, first, stop, factor in row.spans:
            counting = [t for t in range(first, stop) if row.weights[t] * factor > 0]
            which[name] += [n * width + t for t in counting]
            weights[name] += [row.weights[t] * factor for t in counting]
    return {
        name: Stream(
            None if len(which[name]) == len(rows) * width else torch.tensor(which[name], device=device),
            None if set(weights[name]) == {1.0} else torch.tensor(weights[name], device=device),
        )
        for name in which
    }


def _room(numbers: int, dtype: torch.dtype, file: Path | None, device: torch.device) -> Tensor:
    if file is None:
        return torch.empty(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    file.unlink(missing_ok=True)
    with open(file, "wb") as stream:
        if hasattr(os, "posix_fallocate"):  # a disk that is full says so here; a write to a mapped page would kill
            os.posix_fallocate(stream.fileno(), 0, numbers * dtype.itemsize)
    return torch.from_file(str(file), shared=True, size=numbers, dtype=dtype)


def file_of(work: Path, rank: int) -> Path:
    """Where the activations of a rank lie."""
    return work / f"activations.{rank}.bin"


@contextmanager
def removed(work: Path, leads: bool = True) -> Iterator[None]:
    """Leave no activations in `work`, nor those of a killed run before; of several hosts, the one that `leads` does."""
    try:
        _remove(work, leads)
        yield
    finally:
        _remove(work, leads)


def _remove(work: Path, leads: bool) -> None:
    for file in work.glob("activations.*.bin") if leads else ():
        file.unlink(missing_ok=True)


def _moved(value: Any, device: torch.device, seen: dict[int, Any] | None = None) -> Any:
    """`value` with its tensors on `device`; what several blocks share stays shared."""
    seen = {} if seen is None else seen
    if isinstance(value, dict):
        return {k: _moved(v, device, seen) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(v, device, seen) for v in value)
    if isinstance(value, Tensor):
        return seen.setdefault(id(value), value.to(device))
    return value


def _part(value: Any, whole: Any, seen: dict[int, Any]) -> Any:
    """`value` with its tensors as views of those in `whole` where they are the first part of them: masks and positions of
    shorter rows take no memory of their own.
    """
    if isinstance(value, dict) and isinstance(whole, dict):
        return {k: _part(v, whole.get(k), seen) for k, v in value.items()}
    if isinstance(value, (tuple, list)) and isinstance(whole, (tuple, list)) and len(value) == len(whole):
        return type(value)(_part(v, w, seen) for v, w in zip(value, whole, strict=True))
    if not (isinstance(value, Tensor) and isinstance(whole, Tensor) and value.ndim == whole.ndim and value.ndim > 0):
        return value
    if id(value) not in seen:
        view = whole[tuple(slice(n) for n in value.shape)]
        if view.shape[1:] == value.shape[1:] and view.shape[0] < value.shape[0]:  # more rows, and each the same for all
            view = view[:1].expand(value.shape)
        seen[id(value)] = view if view.dtype == value.dtype and torch.equal(view, value) else value
    return seen[id(value)]


class _Reached(Exception):
    """The last block was reached: what follows has no weights."""


class _Beside:
    """What a block returns beside the hidden states, while blocks only hand those on."""


@contextmanager
def _passing_through(
    blocks: nn.ModuleList,
) -> Iterator[tuple[list[tuple[Tensor, dict[str, Any]]], list[Callable[[Tensor], Any]]]]:
    """Let every block hand on NaN at once; hear what each is given (blocks may attend in different ways), and the form of
    what they put out."""
    heard: list[tuple[Tensor, dict[str, Any]]] = []
    own = [block.forward for block in blocks]
    form: list[Callable[[Tensor], Any]] = []  # of what a block returns, once known
    handed_on: list[Tensor] = []  # NaN: it shows in whatever a model makes of hidden states between blocks

    def hear(i: int, *args: Any, **kwargs: Any) -> Any:
        if not form:
            form.append(_form(own[0](*args, **kwargs)))
        hidden, given = _arguments(own[i], args, kwargs)
        if beside := [name for name, value in given.items() if isinstance(value, _Beside)]:
            raise ValueError(
                f"{type(blocks[i]).__name__}: {beside[0]} comes from the block before, and blocks that are pruned one by one "
                "hand on hidden states only; this model cannot be pruned"
            )
        # A view of the whole is as good: Gemma 4 cuts rows short before blocks without keys of their own, here by nothing.
        if i != len(heard) or (
            heard and (hidden.data_ptr(), hidden.shape) != (handed_on[0].data_ptr(), handed_on[0].shape)
        ):
            raise _no_chain(blocks)
        heard.append((hidden, given))
        if len(heard) == len(own):
            raise _Reached
        if i == 0:
            handed_on[:] = [torch.full_like(hidden, math.nan)]
        return form[0](handed_on[0])

    try:
        for i, block in enumerate(blocks):
            block.forward = partial(hear, i)
        yield heard, form
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.forward = forward


def _no_chain(blocks: nn.ModuleList) -> ValueError:
    return ValueError(
        f"{type(blocks[0]).__name__}: blocks run more than once, or the model works on hidden states between them, and blocks "
        "that are pruned one by one each take what the one before puts out; this model cannot be pruned"
    )


def _form(out: Any) -> Callable[[Tensor], Any]:
    """What makes of hidden states an output like `out`."""
    if not isinstance(out, (tuple, list)):
        return lambda hidden: hidden
    beside = [None if value is None else _Beside() for value in out[1:]]
    return lambda hidden: type(out)([hidden, *beside])


def _arguments(forward: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states that `forward` would be given, and everything else by name."""
    signature = inspect.signature(forward)
    given = signature.bind(*args, **kwargs).arguments
    first, *others = signature.parameters.values()
    for parameter in others:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given.pop(first.name), given
