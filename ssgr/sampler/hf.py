"""Sampling with transformers: batches of like length, from which finished rows leave at once.

Shapes: N rows, T tokens, V vocabulary, K candidates of the nucleus, H key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from ssgr.records import Trace
from ssgr.sampler import Decoding, Request
from ssgr.sampler.attention import grouped_attention

_NUCLEUS = 64  # candidates looked at first: the nucleus of a language model at 0.95 is nearly always smaller
_SHRINK = 0.9  # finished rows leave once they are a tenth of the batch: copying the cache costs about one step


@dataclass(frozen=True)
class HfSampler:
    """The transformers engine; `batch_size` rows are decoded together."""

    batch_size: int = field(metadata={"key": False})

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"sampler.batch_size={self.batch_size}: at least one row is decoded at a time")

    @property
    def wants_model(self) -> bool:
        """True: this engine runs the model."""
        return True

    def sample(
        self,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        decoding: Decoding,
    ) -> Iterator[list[Trace]]:
        """Yield the traces of all `requests`, longest prompts first.

        Raises:
            ValueError: a prompt leaves no room in the model's context.
        """
        assert model is not None
        _check_room(model, requests, decoding)
        ordered = sorted(requests, key=lambda r: (-len(r.prompt_ids), r.problem_id, r.attempt))
        for start in range(0, len(ordered), self.batch_size):
            with grouped_attention(model):
                traces = decode(model, ordered[start : start + self.batch_size], decoding, stop_ids(model, tokenizer))
            yield traces


def _check_room(model: PreTrainedModel, requests: Sequence[Request], decoding: Decoding) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(requests, key=lambda r: len(r.prompt_ids))
    if context and len(longest.prompt_ids) + decoding.max_new_tokens > context:
        raise ValueError(
            f"the prompt of {longest.problem_id} has {len(longest.prompt_ids)} tokens and max_new_tokens is "
            f"{decoding.max_new_tokens}, but the model's context is {context}; type max_new_tokens="
            f"{max(1, context - len(longest.prompt_ids))} or less for the sampler or bench, or drop the problem"
        )


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token id that ends a response: those of the generation config and the tokenizer's own."""
    config = model.generation_config
    eos: Any = config.eos_token_id if config is not None else None
    ids = eos if isinstance(eos, list) else [eos]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


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

    def batch_select_indices(self, indices: Tensor) -> None:
        self.room_k, self.room_v = self.room_k[indices], self.room_v[indices]
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

    A row's draws depend on its seed alone, not on what it is batched with (up to rounding in the forward pass).
    """
    device = model.device
    width = max(len(r.prompt_ids) for r in rows)
    ids_NT = torch.tensor([[0] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in rows], device=device)
    mask_NT = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in rows], device=device)
    seeds = [r.seed(decoding.seed) for r in rows]
    uniform_NT = _uniforms(seeds, decoding.max_new_tokens)
    stop_ids_S = torch.tensor(sorted(stop), device=device)
    cache = _cache(model)
    out_NT = torch.zeros((len(rows), decoding.max_new_tokens), dtype=torch.long)
    length_N = torch.full((len(rows),), decoding.max_new_tokens)
    stopped_N = torch.zeros(len(rows), dtype=torch.bool)
    live_N = torch.arange(len(rows))  # rows still in the batch
    open_N = torch.ones(len(rows), dtype=torch.bool)  # of those, the ones that have not stopped
    step_ids, position = ids_NT, (mask_NT.cumsum(1) - 1).clamp(min=0)
    padded = bool((mask_NT == 0).any())
    for step in range(decoding.max_new_tokens):
        logits_NV = model(
            input_ids=step_ids,
            attention_mask=mask_NT if padded else None,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        token_N = pick(logits_NV.float(), uniform_NT[live_N, step].to(device), decoding)
        out_NT[live_N, step] = token_N.cpu()
        ended = torch.isin(token_N, stop_ids_S).cpu() & open_N
        length_N[live_N[ended]] = step + 1
        stopped_N[live_N[ended]] = True
        open_N &= ~ended
        if not open_N.any():
            break
        mask_NT = torch.cat([mask_NT, mask_NT.new_ones(len(mask_NT), 1)], 1)
        step_ids, position = token_N[:, None], position[:, -1:] + 1
        if int(open_N.sum()) <= _SHRINK * len(open_N):
            stay = open_N.nonzero()[:, 0]
            cache.batch_select_indices(stay.to(device))
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


def _uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    generator = torch.Generator()
    return torch.stack(
        [torch.rand(steps, generator=generator.manual_seed(seed), dtype=torch.float64) for seed in seeds]
    )


def pick(logits_NV: Tensor, uniform_N: Tensor, decoding: Decoding) -> Tensor:
    """Draw one token a row by inverting the distribution function of the nucleus at `uniform_N`.

    Top-p without sorting the vocabulary: the 64 largest logits against the exact normaliser; a batch with a row whose
    nucleus does not fit is sorted whole. The distribution is the same either way. Temperature 0 is greedy.
    """
    if decoding.temperature == 0:
        return logits_NV.argmax(1)
    logits_NV = logits_NV / decoding.temperature
    norm_N1 = logits_NV.logsumexp(1, keepdim=True)
    for size in (min(_NUCLEUS, logits_NV.shape[1]), logits_NV.shape[1]):
        top_NK, ids_NK = logits_NV.topk(size, dim=1)
        mass_NK = (top_NK - norm_N1).double().exp().cumsum(1)
        if size == logits_NV.shape[1] or bool((mass_NK[:, -1] >= decoding.top_p).all()):
            break
    inside_N = ((mass_NK < decoding.top_p).sum(1)).clamp(max=size - 1)  # the token that crosses top_p is the last
    total_N = mass_NK.gather(1, inside_N[:, None])[:, 0]
    chosen_N = (mass_NK <= (uniform_N * total_N)[:, None]).sum(1)
    chosen_N = torch.minimum(chosen_N, inside_N)
    return ids_NK.gather(1, chosen_N[:, None])[:, 0]
