"""Sources of calibration rows that need no traces."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from ssgr import keys
from ssgr.calib import Material
from ssgr.calib.rows import Corpus, RandomTokens, Written
from ssgr.difficulty import Difficulty
from ssgr.length import Length
from ssgr.records import Problem
from ssgr.select import Budget, Policy
from ssgr.text import Text
from tests.conftest import TINY
from tests.test_configs import build
from tests.test_thinking import byte_tokenizer

NO_FILTER = Policy(Difficulty("any", 0, 1, True, True), Length("any", "percentile", None, None))


def material(tokenizer: PreTrainedTokenizerBase, problem: Problem, prompt: str) -> Material:
    ids = tuple(tokenizer(prompt)["input_ids"])
    return Material(tokenizer, lambda question: ids, [problem], [], Budget(100, max_row_tokens=100), TINY.thinking)


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("1+2<think>\n", "3", "1+2=3.\n</think>\n3<|eos|>"),  # the template opens the thinking
        ("1+2", "3", "<think>\n1+2=3.\n</think>\n3<|eos|>"),  # the model does
        ("1+2<think>\n", "1+2=3.", "1+2=3.\n</think><|eos|>"),  # the answer is the whole solution, as in MATH
    ],
)
def test_a_written_solution_is_inside_the_thinking_once(
    prompt: str, answer: str, text: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    problem = Problem("a", "1+2", answer, "x", None, "1+2=3.")
    (row,) = Written("written", 0).candidates(material(tokenizer, problem, prompt), NO_FILTER).rows
    assert tokenizer.decode(list(row.ids[row.prompt_tokens :])) == text
    assert tokenizer.decode(list(row.ids[: row.prompt_tokens])) == prompt


def test_text_is_keyed_by_what_it_holds_and_how_it_is_read(tmp_path: Path) -> None:
    def key(name: str) -> str:
        return keys.digest(Corpus("corpus", 0, str(tmp_path / name), 64))

    line = json.dumps({"text": "one"})
    for name, content in (
        ("a.jsonl", line),
        ("b.jsonl", line),
        ("c.txt", line),
        ("d.jsonl", "{}"),
        ("e/f.jsonl", line),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert key("a.jsonl") == key("b.jsonl")
    assert len({key(name) for name in ("a.jsonl", "c.txt", "d.jsonl")}) == 3
    before = key("e")
    (tmp_path / "e" / "f.jsonl").write_text("{}")
    assert key("e") != before


def test_rows_are_no_text_whatever_their_file_is_called(tmp_path: Path) -> None:
    """The published codes take c4-train.00000-of-01024.json, which is JSONL."""
    documents = ["One.\n\nTwo.", "Three, 4."]
    rows = [{"text": text, "url": "a"} for text in documents]
    (tmp_path / "c4.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c4.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "array.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c4.parquet")
    with open(tmp_path / "c4.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "url"), *(row.values() for row in rows)])
    texts = [Text(str(one), "calib.text") for one in tmp_path.iterdir()]
    assert len(texts) == 5 and all(list(text.documents(0)) == documents for text in texts)
    assert {text.whole(1) for text in texts} == {"\n\n".join(documents)}


def test_a_bad_line_of_text_is_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nnot JSON\n')
    problem = Problem("a", "1+2", "3", "x", None, None)
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: not JSON"):
        Corpus("corpus", 0, str(tmp_path / "a.jsonl"), 64).candidates(material(tokenizer, problem, "1"), NO_FILTER)


def test_lines_are_joined_to_running_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    lines = [f"The baker walked to mill {i}." for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    given = material(tokenizer, Problem("a", "1+2", "3", "x", None, None), "1")
    apart, joined = (Corpus("own", 0, str(tmp_path / "a.jsonl"), 20, joined=how) for how in (False, True))
    text = "".join(tokenizer.decode(list(row.ids)) for row in joined.candidates(given, NO_FILTER).rows)
    assert len(text) > 400 and ("\n\n".join(lines) + tokenizer.eos_token).startswith(text)
    assert any(tokenizer.eos_token_id in row.ids for row in apart.candidates(given, NO_FILTER).rows)
    assert keys.digest(apart) != keys.digest(joined)


@pytest.mark.parametrize("begins", [False, True])
def test_documents_begin_as_the_tokenizer_begins_a_text(begins: bool, tmp_path: Path) -> None:
    own, lines = byte_tokenizer(bos=begins), [f"The baker walked to mill {i}." for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    given = material(own, Problem("a", "1+2", "3", "x", None, None), "1")
    rows = Corpus("own", 0, str(tmp_path / "a.jsonl"), 20).candidates(given, NO_FILTER).rows
    found = [i for row in rows for i in row.ids]
    want = [i for line in lines for i in (*own(line)["input_ids"], own.eos_token_id)]
    assert len(found) > 100 and found == want[: len(found)] and (own.bos_token_id in found) == begins


def test_a_budget_of_rows_makes_windows_of_their_own_length(tokenizer: PreTrainedTokenizerBase) -> None:
    """Not of the longest row that is taken: 128 rows of C4 were drawn from 35,000 of them."""
    budget = Budget(None, 3, max_row_tokens=1000)
    given = Material(tokenizer, lambda question: (), [], [], budget, TINY.thinking)
    text, noise = (
        one.candidates(given, NO_FILTER).rows for one in (Corpus("a", 0, "prose", 20), RandomTokens("b", 0, 20))
    )
    assert 12 <= len(text) < 30 and len(noise) == 8


def test_wikitext_is_running_text() -> None:
    calib = {name: build(f"calib={name}").calib for name in ("corpus", "c4", "wikitext")}
    assert [name for name, one in calib.items() if isinstance(one, Corpus) and one.joined] == ["wikitext"]
