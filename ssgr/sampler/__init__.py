"""Sampling: from prompts to traces, as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssgr.records import Trace


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn: attempts a problem, temperature, nucleus mass, response cap in tokens, seed."""

    attempts: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int

    def __post_init__(self) -> None:
        for name, n in (("attempts", self.attempts), ("max_new_tokens", self.max_new_tokens)):
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"{name}={n}: give a whole number of at least 1, without a point or exponent")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature} top_p={self.top_p}: give temperature >= 0 (0 is greedy) and 0 < top_p <= 1"
            )


@dataclass(frozen=True)
class Request:
    """One attempt that is to be sampled; `limit` caps its response below what the decoding allows.

    `begun` are the first tokens of the response, where it was cut at a smaller cap: an engine goes on from there, or anew.
    """

    problem_id: str
    attempt: int
    prompt_ids: tuple[int, ...]
    limit: int | None = None
    begun: tuple[int, ...] = ()

    def most(self, decoding: Decoding) -> int:
        """Tokens of the response at most."""
        return min(self.limit or decoding.max_new_tokens, decoding.max_new_tokens)

    def seed(self, seed: int) -> int:
        """The seed of this attempt: the same whatever the batch, the model or the order."""
        digest = hashlib.sha256(f"{seed}/{self.problem_id}/{self.attempt}".encode()).digest()
        return int.from_bytes(digest[:8]) >> 1


class Sampler(Protocol):
    """An engine that answers prompts; it yields traces batch by batch, so that a killed run loses one batch."""

    @property
    def wants_model(self) -> bool:
        """Whether the engine runs the model it is given (else the model is not loaded)."""
        ...

    def sample(
        self,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        decoding: Decoding,
    ) -> Iterator[list[Trace]]:
        """Yield the traces of all `requests`, in batches, in any order."""
        ...
