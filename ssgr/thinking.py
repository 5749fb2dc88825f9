"""Thinking: where a response stops to think and begins to answer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Part:
    """What of a response is the answer: None where it never stopped to think. `tokens` of it are before the answer."""

    tokens: int
    answer: str | None


@dataclass(frozen=True)
class Thinking:
    """The tags around the thinking of a model; without an `end` it does not think, and all of a response is the answer.

    The rule: the answer is what follows the last `end`. Where there is none, a response whose prompt or whose own text
    opened the thinking with `start` never closed it: it has no answer if one is `required`, else all of it is searched. Where
    nothing opened the thinking (a Qwen3 that is asked not to think, whose prompt holds both tags), all of it is the answer.
    """

    start: str | None = "<think>"
    end: str | None = "</think>"
    required: bool = True

    def __post_init__(self) -> None:
        if self.start and not self.end:
            raise ValueError(
                f"model.thinking.start={self.start} has no end: type model.thinking.end=TAG, or model.thinking.start=null for a "
                "model that does not think"
            )

    def part(self, tokenizer: Any, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> Part:
        """The answer part of a response, as text without the special tokens at its end, such as the one that stopped it.

        A tag that is one token of the vocabulary is looked for among the ids: the same signs written out in other tokens
        are no tag. Other tags are looked for in the text.
        """
        ids = list(generated_ids)
        closes = tokenizer.convert_tokens_to_ids(self.end) if self.end else None
        while ids and ids[-1] in _special(tokenizer) and ids[-1] != closes:
            ids.pop()
        if not self.end:
            return Part(0, tokenizer.decode(ids))
        tokens, answer = _after(tokenizer, ids, self.end)
        if answer is not None:
            return Part(tokens, answer)
        if self.required and self._open(tokenizer, prompt_ids, ids):
            return Part(len(generated_ids), None)
        return Part(0, tokenizer.decode(ids))

    def part_of_text(self, response: str, opened: bool) -> str | None:
        """The answer part of a response that is text, whose prompt is not known but for whether it `opened` the thinking."""
        if not self.end:
            return response
        _, tag, after = response.rpartition(self.end)
        if tag:
            return after
        opened = opened or bool(self.start and self.start in response)
        return None if self.required and opened else response

    def _open(self, tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> bool:
        if not self.start or _after(tokenizer, ids, self.start)[1] is not None:
            return True
        assert self.end
        opened, rest = _after(tokenizer, prompt_ids, self.start)
        return rest is not None and _after(tokenizer, prompt_ids[opened:], self.end)[1] is None


@lru_cache(8)
def _special(tokenizer: Any) -> frozenset[int]:
    """Every special token: models end with others than the tokenizer's own (Gemma's <end_of_turn>, Phi-3's <|end|>)."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({tokenizer.eos_token_id, tokenizer.pad_token_id, *added} - {None})


def _after(tokenizer: Any, ids: Sequence[int], tag: str) -> tuple[int, str | None]:
    """What follows the last `tag` in `ids`, as text, and how many ids are up to its end; None where there is no tag."""
    ids = list(ids)
    token = tokenizer.convert_tokens_to_ids(tag)
    if token is not None and tokenizer.convert_ids_to_tokens(token) == tag:
        at = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] == token), None)
        return (0, None) if at is None else (at + 1, tokenizer.decode(ids[at + 1 :]))
    before, found, after = tokenizer.decode(ids).rpartition(tag)
    if not found:
        return 0, None
    length = len(before) + len(tag)
    return bisect_left(range(len(ids)), length, key=lambda i: len(tokenizer.decode(ids[:i]))), after
