"""Selection: which traces are eligible, and which of them are drawn under the budget."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ssgr.bins import Bins
from ssgr.difficulty import Difficulty, wrong_shares
from ssgr.length import Length
from ssgr.records import Funnel, Graded, Row

Balance = Literal["none", "level", "length"]
_log = logging.getLogger("ssgr")
_EXCHANGES = 20  # random exchanges tried a row: enough to reach any reachable token count


@dataclass(frozen=True)
class Budget:
    """How much is drawn: `tokens` in all (default), or a number of `rows`; and what happens to over-long rows."""

    tokens: int | None = 8192
    rows: int | None = None
    max_row_tokens: int = 4096
    overlong: Literal["drop", "window"] = "drop"
    held_out: float = 0.0  # tokens beside the budget, as a share of it, on which the reconstruction is only measured

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.rows is None):
            raise ValueError(
                f"budget.tokens={self.tokens} budget.rows={self.rows}: give exactly one, "
                "such as budget.tokens=8192, or budget.tokens=null budget.rows=128"
            )
        each = (("tokens", self.tokens, 2), ("rows", self.rows, 1), ("max_row_tokens", self.max_row_tokens, 2))
        for name, n, least in each:  # a row has two tokens at least
            if n is not None and (not isinstance(n, int) or n < least):
                raise ValueError(
                    f"budget.{name}={n}: give a whole number of at least {least}, without a point or exponent"
                )
        if not 0 <= self.held_out <= 1:
            raise ValueError(
                f"budget.held_out={self.held_out}: give a share of the budget between 0 and 1, such as 0.125"
            )
        if self.overlong not in ("drop", "window"):
            raise ValueError(f"budget.overlong={self.overlong!r}: valid choices are drop, window")

    def of_rows(self, length: int) -> int:
        """How many tokens it takes of rows of `length` tokens."""
        return self.tokens or (self.rows or 0) * length


@dataclass(frozen=True)
class Policy:
    """The bands and the balance that a selection applies."""

    difficulty: Difficulty
    length: Length
    balance: Balance = "none"
    bins: Bins | None = None  # what the rows are labelled by, if by anything

    def __post_init__(self) -> None:
        if self.balance not in ("none", "level", "length"):
            raise ValueError(f"select.balance={self.balance!r}: valid choices are none, level, length")


@dataclass(frozen=True)
class Candidates:
    """Rows that may be drawn, how they were filtered, and the stratum of each where the draw is balanced."""

    rows: tuple[Row, ...]
    funnel: Funnel
    strata: tuple[Hashable, ...] | None = None
    windowed: bool = False  # running text or noise: the last row may be shortened to meet the budget exactly
    attempts: bool = False  # several rows may be of one problem: their ids are PROBLEM#ATTEMPT


def as_row(graded: Graded, bin_: str = "") -> Row:
    """The whole trace as a row: its prompt ids and the generated ids as they came."""
    trace = graded.trace
    name = f"{trace.problem_id}#{trace.attempt}"
    return Row(trace.prompt_ids + trace.generated_ids, len(trace.prompt_ids), name, graded.level, bin_)


def as_rows(graded: Sequence[Graded], wrong: Mapping[str, float], bins: Bins | None) -> list[Row]:
    """Whole traces as rows, labelled by `bins` among these traces."""
    if bins is None:
        return [as_row(g) for g in graded]
    shares = [wrong.get(g.trace.problem_id) for g in graded]
    labels = bins.of(shares, [len(g.trace.generated_ids) for g in graded])
    return [as_row(g, label) for g, label in zip(graded, labels, strict=True)]


def eligible(graded: Sequence[Graded], verdict: str, policy: Policy) -> Candidates:
    """Filter traces by verdict, difficulty band and length band, counting what each leaves.

    Raises:
        ValueError: nothing is left; the message holds the funnel and the nearest setting that is not empty.
    """
    wrong = wrong_shares(graded)
    fit = [g for g in graded if verdict in ("any", g.verdict)]
    held = [policy.difficulty.holds(wrong.get(g.trace.problem_id)) for g in fit]
    hard = [g for g, ok in zip(fit, held, strict=True) if ok]
    rows = [row for row, ok in zip(as_rows(fit, wrong, policy.bins), held, strict=True) if ok]
    strata = _strata(fit, hard, policy.balance)
    kept = _in_band(hard, strata if policy.balance == "level" else ["all"] * len(hard), policy.length)
    funnel: Funnel = (
        ("graded", len(graded)),
        (verdict if verdict != "any" else "any verdict", len(fit)),
        (f"difficulty {policy.difficulty.name}", len(hard)),
        (f"length {policy.length.name}", len(kept)),
    )
    if not kept:
        raise ValueError(f"the selection is empty: {show(funnel)}; {_nearest(fit, wrong, policy)}")
    if policy.balance != "none":
        _see_strata(fit if policy.balance == "length" else hard, [strata[i] for i in kept], policy)
    balanced = None if policy.balance == "none" else tuple(strata[i] for i in kept)
    return Candidates(tuple(rows[i] for i in kept), funnel, balanced, attempts=True)


def show(funnel: Funnel) -> str:
    """A funnel on one line: 512 graded -> 301 right -> ..."""
    return " -> ".join(f"{count} {name}" for name, count in funnel)


def _strata(pool: Sequence[Graded], of: Sequence[Graded], balance: Balance) -> list[Hashable]:
    if balance == "length":
        edges = np.percentile([len(g.trace.generated_ids) for g in pool] or [0], [100 / 3, 200 / 3])
        return [int(np.searchsorted(edges, len(g.trace.generated_ids), "right")) for g in of]
    return [g.level for g in of]


def _see_strata(pool: Sequence[Graded], held: Sequence[Hashable], policy: Policy) -> None:
    """Warn where the band lacks a stratum of the pool: it is then not drawn at the mix of the other bands."""
    if lacking := sorted(set(_strata(pool, pool, policy.balance)) - set(held), key=repr):
        _log.warning(
            "select.balance=%s: difficulty=%s length=%s holds no trace of %s %s, so its mix is not that of other bands",
            policy.balance, policy.difficulty.name, policy.length.name,
            "level" if policy.balance == "level" else "length third", ", ".join(map(str, lacking)),
        )  # fmt: skip


def _in_band(graded: Sequence[Graded], strata: Sequence[Hashable], length: Length) -> list[int]:
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, stratum in enumerate(strata):
        members[stratum].append(i)
    kept: list[int] = []
    for indices in members.values():
        inside = length.holding([len(graded[i].trace.generated_ids) for i in indices])
        kept += [i for i, ok in zip(indices, inside, strict=True) if ok]
    return sorted(kept)


def _nearest(fit: Sequence[Graded], wrong: dict[str, float], policy: Policy) -> str:
    """What to type next after an empty selection: the option that keeps most of the request and leaves traces."""
    if not fit:
        return "no trace has that verdict: type calib.verdict=any, or sample more with sampler.decoding.attempts"
    shares = [wrong.get(g.trace.problem_id) for g in fit]
    if not any(policy.difficulty.holds(s) for s in shares):
        middle = (policy.difficulty.low + policy.difficulty.high) / 2
        inner = [s for s in shares if s is not None and 0 < s < 1]
        if not inner:
            return "every problem is always or never solved, or never graded: type difficulty=any"
        near = min(inner, key=lambda s: abs(s - middle))
        low, high = max(0.0, near - 0.005), min(1.0, near + 0.005)
        return f"nearest: type difficulty.low={low:.3f} difficulty.high={high:.3f}, or difficulty=any"
    return "nearest: type length=any"


def fit_rows(candidates: Candidates, budget: Budget) -> Candidates:
    """Drop or window rows longer than `budget.max_row_tokens` or the whole budget, and count them in the funnel."""
    limit, option = budget.max_row_tokens, "max_row_tokens"
    if not candidates.windowed and budget.tokens is not None and budget.tokens < limit:
        limit, option = budget.tokens, "tokens"
    if all(len(row) <= limit for row in candidates.rows):
        return candidates
    kept = [i for i, row in enumerate(candidates.rows) if len(row) <= limit or budget.overlong == "window"]
    rows = tuple(shorten(candidates.rows[i], limit) for i in kept)
    cut = sum(len(row) > limit for row in candidates.rows)
    name = f"at most {limit} tokens" if budget.overlong == "drop" else f"windowed to {limit} tokens ({cut} cut)"
    funnel = (*candidates.funnel, (name, len(rows)))
    if not rows:
        raise ValueError(
            f"the selection is empty: {show(funnel)}; nearest: type budget.overlong=window, "
            f"or budget.{option}={min(len(row) for row in candidates.rows)}"
        )
    strata = candidates.strata and tuple(candidates.strata[i] for i in kept)
    return replace(candidates, rows=rows, funnel=funnel, strata=strata)


def shorten(row: Row, tokens: int) -> Row:
    """The first `tokens` tokens of `row`."""
    return replace(row, ids=row.ids[:tokens], prompt_tokens=min(row.prompt_tokens, tokens))


def draw(candidates: Candidates, budget: Budget, seed: int) -> tuple[Row, ...]:
    """Draw rows without replacement, whole, until the budget is met.

    A token budget is met exactly where rows of the needed lengths exist (the last rows are exchanged for others of
    the right length); otherwise it is missed from below by less than the shortest row left.

    Raises:
        ValueError: the candidates hold fewer rows or tokens than the budget asks for.
    """
    rows = candidates.rows
    if not rows:
        raise ValueError(
            f"the selection is empty: {show(candidates.funnel)}; give more text or problems, or a smaller calib.window"
        )
    tokens, total = budget.tokens, sum(map(len, rows))
    if (tokens or 0) > total or (budget.rows or 0) > len(rows):
        asked = f"budget.tokens={tokens}" if tokens else f"budget.rows={budget.rows}"
        most = f"budget.tokens={total}" if tokens else f"budget.rows={len(rows)}"
        more = (
            "sample more (sampler.decoding.attempts, or more problems)"
            if candidates.attempts
            else "give more text or problems"
        )
        raise ValueError(
            f"{asked} is more than the pool holds: {show(candidates.funnel)}, {total} tokens; type {most} or less, "
            f"or {more}"
        )
    order = _order(candidates, random.Random(seed))
    if tokens is None:
        if len(order) < (budget.rows or 0):
            raise ValueError(
                f"budget.rows={budget.rows} is more than a balanced draw can hold: one stratum is used up after "
                f"{len(order)} rows; type budget.rows={len(order)} or select.balance=none"
            )
        return tuple(rows[i] for i in order[: budget.rows])
    if candidates.windowed:
        return _fill_windows([rows[i] for i in order], tokens)
    return tuple(rows[i] for i in _fill(order, [len(row) for row in rows], tokens, candidates.strata))


def _order(candidates: Candidates, rng: random.Random) -> list[int]:
    """A random order; where there are strata, one in which every beginning holds them in equal tokens."""
    order = list(range(len(candidates.rows)))
    rng.shuffle(order)
    if candidates.strata is None:
        return order
    queues: dict[Hashable, list[int]] = defaultdict(list)
    for i in reversed(order):
        queues[candidates.strata[i]].append(i)
    used = dict.fromkeys(sorted(queues, key=repr), 0)
    out: list[int] = []
    while all(queues.values()):
        stratum = min(used, key=lambda s: used[s])
        i = queues[stratum].pop()
        used[stratum] += len(candidates.rows[i])
        out.append(i)
    return out  # ends where the first stratum is used up: past it the mix would no longer be the same


def _fill_windows(rows: Sequence[Row], tokens: int) -> tuple[Row, ...]:
    out: list[Row] = []
    for row in rows:
        if tokens < 2:  # a row needs two at least
            break
        out.append(shorten(row, tokens))
        tokens -= len(row)
    return tuple(out)


def _fill(order: Sequence[int], lengths: Sequence[int], tokens: int, strata: Sequence[Hashable] | None) -> list[int]:
    taken: list[int] = []
    gap = tokens
    spare: list[int] = []
    for i in order:
        if lengths[i] <= gap:
            taken.append(i)
            gap -= lengths[i]
        else:
            spare.append(i)
    if strata is not None and gap > max(lengths):
        raise ValueError(
            f"budget.tokens={tokens} is more than a balanced draw can hold: one stratum is used up after "
            f"{tokens - gap} tokens; type budget.tokens={tokens - gap} or select.balance=none"
        )
    same: Callable[[int, int], bool] = lambda a, b: strata is None or strata[a] == strata[b]
    by_length: dict[int, list[int]] = defaultdict(list)
    for i in spare:
        by_length[lengths[i]].append(i)
    for better in range(gap, 0, -1):  # exchange one taken row for a spare one that is longer by the gap, or nearly
        for at in range(len(taken) - 1, -1, -1):
            for other in by_length.get(lengths[taken[at]] + better, ()):
                if same(taken[at], other):
                    taken[at] = other
                    return taken
    return taken


def left_over(candidates: Candidates, drawn: Sequence[Row], tokens: int, seed: int) -> tuple[Row, ...]:
    """At most `tokens` tokens of random rows of which none was drawn, nor another attempt at the same problem, which may be
    the same text; fewer, or none, where the pool is used up."""
    problem: Callable[[Row], str] = lambda row: row.id.rpartition("#")[0] if candidates.attempts else row.id
    used = {problem(row) for row in drawn}
    rest = [row for row in candidates.rows if problem(row) not in used]
    random.Random(f"held out/{seed}").shuffle(rest)
    out = []
    for row in rest:
        if candidates.windowed and len(row) > tokens >= 2:
            row = shorten(row, tokens)
        if len(row) <= tokens:
            out.append(row)
            tokens -= len(row)
    return tuple(out)


def match(candidates: Candidates, rows: int, tokens: int, seed: int) -> tuple[Row, ...]:
    """Draw `rows` random rows of `tokens` tokens in all: the control of a selection of that size.

    A random draw of `rows` rows is mended by random exchanges that bring its tokens nearer, then by the best single one.

    Raises:
        ValueError: there are fewer candidates than rows.
    """
    pool = candidates.rows
    if rows > len(pool):
        raise ValueError(
            f"calib=matched: {rows} rows to match, but the pool holds {len(pool)}: {show(candidates.funnel)}"
        )
    rng = random.Random(seed)
    order = list(range(len(pool)))
    rng.shuffle(order)
    taken, spare = order[:rows], order[rows:]
    lengths = np.array([len(row) for row in pool])
    gap = tokens - int(lengths[taken].sum())
    for _ in range(_EXCHANGES * rows if spare else 0):
        at, other = rng.randrange(rows), rng.randrange(len(spare))
        change = int(lengths[spare[other]] - lengths[taken[at]])
        if abs(gap - change) < abs(gap):
            taken[at], spare[other] = spare[other], taken[at]
            gap -= change
    if spare and gap:
        changes = lengths[spare][None, :] - lengths[taken][:, None]
        at, other = (int(i) for i in np.unravel_index(np.abs(changes - gap).argmin(), changes.shape))
        if abs(gap - int(changes[at, other])) < abs(gap):
            taken[at] = spare[other]
    return tuple(pool[i] for i in taken)
