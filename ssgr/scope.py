"""Scope: how much each stream of calibration tokens weighs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ssgr.records import Row


@dataclass(frozen=True)
class Scope:
    """Weights of prompt and response tokens, and of the bins of their rows, in H = sum_t w_t x_t x_t^T.

    A row whose bin is not named in `bins` weighs 1; text that is neither prompt nor response always does.

    Raises:
        ValueError: a weight is negative, or all are zero.
    """

    name: str
    prompt: float = 1.0
    response: float = 1.0
    bins: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = {"prompt": self.prompt, "response": self.response, **{f"bins.{k}": v for k, v in self.bins.items()}}
        for key, weight in given.items():
            if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
                raise ValueError(
                    f"scope.{key}={weight}: give a weight of at least 0, such as 1, or 0 to leave them out"
                )
        if self.prompt == self.response == 0:
            raise ValueError("scope.prompt=0 scope.response=0: no token is left; give one of them a weight of 1")

    def weight(self, stream: str) -> float:
        """The weight of a stream (see `streams`)."""
        bin_, _, part = stream.rpartition("/")
        return {"prompt": self.prompt, "response": self.response}.get(part, 1.0) * self.bins.get(bin_, 1.0)


BOTH = Scope("both")


def streams(row: Row, parts: bool) -> list[tuple[str, int, int]]:
    """The streams of a row with their first and last token: BIN/prompt and BIN/response, or BIN/text without `parts`."""
    if not parts:
        return [(f"{row.bin}/text", 0, len(row))]
    cut = row.prompt_tokens
    spans = [(f"{row.bin}/prompt", 0, cut), (f"{row.bin}/response", cut, len(row))]
    return [span for span in spans if span[1] < span[2]]
