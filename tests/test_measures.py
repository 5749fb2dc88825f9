"""Measures: perplexity against a plain loop, tasks against lm-evaluation-harness by itself, suites and their report."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from ssgr import pipeline
from ssgr.keys import digest
from ssgr.measure import Measure
from ssgr.measure.perplexity import Perplexity
from ssgr.measure.tasks import LmEvalTask, known
from ssgr.records import Item, Trace
from ssgr.report import table
from ssgr.report.cells import find
from ssgr.sampler import Decoding
from ssgr.sampler.hf import HfSampler
from ssgr.stages.evaluate import Bench, Suite, item_difference, members, reading
from ssgr.store import Store
from tests.conftest import TINY, Loaded, Run, random_model
from tests.test_configs import build

TEXT = (
    "The baker walked to the harbour. Later that day, the rain came and went, although the old mill was silent. " * 40
)


def plain_loss(model: Any, ids: list[int], first: int) -> float:
    """The mean loss by its definition, in float64."""
    with torch.inference_mode():
        p_TV = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(p_TV[i - 1, ids[i]]) for i in range(first, len(ids))) / (len(ids) - first)


def test_perplexity_of_a_text_is_that_of_a_plain_loop(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    measure = Perplexity("own", str(file), window=300, windows=3)
    items = measure.measure(TINY, tokenizer, ())
    ids = tokenizer(TEXT)["input_ids"]
    want = [plain_loss(TINY.load(), ids[i * 300 : (i + 1) * 300], 1) for i in range(3)]
    assert [i.value for i in items] == pytest.approx(want, rel=1e-5) and [i.weight for i in items] == [299] * 3
    found = reading(measure, items, 1.0)
    assert found.value == pytest.approx(math.exp(np.mean(want)), rel=1e-5)
    assert found.ci95[0] <= found.value <= found.ci95[1] and found.items == 3


def test_perplexity_of_traces_counts_responses_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    model = random_model(vocabulary=512)
    traces = [
        Trace("a", 0, (5, 6, 7), (8, 9), "stop", 0, True),
        Trace("b", 0, (5,), tuple(range(20, 40)), "stop", 0, True),
        Trace("b", 1, (5,), tuple(range(40, 60)), "stop", 0, True),
    ]
    measure = Perplexity("traces", traces=object())
    items = measure.measure(Loaded(model), tokenizer, traces)
    twice = [plain_loss(model, [5, *range(first, first + 20)], 1) for first in (20, 40)]
    want = [plain_loss(model, [5, 6, 7, 8, 9], 3), sum(twice) / 2]
    assert [(i.id, i.weight) for i in items] == [("a", 2), ("b", 40)]
    assert [i.value for i in items] == pytest.approx(want, rel=1e-5)
    assert reading(measure, items, 1.0).value == pytest.approx(math.exp((2 * want[0] + 40 * want[1]) / 42), rel=1e-5)


def test_a_paired_difference_of_losses_is_weighted_and_in_nats() -> None:
    dense = [Item(str(i), 1.0 + i / 100, 10 + i) for i in range(50)]
    pruned = [Item(i.id, i.value + 0.2, i.weight) for i in reversed(dense)]
    gap, ends = item_difference(pruned, dense)
    assert [gap, *ends] == pytest.approx([0.2] * 3), "it is the same in all items, however long they are"


def test_the_interval_of_a_weighted_mean_is_that_of_a_ratio_of_sums() -> None:
    rng = np.random.default_rng(0)
    weight_N = rng.lognormal(5, 0.8, 200).round()
    value_N = 1 + 0.1 * rng.standard_normal(200)
    items = [Item(f"{i:03}", v, int(w)) for i, (v, w) in enumerate(zip(value_N, weight_N, strict=True))]
    drawn = rng.integers(200, size=(10_000, 200))
    means = (value_N * weight_N)[drawn].sum(1) / weight_N[drawn].sum(1)
    found = np.log(reading(Perplexity("x", "prose"), items, 1.0).ci95)
    assert found == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.002)


@pytest.mark.parametrize(
    ("how", "said"),
    [({}, "give one of them"), ({"text": "prose", "traces": 1}, "give one of them"),
     ({"text": "prose", "window": 1}, "at least 2"), ({"text": "prose", "windows": 0}, "at least 1")],
)  # fmt: skip
def test_bad_perplexities_are_refused(how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Perplexity("x", **how)


def test_a_library_that_is_not_installed_is_told_before_hours_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssgr.measure.tasks.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"bench=x needs lm-evaluation-harness .*: type pip install 'ssgr\[lm_eval\]'"):
        LmEvalTask("x", "boolq", "acc").check(None)


def test_texts_that_do_not_serve_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # the hub is not asked five times
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ValueError, match=r"less than a window; type bench.window=\d+ or less"):
        Perplexity("x", str(tmp_path / "short.txt")).measure(TINY, tokenizer, ())
    with pytest.raises(ValueError, match=r"more than the model's context of 128; type bench.window=128"):
        Perplexity("x", "prose", window=129, windows=1).measure(Loaded(random_model(vocabulary=512)), tokenizer, ())
    with pytest.raises(ValueError, match=r"2048 tokens are more than the model's context of 1024"):  # before it samples
        pipeline.plan(build("bench=perplexity", "bench.text=prose"), Store(tmp_path / "store"))
    with pytest.raises(ValueError, match="no traces"):
        Perplexity("x", traces=object()).measure(TINY, tokenizer, ())
    with pytest.raises(ValueError, match=r"bench.text=no/such is neither a file nor a dataset"):
        Perplexity("x", "no/such").measure(TINY, tokenizer, ())


@pytest.mark.xdist_group("lm_eval")  # the index of its tasks is read once
@pytest.mark.filterwarnings("ignore")  # of the library and of what it imports
def test_a_task_is_what_the_library_says(sums: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    measure = LmEvalTask("sums", "sums", "acc", folder=str(sums), batch_size=4)
    items = measure.measure(TINY, tokenizer, ())
    model = HFLM(pretrained=TINY.load(), tokenizer=tokenizer, batch_size=1)
    want = lm_eval.simple_evaluate(model, tasks=["sums"], task_manager=known(str(sums)), bootstrap_iters=0)
    assert len(items) == 24
    found = reading(measure, items, 1.0)
    assert found.value == pytest.approx(want["results"]["sums"]["acc,none"]) and found.metric == "acc"
    calls, tiny = [], TINY.load()
    tiny.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"bench.metric=f1: the task sums has acc"):
        LmEvalTask("sums", "sums", "f1", folder=str(sums), batch_size=1).measure(Loaded(tiny), tokenizer, ())
    assert 0 < len(calls) <= 4, "the choices of one document of 24 show which metrics a task has"
    with pytest.raises(ValueError, match=r"bench.task=sumss: .* has no such task; near are .*sums"):
        LmEvalTask("sums", "sumss", "acc", folder=str(sums)).measure(TINY, tokenizer, ())
    (sums / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="cannot run the task sums"):
        LmEvalTask("sums", "sums", "acc", folder=str(sums)).measure(TINY, tokenizer, ())


@pytest.mark.xdist_group("lm_eval")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("metric", ["f1", "mcc"])
def test_a_metric_of_all_documents_at_once_is_refused_before_the_model_is_loaded(
    metric: str, sums: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    unused: Any = None
    with pytest.raises(ValueError, match=rf"bench.metric={metric}: the task sums_of_all makes it of .*: it has acc$"):
        LmEvalTask("sums", "sums_of_all", metric, folder=str(sums)).measure(unused, tokenizer, ())


@pytest.mark.xdist_group("lm_eval")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chat", [True, False])
def test_a_task_is_asked_as_the_model_says(
    chat: bool, sums: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, Any]] = []

    def apply(turns: Any, **how: Any) -> str:
        asked.append((turns, {**how, "year": chat_template_utils.datetime.now().year}))
        return str(turns[-1]["content"])

    monkeypatch.setattr(tokenizer, "apply_chat_template", apply)  # the model's own takes no system prompt
    model = replace(TINY, system="Be brief.", chat={"enable_thinking": False})
    LmEvalTask("sums", "sums", "acc", limit=2, folder=str(sums), chat=chat).measure(model, tokenizer, ())
    assert bool(asked) == chat
    for turns, how in asked:
        assert turns[0] == {"role": "system", "content": "Be brief."} and turns[-1]["role"] == "user"
        assert how["enable_thinking"] is False and how["year"] == 2025


def test_a_loss_that_is_no_number_is_told(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    model = random_model(vocabulary=512)
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(
        ValueError, match=r"the loss of own/0 is nan: the model overflows there; type model.dtype=float32"
    ):
        Perplexity("own", str(tmp_path / "text.txt"), window=100).measure(Loaded(model), tokenizer, ())


def test_tasks_of_your_own_are_keyed_by_what_they_hold(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.yaml").write_text("task: t\n")
    own = lambda folder: digest(LmEvalTask("t", "t", "acc", folder=str(folder)))
    first = own(tmp_path / "one")
    assert first == own(tmp_path / "other") == own(f"{tmp_path}/one/")
    (tmp_path / "one" / ".git").mkdir()
    (tmp_path / "one" / ".git" / "index").write_text("changes by itself")
    assert own(tmp_path / "one") == first
    (tmp_path / "one" / "t.yaml").write_text("task: t\nnum_fewshot: 5\n")
    assert own(tmp_path / "one") != first
    assert digest(LmEvalTask("t", "t", "acc", batch_size=3)) == digest(LmEvalTask("t", "t", "acc")) != first


@pytest.mark.xdist_group("lm_eval")
@pytest.mark.filterwarnings("ignore")
def test_a_metric_that_a_task_gives_without_declaring_it_serves(sums: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    items = LmEvalTask("sums", "sums_own", "own", folder=str(sums)).measure(TINY, tokenizer, ())
    rows = (sums / "rows.jsonl").read_text().split("\n")
    assert [item.value for item in items] == [json.loads(row)["answer"] for row in rows]


@pytest.mark.parametrize("value", [(-3.5, 7), [True, False], None])
def test_a_metric_that_is_no_number_is_refused(value: object) -> None:
    samples = {"t": [{"doc_id": 0, "own": value, "metrics": ["own"]}]}
    with pytest.raises(ValueError, match=r"bench.metric=own: the task t gives no number for t/0"):
        LmEvalTask("t", "t", "own")._items(samples)


def test_a_suite_shares_its_decoding() -> None:
    bench = Bench("one", Decoding(2, 0.6, 0.95, 9, 0), HfSampler(4))
    other: Measure = Perplexity("two", "prose")
    made = members(Suite("both", {"a": bench, "b": other}, {"seed": 7}))
    assert isinstance(made[0], Bench) and made[0].decoding == Decoding(2, 0.6, 0.95, 9, 7) and made[1] is other
    assert members(bench) == [bench]
    (reads,) = members(Suite("traces", {"a": Perplexity("own", traces=bench)}, {"seed": 7}))
    assert isinstance(reads, Perplexity) and reads.traces.decoding.seed == 7, "what is sampled once is asked for once"
    with pytest.raises(ValueError, match="two of its benchmarks are called one"):
        members(Suite("both", {"a": bench, "b": bench}))
    with pytest.raises(ValueError, match="its benchmarks two and two_dense would write the same file"):
        members(Suite("both", {"a": Perplexity("two_dense", "prose"), "b": other}))
    with pytest.raises(ValueError, match="letters, digits"):
        members(Perplexity("a/b", "prose"))
    with pytest.raises(ValueError, match="at least one"):
        Suite("none", {})
    with pytest.raises(
        ValueError, match=r"bench.decoding.top_k: there is no such setting; valid are attempts, temperature"
    ):
        Suite("both", {"a": bench}, {"top_k": 20})
    (own,) = members(Suite("both", {"a": bench}, {"seed": None, "max_new_tokens": 64}))
    assert isinstance(own, Bench) and own.decoding == Decoding(2, 0.6, 0.95, 64, 0)


def test_what_a_benchmark_lacks_is_called_as_it_is_set(tmp_path: Path) -> None:
    unused: Any = None
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"problem": "1+1?", "solution": "2"}))
    for settings, said in (
        (["bench.problems.file=/no/file.jsonl"], "no such file; type problems.file=FILE.jsonl; of a benchmark"),
        ([f"bench.problems.file={rows}"], "Type problems.columns.question=COLUMN, or mend the row; of a benchmark"),
    ):
        (bench,) = build("bench=gsm8k", *settings).benches
        assert isinstance(bench, Bench)
        with pytest.raises(ValueError, match=rf"{re.escape(said)}, problems is bench.problems, "):
            bench.asks(unused).read("test")


def test_a_suite_from_the_command_line_to_the_report(run: Run, tmp_path: Path) -> None:
    command = ("bench=suite/smoke", "calib=prompts", "pruner=wanda", "budget.tokens=400", "device=cpu")
    done = run(*command, small=False)
    assert done.returncode == 0, done.stderr
    assert "+0." in done.stdout and " nats" in done.stdout and "accuracy" in done.stdout
    scores = json.loads((tmp_path / "run" / "result.json").read_text())["scores"]
    assert set(scores) == {"smoke", "perplexity", "perplexity_traces"}
    for name in ("perplexity", "perplexity_traces"):
        assert 1 < scores[name]["dense"]["value"] < scores[name]["pruned"]["value"]
        assert 0 < scores[name]["ci95"][0] < scores[name]["difference"] < scores[name]["ci95"][1]
    keys = json.loads((tmp_path / "run" / "result.json").read_text())["keys"]
    assert keys["sample_dense.smoke"] == keys["sample_dense.perplexity_traces"], (
        "the traces of the dense model are sampled once"
    )
    cells = find([tmp_path / "run"])
    assert {cell.fields["bench"]: cell.metric for cell in cells} == {
        "smoke": "accuracy", "perplexity": "perplexity", "perplexity_traces": "perplexity",
    }  # fmt: skip
    by = {row["bench"]: row for row in table.means(cells, ["bench"])}
    value = scores["perplexity"]["pruned"]["value"]
    assert by["perplexity"]["perplexity"].startswith(f"{value:.3f}") and by["smoke"]["perplexity"] == ""


@pytest.mark.parametrize("bench", ["held_out", "smoke"])
def test_grading_again_samples_and_prunes_nothing(bench: str, tmp_path: Path) -> None:
    def keys(*more: str) -> set[tuple[str, str]]:
        experiment = build("calib=ssgr", f"bench={bench}", "device=cpu", *more)
        return {(one.stage, one.key) for one in pipeline.plan(experiment, Store(tmp_path))}

    assert {stage for stage, _ in keys("+grader@bench.grader=math") - keys()} == {"grade", "evaluate"}


def test_the_rows_are_selected_before_the_dense_model_is_evaluated(tmp_path: Path) -> None:
    """What is wrong with filters, bins and the budget is told before hours of work that do not need them."""
    stages = [one.stage for one in pipeline.plan(build("bench=smoke", "device=cpu"), Store(tmp_path))]
    assert stages == [
        "sample",
        "grade",
        "select",
        *["sample", "grade", "evaluate"],
        "prune",
        *["sample", "grade", "evaluate"],
    ]


@pytest.mark.parametrize(
    ("settings", "heeded"),
    [
        (("pruner=wanda",), True),
        (("pruner=wanda", "allocation=owl"), True),
        (("pruner=wanda", "propagate=dense"), False),
        (("pruner=wandapp",), False),
        (("pruner=magnitude",), False),
    ],
)
def test_the_order_is_in_a_key_where_it_is_heeded(settings: tuple[str, ...], heeded: bool, tmp_path: Path) -> None:
    layer, block = (
        [one.key for one in pipeline.plan(build("device=cpu", *settings, f"order={order}"), Store(tmp_path))]
        for order in ("layer", "block")
    )
    assert (layer != block) == heeded
