"""Each allocation against a naive version: the published formula, and one sort of all scores of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssgr.allocation import Allocation, Seen
from ssgr.allocation.owl import OWL, bounded
from ssgr.allocation.uniform import Uniform
from ssgr.allocation.whole import Whole
from ssgr.pruner.wanda import Wanda
from ssgr.scope import BOTH
from ssgr.sparsity import NM, Unstructured
from ssgr.stages import allocate

CONF = Path(__file__).parent.parent / "conf"
RATIOS = (0.001, 0.05, 0.5, 0.73, 0.999)


class Reader:
    """A dense model read from a disk: a matrix is gone when the next is asked for."""

    def __init__(self, seen: Sequence[Seen]) -> None:
        self.seen, self.looks = seen, 0
        self.sizes = {one.name: one.w_OI.numel() for one in seen}

    def __call__(self) -> Iterator[Seen]:
        self.looks += 1
        for one in self.seen:
            w_OI = one.w_OI.clone()
            score = None if one.score is None else Taken(one.score())
            yield Seen(one.name, one.block, w_OI, one.square_I, score)
            w_OI.fill_(float("nan"))
            if score is not None:
                score.gone = True


class Taken:
    """Scores that must be asked for in time."""

    def __init__(self, score_OI: Tensor) -> None:
        self.score_OI, self.gone = score_OI, False

    def __call__(self) -> Tensor:
        assert not self.gone
        return self.score_OI


def model(outliers: Sequence[int] = (3, 6, 9, 12, 15, 18), even: bool = True) -> Reader:
    """Blocks of three layers with so many outliers in each block, and scores that differ by layer."""
    g = torch.Generator().manual_seed(0)
    seen = []
    for block, count in enumerate(outliers):
        for part, outputs, inputs in (("q", 24, 16), ("up", 40, 16), ("down", 16, 40)):
            rows = outputs if even else outputs + 3 * block + 1
            w_OI = (0.5 + torch.rand(rows, inputs, generator=g)) * torch.randn(rows, inputs, generator=g).sign()
            w_OI.view(-1)[:count] *= 1000
            scale = float(torch.rand((), generator=g) * 3 + 0.1)
            score: Callable[[], Tensor] = lambda w_OI=w_OI, scale=scale: w_OI.abs() * scale
            seen.append(Seen(f"blocks.{block}.{part}", block, w_OI, 0.8 + torch.rand(inputs, generator=g), score))
    return Reader(seen)


def mean_of(ratios: dict[str, float], sizes: dict[str, int]) -> float:
    """The mean share of zeros over weights."""
    return sum(ratios[name] * size for name, size in sizes.items()) / sum(sizes.values())


def test_uniform_is_uniform_and_never_looks() -> None:
    reader = model(even=False)
    assert Uniform().ratios(reader, reader.sizes, 0.4) == dict.fromkeys(reader.sizes, 0.4)
    assert reader.looks == 0


def naive_owl(seen: Sequence[Seen], m: float, lamda: float, ratio: float) -> list[float]:
    """The published code in float64: one share of zeros for each block."""
    outliers = []
    for block in sorted({one.block for one in seen}):
        parts = [one.w_OI.double().abs() * one.square_I.double().sqrt() for one in seen if one.block == block]  # type: ignore
        scores = torch.cat([part.flatten() for part in parts])
        outliers.append(float((scores > m * scores.mean()).sum()) / scores.numel() * 100)
    d = torch.tensor(outliers, dtype=torch.float64)
    kept = (d - d.min()) * (1 / (d.max() - d.min()) * lamda * 2)
    kept = kept - kept.mean() + (1 - ratio)
    return (1 - kept).tolist()


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
@pytest.mark.parametrize(("m", "lamda"), [(5.0, 0.08), (3.0, 0.15), (5.0, 0.0)])
@pytest.mark.parametrize("outliers", [(3, 6, 9, 12, 15, 18), (20, 4, 4, 20), (2, 11, 5, 9, 10, 0, 3)])
def test_owl_is_naive_owl_where_blocks_are_equal(ratio: float, m: float, lamda: float, outliers: Sequence[int]) -> None:
    reader = model(outliers)
    want = naive_owl(reader.seen, m, lamda, ratio)
    assert max(want) - min(want) == pytest.approx(2 * lamda)
    got = OWL(m, lamda).ratios(reader, reader.sizes, ratio)
    if max(abs(r - ratio) for r in want) <= lamda + 1e-12:
        assert all(got[one.name] == pytest.approx(want[one.block], abs=1e-9) for one in reader.seen)
    else:
        assert outliers == (2, 11, 5, 9, 10, 0, 3)
    assert reader.looks == 1 and mean_of(got, reader.sizes) == pytest.approx(ratio, abs=1e-12)


@pytest.mark.parametrize("ratio", RATIOS)
def test_owl_keeps_to_its_bounds_and_the_mean_where_blocks_are_uneven(ratio: float) -> None:
    reader = model((1, 2, 4, 9, 20, 44), even=False)
    got = OWL().ratios(reader, reader.sizes, ratio)
    assert mean_of(got, reader.sizes) == pytest.approx(ratio, abs=1e-12)
    by_block = [got[f"blocks.{block}.q"] for block in range(6)]
    assert by_block == sorted(by_block, reverse=True) and by_block[0] > by_block[-1]  # later blocks have more outliers
    assert max(0, ratio - 0.08) - 1e-12 <= by_block[-1] and by_block[0] <= min(1, ratio + 0.08) + 1e-12
    assert all(got[one.name] == by_block[one.block] for one in reader.seen)


def test_owl_with_one_block_of_outliers_stays_within_lamda_as_the_paper_says() -> None:
    reader = model((20, 0, 0, 0, 0))
    assert min(naive_owl(reader.seen, 5.0, 0.08, 0.5)) == pytest.approx(0.5 - 0.08 * 2 * 4 / 5)
    got = OWL().ratios(reader, reader.sizes, 0.5)
    assert got["blocks.0.q"] == pytest.approx(0.42, abs=1e-9)
    assert got["blocks.3.up"] == pytest.approx(0.52, abs=1e-9)


def test_owl_without_differences_or_inputs_is_uniform() -> None:
    reader = model()
    for one in reader.seen:
        one.w_OI.fill_(0.7)
    assert OWL().ratios(reader, reader.sizes, 0.6) == pytest.approx(dict.fromkeys(reader.sizes, 0.6))
    blind = Reader([Seen(one.name, one.block, one.w_OI) for one in reader.seen])
    assert OWL().ratios(blind, blind.sizes, 0.6) == pytest.approx(dict.fromkeys(reader.sizes, 0.6))


def test_owl_treats_what_no_token_came_to_as_usual() -> None:
    reader = model((3, 15, 15, 15, 6, 6))  # the mean of the others lies midway
    part = Reader([Seen(s.name, s.block, s.w_OI, None if s.block == 2 else s.square_I) for s in reader.seen])
    got = OWL().ratios(part, part.sizes, 0.5)
    assert got["blocks.2.q"] == pytest.approx(sum(got[f"blocks.{b}.q"] for b in (0, 1, 3, 4, 5)) / 5)
    assert mean_of(got, part.sizes) == pytest.approx(0.5, abs=1e-12)
    one = Reader([Seen(s.name, s.block, s.w_OI, None if s.name.endswith("up") else s.square_I) for s in reader.seen])
    assert OWL().ratios(one, one.sizes, 0.5)["blocks.0.up"] == OWL().ratios(one, one.sizes, 0.5)["blocks.0.q"]


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 10**9)), min_size=1, max_size=20),
    st.floats(0, 1), st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip
def test_bounded_keeps_mean_bounds_and_order(
    values: list[tuple[float, int]], mean: float, under: float, over: float
) -> None:
    low, high = mean - under, mean + over
    x, weights = [v for v, _ in values], [w for _, w in values]
    got = bounded(x, weights, low, high, mean)
    assert sum(map(lambda r, w: r * w, got, weights)) / sum(weights) == pytest.approx(mean, abs=1e-9)
    assert all(low - 1e-12 <= r <= high + 1e-12 for r in got)
    pairs = sorted(zip(x, got, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(pairs))


@pytest.mark.parametrize(("m", "lamda"), [(0.0, 0.08), (5.0, -0.1), (5.0, 1.5)])
def test_owl_refuses_impossible_settings(m: float, lamda: float) -> None:
    with pytest.raises(ValueError, match="give m > 0 and lamda from 0 to 1"):
        OWL(m, lamda)


def scores_of(reader: Reader) -> dict[str, Tensor]:
    """The scores of every layer that has any."""
    return {one.name: one.score() for one in reader.seen if one.score is not None}


@pytest.mark.parametrize("ratio", RATIOS)
def test_global_is_one_sort_of_all_scores(ratio: float) -> None:
    reader = model(even=False)
    scores = scores_of(reader)
    every = torch.cat([score.flatten() for score in scores.values()])
    gone = torch.zeros_like(every, dtype=torch.bool)
    gone[every.argsort()[: round(len(every) * ratio)]] = True
    got = Whole().ratios(reader, reader.sizes, ratio)
    assert reader.looks == 2
    for (name, score), want in zip(scores.items(), gone.split([s.numel() for s in scores.values()]), strict=True):
        if 0 < got[name] < 1:
            assert torch.equal(~Unstructured(got[name]).keep(score, "layer"), want.view_as(score))
        else:
            assert want.all() if got[name] else not want.any()


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=8), st.floats(0.0001, 0.9999), st.integers(0, 3),
    st.sampled_from([1e-30, 1.0, 1e30]), st.integers(0, 2**31),
)  # fmt: skip
def test_global_counts_are_exact_with_ties_and_negative_scores(
    widths: list[int], ratio: float, decimals: int, scale: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = [torch.randn(3, n, generator=g).round(decimals=decimals) * scale for n in widths]
    seen = [Seen(f"layer.{i}", i, s, None, Taken(s)) for i, s in enumerate(scores)]
    sizes = {one.name: one.w_OI.numel() for one in seen}
    got = Whole().ratios(lambda: seen, sizes, ratio)
    counts = {name: round(got[name] * size) for name, size in sizes.items()}
    assert all(got[name] * size == pytest.approx(counts[name], abs=1e-9) for name, size in sizes.items())
    every = torch.cat([s.flatten() for s in scores]).sort().values
    wanted = round(len(every) * ratio)
    assert sum(counts.values()) == wanted
    if wanted > 0:
        limit = every[wanted - 1]
        for name, score in zip(sizes, scores, strict=True):
            assert int((score < limit).sum()) <= counts[name] <= int((score <= limit).sum())


@pytest.mark.parametrize("ratio", RATIOS)
def test_global_shares_equal_scores_evenly(ratio: float) -> None:
    seen = [Seen(f"layer.{n}", n, torch.ones(n, 100), None, Taken(torch.full((n, 100), 0.25))) for n in (1, 7, 30, 400)]
    sizes = {one.name: one.w_OI.numel() for one in seen}
    got = Whole().ratios(lambda: seen, sizes, ratio)
    assert mean_of(got, sizes) == pytest.approx(ratio, abs=0.5 / sum(sizes.values()))
    assert all(abs(got[name] - ratio) <= 2 / size for name, size in sizes.items())


@pytest.mark.parametrize("ratio", RATIOS)
def test_global_gives_the_share_of_the_model_to_what_has_no_scores(ratio: float) -> None:
    reader = model(even=False)
    part = Reader([Seen(s.name, s.block, s.w_OI, None, None if s.block == 1 else s.score) for s in reader.seen])
    got = Whole().ratios(part, part.sizes, ratio)
    assert all(got[f"blocks.1.{layer}"] == ratio for layer in ("q", "up", "down"))
    gone = sum(round(got[name] * size) for name, size in part.sizes.items())
    assert gone == round(sum(part.sizes.values()) * ratio)
    blind = Reader([Seen(s.name, s.block, s.w_OI) for s in reader.seen])
    assert Whole().ratios(blind, blind.sizes, ratio) == dict.fromkeys(blind.sizes, ratio)


def test_the_mean_is_within_a_millionth_of_the_ratio() -> None:
    g = torch.Generator().manual_seed(0)
    seen = []
    for block in range(3):
        w_OI = torch.randn(500 + 211 * block, 700, generator=g) * (1 + block)
        score: Callable[[], Tensor] = lambda w_OI=w_OI: w_OI.abs()
        seen.append(Seen(f"layer.{block}", block, w_OI, torch.ones(700), score))
    sizes = {one.name: one.w_OI.numel() for one in seen}
    allocations: Sequence[Allocation] = (Uniform(), OWL(), Whole())
    for allocation in allocations:
        for ratio in (1 / 3, 0.61803):
            got = allocation.ratios(lambda: seen, sizes, ratio)
            assert got.keys() == sizes.keys() and mean_of(got, sizes) == pytest.approx(ratio, abs=1e-6)


@pytest.mark.parametrize("allocation", [Uniform(), OWL(), Whole()], ids=lambda allocation: allocation.name)
def test_layers_that_stay_dense_play_no_part(allocation: Allocation) -> None:
    reader = model()
    sizes = {name: size for name, size in reader.sizes.items() if not name.endswith("down")}
    without = Reader([one for one in reader.seen if one.name in sizes])
    assert allocation.ratios(reader, sizes, 0.5) == allocation.ratios(without, sizes, 0.5)
    assert allocation.ratios(reader, {}, 0.5) == {}


def test_a_score_that_is_not_a_number_is_an_error() -> None:
    bad = Seen("layers.3.up", 3, torch.ones(2, 2), None, Taken(torch.tensor([[1.0, float("nan")], [0.0, 1.0]])))
    with pytest.raises(ValueError, match=r"layers\.3\.up: a score is NaN; type model\.dtype=float32"):
        Whole().ratios(lambda: [bad], {"layers.3.up": 4}, 0.5)


@pytest.mark.parametrize(("choice", "want"), [("uniform", Uniform()), ("owl", OWL()), ("global", Whole())])
def test_the_yaml_is_the_published_setting(choice: str, want: Allocation) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"allocation={choice}"])
    got = hydra.utils.instantiate(cfg.allocation, _convert_="all")
    assert got == want and got.name == choice
    assert want.needs == {"uniform": "nothing", "owl": "norms", "global": "scores"}[choice]


@pytest.mark.parametrize(
    ("sparsity", "share", "said"),
    [(Unstructured(0.5), 1.0, "would leave no weight in w"), (NM(2, 4), 0.4, "is the same in every layer")],
)
def test_a_share_that_cannot_be_is_refused(sparsity: Any, share: float, said: str) -> None:
    given: Any = SimpleNamespace(name="own", needs="nothing", ratios=lambda look, sizes, ratio: {"w": share})
    unread: Any = None
    with pytest.raises(ValueError, match=said):
        allocate.ratios(given, unread, [], None, Wanda(), sparsity, BOTH)
