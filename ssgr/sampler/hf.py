"""Sampling with transformers: continuous batching, and batches of like length for models that it does not serve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from ssgr.loadable import Loadable
from ssgr.records import Trace
from ssgr.sampler import Decoding, Request, batch, check_room, slots, stop_ids
from ssgr.sampler.attention import grouped_attention


@dataclass(frozen=True)
class HfSampler:
    """The transformers engine; `batch_size` rows are decoded together."""

    runs_model: ClassVar[bool] = True
    batch_size: int = field(metadata={"key": False})

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"sampler.engine.batch_size={self.batch_size}: at least one row is decoded at a time")

    def sample(
        self,
        checkpoint: Loadable,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        decoding: Decoding,
    ) -> Iterator[list[Trace]]:
        """Yield the traces of all `requests`, longest prompts first.

        Raises:
            ValueError: a prompt leaves no room in the model's context.
        """
        model = checkpoint.load()
        check_room(getattr(model.config.get_text_config(), "max_position_embeddings", None), requests, decoding)
        ordered = sorted(requests, key=lambda r: (-len(r.prompt_ids) - len(r.begun), r.problem_id, r.attempt))
        stop = stop_ids(model.generation_config, tokenizer)
        if slots.serves(model):
            yield from slots.decode(model, ordered, decoding, stop, self.batch_size)
            return
        for start in range(0, len(ordered), self.batch_size):
            with grouped_attention(model):
                traces = batch.decode(model, ordered[start : start + self.batch_size], decoding, stop)
            yield traces
