"""Calibration sources: which rows of token ids may calibrate the pruning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ssgr.records import Graded, Problem
from ssgr.select import Budget, Candidates, Policy
from ssgr.thinking import Thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # by name only: its import takes seconds

Needs = Literal["nothing", "problems", "traces"]


@dataclass(frozen=True)
class Material:
    """What a source may draw from; what it does not need is empty."""

    tokenizer: PreTrainedTokenizerBase
    prompt_ids: Callable[[str], tuple[int, ...]]
    problems: Sequence[Problem]
    graded: Sequence[Graded]
    budget: Budget  # how much is wanted, for sources that have no end, and in rows of what length
    thinking: Thinking  # the tags around it


class Source(Protocol):
    """A calibration source."""

    @property
    def name(self) -> str:
        """The choice in the config group."""
        ...

    @property
    def draw(self) -> int:
        """Seed of the draw without replacement."""
        ...

    @property
    def needs(self) -> Needs:
        """What must be read or sampled before."""
        ...

    @property
    def uses(self) -> frozenset[str]:
        """Which of difficulty, length and scope the source can apply."""
        ...

    @property
    def matches(self) -> bool:
        """Whether the draw takes the size of another selection instead of the budget (see `reference`)."""
        ...

    def candidates(self, material: Material, policy: Policy) -> Candidates:
        """The rows that may be drawn."""
        ...

    def reference(self, material: Material, policy: Policy) -> Candidates:
        """The selection whose size a matching source takes."""
        ...
