"""Measures: what a model is tried on without sampling: the perplexity of texts, the tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ssgr.loadable import Loadable
from ssgr.records import Item, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # by name only: its import takes seconds


class Measure(Protocol):
    """One measure: a value for each item of a set that dense and pruned model share."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def metric(self) -> str:
        """What its mean is: `perplexity` (of items that are mean losses in nats a token), or a share such as `acc`."""
        ...

    @property
    def traces(self) -> Any:
        """The benchmark on whose traces of the dense model it is taken, or None."""
        ...

    def check(self, context: int | None) -> None:
        """See what can be seen before hours of work, of a model with so much context.

        Raises:
            ValueError: it cannot be measured.
        """
        ...

    def measure(self, model: Loadable, tokenizer: PreTrainedTokenizerBase, traces: Sequence[Trace]) -> list[Item]:
        """The value of each item.

        Raises:
            ValueError: there is nothing to measure, or the library or data it needs is not there.
        """
        ...
