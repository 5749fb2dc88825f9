"""Sums of what enters the matrices against naive ones in float64, by any batching and as any mixture of streams.

Shapes: N rows, T tokens, I inputs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MixtralConfig, PreTrainedTokenizerBase
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from ssgr.model import Model, experts
from ssgr.model.blocks import matrices
from ssgr.pruner import Moments, Pruner
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.pruner.wanda import Wanda
from ssgr.records import CalibrationSet, LayerResult, Row
from ssgr.scope import BOTH, Scope
from ssgr.sparsity import Unstructured
from ssgr.stages import activations, collect
from ssgr.stages.activations import ALL, HELD_OUT, passages
from ssgr.stages.collect import Collector, Stream, Sums, moments
from ssgr.stages.plan import Memory
from ssgr.stages.prune import Passing, prune
from ssgr.stages.ranks import Ranks
from ssgr.stages.solve import mixtures
from ssgr.stages.statistics import Statistics
from ssgr.stages.statistics import collect as collect_dense
from ssgr.stages.walk import Walk
from tests.conftest import random_model
from tests.test_prune import calibration, uniform

CPU = torch.device("cpu")
ULP = 2.0**-24  # half the spacing of float32 at 1
HALF = Unstructured(0.5)
MIXTURE = Scope("mixture", prompt=0.3, response=1.7, bins={"hard": 0.25, "easy": 0.0})
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "large mean, small variance": lambda x: 1000 + 0.01 * x,
    "bfloat16": lambda x: x.bfloat16(),
    "bfloat16, large mean": lambda x: (300 + x).bfloat16(),
    "float16 near its end": lambda x: (10000 * x).half(),
    "heavy tails": lambda x: x**7,
    "one sign": lambda x: x.abs(),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, want: Tensor, size: Tensor) -> float:
    """The largest difference as a share of `size`."""
    return float(((found - want).abs() / size.clamp(min=1e-30)).max())


class Naive:
    """Sums in float64, and with every term's absolute value; `longest` is the most tokens of one batch."""

    def __init__(self, inputs: int) -> None:
        zero: Callable[..., Tensor] = lambda *shape: torch.zeros(2, *shape, dtype=torch.float64)
        self.tokens, self.longest = 0.0, 0
        self.sum_2I, self.gram_2II = zero(inputs), zero(inputs, inputs)

    def add(self, x_TI: Tensor, w_T: Sequence[float]) -> None:
        wide_TI, w_T1 = x_TI.double(), torch.tensor(w_T, dtype=torch.float64)[:, None]
        for k, x in enumerate((wide_TI, wide_TI.abs())):
            self.sum_2I[k] += (x * w_T1).sum(0)
            self.gram_2II[k] += (x * w_T1).T @ x
        self.tokens += math.fsum(w_T)
        self.longest = max(self.longest, len(x_TI))

    def check(self, sums: Sums) -> None:
        """Every sum is as near as collect.py says."""
        share = (self.longest + 2) * ULP
        found = sums.tensors()
        assert sums.tokens == pytest.approx(self.tokens, rel=2 * ULP)
        assert bool(((found["sum"] - self.sum_2I[0]).abs() <= share * self.sum_2I[1]).all())
        square_2I = self.gram_2II.diagonal(dim1=1, dim2=2)
        assert bool(((found["square"] - square_2I[0]).abs() <= share * square_2I[1]).all())
        if "gram" in found:
            off_II = (found["gram"] - self.gram_2II[0]).abs() - share * self.gram_2II[1]
            assert bool((off_II.triu() <= 0).all())


@pytest.mark.parametrize("statistic", ["norm", "gram"])
@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize(("batches", "tokens"), [(1, 1), (3, 700), (3000, 1)])
def test_sums_keep_the_bound_whatever_the_number_of_batches(
    batches: int, tokens: int, case: str, statistic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "_STRIP", 5)  # several strips, the last one narrow
    inputs = 12
    sums, naive = Sums.zero(inputs, statistic, CPU), Naive(inputs)  # type: ignore[arg-type]
    for n in range(batches):
        x_TI = INPUTS[case](normal(tokens, inputs, seed=n))
        weights = [((7 * n + t) % 10 + 1) / 10 for t in range(tokens)]  # of which few are float32 numbers
        plain = n % 3 == 0
        sums.add(x_TI, None if plain else torch.tensor(weights))
        naive.add(x_TI, [1.0] * tokens if plain else weights)
    naive.check(sums)


@pytest.mark.parametrize("case", INPUTS)
def test_moments_are_those_of_float64(case: str) -> None:
    sums, naive = Sums.zero(12, "gram", CPU), Naive(12)
    for n in range(4):
        x_TI, w_T = INPUTS[case](normal(300, 12, seed=n)), torch.rand(300, generator=torch.Generator().manual_seed(n))
        sums.add(x_TI, w_T)
        naive.add(x_TI, w_T.tolist())
    found = moments([(1.0, sums.tensors())], "gram")
    assert found and found.gram_II is not None and found.mean_I.dtype == found.gram_II.dtype == torch.float32
    share = (naive.longest + 4) * ULP  # division and rounding to float32 add two
    mean_2I, gram_2II = naive.sum_2I / naive.tokens, naive.gram_2II / naive.tokens
    square_2I = gram_2II.diagonal(dim1=1, dim2=2)
    assert bool(((found.gram_II - gram_2II[0]).abs() <= share * gram_2II[1]).all())
    assert torch.equal(found.gram_II, found.gram_II.T)
    assert torch.equal(found.square_I, found.gram_II.diagonal())
    assert bool(((found.mean_I - mean_2I[0]).abs() <= share * mean_2I[1]).all())
    variance_I = square_2I[0] - mean_2I[0].square()
    off_I = share * (square_2I[1] + 2 * mean_2I[0].abs() * mean_2I[1]) + 3 * ULP * square_2I[1]
    assert bool(((found.variance_I - variance_I).abs() <= off_I).all())
    assert bool((found.variance_I >= 0).all())
    if "large mean" not in case:  # there the variance is less than the rounding of the square
        assert bool(((found.variance_I - variance_I).abs() <= 1e-3 * variance_I).all())


def test_moments_of_nothing() -> None:
    empty = Sums.zero(3, "norm", CPU).tensors()
    some = Sums.zero(3, "norm", CPU)
    some.add(normal(5, 3), None)
    assert moments([(1.0, empty), (0.0, some.tensors())], "norm") is None
    assert moments([], "gram") is None


class Toy(nn.Module):
    """A block of the usual shape: three matrices of one input, one of another, two of a third, one of a fourth."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, outputs, inputs in (("q", 6, 6), ("k", 6, 6), ("v", 6, 6), ("o", 6, 6), ("gate", 9, 6), ("up", 9, 6)):
            setattr(self, name, nn.Linear(inputs, outputs, bias=False))
        self.down = nn.Linear(9, 6, bias=False)

    def forward(self, x_NTI: Tensor) -> Tensor:
        mixed = x_NTI + self.o((self.q(x_NTI) + self.k(x_NTI) * self.v(x_NTI)).tanh())
        out: Tensor = self.down(self.gate(mixed).sigmoid() * self.up(mixed))
        return out


def heard(
    block: nn.Module, batches: Sequence[Tensor], streams: Sequence[dict[str, Stream]], whole: bool = True,
    include: Sequence[str] = (),
) -> Collector:  # fmt: skip
    collector = Collector("gram", matrices(block, include))
    with collector.listening(), torch.no_grad():
        for x_NTI, own in zip(batches, streams, strict=True):
            collector.run(lambda x=x_NTI: block(x), own, whole, x_NTI.shape[0] * x_NTI.shape[1])  # type: ignore[misc]
    return collector


def same(a: Collector, b: Collector) -> bool:
    assert a.owner == b.owner and a.sums.keys() == b.sums.keys()
    parts = [(a.sums[key].tensors(), b.sums[key].tensors()) for key in a.sums]
    return all(torch.equal(x[name], y[name]) for x, y in parts for name in x)


EVERY = {"every": Stream(None, None)}


def test_matrices_of_the_same_inputs_share_their_sums() -> None:
    found = heard(Toy(), [normal(2, 5, 6, seed=n) for n in range(3)], [EVERY] * 3)
    assert found.owner == {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}
    assert {owner for owner, _ in found.sums} == {"q", "o", "gate", "down"}
    assert {sums.tokens for sums in found.sums.values()} == {30.0}
    groups = collect.sharing(["down", "k", "q", "up", "other"], found.owner)
    assert groups == [["down"], ["k", "q"], ["up"], ["other"]]


def test_a_row_without_a_token_of_a_stream_has_no_gradient_and_is_not_counted() -> None:
    x_NTI, block = normal(3, 5, 6), Toy().requires_grad_(False)
    with_one, without = Collector("gradient", matrices(block, ())), Collector("gradient", matrices(block, ()))
    for found, x, which in ((with_one, x_NTI, [0, 3, 11]), (without, x_NTI[[0, 2]], [0, 3, 6])):
        with found.listening():
            found.run(lambda x=x: block(x), {"some": Stream(torch.tensor(which), None)}, True)  # type: ignore[misc]
    for name in "qo":
        one, other = (found.sums[name, "some"] for found in (with_one, without))
        assert one.rows == other.rows == 2 and one.gradient_OI is not None
        torch.testing.assert_close(one.gradient_OI, other.gradient_OI)


def test_only_the_tokens_of_a_stream_count() -> None:
    """What is in no stream may be anything: padding, or tokens without weight."""
    x_NTI = normal(2, 5, 6)
    which, weights = [0, 2, 3, 7], [0.5, 2.0, 1.0, 0.1]
    poisoned = torch.full_like(x_NTI, torch.nan).view(10, 6)
    poisoned[which] = x_NTI.view(10, 6)[which]
    stream = {"some": Stream(torch.tensor(which), torch.tensor(weights))}
    naive = Naive(6)
    naive.add(x_NTI.view(10, 6)[which], weights)
    for x in (x_NTI, poisoned.view(2, 5, 6)):
        naive.check(heard(Toy(), [x], [stream]).sums["q", "some"])


@pytest.mark.parametrize("include", [(), ("q", "o"), ("gate",)])
def test_a_pass_that_ends_early_hears_the_same(include: tuple[str, ...]) -> None:
    batches, block = [normal(2, 5, 6, seed=n) for n in range(4)], Toy()
    calls: dict[str, int] = defaultdict(int)
    for name, module in block.named_children():
        own = module.forward

        def counted(x: Tensor, name: str = name, own: Callable[[Tensor], Tensor] = own) -> Tensor:
            calls[name] += 1
            return own(x)

        module.forward = counted
    whole = heard(block, batches, [EVERY] * 4, True, include)
    assert set(calls.values()) == {4}
    calls.clear()
    assert same(whole, heard(block, batches, [EVERY] * 4, False, include))
    order = ["q", "k", "v", "o", "gate", "up", "down"]
    last = order.index((include or order)[-1])
    assert [calls[name] for name in order] == [4] * last + [1] * (7 - last)  # the first batch is run to its end


class Routed(nn.Module):
    """A block of which a part runs only where the tokens ask for it, and another one twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("first", "seldom", "twice", "last"):
            setattr(self, name, nn.Linear(6, 6))

    def forward(self, x_NTI: Tensor) -> Tensor:
        asked = x_NTI.mean() > 0.1
        x_NTI = self.first(x_NTI)
        if asked:
            x_NTI = self.seldom(x_NTI.sin())
        out: Tensor = self.last(self.twice(self.twice(x_NTI)))
        return out


@pytest.mark.parametrize("include", [("first", "seldom", "last"), ("first", "twice"), ("twice",)])
def test_a_pass_does_not_end_before_all_was_heard(include: tuple[str, ...]) -> None:
    batches = [normal(1, 3, 6, seed=n) for n in (1, 4, 0, 7, 2, 8)]
    assert [bool(x.mean() > 0.1) for x in batches] == [False, False, True, False, True, False]
    whole = heard(Routed(), batches, [EVERY] * 6, True, include)
    counts = {name: sums.tokens for (name, _), sums in whole.sums.items()}
    assert set(counts) == set(include) and counts.get("twice", 36.0) == 36.0 and counts.get("seldom", 6.0) == 6.0
    assert same(whole, heard(Routed(), batches, [EVERY] * 6, False, include))


def test_tokens_that_cannot_be_told_apart_are_refused() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x_NTI: Tensor) -> Tensor:
            out: Tensor = self.linear(x_NTI[:, ::2])
            return out

    with pytest.raises(ValueError, match=r"linear is given 3 vectors for 6 tokens, .*'pruner.exclude=\[linear\]'"):
        heard(Half(), [normal(1, 6, 6)], [EVERY])


def test_experts_hear_their_own_tokens_with_their_weights() -> None:
    size = {"hidden_size": 6, "intermediate_size": 5, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(**size)
    config._experts_implementation = "ssgr"
    torch.manual_seed(0)
    module = MixtralExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    assert experts.is_stacked(module)
    block = nn.Module()
    block.experts = module
    x_TI, index_TK = normal(9, 6), torch.tensor([[0, 1], [1, 2]] * 4 + [[0, 2]])  # none is for the last expert
    part = Stream(torch.tensor([0, 3, 4, 6]), torch.tensor([0.5, 1.0, 2.0, 0.25]))
    weighted = Stream(None, torch.arange(9) / 4)
    collector = Collector("gram", matrices(block))
    with collector.listening(), torch.no_grad():
        run: Callable[[], Tensor] = lambda: module(x_TI, index_TK, torch.ones(9, 2))
        for whole in (True, False):
            assert collector.run(run, {"part": part, "weighted": weighted, **EVERY}, whole, 9) is not None
    seen = {(owner, stream) for owner, stream in collector.sums if owner.endswith("gate_up_proj")}
    assert seen == {
        (f"experts.{e}.gate_up_proj", s) for e, s in [(e, s) for e in range(3) for s in ("part", "weighted", "every")]
    }
    for owner, stream in seen:
        of = {"part": dict(zip([0, 3, 4, 6], [0.5, 1, 2, 0.25], strict=True)), "every": dict.fromkeys(range(9), 1.0)}
        weight = of.get(stream, {t: t / 4 for t in range(9)})
        tokens = [t for t in range(9) if int(owner.split(".")[1]) in index_TK[t] and t in weight]
        naive = Naive(6)
        for _ in range(2):
            naive.add(x_TI[tokens], [float(weight[t]) for t in tokens])
        naive.check(collector.sums[owner, stream])


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sums, Naive]]:
    """Every `Sums` that is made, and a naive one of the same tokens."""
    own, made = Sums.add, {}  # type: ignore[var-annotated]

    def add(self: Sums, x_TI: Tensor, w_T: Tensor | None) -> None:
        naive = made.setdefault(id(self), (self, Naive(x_TI.shape[1])))[1]
        naive.add(x_TI, [1.0] * len(x_TI) if w_T is None else w_T.tolist())
        own(self, x_TI, w_T)

    monkeypatch.setattr(Sums, "add", add)
    return made.values()  # type: ignore[return-value]


def binned(held_out: int = 0, rows: int = 32) -> CalibrationSet:
    """Ragged rows in three bins, the last two tokens of every third without weight, and some held-out ones between."""
    cal = calibration(rows=rows + held_out)
    made = tuple(replace(row, bin=("hard", "easy", "medium")[i % 3]) for i, row in enumerate(cal.rows))
    weights = tuple((1.0,) * (len(r) - 2) + (float(i % 3 > 0),) * 2 for i, r in enumerate(made[:rows]))
    return CalibrationSet("test", made[:rows], weights, (), 0, True, made[rows:])


def saved(folder: Path, seed: int = 0) -> Model:
    random_model(seed).save_pretrained(folder)
    return Model("random", str(folder), device="cpu")


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of safetensors."""
    out: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as content:  # type: ignore[no-untyped-call]
            out |= {f"{file.stem}|{name}": content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    return out


def test_any_batching_gives_the_same_sums(
    recorded: list[tuple[Sums, Naive]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One row a batch, and 32: each within the bound, and where the inputs are the same also to each other."""
    source, found = saved(tmp_path / "source"), []
    for batch in (1, 10**6):
        monkeypatch.setattr(activations, "_BATCH_TOKENS", batch)
        work = tmp_path / str(batch)
        work.mkdir()
        collect_dense(source, tokenizer, binned(), "gram", Memory(1), work)
        found.append(stored(work))
    assert len(recorded) == 2 * 2 * 4 * 6  # batchings, blocks, inputs of their own, streams
    for sums, naive in recorded:
        naive.check(sums)
    assert max(naive.longest for _, naive in recorded) > 150 and min(naive.longest for _, naive in recorded) <= 39
    one, all_ = found
    assert one.keys() == all_.keys()
    for name, value in one.items():
        whose = name.rpartition("|")[0]
        square, tokens = one[f"{whose}|square"], one[f"{whose}|tokens"]
        size = (tokens * square).sqrt() if name.endswith("|sum") else square
        if name.endswith("|gram.0"):
            size = torch.outer(square.sqrt(), square.sqrt())
        same_inputs = whose.startswith("block_0000|self_attn.q_proj")  # elsewhere the forward passes round differently
        limit = 0.0 if name.endswith("|tokens") else (float(tokens) + 39 + 5) * ULP if same_inputs else 1e-4
        assert off(value, all_[name], size) <= limit, name


@pytest.mark.parametrize("batch", [1, 100, 4096])
def test_stored_sums_are_those_of_a_naive_walk(
    batch: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row at a time through the whole model in float64: no padding, every token in the stream that it belongs to."""
    monkeypatch.setattr(activations, "_BATCH_TOKENS", batch)
    cal, model = binned(held_out=5), random_model().double()
    source = saved(tmp_path / "source")
    (tmp_path / "work").mkdir()
    collect_dense(source, tokenizer, cal, "gram", Memory(1), tmp_path / "work")
    naive: dict[tuple[int, str, str], Naive] = {}
    given: dict[tuple[int, str], Tensor] = {}
    for i, block in enumerate(model.model.layers):
        for name, matrix in matrices(block).items():
            key = (i, name)
            matrix.module.register_forward_pre_hook(lambda m, args, key=key: given.update({key: args[0][0]}))  # type: ignore[misc]
    every = [(row, w, "") for row, w in zip(cal.rows, cal.weights, strict=True)]
    every += [(row, (1.0,) * len(row), HELD_OUT) for row in cal.held_out]
    for row, weights, before in every:
        with torch.no_grad():
            model(input_ids=torch.tensor([row.ids]), use_cache=False)
        for (i, name), x_TI in given.items():
            for part, span in (("prompt", slice(0, 5)), ("response", slice(5, None))):
                own = naive.setdefault((i, name, f"{before}{row.bin}/{part}"), Naive(x_TI.shape[1]))
                own.add(x_TI[span], weights[span])
    for i in range(2):
        owner, sums = Statistics(tmp_path / "work").block(i, CPU, gram=True)
        for name, whose in owner.items():
            streams = {stream: parts for (of, stream), parts in sums.items() if of == whose}
            assert streams.keys() == {stream for (block, own, stream) in naive if (block, own) == (i, name)}
            for stream, parts in streams.items():
                want = naive[i, name, stream]
                assert float(parts["tokens"]) == want.tokens
                size_I = want.gram_2II[0].diagonal().sqrt()
                gram_II = want.gram_2II[0]
                assert off(parts["gram"].triu(), gram_II.triu(), torch.outer(size_I, size_I)) < 1e-4, (i, name, stream)
                assert off(parts["sum"], want.sum_2I[0], size_I * want.tokens**0.5) < 1e-4, (i, name, stream)


def test_what_follows_without_weight_changes_nothing(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    cal, source = binned(), saved(tmp_path / "source")
    rows = tuple(
        replace(row, ids=tuple(id_ if w else 63 - id_ for id_, w in zip(row.ids, weights, strict=True)))
        for row, weights in zip(cal.rows, cal.weights, strict=True)
    )
    assert rows != cal.rows
    for name, own in (("a", cal), ("b", replace(cal, rows=rows))):
        (tmp_path / name).mkdir()
        collect_dense(source, tokenizer, own, "gram", Memory(1), tmp_path / name)
    a, b = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gathered(source: Model, tokenizer: PreTrainedTokenizerBase, cal: CalibrationSet) -> list[dict[str, Moments]]:
    """The dense model's moments of every matrix, collected in one stream with the mixture's weights."""
    walk, out = Walk(source, Ranks()), []
    with torch.no_grad():
        batches = walk.begin(passages(cal, MIXTURE), tokenizer, None)
        for i, block in walk.filled(range(len(walk)), lambda i: None):
            collector = Collector("gram", matrices(block))
            with collector.listening():
                walk.advance(i, batches, collector)
            assert {stream for _, stream in collector.sums} == {ALL}
            found = {whose: moments([(1.0, sums.tensors())], "gram") for (whose, _), sums in collector.sums.items()}
            out.append({name: found[whose] for name, whose in collector.owner.items()})
    return out  # type: ignore[return-value]


def test_a_mixture_formed_later_is_one_collected_so(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source, cal = saved(tmp_path / "source"), binned()
    (tmp_path / "work").mkdir()
    collect_dense(source, tokenizer, cal, "gram", Memory(1), tmp_path / "work")
    for i, want in enumerate(gathered(source, tokenizer, cal)):
        owner, sums = Statistics(tmp_path / "work").block(i, CPU, gram=True)
        for name, one in want.items():
            mixed, later = mixtures({s: t for (whose, s), t in sums.items() if whose == owner[name]}, MIXTURE, "gram")
            assert mixed and mixed.gram_II is not None and one.gram_II is not None and later is None
            assert mixed.tokens == pytest.approx(one.tokens, rel=1e-6)
            size_I = one.square_I.sqrt()
            assert off(mixed.gram_II, one.gram_II, torch.outer(size_I, size_I)) < 1e-4, name
            assert off(mixed.mean_I, one.mean_I, size_I) < 1e-4, name
            assert off(mixed.square_I, one.square_I, one.square_I) < 1e-4, name


WAYS = {
    "by layer": Passing("pruned", "layer"),
    "by block": Passing("pruned", "block"),
    "dense": Passing("dense"),
}


def pruned(
    source: Model, tokenizer: PreTrainedTokenizerBase, cal: CalibrationSet, pruner: Pruner, way: str, work: Path,
    scope: Scope = BOTH,
) -> tuple[dict[str, Tensor], tuple[LayerResult, ...]]:  # fmt: skip
    """The weights and what was found, whichever way the rows pass."""
    dense = None
    if way == "dense":
        dense = work.with_name(f"{work.name}.collected")
        dense.mkdir()
        collect_dense(source, tokenizer, cal, "gram", Memory(1), dense)
    given = (None if dense else cal, uniform(pruner, HALF, scope), Memory(1), work, WAYS[way], dense)
    layers = prune(source, tokenizer, *given).layers
    return stored(work / "checkpoint"), layers


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()], ids=lambda p: p.name)
@pytest.mark.parametrize("way", WAYS)
def test_a_scope_is_weights_of_tokens(
    way: str, pruner: Pruner, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The scope's weights, or a calibration set whose tokens have them: the same pruned model."""
    source, cal = saved(tmp_path / "source"), binned()
    factor: Callable[[Row, int], float] = lambda row, t: MIXTURE.weight(
        f"{row.bin}/{'prompt' if t < row.prompt_tokens else 'response'}"
    )
    weights = tuple(
        tuple(w * factor(row, t) for t, w in enumerate(own)) for row, own in zip(cal.rows, cal.weights, strict=True)
    )
    by_scope, _ = pruned(source, tokenizer, cal, pruner, way, tmp_path / "scope", MIXTURE)
    one = replace(cal, weights=weights, parts=False, rows=tuple(replace(row, bin="") for row in cal.rows))
    by_weight, _ = pruned(source, tokenizer, one, pruner, way, tmp_path / "weight")
    without, _ = pruned(source, tokenizer, cal, pruner, way, tmp_path / "without")
    assert any(not torch.equal(value, without[name]) for name, value in by_scope.items())
    for name, value in by_scope.items():
        assert torch.equal(value != 0, by_weight[name] != 0), name
        assert torch.allclose(value, by_weight[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()], ids=lambda p: p.name)
@pytest.mark.parametrize("way", WAYS)
def test_held_out_rows_change_no_byte(
    way: str, pruner: Pruner, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "_BATCH_TOKENS", 200)  # several batches of several rows
    source, cal = saved(tmp_path / "source"), binned(held_out=9)
    found = []
    for name, own in (("with", cal), ("without", replace(cal, held_out=()))):
        weights, layers = pruned(source, tokenizer, own, pruner, way, tmp_path / name)
        found.append((weights, [replace(layer, error_held_out=None, seconds=0) for layer in layers]))
        assert all((layer.error_held_out is None) == (name == "without") for layer in layers)
    (a, ours), (b, theirs) = found
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert ours == theirs


def test_held_out_rows_are_weighted_like_the_others(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The matrices at the first block's door see the same inputs in either propagation, so they report the same errors."""
    source, cal = saved(tmp_path / "source"), binned(held_out=9)
    first = []
    for way in ("by layer", "dense"):
        _, layers = pruned(source, tokenizer, cal, SparseGPT(), way, tmp_path / way, MIXTURE)
        first.append(
            {layer.name: layer for layer in layers if ".0.self_attn." in layer.name and "o_proj" not in layer.name}
        )
    assert len(first[0]) == 3
    for name, a in first[0].items():
        b = first[1][name]
        assert a.tokens == pytest.approx(b.tokens, rel=1e-6)
        assert a.error == pytest.approx(b.error, rel=1e-4)
        assert a.error_held_out == pytest.approx(b.error_held_out, rel=1e-4)


def test_what_is_mixed_already_is_not_weighed_again() -> None:
    sums = Sums.zero(3, "norm", CPU)
    sums.add(normal(5, 3), None)
    scope = Scope("no unnamed rows", bins={"": 0.0})
    seen, later = mixtures({ALL: sums.tensors(), HELD_OUT + ALL: sums.tensors()}, scope, "norm")
    assert seen is not None and later is not None
    assert mixtures({"/text": sums.tensors()}, scope, "norm") == (None, None)


def test_weights_that_are_all_the_same_still_count() -> None:
    """Those of another batch may be others."""
    spans = [("half", 0, 2, 0.5), ("whole", 2, 4, 1.0)]
    found = activations._streams([activations.Passage((5,) * 4, (1.0, 1.0, 1.0, 0.0), spans)], 4, CPU)
    told = {name: (one.which_T, one.weights_T) for name, one in found.items()}
    assert [value if value is None else value.tolist() for pair in told.values() for value in pair] == [
        [0, 1],
        [0.5, 0.5],
        [2],
        None,
    ]
