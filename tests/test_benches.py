"""Benchmarks: each YAML builds, and reads a file with the columns of its dataset as the dataset itself would be read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import hydra
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssgr.problems.table import Columns, HubProblems, Together
from ssgr.stages.evaluate import Bench
from tests.conftest import SHARED

ROOT = Path(__file__).parents[1]
ROWS: dict[str, tuple[dict[str, Any], str]] = {  # a row as the dataset has it, and the gold answer that is read
    "gsm8k": ({"question": "How many?", "answer": "2+3=<<2+3=5>>5\n#### 5"}, "5"),
    "math500": ({"problem": "Find $x$.", "answer": "\\frac{1}{2}", "level": 3, "unique_id": "test/a/1.json"}, "\\frac{1}{2}"),
    "aime24": ({"id": 60, "problem": "Find $n$.", "answer": "204"}, "204"),
    "aime25": ({"id": "0", "problem": "Find $n$.", "answer": "70"}, "70"),
    "aime120": ({"id": 0, "problem": "Find $n$.", "answer": "116"}, "116"),
    "amc23": ({"id": 0, "question": "Find $n$.", "answer": 27.0}, "27.0"),
    "minerva_math": ({"question": "How far?", "answer": "1.6"}, "1.6"),
    "olympiadbench": ({"question": "Find $n$.", "final_answer": ["$2$", "$3$"]}, "$2$, $3$"),
    "svamp": ({"question_concat": "How many?", "Answer": "8"}, "8"),
    "gpqa_diamond": (
        {"Question": "Which?", "Correct Answer": "right\n", "Incorrect Answer 1": "no", "Incorrect Answer 2": "nor this",
         "Incorrect Answer 3": "never"}, "letter",
    ),
    "mmlu": ({"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2}, "C"),
}  # fmt: skip


def bench(name: str, *overrides: str) -> Bench:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("config", [f"bench={name}", *overrides])
        made = hydra.utils.instantiate(cfg.bench, _convert_="all")
    assert isinstance(made, Bench)
    return made


def write(path: Path, row: dict[str, Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)
    else:
        path.write_text(json.dumps(row))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize("name", ROWS)
def test_each_reads_a_file_with_its_columns(name: str, suffix: str, tmp_path: Path) -> None:
    row, gold = ROWS[name]
    if suffix == ".csv" and any(isinstance(value, list) for value in row.values()):
        pytest.skip("CSV has no lists")
    file = write(tmp_path / f"rows{suffix}", row)
    made = bench(name, f"bench.problems.file={file}")
    assert made.name == name and made.grader is not None and made.problems is not None
    assert made.decoding.temperature == 0.6 and made.decoding.top_p == 0.95
    (problem,) = made.problems.read("test")
    if name == "gpqa_diamond":
        shown = dict(line.split(". ") for line in problem.question.splitlines() if line[1:3] == ". ")
        assert shown[problem.answer] == "right" and sorted(shown.values()) == ["never", "no", "nor this", "right"]
    else:
        assert problem.answer == gold if suffix != ".csv" else problem.answer.rstrip(".0") == gold.rstrip(".0")
    assert "\\boxed{}" in problem.question and problem.question.startswith(str(row.get("question", ""))[:5])
    if suffix == ".jsonl":  # a grader starts a process
        right = made.grader.grade([(problem.answer, f"<think>hm</think>\\boxed{{{problem.answer}}}")])[0]
        assert right.verdict == "right", right


def test_datasets_are_one_benchmark_together(tmp_path: Path) -> None:
    parts = {}
    for name, count in (("a", 2), ("b", 1)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps({"problem": f"{name}{i}?", "answer": i, "id": i}) for i in range(count)))
        parts[name] = HubProblems(name, Columns(answer="answer", id="id"), file=str(file))
    assert [(p.id, p.question) for p in Together(parts).read("test")] == [
        ("a/0", "a0?"),
        ("a/1", "a1?"),
        ("b/0", "b0?"),
    ]
    assert len(Together(parts, limit=2).read("test")) == 2
    assert len(Together(parts, parts["a"].file, limit=1).read("test")) == 1
    grader = bench("aime120").grader
    assert grader is not None
    assert [g.verdict for g in grader.grade([("077", "\\boxed{77}"), ("077", "\\boxed{7}")])] == ["right", "wrong"]


def test_every_dataset_of_the_hub_is_pinned() -> None:
    for name in ROWS:
        problems = bench(name).problems
        for one in problems.parts.values() if isinstance(problems, Together) else [problems]:
            assert isinstance(one, HubProblems) and len(one.revision or "") == 40, name


def test_options_are_shuffled_by_seed_and_problem() -> None:
    names = ["r", "x", "y", "z"]
    columns = [Columns("q", choices=names, shuffle=seed) for seed in (0, 0, 1)]
    shown = [
        [c.problem({"q": f"{i}?", "r": "right", "x": "1", "y": "2", "z": "3"}, i, "s") for i in range(60)]
        for c in columns
    ]
    assert all(f"\n{one.answer}. right" in one.question for some in shown for one in some)
    drawn = [[one.answer for one in some] for some in shown]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == set("ABCD") and max(map(drawn[0].count, "ABCD")) < 30
    plain = Columns("q", choices=names).problem({"q": "?", "r": "right", "x": "1", "y": "2", "z": "3"}, 1, "s")
    assert plain.answer == "A" and plain.question == "?\n\nA. right\nB. 1\nC. 2\nD. 3"


@pytest.mark.parametrize(
    ("row", "said"),
    [({"q": "?", "c": ["a", "b"], "answer": "C"}, "none of them"), ({"q": "?", "c": ["a", "b"], "answer": "ab"}, "none of them"),
     ({"q": "?", "c": [], "answer": 0}, "0 choices"), ({"q": "?", "c": ["a"], "answer": 0}, "1 choices"),
     ({"q": "?", "c": ["a", "b"], "answer": None}, "no answer in column 'answer'"), ({"c": ["a"], "answer": 0}, "no question"),
     ({"q": "?", "c": ["a", None], "answer": 0}, r"row 7: choices in column 'c' are no list of texts but \['a', None\]"),
     ({"q": "?", "c": [["a"], ["b"]], "answer": 0}, r"row 7: .* are no list of texts but \[\['a'\], \['b'\]\]"),
     ({"q": "?", "c": "['0', '4']", "answer": 1}, r"row 7: choices in column 'c' are no list of .*; its columns are q, c"),
     ({"q": "?", "answer": 1}, "are no list of texts but None"),
     ({"q": "?", "c": [{"text": "a"}, {"text": "b"}], "answer": 1}, "are no list of texts"),
     ({"q": "?", "c": {"text": ["a", "b"], "label": ["X", "Y"]}, "answer": "A"}, "none of them")],
)  # fmt: skip
def test_bad_choices_are_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Columns("q", choices="c").problem(row, 7, "s")
    with pytest.raises(ValueError, match=r"it has no \{question\}"):
        Columns(prompt="hello")


def test_options_in_columns_of_their_own_may_be_zero_or_lacking_but_for_the_right_one() -> None:
    columns = Columns("q", choices=["r", "x", "y", "z"])
    zero = columns.problem({"q": "?", "r": 0, "x": 1, "y": None, "z": " "}, 1, "s")
    assert (zero.answer, zero.question) == ("A", "?\n\nA. 0\nB. 1")
    with pytest.raises(ValueError, match=r"s, row 3: the right option, in column \['r'\], is empty"):
        columns.problem({"q": "?", "r": "", "x": "1", "y": "2", "z": "3"}, 3, "s")


def test_options_with_labels_are_read_as_in_arc() -> None:
    options: dict[str, list[Any]] = {"text": ["ice", "fire", "sand"], "label": ["1", "2", "3"]}
    read = Columns("question", "answerKey", choices="choices").problem(
        {"question": "What burns?", "choices": options, "answerKey": "2"}, 1, "s"
    )
    assert (read.answer, read.question) == ("B", "What burns?\n\nA. ice\nB. fire\nC. sand")
    options["label"] = [1, 2, 3]
    assert Columns("q", "a", choices="c").problem({"q": "?", "c": options, "a": 2}, 1, "s").answer == "B"
    options["label"] = ["A", "B", "C"]
    assert Columns("q", "a", choices="c").problem({"q": "?", "c": options, "a": "C"}, 1, "s").answer == "C"


@pytest.mark.skipif(not SHARED.exists(), reason="the collected problems (shared/data) are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "file", "count", "columns"),
    [("gsm8k", "gsm8k_test", 1319, ["question=problem", "answer_after=null"]), ("math500", "math500", 500, ["id=id"]),
     ("aime24", "aime24", 30, []), ("aime25", "aime25", 30, []), ("minerva_math", "minerva_math", 272, ["question=problem"]),
     ("olympiadbench", "olympiadbench_math_en", 675, ["question=problem", "answer=answer"]),
     ("mmlu", "general/mmlu_validation", 1531, ["question=problem"])],
)  # fmt: skip
def test_real_sets_are_read_whole(name: str, file: str, count: int, columns: list[str]) -> None:
    path = SHARED / "data" / "problems" / f"{file}.jsonl"
    over = [f"bench.problems.columns.{one}" for one in columns]
    made = bench(name, f"bench.problems.file={path}", *over)
    assert isinstance(made.problems, HubProblems)
    read = made.problems.read("test")
    assert len(read) == count and all(problem.answer for problem in read)
