"""What cells found and how they differ: intervals, p-values and corrections, against closed forms, scipy and statsmodels."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from ssgr import intervals
from ssgr.report import table
from ssgr.report.__main__ import main
from ssgr.report.cells import find
from ssgr.report.compare import Gap, compare, holds_zero
from tests.test_report import cell


def effects(rng: np.random.Generator, draws: int, seeds: int, problems: int, sd: float = 0.5) -> NDArray[np.float64]:
    """(D, S, P) values of mean zero with random effects of draws, seeds and problems."""
    noise = rng.normal(0, 1, (draws, seeds, problems))
    return (
        noise
        + rng.normal(0, sd, (draws, 1, 1))
        + (rng.normal(0, sd, (1, seeds, 1)) if seeds > 1 else 0)
        + rng.normal(0, 1, (1, 1, problems))
    )


def test_the_bootstrap_of_one_draw_is_the_plain_loop() -> None:
    values = np.random.default_rng(0).random(37)
    rng = np.random.default_rng(5)
    means = [values[rng.integers(37, size=37)].mean() for _ in range(intervals.RESAMPLES)]
    assert intervals.bootstrap([values[None, None]], seed=5)[0] == pytest.approx(np.percentile(means, [2.5, 97.5]))


def test_the_bootstrap_of_crossed_draws_and_seeds_is_the_plain_loop() -> None:
    table_DSP = effects(np.random.default_rng(1), 4, 3, 30)
    table_DSP[1, 2] = np.nan
    rng = np.random.default_rng(2)
    means = []
    while len(means) < 20_000:
        drawn = table_DSP[rng.integers(4, size=4)][:, rng.integers(3, size=3)][..., rng.integers(30, size=30)]
        if not np.isnan(drawn).all():
            means.append(np.nanmean(drawn))
    got = intervals.bootstrap([table_DSP])[0]
    assert got == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.04 * (got[1] - got[0]))


@pytest.mark.parametrize("shape", [(1, 1, 400), (30, 1, 80), (1, 30, 80), (25, 25, 60)])
def test_intervals_have_the_width_of_the_closed_form(shape: tuple[int, int, int]) -> None:
    """In the normal limit: 1.96 standard errors, whose variance is the sum of those of draws, seeds, problems and the rest.

    The plug-in variances of the effects of a balanced layout, each divided by how many there are of its levels.
    """
    table_DSP = effects(np.random.default_rng(3), *shape)
    variance, rest = 0.0, table_DSP - table_DSP.mean()
    for axis, n in enumerate(shape):
        effect = table_DSP.mean(tuple({0, 1, 2} - {axis}), keepdims=True) - table_DSP.mean()
        variance += float((effect**2).mean()) / n
        rest = rest - effect
    if np.prod(shape) > max(shape):  # what is left beside the effects is resampled by all axes at once
        several = [axis for axis in range(3) if shape[axis] > 1]
        if len(several) == 2:
            variance += float((rest**2).mean()) / np.prod(shape)
        else:  # each two-way effect, then the three-way one
            for axis in several:
                pair = rest.mean(axis, keepdims=True)
                variance += float((pair**2).mean()) / (np.prod(shape) / shape[axis])
                rest = rest - pair
            variance += float((rest**2).mean()) / np.prod(shape)
    low, high = intervals.bootstrap([table_DSP])[0]
    assert (high - low) / 2 == pytest.approx(intervals.Z95 * sqrt(variance), rel=0.04)
    assert (high + low) / 2 == pytest.approx(table_DSP.mean(), abs=0.1 * (high - low))


def test_intervals_and_p_hold_what_they_promise() -> None:
    """300 tables of eight draws and 40 problems around zero: 95 of 100 intervals hold it, 5 of 100 p are below 0.05."""
    rng = np.random.default_rng(4)
    tables = [effects(rng, 8, 1, 40, sd=0.3) for _ in range(300)]
    held = np.mean([low <= 0 <= high for low, high in intervals.bootstrap(tables)])
    false = np.mean([intervals.clustered_t(one) < 0.05 for one in tables])
    assert 0.90 <= held <= 0.99
    assert 0.01 <= false <= 0.08


def test_one_draw_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(6)
    for shift in (0.0, 0.1, 0.4):
        a, b = rng.normal(shift, 1, 60), rng.normal(0, 1, 60)
        p = intervals.clustered_t((a - b)[None, None])
        assert p == pytest.approx(stats.ttest_rel(a, b).pvalue)
        flips = stats.permutation_test(
            (a, b),
            lambda x, y: np.mean(x - y),
            permutation_type="samples",
            n_resamples=9999,
            rng=np.random.default_rng(0),
        )
        assert p == pytest.approx(flips.pvalue, abs=0.02)


@pytest.mark.parametrize("hole", [False, True])
def test_the_variance_is_the_sum_of_the_cluster_robust_ones_of_statsmodels(hole: bool) -> None:
    gaps_DSP = effects(np.random.default_rng(7), 5, 3, 25) + 0.5
    if hole:
        gaps_DSP[2, 1] = np.nan
    at = np.argwhere(~np.isnan(gaps_DSP))
    values = gaps_DSP[tuple(at.T)]
    model = sm.OLS(values, np.ones(len(values)))
    parts = [
        (float(model.fit(cov_type="cluster", cov_kwds={"groups": at[:, axis]}).bse[0] ** 2), n - 1)
        for axis, n in enumerate(gaps_DSP.shape)
    ]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / n for part, n in parts)
    want = 2 * stats.t.sf(abs(values.mean()) / sqrt(variance), freedom)
    assert intervals.clustered_t(gaps_DSP) == pytest.approx(want)
    assert 0.001 < want < 0.9


def test_a_difference_of_few_problems_proves_little() -> None:
    assert intervals.clustered_t(np.full((1, 1, 4), -1.0)) == 1 / 8  # all four worse: one in eight by chance
    assert intervals.clustered_t(np.full((3, 1, 1), -1.0)) == 1
    assert intervals.clustered_t(np.zeros((2, 2, 50))) == 1
    assert holds_zero((-0.1, -1e-16)) and holds_zero((1e-16, 0.1)), "rounding"


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_holm_is_that_of_statsmodels(n: int) -> None:
    p = np.random.default_rng(n).beta(0.3, 2, n)
    assert intervals.holm(list(p)) == pytest.approx(multipletests(p, method="holm")[1])
    assert intervals.holm([]) == []


def sweep(folder: Path, problems: int = 40) -> dict[tuple[str, int, int], list[bool]]:
    """Three draws and two seeds of two sources on a dense model that is right on nine of ten problems of each seed."""
    rng, out = np.random.default_rng(8), {}
    for seed in (1, 2):
        dense = [bool((i + seed) % 10) for i in range(problems)]
        for calib, chance in (("ssgr", 0.5), ("matched", 0.55)):
            for draw in range(3):
                right = [bool(x) for x in rng.random(problems) < chance]
                out[calib, draw, seed] = right
                cell(folder / f"{calib}{draw}{seed}", right, dense=dense, calib={"name": calib, "draw": draw},
                     bench__decoding={"seed": seed})  # fmt: skip
    return out


def test_a_sweep_of_three_draws_and_two_seeds(tmp_path: Path) -> None:
    right = sweep(tmp_path)
    by = {found.names["calib"]: found for found in compare(find([tmp_path]), against="calib=matched")}
    ssgr, matched = by["ssgr"], by["matched"]
    assert (ssgr.draws, ssgr.seeds, ssgr.problems, len(ssgr.cells)) == (3, 2, 40, 6)
    order = sorted(range(40), key=str)  # problems are in the order of their ids
    own, control = (
        np.array([[right[calib, d, s] for s in (1, 2)] for d in range(3)], float)[..., order]
        for calib in ("ssgr", "matched")
    )
    dense = np.array([[float(bool((i + s) % 10)) for i in order] for s in (1, 2)])
    assert ssgr.value.mean == pytest.approx(own.mean()) and ssgr.dense.mean == pytest.approx(0.9)
    assert ssgr.to_dense.mean == pytest.approx((own - dense).mean())
    assert ssgr.to_dense.ci95 == intervals.bootstrap([own - dense])[0]
    assert ssgr.dense.ci95 == intervals.bootstrap([dense[None]])[0]
    assert ssgr.to_dense.p == intervals.clustered_t(own - dense) < 0.001 and not ssgr.to_dense.unsure
    family = [ssgr.to_dense.p, matched.to_dense.p]
    assert [ssgr.to_dense.p_adjusted, matched.to_dense.p_adjusted] == pytest.approx(
        multipletests(family, method="holm")[1]
    )
    assert matched.to_control is None and ssgr.to_control is not None
    assert ssgr.to_control.mean == pytest.approx((own - control).mean())
    assert ssgr.to_control.ci95 == intervals.bootstrap([own - control])[0]
    assert ssgr.to_control.p == ssgr.to_control.p_adjusted and ssgr.to_control.unsure  # its family is of one


def test_a_cell_that_failed_leaves_a_hole_and_is_no_draw(tmp_path: Path) -> None:
    right = sweep(tmp_path)
    (tmp_path / "ssgr12" / "result.json").unlink()
    cells = find([tmp_path])
    ssgr = next(c for c in compare(cells, against="calib=matched") if c.names["calib"] == "ssgr")
    assert (ssgr.draws, ssgr.seeds, len(ssgr.cells)) == (3, 2, 5)
    assert ssgr.missing == 1 and [row["missing"] for row in table.means(cells)].count("1 of 6") == 1
    there = [own for (calib, *at), own in right.items() if calib == "ssgr" and at != [1, 2]]
    assert ssgr.value.mean == pytest.approx(np.mean(there))
    assert ssgr.to_control is not None
    (tmp_path / "matched01" / "result.json").unlink()
    ssgr = next(c for c in compare(find([tmp_path]), against="calib=matched") if c.names["calib"] == "ssgr")
    assert ssgr.to_control is None, "a mean over the draws that have a control is another mean"


def test_one_evaluation_has_the_interval_of_its_record(tmp_path: Path) -> None:
    cell(tmp_path / "a", [True, False, True])
    (found,) = compare(find([tmp_path]))
    assert found.value.ci95 == tuple(found.cells[0].score["pruned"]["ci95"]) == (0, 1)


@pytest.mark.parametrize(
    ("field", "setting", "values"),
    [("budget", "budget__tokens", (400, 800)), ("model", "model", ({"name": "tiny"}, {"name": "large"})),
     ("bench", "bench", ({"name": "a", "decoding": {"seed": 1}}, {"name": "b", "decoding": {"seed": 1}}))],
)  # fmt: skip
def test_what_has_no_common_mean_is_apart_or_refused(
    field: str, setting: str, values: tuple[object, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, value in enumerate(values):
        cell(tmp_path / str(i), [True, i == 0], **{setting: value})
    cells = find([tmp_path])
    apart = compare(cells)
    assert len(apart) == 2 and all(field in one.names for one in apart)
    with pytest.raises(ValueError, match=rf"more than one {field} .* give --by calib,{field}"):
        compare(cells, by=["calib"])
    assert main([str(tmp_path), "--by", "calib"]) == 1
    assert f"--by calib,{field}" in capsys.readouterr().err
    assert main([str(tmp_path), "--by", f"calib, {field}"]) == 0


def test_a_mean_over_settings_needs_all_of_them_in_every_draw(tmp_path: Path) -> None:
    for draw in (0, 1):
        for ratio in (0.5, 0.6):
            cell(tmp_path / f"{draw}{ratio}", [ratio == 0.5, True], calib__draw=draw, sparsity={"ratio": ratio})
    (found,) = compare(find([tmp_path]), by=["calib"])
    assert (found.draws, found.seeds, len(found.cells)) == (2, 1, 4) and found.value.mean == 0.75
    (tmp_path / "10.6" / "result.json").unlink()
    with pytest.raises(ValueError, match="differ in sparsity, and not every draw and seed has all of them: give --by"):
        compare(find([tmp_path]), by=["calib"])


def test_of_several_controls_the_one_of_the_same_filter(tmp_path: Path) -> None:
    for band, right in (("hard", [True, True]), ("easy", [False, False])):
        cell(tmp_path / f"s{band}", [True, False], difficulty={"name": band})
        cell(tmp_path / f"m{band}", right, difficulty={"name": band}, calib={"name": "matched", "draw": 0})
    cell(tmp_path / "w", [True, False], difficulty={"name": "any"}, calib={"name": "self", "draw": 0})
    by = {(c.names["calib"], c.names["difficulty"]): c for c in compare(find([tmp_path]), against="calib=matched")}
    for band, gap in (("hard", -0.5), ("easy", 0.5)):
        found = by["ssgr", band].to_control
        assert found is not None and found.mean == gap
    assert by["self", "any"].to_control is None  # two controls fit, and neither is its own
    cell(tmp_path / "d", [True, True], difficulty={"name": "other"}, pruner={"name": "wanda"})
    pruned = compare(find([tmp_path]), against="pruner=wanda")
    assert all(one.to_control is None for one in pruned), "of another filter it is the control of no pruner"


def test_a_control_that_was_tried_on_other_problems_is_refused(tmp_path: Path) -> None:
    cell(tmp_path / "a", [True, False])
    cell(tmp_path / "b", [True, True], problems="q", calib={"name": "matched", "draw": 0})
    with pytest.raises(
        ValueError, match=r"its control .* were tried on different problems and have no paired difference"
    ):
        compare(find([tmp_path]), against="calib=matched")


def test_a_gap_is_sure_by_interval_and_p() -> None:
    assert not Gap(-0.2, (-0.3, -0.1), 0.001, 0.01).unsure
    assert Gap(-0.2, (-0.3, -0.1), 0.001, 0.05).unsure
    assert Gap(-0.2, (-0.4, 0.0), 0.001, 0.01).unsure


def test_tables_show_draws_seeds_and_what_is_unsure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path)
    for form in ("text", "markdown"):
        assert main([str(tmp_path), "--against", "calib=matched", "--format", form]) == 0
        assert capsys.readouterr().out.rstrip().endswith(table.NOTE)
    row = next(row for row in table.means(find([tmp_path]), against="calib=matched") if row["calib"] == "ssgr")
    assert (row["draws"], row["seeds"]) == ("3", "2")
    assert not row["difference to dense"].endswith("~") and row["minus calib=matched"].endswith("] ~")
