"""Batches: rows of like length are decoded together, and finished ones leave at once. For models whose layers do not keep
all keys and values (sliding windows, recurrent states), which `slots` does not serve.

Shapes: N rows, T tokens, V vocabulary, H key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ssgr.records import Trace
from ssgr.sampler import Decoding, Request, cache_argument
from ssgr.sampler.nucleus import pick, uniforms

_SHRINK = 0.9  # finished rows leave once they are a tenth of the batch: copying the cache costs about one step


class _RoomyLayer(DynamicLayer):
    """A key-value cache that doubles its room, so that a step writes one column instead of copying all."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.used = 0
            self.room_k, self.room_v = _room(key_states), _room(value_states)
        first, self.used = self.used, self.used + key_states.shape[-2]
        if self.used > self.room_k.shape[-2]:
            self.room_k = torch.cat([self.room_k, _room(self.room_k)], -2)
            self.room_v = torch.cat([self.room_v, _room(self.room_v)], -2)
        self.room_k[:, :, first : self.used] = key_states
        self.room_v[:, :, first : self.used] = value_states
        self.keys, self.values = self.room_k[:, :, : self.used], self.room_v[:, :, : self.used]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.room_k, self.room_v = self.room_k[beam_idx], self.room_v[beam_idx]
        self.keys, self.values = self.room_k[:, :, : self.used], self.room_v[:, :, : self.used]


def _room(like_NHTD: Tensor) -> Tensor:
    shape = list(like_NHTD.shape)
    shape[-2] = max(128, shape[-2])
    return like_NHTD.new_empty(shape)


def _cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    if all(type(layer) is DynamicLayer for layer in cache.layers):  # sliding windows keep their own kind
        cache.layers = [_RoomyLayer() for _ in cache.layers]
    return cache


@torch.inference_mode()
def decode(model: PreTrainedModel, rows: Sequence[Request], decoding: Decoding, stop: frozenset[int]) -> list[Trace]:
    """Decode `rows` together: left-padded prompts, one uniform number a row and step from the row's own seed.

    What was `begun` is gone on with. A row's draws depend on its seed alone, not on what it is batched with (up to rounding
    in the forward pass).
    """
    device = model.device
    seen = [[*r.prompt_ids, *r.begun] for r in rows]  # what the model sees before the first draw
    width = max(map(len, seen))
    ids_NT = torch.tensor([[0] * (width - len(ids)) + ids for ids in seen], device=device)
    mask_NT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in seen], device=device)
    seeds = [r.seed(decoding.seed) for r in rows]
    uniform_NT = torch.stack([uniforms(seed, decoding.max_new_tokens) for seed in seeds])
    stop_ids_S = torch.tensor(sorted(stop), device=device)
    cache = _cache(model)
    given = {cache_argument(model): cache}
    out_NT = torch.zeros((len(rows), decoding.max_new_tokens), dtype=torch.long)
    for row, r in enumerate(rows):
        out_NT[row, : len(r.begun)] = torch.tensor(r.begun, dtype=torch.long)
    length_N = torch.tensor([len(r.begun) for r in rows])  # tokens of the responses so far
    limit_N = torch.tensor([r.most(decoding) for r in rows])
    stopped_N = torch.zeros(len(rows), dtype=torch.bool)
    live_N = torch.arange(len(rows))  # rows still in the batch
    open_N = torch.ones(len(rows), dtype=torch.bool)  # of those, the ones that have not stopped
    step_ids, position = ids_NT, (mask_NT.cumsum(1) - 1).clamp(min=0)
    padded = bool((mask_NT == 0).any())
    while True:
        logits_NV = model(
            input_ids=step_ids,
            attention_mask=mask_NT if padded else None,
            position_ids=position,
            use_cache=True,
            logits_to_keep=1,
            **given,
        ).logits[:, -1]
        at_N = length_N[live_N].clamp(max=decoding.max_new_tokens - 1)  # of rows that have ended, any number will do
        token_N = pick(logits_NV.float(), uniform_NT[live_N, at_N].to(device), decoding)
        going_N = live_N[open_N]
        out_NT[going_N, at_N[open_N]] = token_N.cpu()[open_N]
        length_N[going_N] += 1
        stops = torch.isin(token_N, stop_ids_S).cpu() & open_N
        stopped_N[live_N[stops]] = True
        open_N &= ~stops & (length_N[live_N] < limit_N[live_N])
        if not open_N.any():
            break
        mask_NT = torch.cat([mask_NT, mask_NT.new_ones(len(mask_NT), 1)], 1)
        step_ids, position = token_N[:, None], position[:, -1:] + 1
        if int(open_N.sum()) <= _SHRINK * len(open_N):
            stay = open_N.nonzero()[:, 0]
            rows_left: Any = stay.to(device)
            cache.reorder_cache(rows_left)  # what beam search does: every kind of layer can, recurrent ones too
            step_ids, position, mask_NT = step_ids[stay], position[stay], mask_NT[stay]
            live_N, open_N = live_N[stay], open_N[stay]
    return [
        Trace(
            r.problem_id,
            r.attempt,
            r.prompt_ids,
            tuple(out_NT[i, : int(length_N[i])].tolist()),
            "stop" if stopped_N[i] else "length",
            seeds[i],
        )
        for i, r in enumerate(rows)
    ]
