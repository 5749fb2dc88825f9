"""Where thinking ends and the answer begins, by token id, and the prompts that open it."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ssgr.grader.choice import Choice
from ssgr.grader.exact import Exact
from ssgr.grader.math import MathVerify
from ssgr.problems import Problem
from ssgr.records import Trace, Verdict
from ssgr.stages.evaluate import outcomes, score
from ssgr.stages.grade import grade
from ssgr.thinking import Part, Thinking
from tests.conftest import SHARED, TINY

TRACES = SHARED / "data" / "traces"
THINK, SKY = Thinking(), Thinking("<|begin_of_thought|>", "<|end_of_thought|>")
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def byte_tokenizer(*tags: str, bos: bool = False, template: str = CHATML) -> Any:
    """A byte-level BPE tokenizer of English, to which `tags` are single tokens."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    text = (Path(__file__).parent.parent / "README.md").read_text()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<|end|>", "<|bos|>"], initial_alphabet=alphabet)
    model.train_from_iterator([text, "</think>\n\n</think>\n\n<think>\n<think>\n" * 50], trainer)
    model.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    if bos:
        model.post_processor = processors.TemplateProcessing(
            "<|bos|> $A", special_tokens=[("<|bos|>", model.token_to_id("<|bos|>"))]
        )
    own = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>", bos_token="<|bos|>")
    own.chat_template = template
    return own


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_special_tokens_at_the_end_are_no_answer() -> None:
    """Gemma ends its turns with another token than the tokenizer's own; one that closes the thinking stays."""
    tokenizer = copy.deepcopy(byte_tokenizer("</think>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    other = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for end in ((other,), (other, tokenizer.eos_token_id), ()):
        assert THINK.part(tokenizer, (), (*ids(tokenizer, "so</think>Paris"), *end)).answer == "Paris"
        assert Thinking(None, None).part(tokenizer, (), (*ids(tokenizer, "Paris"), *end)).answer == "Paris"
    tokenizer = copy.deepcopy(tokenizer)  # what is special is looked up once a tokenizer
    tokenizer.add_tokens([AddedToken("</think>", special=True)], special_tokens=True)
    assert THINK.part(tokenizer, (), ids(tokenizer, "so</think>Paris</think>")).answer == ""
    assert THINK.part(tokenizer, (), (*ids(tokenizer, "so</think>"), other)).answer == ""


@pytest.mark.parametrize("tags", [("<think>", "</think>"), ()], ids=["one token", "several tokens"])
@pytest.mark.parametrize(
    ("prompt", "response", "answer"),
    [
        ("q<think>\n", "a</think>b", "b"),
        ("q<think>\n", "a</think>\n\nb", "\n\nb"),
        ("q", "<think>\na</think>b", "b"),
        ("q<think>\n", "a</think>b</think>c", "c"),
        ("q<think>\n", "a</think>", ""),
        ("q<think>\n", "no end", None),
        ("q", "<think>no end", None),
        ("q<think>\n\n</think>\n\n", "straight", "straight"),  # Qwen3 with enable_thinking=false
        ("q<think>\n\n</think>\n\n", "<think>again", None),
        ("q", "never began", "never began"),
        ("what does <think> mean </think>? q<think>\n", "no end", None),
        ("q<think>\n", "", None),
    ],
)
def test_the_answer_is_what_follows_the_last_end(
    tags: tuple[str, ...], prompt: str, response: str, answer: str | None
) -> None:
    tokenizer = byte_tokenizer(*tags)
    generated = (*ids(tokenizer, response), tokenizer.eos_token_id)
    part = THINK.part(tokenizer, ids(tokenizer, prompt), generated)
    assert part.answer == answer
    before = tokenizer.decode(generated[: part.tokens])
    if answer is None:
        assert part.tokens == len(generated)
        assert replace(THINK, required=False).part(tokenizer, ids(tokenizer, prompt), generated) == Part(0, response)
    elif "</think>" in response:
        shorter = tokenizer.decode(generated[: part.tokens - 1])
        assert before.count("</think>") == response.count("</think>") == shorter.count("</think>") + 1
    else:
        assert part.tokens == 0


def test_a_tag_written_out_in_other_tokens_is_none() -> None:
    tokenizer = byte_tokenizer("<think>", "</think>")
    plain = [*ids(tokenizer, "a </"), *ids(tokenizer, "think"), *ids(tokenizer, "> b")]
    assert tokenizer.decode(plain) == "a </think> b"
    prompt = ids(tokenizer, "q<think>\n")
    assert THINK.part(tokenizer, prompt, plain).answer is None
    assert THINK.part(tokenizer, prompt, [*plain, *ids(tokenizer, "</think> c")]).answer == " c"


def test_a_tag_is_not_the_unknown_token() -> None:
    """As which a tokenizer that has one gives whatever is no token of its own."""
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.unk_token = "<|bos|>"
    assert tokenizer.convert_tokens_to_ids("</think>") == tokenizer.bos_token_id
    assert THINK.part(tokenizer, (), ids(tokenizer, "a</think>b")).answer == "b"


def test_a_model_that_does_not_think() -> None:
    tokenizer = byte_tokenizer()
    assert Thinking(None, None).part(tokenizer, (), ids(tokenizer, "a</think>b")) == Part(0, "a</think>b")
    assert Thinking(None, None).part_of_text("a</think>b", True) == "a</think>b"
    with pytest.raises(ValueError, match=r"has no end: type model.thinking.end=TAG"):
        Thinking("<think>", None)


@pytest.mark.parametrize(
    ("text", "opened", "answer"),
    [("a</think>b", True, "b"), ("a", True, None), ("a", False, "a"), ("</think>", True, ""),
     ("<think>a", False, None), ("<think>a</think>b", False, "b")],
)  # fmt: skip
def test_text_of_which_the_prompt_is_not_known(text: str, opened: bool, answer: str | None) -> None:
    assert THINK.part_of_text(text, opened) == answer
    assert replace(THINK, required=False).part_of_text(text, opened) == (text if answer is None else answer)


@pytest.mark.skipif(not TRACES.is_dir(), reason="there is no ../shared/data/traces")
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("name", ["mip_math_r1style", "mip_gsm8k_r1style", "skyt1_aime24_multisample"])
def test_real_traces(name: str, single: bool) -> None:
    """R1 and its distills start inside the thinking; Sky-T1 writes its own tags; s1.1 and LIMO have none to split at."""
    thinking = SKY if name.startswith("sky") else THINK
    assert thinking.start and thinking.end
    tokenizer = byte_tokenizer(thinking.start, thinking.end) if single else byte_tokenizer()
    prompt = ids(tokenizer, "q" if thinking is SKY else "q<think>\n")
    counts: Counter[tuple[str, bool]] = Counter()
    lines = (TRACES / f"{name}.jsonl").read_text().split("\n")
    rows = [json.loads(line) for line in lines if line][:: 3 if thinking is THINK else 8]
    for row in rows:
        response = row["response"]
        generated = ids(tokenizer, response)
        part = thinking.part(tokenizer, prompt, generated)
        before, tag, after = response.rpartition(thinking.end)
        assert part.answer == (after if tag else None)
        counts[row["model"].split("-")[0], bool(tag)] += 1
        if tag and single:
            assert tokenizer.decode(generated[: part.tokens]) == before + tag
    closed, unclosed = (sum(n for (_, tag), n in counts.items() if tag is is_) for is_ in (True, False))
    assert closed > len(rows) / 4 and unclosed, counts


def test_an_unclosed_response_has_no_answer_and_is_counted() -> None:
    tokenizer = byte_tokenizer("<think>", "</think>")
    prompt = ids(tokenizer, "q<think>\n")
    said = ["a</think>7", "7", "<think>7 </think>8"]
    traces = [Trace("p", n, prompt, ids(tokenizer, text), "length", 0) for n, text in enumerate(said)]
    graded = grade(traces, [Problem("p", "q", "7")], tokenizer, Exact(), THINK)
    assert [g.verdict for g in graded] == [Verdict.RIGHT, Verdict.NO_ANSWER, Verdict.WRONG]
    assert [g.closed for g in graded] == [True, False, True]
    found = score("b", outcomes(graded), 1.0, 1)
    assert found.unclosed == found.no_answer == pytest.approx(1 / 3)


def test_golds_that_the_grader_cannot_read_are_named(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer("<think>", "</think>")
    prompt = ids(tokenizer, "q<think>\n")
    traces = [Trace(f"p{n}", 0, prompt, ids(tokenizer, "a</think>B"), "stop", 0) for n in range(8)]
    bad = [Problem(f"p{n}", "q", "blue") for n in range(7)]
    graded = grade(traces, [*bad, Problem("p7", "q", "B")], tokenizer, Choice(), THINK)
    assert [g.verdict for g in graded] == [Verdict.GRADER_FAILED] * 7 + [Verdict.RIGHT]
    assert "cannot read 7 of 8 gold answers" in caplog.text
    assert "p0, p1, p2, p3, p4, ... (p0: the gold answer 'blue' is no letter)" in caplog.text
    with pytest.raises(
        ValueError, match=r"can read none of the 7 gold answers \(p0: .*problems\.columns\.answer=COLUMN"
    ):
        grade(traces[:7], bad, tokenizer, Choice(), THINK)


def test_golds_are_looked_at_where_a_model_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """One answer on which the grader fails, among none, is no reason to stop: the other golds are good."""
    tokenizer = byte_tokenizer("<think>", "</think>")
    prompt = ids(tokenizer, "q<think>\n")
    traces = [
        Trace(name, 0, prompt, ids(tokenizer, text), "stop", 0) for name, text in (("a", "</think>7"), ("b", "hm"))
    ]
    golds = {"a": "\\frac{", "b": "7"}
    graded = grade(traces, [Problem(k, "q", v) for k, v in golds.items()], tokenizer, MathVerify(60, workers=1), THINK)
    assert [g.verdict for g in graded] == [Verdict.GRADER_FAILED, Verdict.NO_ANSWER]
    assert "cannot read 1 of 2 gold answers, and no answer to these problems counts as right: a (a: " in caplog.text
    with pytest.raises(ValueError, match="can read none of the 2 gold answers"):
        grade(traces, [Problem(k, "q", "\\frac{") for k in golds], tokenizer, MathVerify(60, workers=1), THINK)


def test_prompts_open_the_thinking_as_the_template_says() -> None:
    template = CHATML.replace(
        "<|assistant|>", "<|assistant|>{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    )
    tokenizer = byte_tokenizer("<think>", "</think>", template=template)
    thinks, straight = (
        replace(TINY, chat=chat).prompt_ids(tokenizer, "Q") for chat in ({"tools": []}, {"enable_thinking": False})
    )
    assert tokenizer.decode(thinks).endswith("<|assistant|>")
    assert tokenizer.decode(straight).endswith("</think>\n\n")
    answer = ids(tokenizer, "It is 7.")
    assert THINK.part(tokenizer, straight, answer) == Part(0, "It is 7.")


def test_one_bos_whatever_tokenizer_and_template_add() -> None:
    tokenizer = byte_tokenizer(bos=True, template="{{ bos_token }}" + CHATML)
    prompt = TINY.prompt_ids(tokenizer, "Q")
    assert tokenizer("Q")["input_ids"][0] == tokenizer.bos_token_id, "the tokenizer adds one by itself"
    assert prompt.count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id
    with pytest.raises(ValueError, match=r"begins with two <\|bos\|>"):
        TINY.prompt_ids(byte_tokenizer(template="{{ bos_token }}{{ bos_token }}" + CHATML), "Q")


def test_prompts_are_the_same_every_day() -> None:
    """Templates such as Llama 3.2's print the date: traces of two days would answer different prompts."""
    tokenizer = byte_tokenizer(template="{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert tokenizer.decode(TINY.prompt_ids(tokenizer, "Q")).startswith("01 Jan 2025")
    today = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    assert not str(today).startswith("01 Jan 2025")  # of others, and after it


@pytest.mark.parametrize(
    ("template", "right"),
    [
        (CHATML, True),
        (CHATML.replace("<|assistant|>", ""), False),
        ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
         "{% endif %}{% endfor %}", True),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", False),
        ("{{ messages[0].content }}", False),
    ],
    ids=["chatml", "no generation prompt", "mistral", "roles", "question only"],
)  # fmt: skip
def test_a_template_without_a_generation_prompt_is_refused(template: str, right: bool) -> None:
    tokenizer = byte_tokenizer(template=template)
    if right:
        assert TINY.prompt_ids(tokenizer, "Q")
        return
    with pytest.raises(ValueError, match=r"model=tiny: its chat template has no generation prompt"):
        TINY.prompt_ids(tokenizer, "Q")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('a system turn is needed') }}", "a system turn is needed"),
        ("{{ 'text' + 1 }}", "can only concatenate"),
    ],
)
def test_a_template_that_fails_is_told_of(template: str, why: str) -> None:
    tokenizer = TINY.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"its chat template refuses .*{why}.*; type model\.system=TEXT, or mend"):
        TINY.prompt_ids(tokenizer, "1 + 1?")
