"""Sampling with transformers: continuous batching, and batches of like length for models that it does not serve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from itertools import groupby
from typing import Any, ClassVar

from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ssgr.loadable import Loadable, context_of
from ssgr.records import Trace
from ssgr.sampler import Decoding, Request, batch, cache_argument, check_room, slots, stop_ids, workers
from ssgr.sampler.attention import grouped_attention
from ssgr.sampler.positions import one_way


@dataclass(frozen=True)
class HfSampler:
    """The transformers engine; `batch_size` rows are decoded together, on a processor by `workers` processes."""

    runs_model: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    batch_size: int = field(metadata={"key": False})
    workers: int | None = field(default=None, metadata={"key": False})

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"sampler.engine.batch_size={self.batch_size}: at least one row is decoded at a time")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers={self.workers}: type 1 or more, or null for what is faster")

    def sample(
        self,
        checkpoint: Loadable,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        decoding: Decoding,
    ) -> Iterator[list[Trace]]:
        """Yield the traces of all `requests`, longest prompts first.

        Raises:
            ValueError: a prompt leaves no room in the model's context or has tokens that it lacks, or the model keeps its
                state elsewhere than in a cache.
        """
        model = checkpoint.load()
        _see_kept(model)
        check_room(context_of(model.config), requests, decoding)
        known = len(model.get_input_embeddings().get_parameter("weight"))
        for request in requests:
            if (last := max(request.prompt_ids)) >= known:
                raise ValueError(
                    f"the prompt of {request.problem_id} has token {last}, and the model has embeddings of tokens 0 to "
                    f"{known - 1} only (its tokenizer has {len(tokenizer)}); give the model its own tokenizer, or call "
                    "resize_token_embeddings and save it again"
                )
        ordered = sorted(requests, key=lambda r: (-len(r.prompt_ids) - len(r.begun), r.problem_id, r.attempt))
        stop = stop_ids(model.generation_config, tokenizer)
        with one_way(model, ordered, decoding):
            yield from decode(model, ordered, decoding, stop, self.batch_size, self.workers)


def _see_kept(model: PreTrainedModel) -> None:
    """See that what `model` keeps of the tokens before is, at least in some layers, keys and values in a cache that it is given:
    others would see the last token only, or the padding of shorter rows.

    Raises:
        ValueError: it is not.
    """
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    attends = any(issubclass(kind, DynamicLayer) for kind in kinds)
    elsewhere = not attends or (model._is_stateful and kinds <= {DynamicLayer, DynamicSlidingWindowLayer})
    own: Any = model  # MiniMax has a cache of its own kind
    if elsewhere or not own._supports_default_dynamic_cache() or not cache_argument(model):
        raise ValueError(
            f"{type(model).__name__} keeps its state elsewhere than in keys and values, and sampler=hf cannot sample "
            "from it; type calib=corpus bench=perplexity, which need no traces"
        )


def decode(
    model: PreTrainedModel, requests: Sequence[Request], decoding: Decoding, stop: frozenset[int], size: int,
    asked: int | None = None,
) -> Iterator[list[Trace]]:  # fmt: skip
    """Decode `requests`, `size` rows at a time, by as many workers as are `asked` for; yield some traces at a time.

    The requests are dealt out in turn, so that the attempts at a problem, and long prompts, are shared evenly.
    """
    size = max(1, min(size, len(requests)))
    number = workers.count(asked, model, size)
    if number == 1:
        return _decode(model, requests, decoding, stop, size)
    shares = [(requests[n::number], size // number + (n < size % number)) for n in range(number)]
    return workers.together([partial(_decode, model, own, decoding, stop, rows) for own, rows in shares])


def _decode(
    model: PreTrainedModel, requests: Sequence[Request], decoding: Decoding, stop: frozenset[int], size: int
) -> Iterator[list[Trace]]:
    if slots.serves(model):
        with suppress(slots.OwnMask):
            yield from slots.decode(model, requests, decoding, stop, size)
            return
    pads = _pads(model)
    for _, group in groupby(requests, lambda r: None if pads else len(r.prompt_ids) + len(r.begun)):
        rows = list(group)
        for start in range(0, len(rows), size):
            with grouped_attention(model):
                traces = batch.decode(model, rows[start : start + size], decoding, stop)
            yield traces


def _pads(model: PreTrainedModel) -> bool:
    """Whether `model` tells padding before a row from the row: it is told positions (decoders of BART count all tokens), and its
    cache has no layers of its own (those of DeepSeek-V4 and MiniMax-M3 cut what they hold into blocks, padding and all)."""
    layers = DynamicCache(config=model.config).layers
    plain = all(type(layer).__module__ == DynamicLayer.__module__ for layer in layers)
    return plain and "position_ids" in signature(model.forward).parameters
