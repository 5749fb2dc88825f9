"""Sampling with transformers: continuous batching, and batches of like length for models that it does not serve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssgr.records import Trace
from ssgr.sampler import Decoding, Request, batch, slots
from ssgr.sampler.attention import grouped_attention


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
        stop = stop_ids(model, tokenizer)
        if slots.serves(model):
            yield from slots.decode(model, ordered, decoding, stop, self.batch_size)
            return
        for start in range(0, len(ordered), self.batch_size):
            with grouped_attention(model):
                traces = batch.decode(model, ordered[start : start + self.batch_size], decoding, stop)
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
