"""Continuous batching: rows are decoded in slots, and the place of one that ends is taken by the next prompt.

Rows of very different length share a step, so attention reads the cache by shelves: the slots are kept in order of length,
longest first, and each quarter of them is read as far as its own longest row.

Shapes: N rows, H heads, K key-value heads, L = N x K, G heads a key-value head, T tokens, D head dimension, S slots.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ssgr.records import Finish, Trace
from ssgr.sampler import Decoding, Request, cache_argument
from ssgr.sampler.nucleus import pick, uniforms

_NAME = "ssgr_slots"
_SHELVES, _FEW = 4, 8  # shelves of slots; of so few rows there is one
_ROOM = 128  # tokens that a slot has room for at first, or twice the longest prompt; doubled when a row needs more
_PREFILL = 2048  # padded tokens of prompts in one forward pass
_YIELD_SECONDS = 30.0  # finished traces are handed on at least so often


def serves(model: PreTrainedModel) -> bool:
    """Whether `model` can be decoded in slots: all its layers keep all keys and values, attend as transformers' attention
    interface says, and are told the positions of tokens."""
    layers = DynamicCache(config=model.config).layers
    plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    positions = "position_ids" in signature(model.forward).parameters
    return plain and positions and model.config._attn_implementation == "sdpa" and model._supports_attention_backend


class OwnMask(Exception):
    """The model gives its attention a mask of its own, so it cannot be decoded in slots; its first prompts tell."""


@dataclass
class _Row:
    """A request on its way."""

    request: Request
    seed: int
    uniform_T: np.ndarray[tuple[int], np.dtype[np.float64]]
    limit: int
    next_id: int
    before: tuple[int, ...]  # what the model has seen when `next_id` comes
    ids: list[int] = field(default_factory=list)


class _Layer(DynamicLayer):
    """Keys and values (S, K, T, D) of one layer in all slots."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots
        self.room_k = self.room_v = torch.empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token of each row, (N, K, 1, D), behind those that its slot holds."""
        self.make_room(key_states, value_states, self.slots.reach)
        at_L = self.slots.places(*self.room_k.shape[1:3])
        for room, states in ((self.room_k, key_states), (self.room_v, value_states)):
            room.view(-1, room.shape[-1]).index_copy_(0, at_L, states.reshape(-1, room.shape[-1]))
        return self.room_k, self.room_v

    def make_room(self, key_states: Tensor, value_states: Tensor, tokens: int) -> None:
        """Have room for `tokens` in each slot."""
        have = self.room_k.shape[-2] if self.room_k.numel() else 0
        if tokens > have:
            new = max(tokens, min(self.slots.most, max(_ROOM, 2 * (have or tokens))))
            self.room_k, self.room_v = (
                self._larger(old, like, new) for old, like in ((self.room_k, key_states), (self.room_v, value_states))
            )

    def _larger(self, old: Tensor, like: Tensor, tokens: int) -> Tensor:
        new, have = like.new_empty(self.slots.size, like.shape[1], tokens, like.shape[3]), 0
        if old.numel():
            have = old.shape[-2]
            new[:, :, :have] = old
        new[:, :, have:] = 0  # what is read beside a row's own tokens must be finite
        return new

    def get_seq_length(self) -> int:
        return self.slots.reach


class Slots:
    """The rows that are decoded together, each with a slot of the cache; the first slots hold the longest."""

    def __init__(self, model: PreTrainedModel, size: int, most: int) -> None:
        self.model, self.size, self.most = model, size, most  # no row will have more tokens
        self.cache, self.given = DynamicCache(config=model.config), cache_argument(model)
        self.layers = [_Layer(self) for _ in self.cache.layers]
        self.cache.layers = list(self.layers)
        self.rows: list[_Row] = []
        self.length_N = np.zeros(size, dtype=np.int64)  # tokens whose keys and values are there
        self.at_N = torch.empty(0, dtype=torch.long)
        self._places: dict[tuple[int, int], Tensor] = {}
        self.shelves: list[tuple[int, int, int, Tensor | None]] = []  # first and last slot, tokens, bias

    @property
    def reach(self) -> int:
        """Tokens of the longest row, with the one that is being decoded."""
        return int(self.length_N[: len(self.rows)].max(initial=-1)) + 1

    def places(self, kv_heads: int, room: int) -> Tensor:
        """Where the tokens of this step go, (L,), in the cache of a layer that is seen as (S x K x `room`, D)."""
        if (kv_heads, room) not in self._places:
            head_L = torch.arange(len(self.at_N) * kv_heads, device=self.at_N.device)
            self._places[kv_heads, room] = head_L * room + self.at_N.repeat_interleave(kv_heads)
        return self._places[kv_heads, room]

    @torch.inference_mode()
    def enter(self, rows: Sequence[_Row]) -> None:
        """Let rows take free slots; what is there of them, but for the last token, passes through the model now."""
        prompts = sorted({row.before for row in rows}, key=len)
        while prompts:
            some = [prompts.pop()]
            while prompts and (len(some) + 1) * len(some[0]) <= _PREFILL:
                some.append(prompts.pop())
            passed, where = self._prefill(some), {ids: n for n, ids in enumerate(some)}
            for row in rows:
                if (n := where.get(row.before)) is not None:
                    self._place(row, passed, n)

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> DynamicCache:
        """Keys and values of prompts, padded on the right: causal attention keeps that from real tokens."""
        width = len(prompts[0])
        cache = DynamicCache(config=self.model.config)
        if width:
            ids_NT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in prompts], device=self.model.device)
            self.model(input_ids=ids_NT, use_cache=True, logits_to_keep=1, **{self.given: cache})
        return cache

    def _place(self, row: _Row, passed: DynamicCache, n: int) -> None:
        slot, tokens = len(self.rows), len(row.before)
        self.rows.append(row)
        self.length_N[slot] = tokens
        if tokens:
            for layer, own in zip(self.layers, passed.layers, strict=True):
                assert isinstance(own, DynamicLayer) and own.keys is not None and own.values is not None
                layer.make_room(own.keys, own.values, tokens)
                layer.room_k[slot, :, :tokens] = own.keys[n, :, :tokens]
                layer.room_v[slot, :, :tokens] = own.values[n, :, :tokens]

    @torch.inference_mode()
    def step(self, decoding: Decoding) -> list[int]:
        """Pass the next token of every row through the model, and draw the one after it."""
        count, device = len(self.rows), self.model.device
        length_N = self.length_N[:count]
        self.at_N, self._places = torch.tensor(length_N, device=device), {}
        self.shelves = []
        for first, last in self._bounds():
            own_N = length_N[first:last] + 1
            tokens = int(own_N.max())
            bias = None  # minus infinity at what is no token
            if (over_NT := np.arange(tokens) >= own_N[:, None]).any():
                bias = torch.zeros(over_NT.shape, dtype=self.layers[0].room_k.dtype, device=device)
                bias = bias.masked_fill_(torch.from_numpy(over_NT).to(device), float("-inf"))[:, None, None]
            self.shelves.append((first, last, tokens, bias))
        ids_N1 = torch.tensor([[row.next_id] for row in self.rows], device=device)
        with _stepping(self):
            logits_NV = self.model(
                input_ids=ids_N1, position_ids=self.at_N[:, None], use_cache=True, logits_to_keep=1, **{self.given: self.cache}
            ).logits[:, -1]  # fmt: skip
        length_N += 1
        uniform_N = torch.tensor([row.uniform_T[len(row.ids)] for row in self.rows], dtype=torch.float64)
        drawn: list[int] = pick(logits_NV.float(), uniform_N.to(device), decoding).tolist()
        for row, token in zip(self.rows, drawn, strict=True):
            row.next_id = token
            row.ids.append(token)
        return drawn

    def _bounds(self) -> list[tuple[int, int]]:
        count = len(self.rows)
        each = -(-count // _SHELVES) if count > _FEW else count
        return [(first, min(first + each, count)) for first in range(0, count, each)]

    @torch.inference_mode()
    def leave(self, slot: int) -> None:
        """Free a slot: the longest row of the next shelf takes it, that of the one after takes that one's, and so on."""
        for first, last in self._bounds():
            if first > slot:
                longest = first + int(self.length_N[first:last].argmax())
                self._move(longest, slot)
                slot = longest
        if slot != len(self.rows) - 1:
            self._move(len(self.rows) - 1, slot)
        self.rows.pop()

    def _move(self, source: int, to: int) -> None:
        tokens = int(self.length_N[source])
        self.rows[to], self.length_N[to] = self.rows[source], tokens
        for layer in self.layers:
            layer.room_k[to, :, :tokens] = layer.room_k[source, :, :tokens]
            layer.room_v[to, :, :tokens] = layer.room_v[source, :, :tokens]


_now: ContextVar[Slots | None] = ContextVar("slots", default=None)  # those of the step that is being made


@contextmanager
def _stepping(slots: Slots) -> Iterator[None]:
    before = _now.set(slots)
    try:
        yield
    finally:
        _now.reset(before)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of one token a row, shelf by shelf; of whole prompts, torch's own.

    Raises:
        OwnMask: the model masks or weighs tokens itself, row by row, which shelves do not.
    """
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        raise OwnMask
    slots = _now.get()
    if slots is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, heads, _, size = query.shape
    kv_heads = key.shape[1]
    query_NKGD = query.reshape(rows, kv_heads, -1, size) * (size**-0.5 if scaling is None else scaling)
    out = []
    if query.dtype is not torch.float32:  # torch's kernel reads 16-bit keys where they lie, matmul copies them first
        for first, last, tokens, bias in slots.shelves:
            parts = query_NKGD[first:last], key[first:last, :, :tokens], value[first:last, :, :tokens]
            out.append(scaled_dot_product_attention(*parts, attn_mask=bias, scale=1.0))
        return torch.cat(out).reshape(rows, 1, heads, value.shape[-1]), None
    query_LGD, key_LTD, value_LTD = (x.flatten(0, 1) for x in (query_NKGD, key, value))
    for first, last, tokens, bias in slots.shelves:
        part = slice(first * kv_heads, last * kv_heads)
        score_LGT = torch.bmm(query_LGD[part], key_LTD[part, :tokens].mT)
        if bias is not None:
            score_LGT.view(last - first, 1, -1, tokens).add_(bias)
        out.append(torch.bmm(score_LGT.softmax(-1), value_LTD[part, :tokens]))
    return torch.cat(out).reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)  # each row attends to all that its slot holds


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` attend to slots."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def decode(
    model: PreTrainedModel, requests: Sequence[Request], decoding: Decoding, stop: frozenset[int], size: int
) -> Iterator[list[Trace]]:
    """Decode `requests` in `size` slots, in their order; yield traces as they are finished, some at a time.

    A row's draws depend on its seed alone, not on what it is decoded with (up to rounding in the forward pass).
    """
    most = max((len(request.prompt_ids) + request.most(decoding) for request in requests), default=0)
    waiting, slots = deque(requests), Slots(model, min(size, len(requests)), most)
    while waiting or slots.rows:
        done: list[Trace] = []
        due = time.monotonic() + _YIELD_SECONDS
        with attending(model):
            while (waiting or slots.rows) and len(done) < size and not (done and time.monotonic() > due):
                if free := min(slots.size - len(slots.rows), len(waiting)):
                    slots.enter([_row(waiting.popleft(), decoding) for _ in range(free)])
                drawn = slots.step(decoding)
                ended = [
                    n for n, (row, token) in enumerate(zip(slots.rows, drawn, strict=True)) if _ends(row, token, stop)
                ]
                for n in reversed(ended):
                    done.append(_trace(slots.rows[n], stop))
                    slots.leave(n)
        yield done


def _row(request: Request, decoding: Decoding) -> _Row:
    seed, limit = request.seed(decoding.seed), request.most(decoding)
    *before, last = request.prompt_ids + request.begun
    return _Row(request, seed, uniforms(seed, limit).numpy(), limit, last, tuple(before), list(request.begun))


def _ends(row: _Row, token: int, stop: frozenset[int]) -> bool:
    return token in stop or len(row.ids) >= row.limit


def _trace(row: _Row, stop: frozenset[int]) -> Trace:
    request = row.request
    finish: Finish = "stop" if row.ids[-1] in stop else "length"
    return Trace(request.problem_id, request.attempt, request.prompt_ids, tuple(row.ids), finish, row.seed)
