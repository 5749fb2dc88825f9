"""The model that ships: what it is, and that its recipe gives it."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ssgr import arithmetic
from ssgr.grader.exact import Exact
from ssgr.model.tiny import corpus, train
from ssgr.model.tiny.muon import Muon, orthogonalised
from ssgr.model.tiny.tokenizer import build
from ssgr.problems.arithmetic import ArithmeticProblems
from ssgr.records import Verdict
from ssgr.sampler import Decoding, Request
from ssgr.sampler.hf import HfSampler
from ssgr.stages.grade import grade
from tests.conftest import TINY

WEIGHTS = TINY.directory
assert WEIGHTS is not None


PLAN = (train.Phase(3, 1.0, 1.0, corpus.WIDE), train.Phase(1, 1.0, 0.0, corpus.SHORT))


def test_it_is_small_and_plain() -> None:
    assert WEIGHTS is not None
    assert sum(f.stat().st_size for f in WEIGHTS.iterdir()) < 8 * 2**20
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype="auto")
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.dtype == torch.bfloat16
    assert isinstance(AutoTokenizer.from_pretrained(WEIGHTS), PreTrainedTokenizerFast)
    card = (WEIGHTS / "MODEL_CARD.md").read_text()
    for word in ("Data", "Recipe", "Seed", "Hardware", "Cost", "Accuracy by level", "Limits"):
        assert word in card


def test_the_template_opens_the_thinking(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = TINY.prompt_ids(tokenizer, "What is 1+2?")
    assert tokenizer.decode(ids) == "<|bos|><|user|>What is 1+2?<|assistant|><think>\n"
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("text", ["12+7-3*2", "Check: 7*8=56, ok.", "naïve ☃ 😀\n\tx", "  two  spaces "])
def test_the_tokenizer_loses_nothing(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("128+64") == ["1", "2", "8", "+", "6", "4"]


def test_the_recipe_builds_the_shipped_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """The same ids on what the model reads, although AutoTokenizer takes the class of Qwen2 with its own splitting."""
    own, rng = build(), random.Random(9)
    assert own.get_vocab() == tokenizer.get_vocab()
    for question, answer in (corpus.document(rng) for _ in range(500)):
        assert own(f"{question}")["input_ids"] == tokenizer(f"{question}")["input_ids"]
        response = corpus.shown(answer)
        assert own(response)["input_ids"] == tokenizer(response)["input_ids"]


@pytest.mark.parametrize("style", corpus.STYLES)
def test_every_style_reasons_rightly(style: str) -> None:
    for seed in range(50):
        rng = random.Random(seed)
        problem = arithmetic.generate(4, "train", rng)
        text = corpus.think(problem.tree, rng, style)
        assert str(problem.answer) in text.splitlines()[-1]
        for a, op, b, c in ((s[1], s[0], s[2], s[3]) for s in arithmetic.steps(problem.tree)):
            assert f"{a}{op}{b}={c}" in text


def test_a_mistake_is_wrong_noticed_and_put_right() -> None:
    seen = 0
    for seed in range(200):
        rng = random.Random(seed)
        problem = arithmetic.generate(4, "train", rng)
        for line in corpus.think(problem.tree, rng, "doubting").splitlines():
            for mistake in corpus.MISTAKE.findall(line):
                seen += 1
                a, op, b = re.findall(r"^(\d+)([+*-])(\d+)=", line)[0]
                right = arithmetic.apply(op, int(a), int(b))
                assert int(mistake) != right and f" Wait, no: {a}{op}{b}={right}." in line
                assert f"{{{mistake}}}?" in line or re.search(r", not \d+\. Wait", line)
    assert seen > 100


def test_the_loss_is_on_the_response_without_its_mistakes() -> None:
    tok = build(300)
    response = "12+7={29}? Wait, no: 12+7=19.\n</think>\n19"
    ids, labels = train.encode(tok, "What is 12+7?", response)
    assert tok.decode(ids).endswith(f"<think>\n{corpus.shown(response)}<|eos|>")
    whole = tok(corpus.shown(response))["input_ids"]
    assert ids[-len(whole) - 1 : -1] == whole
    learnt = tok.decode([label for label in labels if label != train.IGNORE])
    assert learnt == "12+7=? Wait, no: 12+7=19.\n</think>\n19<|eos|>"


def test_it_never_trains_on_other_splits() -> None:
    asked = set()
    rng = random.Random(0)
    while len(asked) < 500:
        question, _ = corpus.document(rng)
        if question:
            asked.add(question)
    problems = ArithmeticProblems((1, 2, 3), 500, 500, 0)
    assert not asked & {p.question for split in ("calibration", "test") for p in problems.read(split)}  # type: ignore[arg-type]


def test_single_operations_are_those_of_the_middle_of_a_problem_and_of_train() -> None:
    rng = random.Random(0)
    drawn = [arithmetic.single(rng) for _ in range(2000)]
    assert {p.level for p in drawn} == {1} and {arithmetic.split_of(p.tree) for p in drawn} == {"train"}
    operands = [p.tree[1:] for p in drawn if isinstance(p.tree, tuple)]
    assert sum(max(pair) > 99 for pair in operands) > 1000  # type: ignore[type-var]
    assert all(0 <= p.answer <= arithmetic.MAX_VALUE for p in drawn)


def test_muon_steps_are_those_of_torch_up_to_its_rounding() -> None:
    """torch.optim.Muon orthogonalises in bfloat16."""
    torch.manual_seed(0)
    start, grads = torch.randn(48, 32), [torch.randn(48, 32) for _ in range(3)]
    ends = []
    for make in (Muon, torch.optim.Muon):
        p = torch.nn.Parameter(start.clone())
        settings = {} if make is Muon else {"weight_decay": 0.0}
        opt = make([p], lr=0.1, momentum=0.9, **settings)
        for grad in grads:
            p.grad = grad.clone()
            opt.step()
        ends.append(p.detach())
    assert float((ends[0] - ends[1]).norm()) < 0.02 * float((ends[1] - start).norm())
    values = torch.linalg.svdvals(orthogonalised(torch.randn(64, 24)))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3


def test_it_reasons(tokenizer: PreTrainedTokenizerBase) -> None:
    problems = ArithmeticProblems((1, 2, 3), 1, 96, 11).read("test")
    requests = [Request(p.id, 0, TINY.prompt_ids(tokenizer, p.question)) for p in problems]
    traces = [
        t for part in HfSampler(96).sample(TINY, tokenizer, requests, Decoding(1, 0.6, 0.95, 200, 0)) for t in part
    ]
    right = [g.verdict is Verdict.RIGHT for g in grade(traces, problems, tokenizer, Exact(), TINY.thinking)]
    assert sum(right) / len(right) > 0.8
    assert max(len(t.generated_ids) for t in traces) > 2.5 * min(len(t.generated_ids) for t in traces)


def test_training_is_deterministic_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps at once, and four steps in two runs, give the same bytes."""
    monkeypatch.setattr(train, "DOCUMENTS", 6)
    monkeypatch.setattr(train.tokenizer, "build", lambda: build(300))
    train.train(tmp_path / "whole", PLAN, seed=3, every=2)

    class Killed(Exception):
        pass

    batches = train.batches

    def dying(
        tok: PreTrainedTokenizerFast, seed: int, step: int, mix: corpus.Mix
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if step == 3:
            raise Killed
        return batches(tok, seed, step, mix)

    monkeypatch.setattr(train, "batches", dying)
    with pytest.raises(Killed):
        train.train(tmp_path / "parts", PLAN, seed=3, every=2)
    monkeypatch.setattr(train, "batches", batches)
    train.train(tmp_path / "parts", PLAN, seed=3, every=2)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert a == b
    with pytest.raises(SystemExit, match="is of another run"):
        train.train(tmp_path / "parts", PLAN, seed=4)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    train.train(tmp_path / "one", PLAN, seed=3)
    train.launch(tmp_path / "two", PLAN, seed=3, ranks=2)
    torch.manual_seed(3)
    start = train.Qwen2ForCausalLM(train.model_config(train.tokenizer.build())).model.embed_tokens.weight.detach()
    one, two = (
        torch.load(tmp_path / name / "train.pt", weights_only=True)["model"]["model.embed_tokens.weight"]
        for name in ("one", "two")
    )
    assert float((one - two).norm()) < 0.2 * float((one - start).norm())


def test_micro_batches_are_shared_evenly_and_once() -> None:
    micro = [(torch.zeros(n, 10), torch.zeros(n, 10)) for n in (5, 1, 4, 3, 3)]
    shares = [train.share(micro, rank, 2) for rank in range(2)]
    assert sorted(len(ids) for share in shares for ids, _ in share) == [1, 3, 3, 4, 5]
    assert [sum(len(ids) for ids, _ in share) for share in shares] == [8, 8]


def test_the_learning_rate_rises_stays_and_falls_to_nothing() -> None:
    rates = [rate for rate, _ in train.schedule(train.PHASES)]
    flat, fall = (phase.steps for phase in train.PHASES)
    assert len(rates) == flat + fall
    assert rates[: train.WARMUP_STEPS] == sorted(rates[: train.WARMUP_STEPS]) and 0 < rates[0] < 0.05
    assert set(rates[train.WARMUP_STEPS : flat]) == {1.0}
    assert rates[flat:] == sorted(rates[flat:], reverse=True) and 0 < rates[-1] < 0.002


def test_micro_batches_hold_whole_documents() -> None:
    tok = build(300)
    for ids_NT, labels_NT in train.batches(tok, 0, 0):
        assert ids_NT.shape == labels_NT.shape
        for ids, labels in zip(ids_NT.tolist(), labels_NT.tolist(), strict=True):
            assert ids[0] == tok.bos_token_id and ids.count(tok.eos_token_id) == 1
            after = ids.index(tok.eos_token_id) + 1
            assert set(ids[after:]) <= {tok.pad_token_id} and set(labels[after:]) <= {train.IGNORE}
