"""Whole: one threshold on the scores of all weights of a model.

Shapes: O outputs, I inputs. A bin holds the values of one high half: the upper 16 bits of a float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ssgr.allocation import Needs, Seen

_HALF = 2**16


@dataclass(frozen=True)
class Whole:
    """Each layer loses as many weights as score below the threshold that the wanted share of all weights lies below.

    The threshold is exact in float32, by radix selection; scores that are equal to it are shared out in proportion.
    A layer that no token came to has no scores: it gets the share of the model, and the others what makes the whole
    exact. A layer of low scores may lose all its weights.
    """

    name: str = "global"
    needs: ClassVar[Needs] = "scores"

    def ratios(self, look: Callable[[], Iterable[Seen]], sizes: Mapping[str, int], ratio: float) -> dict[str, float]:
        """The share of zeros of each layer, by two looks.

        Kept in memory are a count for each of 65536 bins, and for each layer those of the values in one bin.

        Raises:
            ValueError: a score is not a number.
        """
        coarse, scored = torch.zeros(_HALF, dtype=torch.int64), set()
        for name, high, _ in _halves(look(), sizes):
            coarse += torch.bincount(high, minlength=_HALF).cpu()
            scored.add(name)
        unscored = sum(round(size * ratio) for name, size in sizes.items() if name not in scored)
        room = sum(sizes[name] for name in scored)
        wanted = min(max(round(sum(sizes.values()) * ratio) - unscored, 0), room)
        split = int(torch.searchsorted(coarse.cumsum(0), wanted))  # the bin in which the last weight to go lies
        below: dict[str, int] = {}
        within: dict[str, tuple[Tensor, Tensor]] = {}
        for name, high, low in _halves(look(), sizes):
            below[name] = int((high < split).sum())
            counts = torch.bincount(low[high == split], minlength=_HALF).cpu()
            used = counts.nonzero().flatten()
            within[name] = (used, counts[used])
        more = _cut(within, wanted - sum(below.values()))
        return {name: (below[name] + more[name]) / size if name in scored else ratio for name, size in sizes.items()}


def _halves(seen: Iterable[Seen], sizes: Mapping[str, int]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The upper and the lower half of every score of each layer that has any, as numbers in the order of the scores."""
    for matrix in seen:
        if matrix.name not in sizes or matrix.score is None:
            continue
        score = matrix.score().float().flatten()
        if score.isnan().any():
            raise ValueError(f"{matrix.name}: a score is NaN; type model.dtype=float32, or allocation=uniform")
        bits = (score + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
        bits = bits ^ (bits >> 31 & 0x7FFFFFFF)  # negative floats are ordered backwards
        yield matrix.name, (bits >> 16) + _HALF // 2, bits & (_HALF - 1)


def _cut(within: Mapping[str, tuple[Tensor, Tensor]], wanted: int) -> dict[str, int]:
    """How many of the `wanted` lowest of all values, given with their counts, each layer has."""
    total = torch.zeros(_HALF, dtype=torch.int64)
    for values, counts in within.values():
        total[values] += counts
    sums = total.cumsum(0)
    assert 0 <= wanted <= int(sums[-1]), "the two looks differ"
    limit = int(torch.searchsorted(sums, wanted))
    ties = int(total[limit])
    wanted_ties = wanted - int(sums[limit]) + ties
    out, before = {}, 0
    for name, (values, counts) in within.items():
        after = before + int(counts[values == limit].sum())
        shared = after * wanted_ties // ties - before * wanted_ties // ties if ties else 0
        out[name] = int(counts[values < limit].sum()) + shared
        before = after
    return out
