"""Length of a trace: bands on the tokens of its response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Length:
    """A band of response length, low <= length <= high (high excluded unless it is the top).

    `unit` says what low and high are: percentiles among the eligible traces, or tokens; None is open.
    """

    name: str
    unit: Literal["percentile", "tokens"]
    low: float | None
    high: float | None

    def __post_init__(self) -> None:
        if self.unit not in ("percentile", "tokens"):
            raise ValueError(f"length.unit={self.unit!r}: valid units are percentile, tokens")
        low, high = self.low or 0.0, float("inf") if self.high is None else self.high
        if not 0 <= low < high or (self.unit == "percentile" and max(low, self.high or 0) > 100):
            raise ValueError(
                f"length={self.name}: low={self.low}, high={self.high} is no band of {self.unit}; "
                "give 0 <= low < high (percentiles up to 100), such as length.low=33 length.high=67"
            )

    @property
    def holds_all(self) -> bool:
        """Whether every trace lies in the band."""
        return not self.low and (self.high is None or (self.unit == "percentile" and self.high == 100))

    def bounds(self, lengths: Sequence[int]) -> tuple[float, float]:
        """The band in tokens, [low, high), among `lengths`; unbounded sides are 0 and infinity."""
        if self.unit == "tokens" or not lengths:
            return self.low or 0.0, float("inf") if self.high is None else self.high
        low = float(np.percentile(lengths, self.low)) if self.low else 0.0
        top = self.high is None or self.high >= 100
        return low, float("inf") if top else float(np.percentile(lengths, self.high or 100))

    def holding(self, lengths: Sequence[int]) -> list[bool]:
        """Which of the eligible `lengths` lie in the band."""
        low, high = self.bounds(lengths)
        return [low <= n < high for n in lengths]
