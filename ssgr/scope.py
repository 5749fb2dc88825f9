"""Scope: which tokens of a calibration row weigh in the statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssgr.records import Row


@dataclass(frozen=True)
class Scope:
    """Weight of each token in H = sum_t w_t x_t x_t^T: 1 inside the scope, 0 outside."""

    name: Literal["response", "prompt", "both"]

    def __post_init__(self) -> None:
        if self.name not in ("response", "prompt", "both"):
            raise ValueError(f"scope.name={self.name!r}: valid scopes are response, prompt, both")

    def weights(self, row: Row) -> tuple[float, ...]:
        """One weight a token of `row`."""
        prompt = 0.0 if self.name == "response" else 1.0
        response = 0.0 if self.name == "prompt" else 1.0
        return (prompt,) * row.prompt_tokens + (response,) * (len(row) - row.prompt_tokens)
