"""Sampling: from prompts to traces, as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ssgr.loadable import Loadable
from ssgr.records import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase  # by name only: their import takes seconds


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
        if not 0 <= self.temperature < inf or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature} top_p={self.top_p}: give temperature >= 0 (0 is greedy) and 0 < top_p <= 1"
            )


@dataclass(frozen=True)
class Request:
    """One attempt that is to be sampled; `limit` caps its response below what the decoding allows.

    `begun` are the first tokens of the response, where it was cut at a smaller cap: an engine goes on from there.
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
        return _digest(f"{seed}/{self.problem_id}/{self.attempt}")

    def seed_of_the_rest(self, seed: int) -> int:
        """The seed of what follows `begun`, for engines that draw it as a response of its own.

        With the seed of the attempt the random numbers that drew `begun` would come again.
        """
        return _digest(f"{seed}/{self.problem_id}/{self.attempt}/{len(self.begun)}") if self.begun else self.seed(seed)


def _digest(what: str) -> int:
    return int.from_bytes(hashlib.sha256(what.encode()).digest()[:8]) >> 1


class Sampler(Protocol):
    """An engine that answers prompts; it yields traces batch by batch, so that a killed run loses one batch."""

    runs_model: ClassVar[bool]  # the checkpoint it is given; else its traces are of whatever it was pointed at
    draws: ClassVar[bool]  # up to the cap, and may go on with what was cut; else its traces are saved ones, as they are

    def sample(
        self,
        checkpoint: Loadable,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        decoding: Decoding,
    ) -> Iterator[list[Trace]]:
        """Yield the traces of all `requests`, in batches, in any order."""
        ...


def check_room(context: int | None, requests: Sequence[Request], decoding: Decoding) -> None:
    """See that each prompt and what may follow it fit into a context of so many tokens (None: it is not known).

    Raises:
        ValueError: some do not; they are counted, and the longest is named.
    """
    over = [r for r in requests if context and len(r.prompt_ids) + r.most(decoding) > context]
    if not over:
        return
    assert context
    longest = max(over, key=lambda r: len(r.prompt_ids))
    room = context - len(longest.prompt_ids)
    what = f"{len({r.problem_id for r in over})} of {len({r.problem_id for r in requests})} prompts"
    if room < 1:
        raise ValueError(
            f"{what} leave no room in the model's context of {context} tokens, the longest is that of {longest.problem_id} with "
            f"{len(longest.prompt_ids)}; drop these problems, or shorten their prompts"
        )
    raise ValueError(
        f"{what} leave no room for max_new_tokens={decoding.max_new_tokens} in the model's context of {context} tokens, the "
        f"longest is that of {longest.problem_id} with {len(longest.prompt_ids)}; type max_new_tokens={room} or less for the "
        "sampler or bench, or drop the problems"
    )


def cache_argument(model: PreTrainedModel) -> str:
    """What `model` calls the cache that it is given (transformers renamed it in 5.24), or "" where it takes none."""
    given = signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in given), "")


def stop_ids(generation: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token id that ends a response: those of the generation config (None: there is none) and the tokenizer's own."""
    eos: Any = generation.eos_token_id if generation is not None else None
    ids = eos if isinstance(eos, list) else [eos]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)
