"""Select: candidates -> the calibration set, under a budget."""

from __future__ import annotations

import logging
from dataclasses import replace

from ssgr.calib import Material, Source
from ssgr.records import CalibrationSet, Row
from ssgr.scope import BOTH, Scope
from ssgr.select import Budget, Policy, draw, fit_rows, left_over, match

VERSION = 5
ROWS, SUMMARY, CONTAMINATED = "calibration.parquet", "calibration.json", "contaminated.json"
_SHORTFALL = 0.99  # a smaller share of the budget than this is no longer the same budget
_log = logging.getLogger("ssgr")


def select(source: Source, material: Material, policy: Policy, budget: Budget) -> CalibrationSet:
    """Draw the calibration set of `source` under `budget`, and rows to hold out from what is left.

    Raises:
        ValueError: the selection is empty (the message has its funnel) or holds less than the budget.
    """
    candidates = fit_rows(source.candidates(material, policy), budget)
    if source.matches:
        wanted = draw(fit_rows(source.reference(material, policy), budget), budget, source.draw)
        rows = match(candidates, len(wanted), sum(map(len, wanted)), source.draw)
    else:
        rows = draw(candidates, budget, source.draw)
    realised = sum(map(len, rows))
    asked = realised if budget.tokens is None else budget.tokens
    if realised < _SHORTFALL * asked and not source.matches:
        balanced = candidates.strata is not None
        _log.warning(
            "calib=%s: %d of %d tokens drawn, as every row left is longer than the rest%s; sources with shorter rows draw "
            "more. Type budget.tokens=%d to compare them",
            source.name, realised, asked,
            f" or would change the mix that select.balance={policy.balance} keeps" if balanced else "", realised,
        )  # fmt: skip
    funnel = (*candidates.funnel, ("drawn", len(rows)))
    rows = tuple(sorted(rows, key=_by_id))
    spare = round(budget.held_out * realised)
    held_out = tuple(sorted(left_over(candidates, rows, spare, source.draw), key=_by_id))
    if spare and not held_out:
        _log.warning(
            "calib=%s: no row is left to hold out, so errors are told on the calibration rows alone; give more problems or "
            "attempts, a smaller budget, or budget.held_out=0",
            source.name,
        )  # fmt: skip
    weights = tuple((1.0,) * len(row) for row in rows)
    return CalibrationSet(source.name, rows, weights, funnel, asked, "scope" in source.uses, held_out)


def _by_id(row: Row) -> str:
    return row.id


def warn_copies(chosen: CalibrationSet) -> None:
    """Warn where rows repeat others, and so weigh more than they look."""
    if chosen.copies:
        _log.warning(
            "calib=%s: %d of %d rows drawn repeat another token for token; attempts at harder problems, or a higher "
            "sampler.decoding.temperature, repeat less",
            chosen.source, chosen.copies, len(chosen.rows),
        )  # fmt: skip


def warn_unused(source: Source, policy: Policy, scope: Scope) -> None:
    """Warn by name of each filter that `source` cannot apply."""
    chosen = {
        "difficulty": (policy.difficulty.name, not policy.difficulty.holds_all),
        "length": (policy.length.name, not policy.length.holds_all),
        "select.balance": (policy.balance, policy.balance != "none"),
        "bins": (policy.bins.name if policy.bins else "none", policy.bins is not None),
        "scope": (scope.name, scope != replace(BOTH, name=scope.name)),
    }
    of_traces = {"select.balance": "difficulty", "bins": "difficulty"}
    for group, (value, filters) in chosen.items():
        if filters and of_traces.get(group, group) not in source.uses:
            _log.warning("%s=%s has no effect on calib=%s, which has nothing to apply it to", group, value, source.name)
