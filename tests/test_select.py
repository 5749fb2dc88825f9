"""Difficulty, length, scope and the draw under a budget."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from ssgr import tables
from ssgr.bins import Bins
from ssgr.calib import Material
from ssgr.calib.rows import Written
from ssgr.calib.traces import OwnTraces
from ssgr.difficulty import Difficulty, wrong_shares
from ssgr.length import Length
from ssgr.records import CalibrationSet, Graded, Row, Trace, Unread, Verdict
from ssgr.scope import BOTH, Scope, streams
from ssgr.select import Budget, Candidates, Policy, draw, eligible, fit_rows, left_over, match, shorten
from ssgr.stages import select
from tests.conftest import TINY

ANY = Difficulty("any", 0, 1, True, True)
HARD = Difficulty("hard", 0.5, 1, False, False)
EVERY = Length("any", "percentile", None, None)
MEDIUM = Length("medium", "percentile", 33.333, 66.667)


def graded(problem: str, attempt: int, right: bool, length: int, level: int = 1) -> Graded:
    trace = Trace(problem, attempt, (1, 2, 3), tuple(range(length)), "stop", 0)
    return Graded(trace, "7", Verdict.RIGHT if right else Verdict.WRONG, level)


def pool(seed: int = 0, problems: int = 60) -> list[Graded]:
    """Problems whose chance of being right falls, and whose length grows, with their level."""
    rng = random.Random(seed)
    out = []
    for p in range(problems):
        level = 1 + p % 4
        out += [
            graded(f"p{p}", a, rng.random() < 1.1 - level / 4, level * 10 + rng.randrange(40), level) for a in range(8)
        ]
    return out


def test_wrong_share_leaves_out_what_the_grader_failed_on() -> None:
    traces = [graded("a", 0, True, 5), graded("a", 1, False, 5)]
    failed = Graded(traces[0].trace, None, Verdict.GRADER_FAILED)
    assert wrong_shares([*traces, failed]) == {"a": 0.5}
    assert wrong_shares([failed]) == {}


@pytest.mark.parametrize(("attempts", "advice"), [(True, "or sample more"), (False, "or give more text or problems")])
def test_a_pool_that_is_too_small_is_told_with_what_makes_it_larger(attempts: bool, advice: str) -> None:
    few = Candidates((Row((1, 2, 3), 3, "a#0"),), (("rows", 1),), attempts=attempts)
    with pytest.raises(ValueError, match=rf"3 tokens; type budget.tokens=3 or less, {advice}"):
        draw(few, Budget(tokens=4), 0)


def test_where_no_difficulty_is_asked_for_a_problem_that_was_never_graded_may_be_drawn() -> None:
    traces = pool()
    failed = [replace(g, verdict=Verdict.GRADER_FAILED) if g.trace.problem_id == "p0" else g for g in traces]
    found = eligible(failed, "any", Policy(ANY, EVERY))
    assert found.funnel[2] == ("difficulty any", len(traces)) and len(found.rows) == len(traces)
    for band in (HARD, replace(ANY, high=0.9), replace(ANY, never_solved=False)):
        assert not {row.id for row in eligible(failed, "any", Policy(band, EVERY)).rows} & {f"p0#{a}" for a in range(8)}
    with pytest.raises(ValueError, match="never graded: type difficulty=any"):
        eligible(failed, Verdict.GRADER_FAILED, Policy(HARD, EVERY))
    assert eligible(failed, Verdict.GRADER_FAILED, Policy(ANY, EVERY)).funnel[2] == ("difficulty any", 8)


@pytest.mark.parametrize("attempts", range(1, 21))
def test_a_share_lies_in_the_band_that_begins_with_it(attempts: int) -> None:
    for wrong in range(1, attempts):
        share = wrong_shares([graded("a", i, i >= wrong, 5) for i in range(attempts)])["a"]
        assert Difficulty("band", wrong / attempts, 1, False, False).holds(share)


def test_never_and_always_solved_are_options() -> None:
    assert not HARD.holds(1.0)
    assert Difficulty("hard", 0.5, 1, False, True).holds(1.0)
    assert Difficulty("easy", 0, 0.25, True, False).holds(0.0)
    assert not Difficulty("easy", 0, 0.25, False, False).holds(0.0)
    assert HARD.holds(0.5) and not HARD.holds(0.49)
    assert not Difficulty("easy", 0, 0.25, True, False).holds(0.25), "it lies in the band that begins with it"


def test_percentile_bands_part_the_eligible_traces() -> None:
    lengths = random.Random(0).sample(range(1000), 300)
    bands = [Length("s", "percentile", None, 33.333), MEDIUM, Length("l", "percentile", 66.667, None)]
    held = [band.holding(lengths) for band in bands]
    assert all(sum(column) == 1 for column in zip(*held, strict=True))
    assert all(abs(sum(h) - 100) <= 1 for h in held)


def test_token_bands_are_absolute() -> None:
    assert Length("l", "tokens", 10, 20).holding([9, 10, 19, 20]) == [False, True, True, False]


def test_the_top_of_the_percentiles_holds_the_longest() -> None:
    assert Length("l", "percentile", 50, 100).holding([1, 2, 3]) == [False, True, True]
    assert Length("m", "percentile", 33, 67).holding([]) == [], "there may be none"


@pytest.mark.parametrize("bad", [{"low": 0.6, "high": 0.5}, {"low": -1, "high": 0.5}, {"low": 0.5, "high": 2}])
def test_bad_difficulty_bands_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"difficulty=x.*such as difficulty\.low"):
        Difficulty("x", always_solved=True, never_solved=True, **bad)


def test_bad_length_bands_are_refused() -> None:
    with pytest.raises(ValueError, match="valid units are percentile, tokens"):
        Length("x", "words", 0, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no band of percentile"):
        Length("x", "percentile", 50, 120)
    with pytest.raises(ValueError, match="low=5, high=5 is no band of tokens"):
        Length("x", "tokens", 5, 5)
    with pytest.raises(ValueError, match="low=150, high=None is no band of percentile"):
        Length("x", "percentile", 150, None)


def test_scope_weighs_the_streams_of_a_row() -> None:
    row = Row((1, 2, 3, 4, 5), 2, "r", bin="hard_medium")
    assert streams(row, parts=True) == [("hard_medium/prompt", 0, 2), ("hard_medium/response", 2, 5)]
    assert streams(row, parts=False) == [("hard_medium/text", 0, 5)]
    assert streams(Row((1, 2), 0, "r"), parts=True) == [("/response", 0, 2)]
    scope = Scope("mixed", prompt=0, response=2, bins={"hard_medium": 3})
    weights = [
        scope.weight(f"{bin_}/{part}") for bin_ in ("hard_medium", "") for part in ("prompt", "response", "text")
    ]
    assert weights == [0, 6, 3, 0, 2, 1]


@pytest.mark.parametrize("wrong", [{"prompt": -1}, {"prompt": 0, "response": 0}, {"bins": {"a": float("inf")}}])
def test_weights_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give a weight of at least 0|give one of them a weight of 1"):
        Scope("x", **wrong)


def test_traces_are_binned_among_those_that_are_eligible() -> None:
    bins = Bins("b", {"hard": HARD}, {"medium": MEDIUM})
    labels = bins.of([0.8, 0.8, 0.1, None], [20, 1, 20, 30])
    assert labels == ["hard_medium", "hard_other", "other_medium", "other_other"]
    rows = eligible(pool(), "right", Policy(HARD, EVERY, bins=bins)).rows
    assert {row.bin for row in rows} == {"hard_medium", "hard_other"}


def test_held_out_rows_are_none_of_those_that_were_drawn() -> None:
    candidates = Candidates(tuple(Row((1,) * n, 0, str(n)) for n in range(2, 40)), ())
    drawn = draw(candidates, Budget(tokens=200), 0)
    held_out = left_over(candidates, drawn, 50, 0)
    assert not {r.id for r in held_out} & {r.id for r in drawn} and 25 < sum(map(len, held_out)) <= 50
    assert held_out != left_over(candidates, drawn, 50, 1)
    assert left_over(candidates, candidates.rows, 50, 0) == ()
    attempts = tuple(replace(row, id=f"p{i % 3}#{i}") for i, row in enumerate(candidates.rows))
    held_out = left_over(replace(candidates, rows=attempts, attempts=True), attempts[:2], 10**6, 0)
    assert {row.id[:3] for row in held_out} == {"p2#"}, "nor are other attempts at the same problems"
    prompts = replace(candidates, rows=tuple(replace(row, id=f"set#{row.id}") for row in candidates.rows))
    assert left_over(prompts, prompts.rows[:1], 50, 0), "of prompts each is a problem, whatever signs its id has"
    windows = replace(rows([10, 10]), windowed=True)
    assert [[len(row) for row in left_over(windows, (), n, 0)] for n in (11, 12)] == [[10], [10, 2]], (
        "no row of one token"
    )


def test_funnel_counts_every_filter() -> None:
    traces = pool()
    found = eligible(traces, "right", Policy(HARD, MEDIUM))
    wrong = wrong_shares(traces)
    right = [g for g in traces if g.verdict is Verdict.RIGHT]
    hard = [g for g in right if 0.5 <= wrong[g.trace.problem_id] < 1]
    assert [n for _, n in found.funnel[:3]] == [len(traces), len(right), len(hard)]
    assert found.funnel[3][1] == len(found.rows) > 0
    ids = {row.id for row in found.rows}
    assert ids <= {f"{g.trace.problem_id}#{g.trace.attempt}" for g in hard}


def test_rows_are_prompt_and_generated_ids_as_they_came() -> None:
    row = eligible([graded("a", 0, True, 4)], "right", Policy(ANY, EVERY)).rows[0]
    assert row.ids == (1, 2, 3, 0, 1, 2, 3) and row.prompt_tokens == 3


@pytest.mark.parametrize("source", [OwnTraces("ssgr", 1, "right"), OwnTraces("matched", 1, "right", match=True)])
@pytest.mark.parametrize("overlong", ["drop", "window"])
def test_selection_reads_no_ids_but_of_what_it_drew(
    source: OwnTraces, overlong: Literal["drop", "window"], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = tmp_path / "graded.parquet"
    own = [replace(g, trace=replace(g.trace, prompt_ids=(1000 + i,))) for i, g in enumerate(pool())]
    tables.write_graded(file, own)
    policy = Policy(HARD, MEDIUM, "level", Bins("b", {"hard": HARD}, {"medium": MEDIUM}))
    budget = Budget(tokens=300, max_row_tokens=45, overlong=overlong, held_out=0.2)

    def selected(traces: list[Graded]) -> CalibrationSet:
        material = Material(tokenizer, lambda question: (), [], traces, Budget(500, max_row_tokens=45), TINY.thinking)
        return select.select(source, material, policy, budget)

    whole, light = selected(tables.read_graded(file)), selected(tables.read_graded(file, ids=False))
    assert all(isinstance(row.ids, Unread) for row in light.rows)
    with pytest.raises(TypeError, match="not iterable"):
        tuple(light.rows[0].ids)
    assert tables.with_ids(light, file) == whole and whole.held_out


def test_that_no_row_is_left_to_hold_out_is_told(
    caplog: pytest.LogCaptureFixture, tokenizer: PreTrainedTokenizerBase
) -> None:
    material = Material(tokenizer, lambda question: (), [], pool(), Budget(500, max_row_tokens=45), TINY.thinking)
    source, policy = OwnTraces("self", 0, "right"), Policy(ANY, EVERY, "none")
    right = len(fit_rows(source.candidates(material, policy), Budget(None, 1, 45)).rows)
    for rows, held_out in ((right, 0.0), (2, 0.9)):
        select.select(source, material, policy, Budget(None, rows, 45, held_out=held_out))
        assert not caplog.text
    select.select(source, material, policy, Budget(None, right, 45, held_out=0.2))
    assert "calib=self: no row is left to hold out" in caplog.text


def test_rows_that_repeat_another_are_counted_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    own = (Row((1, 2), 1, "a#0"), Row((1, 2), 1, "a#1"), Row((1, 2), 1, "a#2"), Row((1, 3), 1, "b#0"))
    chosen = CalibrationSet("self", own, (), (), 8)
    assert chosen.summary()["copies"] == 2
    select.warn_copies(chosen)
    assert "calib=self: 2 of 4 rows drawn repeat another token for token" in caplog.text
    caplog.clear()
    select.warn_copies(replace(chosen, rows=own[2:]))
    assert not caplog.text


def test_an_empty_selection_prints_its_funnel_and_the_nearest_setting() -> None:
    easy = [graded(f"p{i}", a, a > i % 2, 10) for i in range(4) for a in range(8)]  # wrong: an eighth, or two
    with pytest.raises(
        ValueError, match=r"32 graded -> 26 right -> 0 difficulty hard.*type difficulty\.low=0\.245"
    ) as e:
        eligible(easy, "right", Policy(HARD, EVERY))
    low = float(str(e.value).split("difficulty.low=")[1].split()[0])
    high = float(str(e.value).split("difficulty.high=")[1].split(",")[0])
    assert eligible(easy, "right", Policy(Difficulty("near", low, high, False, False), EVERY)).rows


def test_an_empty_length_band_says_so() -> None:
    with pytest.raises(ValueError, match="type length=any"):
        eligible(pool(), "right", Policy(ANY, Length("x", "tokens", 5000, None)))


def rows(lengths: list[int]) -> Candidates:
    return Candidates(tuple(Row(tuple(range(n)), 0, str(i)) for i, n in enumerate(lengths)), (("rows", len(lengths)),))


def test_bins_of_a_source_without_traces_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(ANY, EVERY, bins=Bins("b", {"hard": HARD}, {"medium": MEDIUM}))
    for source in (Written("written", 0), OwnTraces("self", 0, "any")):
        select.warn_unused(source, policy, BOTH)
    assert caplog.messages == ["bins=b has no effect on calib=written, which has nothing to apply it to"]


@given(st.lists(st.integers(1, 60), min_size=40, max_size=120), st.integers(0, 5), st.integers(100, 400))
def test_draws_are_whole_rows_without_replacement_within_the_budget(lengths: list[int], seed: int, tokens: int) -> None:
    candidates = rows(lengths)
    if sum(lengths) < tokens:
        return
    drawn = draw(candidates, Budget(tokens=tokens), seed)
    ids = [row.id for row in drawn]
    assert len(set(ids)) == len(ids)
    assert all(len(row) == lengths[int(row.id)] for row in drawn)
    assert tokens - max(lengths) < sum(map(len, drawn)) <= tokens


def test_every_source_realises_the_same_tokens() -> None:
    lengths = [random.Random(s).randrange(10, 80) for s in range(500)]
    assert {sum(map(len, draw(rows(lengths), Budget(tokens=4000), seed))) for seed in range(20)} == {4000}


def test_draws_follow_their_seed() -> None:
    candidates = rows([10] * 100)
    budget = Budget(tokens=300)
    assert draw(candidates, budget, 1) == draw(candidates, budget, 1) != draw(candidates, budget, 2)


def test_a_window_is_not_shortened_to_one_token() -> None:
    """A row needs two, and the prune would be refused for that one."""
    windows = replace(rows([10] * 10), windowed=True)
    assert [[len(row) for row in draw(windows, Budget(tokens=n), 0)] for n in (31, 32)] == [[10] * 3, [10, 10, 10, 2]]


def test_a_budget_over_the_pool_names_what_it_holds() -> None:
    with pytest.raises(ValueError, match=r"budget\.tokens=1000.*type budget\.tokens=100 or less"):
        draw(rows([10] * 10), Budget(tokens=1000), 0)
    with pytest.raises(ValueError, match=r"budget\.rows=11.*type budget\.rows=10 or less"):
        draw(rows([10] * 10), Budget(tokens=None, rows=11), 0)


def test_overlong_rows_are_dropped_or_windowed_and_counted() -> None:
    candidates = rows([10, 50, 20])
    dropped = fit_rows(candidates, Budget(tokens=100, max_row_tokens=20))
    assert [len(r) for r in dropped.rows] == [10, 20] and dropped.funnel[-1] == ("at most 20 tokens", 2)
    windowed = fit_rows(candidates, Budget(tokens=100, max_row_tokens=20, overlong="window"))
    assert [len(r) for r in windowed.rows] == [10, 20, 20] and windowed.funnel[-1] == (
        "windowed to 20 tokens (1 cut)",
        3,
    )


def test_balanced_bands_have_one_mix_of_levels() -> None:
    mixes = []
    for band in (Length("short", "percentile", None, 33.333), MEDIUM, Length("long", "percentile", 66.667, None)):
        candidates = eligible(pool(problems=400), "right", Policy(Difficulty("any", 0, 1, True, False), band, "level"))
        drawn = draw(candidates, Budget(tokens=3000), 0)
        share = {level: sum(len(r) for r in drawn if r.level == level) / 3000 for level in (1, 2, 3, 4)}
        mixes.append(share)
    for share in mixes:
        assert all(abs(part - 0.25) < 0.04 for part in share.values()), mixes


@pytest.mark.parametrize(("hardest", "thirds", "lacking"), [(9, [0, 0, 1, 2, 2], None), (3, [0, 0], "1, 2")])
def test_thirds_of_length_are_those_of_all_that_have_the_verdict(
    hardest: int, thirds: list[int], lacking: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    easy = lambda n: n % 2 == 0 or n > hardest
    traces = [g for n in range(1, 10) for g in (graded(f"p{n}", 0, True, n), graded(f"p{n}", 1, easy(n), n))]
    with caplog.at_level("WARNING", "ssgr"):
        assert eligible(traces, "right", Policy(HARD, EVERY, "length")).strata == tuple(thirds)
    assert [text.split(" third ")[1].split(", so")[0] for text in caplog.messages] == ([lacking] if lacking else [])


@pytest.mark.parametrize("seed", range(4))
def test_what_fills_a_balanced_draw_is_of_the_stratum_whose_row_it_replaces(seed: int) -> None:
    few = replace(rows([4, 4, 4, 4, 7]), strata=("a", "a", "a", "b", "b"))
    found = draw(few, Budget(tokens=15), seed)
    assert sorted(map(len, found)) == [4, 4, 7] and sum(row in few.rows[:3] for row in found) == 2


def test_a_balanced_draw_beyond_a_stratum_is_refused() -> None:
    candidates = eligible(pool(problems=400), "right", Policy(ANY, EVERY, "level"))
    total = sum(map(len, candidates.rows))
    with pytest.raises(ValueError, match=r"one stratum is used up.*select\.balance=none"):
        draw(candidates, Budget(tokens=total), 0)


@pytest.mark.parametrize("balance", ["none", "level"])
def test_a_draw_that_falls_short_says_why(
    balance: Literal["none", "level"], tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    traces = [graded(f"p{i}", 0, True, 7, level=1) for i in range(30)] + [graded("q", 0, True, 197, level=2)]
    material = Material(tokenizer, lambda question: (), [], traces, Budget(300, max_row_tokens=300), TINY.thinking)
    own = OwnTraces("self", 0, "any")
    found = select.select(own, material, Policy(ANY, EVERY, balance), Budget(tokens=309, max_row_tokens=200))
    said = "longer than the rest or would change the mix that select.balance=level keeps; sources"
    assert (found.tokens["realised"] < 300) == (said in caplog.text) == (balance == "level")


def test_the_control_matches_rows_and_tokens() -> None:
    traces = pool(problems=200)
    chosen = draw(eligible(traces, "right", Policy(HARD, MEDIUM)), Budget(tokens=1000), 3)
    control = match(eligible(traces, "any", Policy(ANY, EVERY)), len(chosen), sum(map(len, chosen)), 3)
    assert len(control) == len(chosen)
    assert sum(map(len, control)) == sum(map(len, chosen))
    assert len({row.id for row in control}) == len(control)
    assert {row.id for row in control} != {row.id for row in chosen}
    for seed in range(5):
        assert sum(map(len, match(rows([10] * 50 + [20] * 50), 20, 400, seed))) == 400, "many are exchanged"
        assert sum(map(len, match(rows([10] * 199 + [13]), 2, 23, seed))) == 23, "the one that fits is found"


@pytest.mark.parametrize("bad", [{"tokens": None}, {"tokens": 5, "rows": 5}, {"tokens": 0}, {"overlong": "cut"}])
def test_bad_budgets_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="budget"):
        Budget(**bad)  # type: ignore[arg-type]


def test_of_a_row_that_is_cut_in_its_prompt_all_is_prompt() -> None:
    assert [shorten(Row((1,) * 9, 5, "a"), n).prompt_tokens for n in (3, 7)] == [3, 5]


def test_rows_longer_than_the_whole_budget_are_counted() -> None:
    found = fit_rows(rows([10, 500, 20]), Budget(tokens=25, max_row_tokens=4096))
    assert found.funnel[-1] == ("at most 25 tokens", 2)
    with pytest.raises(ValueError, match=r"0 at most 25 tokens; nearest: .*budget\.tokens=400"):
        fit_rows(rows([500, 400]), Budget(tokens=25, max_row_tokens=4096))


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the selection is empty: .*smaller calib\.window"):
        draw(rows([]), Budget(tokens=10), 0)


@pytest.mark.parametrize("bad", [{"tokens": 1e3}, {"tokens": 1}, {"tokens": None, "rows": 1.5}, {"max_row_tokens": 1}])
def test_budgets_are_whole_numbers(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"give a whole number of at least [12]"):
        Budget(**bad)  # type: ignore[arg-type]


def test_a_band_without_a_stratum_is_named(caplog: pytest.LogCaptureFixture) -> None:
    traces = [graded(f"p{i}", a, True, 10 * i + a, level=i) for i in (1, 2) for a in range(8)]
    band = Length("long", "tokens", 20, None)
    with caplog.at_level("WARNING", "ssgr"):
        eligible(traces, "right", Policy(ANY, band, "level"))
    assert "select.balance=level: difficulty=any length=long holds no trace of level 1" in caplog.text
