"""Own traces: the model's prompts and what it generated, filtered or not (self, rac, ssgr, matched)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ssgr.calib import Material, Needs
from ssgr.difficulty import wrong_shares
from ssgr.records import Funnel, Verdict
from ssgr.select import Candidates, Policy, as_rows, eligible


@dataclass(frozen=True)
class OwnTraces:
    """Graded traces with `verdict` inside the difficulty and length bands; with `match`, a random draw of that size.

    `match` is the control that any selection must beat: as many rows and tokens, drawn from all traces.
    """

    name: str
    draw: int
    verdict: str
    match: bool = False

    def __post_init__(self) -> None:
        if self.verdict not in ("any", *Verdict):
            raise ValueError(f"calib.verdict={self.verdict!r}: valid choices are any, {', '.join(Verdict)}")

    @property
    def needs(self) -> Needs:
        """Traces."""
        return "traces"

    @property
    def uses(self) -> frozenset[str]:
        """All filters."""
        return frozenset(("difficulty", "length", "scope"))

    @property
    def matches(self) -> bool:
        """Whether this is the control."""
        return self.match

    def candidates(self, material: Material, policy: Policy) -> Candidates:
        """The traces that may be drawn; for the control all of them.

        Raises:
            ValueError: the selection is empty.
        """
        if not self.match:
            return eligible(material.graded, self.verdict, policy)
        rows = tuple(as_rows(material.graded, wrong_shares(material.graded), policy.bins))
        funnel: Funnel = (("graded", len(rows)),)
        return Candidates(rows, funnel, attempts=True)

    def reference(self, material: Material, policy: Policy) -> Candidates:
        """The selection that the control matches."""
        return replace(self, match=False).candidates(material, policy)
