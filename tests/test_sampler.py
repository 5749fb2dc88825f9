"""Sampling: the right distribution, the right ends, the same traces whatever the batch."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ssgr.flow import Flow
from ssgr.model import Model
from ssgr.problems.arithmetic import ArithmeticProblems
from ssgr.records import Problem, Trace
from ssgr.sampler import Decoding, Request, stop_ids
from ssgr.sampler.batch import decode
from ssgr.sampler.hf import HfSampler
from ssgr.sampler.nucleus import pick
from ssgr.sampler.replay import ReplaySampler
from ssgr.stages import sample as sampling
from ssgr.stages.sample import sample, spent
from ssgr.store import Store
from ssgr.tables import read_traces, write_traces
from tests.conftest import TINY, Loaded, random_model

SAMPLING = Decoding(2, 0.6, 0.95, 120, 0)
GREEDY = Decoding(1, 0.0, 1.0, 80, 0)


class Never(Loaded):
    """A model that is not to be loaded."""

    def load(self) -> PreTrainedModel:
        raise AssertionError("nothing was left to sample")


NEVER = Never(None)


def requests(tokenizer: PreTrainedTokenizerBase, problems: int = 12, attempts: int = 2) -> list[Request]:
    drawn = ArithmeticProblems((1, 2), 1, problems, 5).read("test")
    return [Request(p.id, a, TINY.prompt_ids(tokenizer, p.question)) for p in drawn for a in range(attempts)]


def nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Top-p by its definition: sort all, keep the smallest set whose mass reaches top_p."""
    p = (logits.double() / temperature).softmax(0)
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    kept = order[before < top_p]
    out = torch.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize(("scale", "vocabulary"), [(3.0, 40), (3.0, 400), (0.05, 400)])
def test_pick_draws_from_the_nucleus(scale: float, vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(vocabulary) * scale
    want = nucleus(logits, 0.6, 0.95)
    n = 20_000
    uniform = torch.rand(n, dtype=torch.float64)
    got = torch.bincount(pick(logits.repeat(n, 1), uniform, SAMPLING), minlength=vocabulary)
    assert not got[want == 0].any()
    likely = want * n > 5
    expected = want[likely] / want[likely].sum() * got[likely].sum()
    assert stats.chisquare(got[likely], expected).pvalue > 1e-4


def test_pick_is_the_inverse_distribution_function() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    p = nucleus(logits[0], 1.0, 1.0)
    decoding = Decoding(1, 1.0, 1.0, 1, 0)
    edge = float(p[1])
    assert int(pick(logits, torch.tensor([edge - 1e-6]).double(), decoding)) == 1
    assert int(pick(logits, torch.tensor([edge + 1e-6]).double(), decoding)) == 2
    assert int(pick(logits, torch.tensor([0.0]).double(), decoding)) == 1
    assert int(pick(logits, torch.tensor([1 - 1e-12]).double(), decoding)) == 0
    narrow, last = Decoding(1, 1.0, 0.5, 1, 0), torch.tensor([1.0]).double()  # what a number below 1 may be rounded to
    assert int(pick(logits, last, narrow)) == 1, "the nucleus has one token"


def test_greedy_decoding_is_that_of_generate(tokenizer: PreTrainedTokenizerBase) -> None:
    model = TINY.load()
    rows = requests(tokenizer, attempts=1)
    got = decode(model, rows, GREEDY, stop_ids(model.generation_config, tokenizer))
    config = GenerationConfig(do_sample=False, max_new_tokens=80, eos_token_id=1, pad_token_id=2)
    for row, trace in zip(rows, got, strict=True):
        want = model.generate(torch.tensor([row.prompt_ids]), generation_config=config)[0, len(row.prompt_ids) :]
        assert list(trace.generated_ids) == want.tolist()
        assert trace.prompt_ids == row.prompt_ids


def test_traces_do_not_depend_on_the_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    model = TINY.load()
    rows = requests(tokenizer)
    traces = []
    for size in (1, 5, 64):
        found = [t for batch in HfSampler(size).sample(Loaded(model), tokenizer, rows, SAMPLING) for t in batch]
        traces.append({(t.problem_id, t.attempt): t.generated_ids for t in found})
    assert traces[0] == traces[1] == traces[2]


def test_seeds_and_attempts_differ(tokenizer: PreTrainedTokenizerBase) -> None:
    model = TINY.load()
    rows = requests(tokenizer, problems=8, attempts=2)
    hot, other = (Decoding(2, 1.5, 1.0, 60, seed) for seed in (0, 1))  # where each number matters
    a, b, c = (
        {
            (t.problem_id, t.attempt): t.generated_ids
            for t in decode(model, asked, d, stop_ids(model.generation_config, tokenizer))
        }
        for asked, d in ((rows, hot), (rows[::-1], hot), (rows, other))  # wherever in the batch a row is
    )
    assert a == b != c
    assert any(a[name, 0] != a[name, 1] for name, _ in a)


def test_stop_and_length_finish_reasons(tokenizer: PreTrainedTokenizerBase) -> None:
    model = TINY.load()
    rows = requests(tokenizer)
    whole = decode(model, rows, SAMPLING, stop_ids(model.generation_config, tokenizer))
    assert all((t.generated_ids[-1] == tokenizer.eos_token_id) == (t.finish == "stop") for t in whole)
    assert all(tokenizer.eos_token_id not in t.generated_ids[:-1] for t in whole)
    cut = decode(model, rows, Decoding(2, 0.6, 0.95, 4, 0), stop_ids(model.generation_config, tokenizer))
    assert all(t.finish == "length" and len(t.generated_ids) == 4 for t in cut)
    assert all(a.generated_ids[:4] == b.generated_ids for a, b in zip(whole, cut, strict=True))


def test_what_a_row_would_draw_beyond_its_cap_is_not_looked_at() -> None:
    """It stays in the batch until a tenth of all rows has ended, and here goes on to a token that would stop it."""
    model, greedy = random_model(), Decoding(1, 0.0, 1.0, 10, 0)
    alone = decode(model, [Request("a", 0, (5, 9))], replace(greedy, max_new_tokens=11), frozenset())[0].generated_ids
    stop = frozenset(alone[10:]) - {*alone[:10]}
    assert stop, "a token that it has not drawn before"
    rows = [Request(f"{n}", 0, (n,)) for n in range(10, 60)]
    first, *others = decode(model, [Request("a", 0, (5, 9), begun=alone[:9]), *rows], greedy, stop)
    assert (first.generated_ids, first.finish) == (alone[:10], "length")
    assert sum(len(trace.generated_ids) > 1 for trace in others) > 46, "the batch goes on as it is"


def test_a_prompt_beyond_the_context_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [Request("long", 0, tuple(range(100)))]
    with pytest.raises(ValueError, match=r"1 of 1 prompts.*of 128 tokens.*long with 100; type max_new_tokens=28"):
        list(HfSampler(2).sample(Loaded(random_model()), tokenizer, rows, Decoding(1, 0.6, 0.95, 60, 0)))


@pytest.mark.parametrize("damaged", [None, "cut", "flipped", "blank"])
def test_a_killed_run_samples_only_what_is_missing(
    damaged: str | None, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    problems = ArithmeticProblems((1,), 1, 6, 5).read("test")

    class Killed(Exception):
        pass

    class Dying:
        """Gives two batches, then dies."""

        runs_model = True

        def sample(self, model, tokenizer, requests, decoding):  # type: ignore[no-untyped-def]
            for n, batch in enumerate(HfSampler(4).sample(model, tokenizer, requests, decoding)):
                if n == 2:
                    raise Killed
                yield batch

    class Counting(Dying):
        """Counts what it is asked for."""

        asked = 0

        def sample(self, model, tokenizer, requests, decoding):  # type: ignore[no-untyped-def]
            self.asked += len(requests)
            yield from HfSampler(4).sample(model, tokenizer, requests, decoding)

    def prompt(question: str) -> tuple[int, ...]:
        return TINY.prompt_ids(tokenizer, question)

    with pytest.raises(Killed):
        sample(TINY, tokenizer, prompt, problems, Dying(), SAMPLING, tmp_path)
    assert not (tmp_path / "traces.parquet").exists()
    part = sorted((tmp_path / "parts").iterdir())[0]
    dropped = sum(len(trace.generated_ids) for trace in read_traces(part)) if damaged else 0
    content = bytearray(part.read_bytes())
    ids = pq.ParquetFile(part).metadata.row_group(0).column(3)
    place = ids.dictionary_page_offset + ids.total_compressed_size // 4
    if damaged == "flipped":
        content[place] ^= 1
    elif damaged == "blank":
        content[place : place + 64] = bytes(64)
    part.write_bytes(content[:100] if damaged == "cut" else content)
    second = Counting()
    got = sample(TINY, tokenizer, prompt, problems, second, SAMPLING, tmp_path)
    assert second.asked == 12 - 8 + 4 * bool(damaged)
    assert caplog.text.count("is damaged") == bool(damaged)
    other = tmp_path / "undisturbed"
    other.mkdir()
    assert got == sample(TINY, tokenizer, prompt, problems, HfSampler(4), SAMPLING, other)
    seconds, drawn = spent(tmp_path)
    assert seconds > 0 and drawn == sum(len(trace.generated_ids) for trace in got) + dropped
    again = sample(NEVER, tokenizer, prompt, problems, HfSampler(4), SAMPLING, tmp_path)  # killed while published
    assert again == got and spent(tmp_path) == (seconds, drawn)
    assert read_traces(tmp_path / "traces.parquet") == got


def test_a_kill_beside_the_notes_leaves_no_file_beside_the_traces(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = ArithmeticProblems((1,), 1, 1, 5).read("test")
    once = replace(SAMPLING, attempts=1)
    given = (TINY, tokenizer, lambda question: TINY.prompt_ids(tokenizer, question), problems, HfSampler(4), once)
    named = Path.replace

    def killed(file: Path, to: Path) -> Path:
        if to.name == "spent.json":
            raise KeyboardInterrupt
        return named(file, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            sample(*given, tmp_path)
    sample(*given, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["traces.parquet"]


@pytest.mark.parametrize("content", ["", "\0" * 9, "[3.5", "[3.5]", "null"])
def test_what_was_spent_stops_no_run(content: str, tmp_path: Path) -> None:
    """A host that went down may leave a file empty, and the traces beside it are worth more."""
    assert spent(tmp_path) == (0.0, 0)
    (tmp_path / "spent.json").write_text("[3.5, 7]")
    assert spent(tmp_path) == (3.5, 7)
    (tmp_path / "spent.json").write_text(content)
    assert spent(tmp_path) == (0.0, 0)


def test_a_part_that_cannot_be_read_now_is_kept(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk or a network that fails to read says nothing of what it holds, which cost hours."""
    (tmp_path / "parts").mkdir()
    part = tmp_path / "parts" / "one.parquet"
    write_traces(part, [Trace("a", 0, (1,), (2,), "stop", 0)])
    content = part.read_bytes()

    def fails(path: Path) -> list[Trace]:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(sampling, "read_traces", fails)
    with pytest.raises(OSError, match="Input/output"):
        sample(NEVER, tokenizer, lambda text: (1,), [], HfSampler(1), SAMPLING, tmp_path)
    assert part.read_bytes() == content


def saved(tmp_path: Path, suffix: str) -> tuple[Path, list[Trace]]:
    traces = [Trace(f"p{i}", a, (1, 2), (3, 4, i, a), "stop", 9, False) for i in range(3) for a in range(2)]
    file = tmp_path / f"traces{suffix}"
    if suffix == ".parquet":
        write_traces(file, traces)
    else:
        names = ("problem_id", "attempt", "prompt_ids", "generated_ids", "finish", "seed")
        file.write_text("\n".join(json.dumps({n: getattr(t, n) for n in names}) for t in traces))
    return file, traces


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_replay_gives_back_what_was_saved(suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file, traces = saved(tmp_path, suffix)
    rows = [Request(t.problem_id, t.attempt, (7,)) for t in traces]
    assert list(ReplaySampler(str(file)).sample(TINY, tokenizer, rows, SAMPLING)) == [traces]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"generated_ids": "text"}, "generated_ids is 'text'; give a list of token ids"),
     ({"generated_ids": ["a"]}, r'generated_ids is "\[\'a\'\]"; give a list'), ({"prompt_ids": [1.5]}, "prompt_ids is"),
     ({"attempt": "first"}, "attempt is 'first'; give a whole number")],
)  # fmt: skip
def test_a_replayed_row_that_is_no_trace_is_named(
    wrong: dict[str, Any], said: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    good = {"problem_id": "a", "attempt": 0, "generated_ids": [5], "finish": "stop"}
    file = tmp_path / "traces.jsonl"
    file.write_text("\ufeff" + json.dumps(good) + "\n\n" + json.dumps({**good, "attempt": 1, **wrong}))
    with pytest.raises(ValueError, match=rf"^traces.jsonl, row 3: {said}"):
        list(ReplaySampler(str(file)).sample(TINY, tokenizer, [Request("a", 0, (1,))], SAMPLING))


def test_replayed_traces_of_other_prompts_are_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    file, traces = saved(tmp_path, ".jsonl")
    same = [Request(t.problem_id, t.attempt, t.prompt_ids) for t in traces]
    list(ReplaySampler(str(file)).sample(TINY, tokenizer, same, SAMPLING))
    assert not caplog.records
    list(ReplaySampler(str(file)).sample(TINY, tokenizer, [replace(same[0], prompt_ids=(7,)), *same[1:]], SAMPLING))
    assert f"1 of {len(traces)} traces answer prompts that are not those of these problems now" in caplog.text


def test_replay_takes_saved_traces_whole_whatever_was_replayed_before(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Ours are not cut at the cap, neither when a part was replayed before."""
    ids = TINY.prompt_ids(tokenizer, "1+1?")
    traces = [Trace(f"p{i}", 0, ids, (5,) * 40, "stop", 0) for i in range(4)]
    write_traces(tmp_path / "saved.parquet", traces)
    problems: Any = SimpleNamespace(read=lambda split: [Problem(f"p{i}", "1+1?", "2", "test") for i in range(4)])
    for shard in ("1/2", None):
        x: Any = SimpleNamespace(model=TINY, shard=shard)
        how = (ReplaySampler(str(tmp_path / "saved.parquet")), Decoding(1, 0.6, 0.95, 8, 0), None)
        made, _ = Flow(x, Store(tmp_path / "store")).sampled("sample", problems, "calibration", *how)
    assert [(len(t.generated_ids), t.finish) for t in read_traces(made.path / "traces.parquet")] == [(40, "stop")] * 4


@pytest.mark.parametrize("changed", ["model", "sampler"])
def test_nothing_is_made_of_files_that_change_during_a_run(
    changed: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key says which files were read first: what is made of others must never lie under it."""
    shutil.copytree(TINY.files(), tmp_path / "model")
    ids = TINY.prompt_ids(tokenizer, "1+1?")
    write_traces(tmp_path / "saved.parquet", [Trace("p", 0, ids, (5,) * 4, "stop", 0)])
    problems: Any = SimpleNamespace(read=lambda split: [Problem("p", "1+1?", "2", "test")])
    x: Any = SimpleNamespace(model=Model("m", str(tmp_path / "model")), shard=None)
    flow = Flow(x, Store(tmp_path / "store"))
    how = (ReplaySampler(str(tmp_path / "saved.parquet")), Decoding(1, 0.6, 0.95, 8, 0), None)
    file = tmp_path / ("saved.parquet" if changed == "sampler" else "model/model.safetensors")

    def change(*_: object) -> None:
        content, stat = file.read_bytes(), file.stat()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    monkeypatch.setattr("ssgr.stages.sample.sample", change)
    with pytest.raises(ValueError, match=f"files of the {changed} changed since this run began"):
        flow.sampled("sample", problems, "calibration", *how)
    assert not [*(tmp_path / "store" / "sample").glob("*/")]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_an_attempt_that_is_saved_twice_is_refused(
    suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """As where two files were joined: the first would be lost, and nothing said."""
    file, _ = saved(tmp_path, ".jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file = tmp_path / f"twice{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([*rows, rows[1]]), file)
    else:
        file.write_text("\n".join(map(json.dumps, [*rows, rows[1]])))
    with pytest.raises(ValueError, match=rf"twice{suffix}: attempt 1 of p0 is there twice; give each once"):
        list(ReplaySampler(str(file)).sample(TINY, tokenizer, [Request("p0", 1, (1,))], SAMPLING))


def test_a_damaged_file_of_traces_is_told(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file, _ = saved(tmp_path, ".parquet")
    content = bytearray(file.read_bytes())
    content[4:60] = bytes(56)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^traces\.parquet is no Parquet file that can be read"):
        list(ReplaySampler(str(file)).sample(TINY, tokenizer, [Request("p0", 1, (1,))], SAMPLING))


def test_replay_names_the_first_missing_attempt(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file, _ = saved(tmp_path, ".jsonl")
    with pytest.raises(ValueError, match="lacks 1 of 1 traces, the first is attempt 5 of p0"):
        list(ReplaySampler(str(file)).sample(TINY, tokenizer, [Request("p0", 5, (1,))], SAMPLING))
    with pytest.raises(ValueError, match="no such file"):
        list(ReplaySampler("nowhere.jsonl").sample(TINY, tokenizer, [Request("p0", 5, (1,))], SAMPLING))


@pytest.mark.parametrize("bad", [{"attempts": 0}, {"top_p": 0.0}, {"temperature": -1.0}, {"max_new_tokens": 0}])
def test_bad_decoding_is_refused(bad: dict[str, float]) -> None:
    good = {"attempts": 1, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 5, "seed": 0}
    with pytest.raises(ValueError, match=r"at least 1|0 < top_p"):
        Decoding(**{**good, **bad})  # type: ignore[arg-type]


def test_replayed_traces_of_another_model_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"problem_id": "a", "attempt": 0, "generated_ids": [151643], "finish": "stop"}
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="outside the model's vocabulary of 512"):
        list(ReplaySampler(str(file)).sample(TINY, tokenizer, [Request("a", 0, (1,))], GREEDY))
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"t\.jsonl, row 1: a trace must be a JSON object"):
        list(ReplaySampler(str(file)).sample(TINY, tokenizer, [Request("a", 0, (1,))], GREEDY))


def test_a_line_of_traces_may_hold_any_sign(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"problem_id": "a", "attempt": 0, "generated_ids": [5], "finish": "stop", "text": "one\u2028two\x85three"}
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    ((trace,),) = ReplaySampler(str(file)).sample(TINY, tokenizer, [Request("a", 0, (1,))], GREEDY)
    assert trace.generated_ids == (5,)


def recipe(file: Path, traces: list[Trace], tokenizer: Any, kind: str) -> str:
    """The traces as the RAC recipe of `kind` writes them: in order, without the ids of problems."""
    rows: list[dict[str, Any]] = []
    for t in traces:
        if kind == "sglang":
            ids = [*t.prompt_ids, *t.generated_ids]
            counts = {"num_prompt_tokens": len(t.prompt_ids), "num_decode_tokens": len(t.generated_ids)}
            rows.append({"input_ids": ids, **counts, "text": tokenizer.decode(ids)})
        else:
            text = tokenizer.decode([i for i in t.generated_ids if i != tokenizer.eos_token_id])  # R1's tags stay
            counts = {"prompt_tokens": len(t.prompt_ids), "completion_tokens": len(t.generated_ids)}
            rows.append({"prompt": tokenizer.decode(list(t.prompt_ids)), "completion": text, **counts, "model": "tiny"})
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(file)


def test_a_prompt_of_a_recipe_that_is_no_text_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "user"}], "completion": "3", "completion_tokens": 2}))
    with pytest.raises(ValueError, match=r"^t.jsonl, row 1: prompt is .*; give a text"):
        list(ReplaySampler(str(file), allow_retokenise=True).sample(TINY, tokenizer, [], SAMPLING))


@pytest.mark.parametrize("kind", ["sglang", "deepspeed"])
def test_replay_reads_the_traces_of_the_rac_recipes(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    problems = ArithmeticProblems([1, 2, 3], calibration=6, test=1, seed=0).read("calibration")
    asked = [Request(p.id, a, TINY.prompt_ids(tokenizer, p.question)) for p in problems for a in range(2)]
    drawn = [t for some in HfSampler(8).sample(TINY, tokenizer, asked, SAMPLING) for t in some]
    by_name = {(t.problem_id, t.attempt): t for t in drawn}
    want = [by_name[r.problem_id, r.attempt] for r in asked]
    assert {t.finish for t in want} >= {"stop"} and len({t.prompt_ids for t in want}) == len(problems)
    file = recipe(tmp_path / "traces.jsonl", want, tokenizer, kind)
    if kind == "deepspeed":
        with pytest.raises(ValueError, match=r"holds text and no token ids: type sampler.engine.allow_retokenise=true"):
            next(ReplaySampler(file).sample(TINY, tokenizer, asked, SAMPLING))
    own = ReplaySampler(file, True, allow_retokenise=True)
    (got,) = own.sample(TINY, tokenizer, asked, SAMPLING)
    same = [(t.generated_ids, t.finish) == (w.generated_ids, w.finish) for t, w in zip(got, want, strict=True)]
    assert [t.prompt_ids for t in got] == [t.prompt_ids for t in want]
    if kind == "sglang":
        assert all(same)
    else:  # text: the model may have drawn other ids of the same text, and each of another number is counted
        assert [tokenizer.decode(t.generated_ids) for t in got] == [tokenizer.decode(t.generated_ids) for t in want]
        assert sum(same) >= len(same) // 2
        odd = [len(t.generated_ids) != len(w.generated_ids) for t, w in zip(got, want, strict=True)]
        assert ("other numbers of tokens" in caplog.text) == any(odd)
    more = [*asked, Request(problems[0].id, 2, asked[0].prompt_ids), Request("other", 0, (5, 6))]
    with pytest.raises(ValueError, match=r"lacks 2 of 14 traces, the first is attempt 2 of .*set model.system"):
        next(own.sample(TINY, tokenizer, more, SAMPLING))


def test_what_ends_a_trace_of_a_recipe_is_what_the_generation_config_names(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Not the tokenizer's own alone, which would be put behind it."""
    file = tmp_path / "traces.jsonl"
    file.write_text(json.dumps({"input_ids": [5, 6, 9, 7], "num_prompt_tokens": 2}))
    ends = Loaded(SimpleNamespace(generation_config=GenerationConfig(eos_token_id=[1, 7])))
    ((trace,),) = ReplaySampler(str(file)).sample(ends, tokenizer, [Request("a", 0, (5, 6))], SAMPLING)
    assert (trace.generated_ids, trace.finish) == ((9, 7), "stop")


def test_a_text_of_a_recipe_was_cut_if_as_many_tokens_were_drawn_as_might_be(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """However many its text is tokenised into: one that was cut is not made to end."""
    text, end = "So it is 7.", int(tokenizer.eos_token_id)
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    asked = [Request("a", 0, tuple(tokenizer.encode("1+6", add_special_tokens=False)))]
    for drawn, cap, want in (
        (len(ids) + 3, len(ids) + 3, (ids, "length")),
        (len(ids) + 1, len(ids) + 1, ((*ids, end), "stop")),  # the last was what ended it
        (len(ids) + 2, len(ids) + 3, ((*ids, end), "stop")),
        (len(ids) - 1, len(ids), (ids, "length")),  # no room is left for what ended it
    ):
        file = tmp_path / "traces.jsonl"
        file.write_text(json.dumps({"prompt": "1+6", "completion": text, "completion_tokens": str(drawn)}))
        ((trace,),) = ReplaySampler(str(file), allow_retokenise=True).sample(
            TINY, tokenizer, asked, replace(SAMPLING, max_new_tokens=cap)
        )
        assert (trace.generated_ids, trace.finish) == want, (drawn, cap)
