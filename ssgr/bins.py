"""Bins: in which band of difficulty and of length each trace lies, so that the bands can be weighed after collection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssgr.difficulty import Difficulty
from ssgr.length import Length

OTHER = "other"  # what lies in no band


@dataclass(frozen=True)
class Bins:
    """Bands of difficulty and of length by name; a bin is called difficulty_length, such as hard_medium."""

    name: str
    difficulty: Mapping[str, Difficulty]
    length: Mapping[str, Length]

    @property
    def names(self) -> list[str]:
        """Every bin."""
        return [f"{band}_{length}" for band in (*self.difficulty, OTHER) for length in (*self.length, OTHER)]

    def of(self, wrong: Sequence[float | None], lengths: Sequence[int]) -> list[str]:
        """The bin of each trace, from the wrong share of its problem (None if never graded) and its response length.

        The first band that holds a trace is its own; length bands in percentiles are among these traces.
        """
        inside = {name: band.holding(lengths) for name, band in self.length.items()}
        out = []
        for i, share in enumerate(wrong):
            bands = [name for name, band in self.difficulty.items() if band.holds(share)]
            lengths_ = [name for name in self.length if inside[name][i]]
            out.append("_".join((*bands, OTHER)[:1] + (*lengths_, OTHER)[:1]))
        return out
