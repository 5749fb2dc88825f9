"""Problems: generated ones with disjoint splits, and tables with a column mapping."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssgr import arithmetic, prose
from ssgr.problems import checked
from ssgr.problems.arithmetic import ArithmeticProblems
from ssgr.problems.table import Columns, HubProblems, JsonlProblems, Together
from ssgr.records import Problem
from ssgr.text import Text
from tests.conftest import SHARED

LEVELS = (1, 2, 3, 4, 5, 6, 7, 8)


def test_splits_are_disjoint_by_construction() -> None:
    """Whatever the seed, a problem is in one split only, also with its commutative operands exchanged."""
    seen: dict[str, set[object]] = {split: set() for split in arithmetic.SPLITS}
    for split in arithmetic.SPLITS:
        for seed in range(3):
            rng = random.Random(seed)
            seen[split] |= {arithmetic._canonical(arithmetic.generate(1 + i % 3, split, rng).tree) for i in range(600)}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["calibration"]
    assert not seen["calibration"] & seen["test"]
    assert arithmetic.split_of(("+", 12, ("*", 3, 7))) == arithmetic.split_of(("+", ("*", 7, 3), 12))


def test_questions_of_the_two_splits_differ() -> None:
    problems = ArithmeticProblems(LEVELS, 512, 256, 0)
    calibration, test = problems.read("calibration"), problems.read("test")
    assert not {p.question for p in calibration} & {p.question for p in test}
    assert len({p.question for p in test}) == 256
    assert problems.read("test") == test != ArithmeticProblems(LEVELS, 512, 256, 1).read("test")


@pytest.mark.parametrize("level", LEVELS)
def test_expressions_have_their_answer_and_level(level: int) -> None:
    for problem in (arithmetic.generate(level, "train", random.Random(i)) for i in range(50)):
        assert problem.level == level
        assert eval(arithmetic.text(problem.tree)) == problem.answer == arithmetic.value(problem.tree)
        if expression := re.search(r"(?:Compute|What is|value of) ([\d+*()-]+)[.?]$", problem.question):
            assert eval(expression[1]) == problem.answer
        assert 0 <= problem.answer <= arithmetic.MAX_VALUE


def test_steps_reduce_the_expression_to_its_value() -> None:
    for i in range(100):
        tree = arithmetic.generate(6, "train", random.Random(i)).tree
        steps = arithmetic.steps(tree)
        assert len(steps) == 6
        assert all(eval(rest) == arithmetic.value(tree) for *_, rest in steps)
        assert all(arithmetic.apply(op, a, b) == c for op, a, b, c, _ in steps)


def test_stories_tell_the_operations_in_order() -> None:
    tree = ("*", ("-", ("+", 10, 5), 3), 4)
    story = arithmetic._story(tree, random.Random(0))
    assert [int(n) for n in re.findall(r"\d+", story)] == [10, 5, 3, 4]


@pytest.mark.parametrize(
    ("written", "level"), [("3", 3), (3.0, 3), ("Level 5", 5), ("12", 12), ("?", None), (None, None)]
)
def test_a_level_is_the_first_number(written: object, level: int | None) -> None:
    row = {"q": "What is 1+1?", "a": "2", "l": written}
    assert Columns(question="q", answer="a", level="l").problem(row, 1, "here").level == level


def test_bad_levels_and_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="valid levels are 1 to 8"):
        ArithmeticProblems((9,), 1, 1, 0).read("test")
    with pytest.raises(ValueError, match=r"problems\.test=5000: level 1 has no more than about"):
        ArithmeticProblems((1,), 1, 5000, 0).read("test")
    with pytest.raises(ValueError, match="at least one"):
        ArithmeticProblems((), 1, 1, 0)


def test_prose_has_no_numbers() -> None:
    rng = random.Random(0)
    text = " ".join(prose.paragraph(rng) for _ in range(100))
    assert not re.search(r"[\d+*=]", text)


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_jsonl_with_a_column_mapping(tmp_path: Path) -> None:
    file = write(
        tmp_path / "x.jsonl", [{"q": f"question {i}", "a": f"so #### {i}", "lvl": "Level 3"} for i in range(40)]
    )
    problems = JsonlProblems(str(file), Columns(question="q", answer="a", level="lvl", answer_after="####"))
    calibration, test = problems.read("calibration"), problems.read("test")
    assert len(calibration) + len(test) == 40 and test
    assert {p.id for p in calibration}.isdisjoint(p.id for p in test)
    assert {p.answer for p in calibration + test} == {str(i) for i in range(40)}
    assert {p.level for p in test} == {3}


def test_jsonl_with_a_test_file(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"problem": "1+1", "answer": "2"}])
    test = write(tmp_path / "b.jsonl", [{"problem": "1+2", "answer": "3"}])
    problems = JsonlProblems(str(train), Columns(), str(test))
    assert [p.answer for p in problems.read("calibration")] == ["2"]
    assert [p.answer for p in problems.read("test")] == ["3"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"problem": "x"},
            r"row 2: no answer in column 'answer'; its columns are problem\. Type problems\.columns\.answer=",
        ),
        ({"answer": "x"}, "row 2: no question in column 'problem'"),
        ({"problem": "x", "answer": "  "}, "row 2: no answer in column 'answer'"),
        ({"problem": "x", "answer": []}, "row 2: no answer in column 'answer'"),
        ({"problem": "x", "answer": float("nan")}, "row 2: no answer in column 'answer'"),
        (
            {"problem": [{"role": "user", "content": "1+1?"}], "answer": "2"},
            r"row 2: no question in column 'problem', which holds no text but \[.*1\+1.*; its columns are problem, answer\. Type",
        ),
        (
            {"problem": "x", "answer": {"style": "rule"}},
            r"row 2: no answer in column 'answer', which holds no text but .*rule",
        ),
        ({"problem": "x", "answer": [["2"]]}, r"row 2: no answer in column 'answer', which holds no text but"),
        ({"problem": "x", "answer": ["2", None]}, r"row 2: no answer in column 'answer', which holds no text but"),
        ({"problem": "x", "answer": "work #### "}, "row 2: no answer in column 'answer'"),
        ("{oops", "row 2: not JSON"),
        ("[1]", "row 2: a row must be a JSON object"),
    ],
)
def test_a_bad_row_is_named(row: object, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [{"problem": "1+1", "answer": "2"}, row])
    with pytest.raises(ValueError, match=message):
        JsonlProblems(str(file), Columns(answer_after="####")).read("calibration")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"problem": "caf\xe9", "answer": "2"}',
            r"x\.jsonl, row 2: not UTF-8 .* at byte 17\); save the file as UTF-8",
        ),
        (b'{"a":' * 20_000, r"x\.jsonl, row 2: its JSON is nested too deeply"),
        (b'{"problem": "x"', r"x\.jsonl, row 2: not JSON"),
    ],
    ids=["Latin-1", "deep", "cut"],
)
def test_a_line_that_cannot_be_read_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"problem": "1+1", "answer": "2"}\n' + line)
    with pytest.raises(ValueError, match=message):
        JsonlProblems(str(tmp_path / "x.jsonl"), Columns()).read("calibration")
    with pytest.raises(ValueError, match=message):
        list(Text(str(tmp_path / "x.jsonl"), "calib.text", "problem").documents(0))


def test_numbers_are_read_as_they_were_written(tmp_path: Path) -> None:
    golds = ["9" * 5000, "0.12345678901234567890", "1e400", "-7"]
    (tmp_path / "x.jsonl").write_text(
        "\n".join(f'{{"problem": "{n}", "answer": {gold}}}' for n, gold in enumerate(golds))
    )
    path = str(tmp_path / "x.jsonl")
    assert [p.answer for p in JsonlProblems(path, Columns(), path).read("test")] == golds


@pytest.mark.parametrize("limit", [-1, 0, 2.5])
def test_a_limit_that_limits_nothing_is_refused(limit: Any) -> None:
    for make in (
        lambda: JsonlProblems("x.jsonl", Columns(), limit=limit),
        lambda: HubProblems("x", Columns(), limit=limit),
        lambda: Together({}, limit=limit),
    ):
        with pytest.raises(ValueError, match=rf"problems\.limit={limit}: give a whole number, 1 or more, or null"):
            make()


@pytest.mark.filterwarnings("ignore")
def test_an_error_without_a_message_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("datasets.load_dataset", late)
    monkeypatch.setattr("datasets.load_dataset_builder", late)
    with pytest.raises(ValueError, match=r"cannot be loaded: TimeoutError"):
        HubProblems("a/b", Columns()).read("test")
    settings = r"calib\.subset=None calib\.split=train calib\.revision=abc"
    with pytest.raises(
        ValueError, match=rf"calib\.text=a/b is neither a file .* {settings} \(TimeoutError\); type those of"
    ):
        list(Text("a/b", "calib.text", revision="abc").documents(0))


def test_a_text_without_its_column_is_told_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"title": "One", "body": "Two."}])
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows.to_iterable_dataset())
    with pytest.raises(
        ValueError, match=r"^bench\.column=text: a/b has no such column; its columns are title, body\. Type bench\.col"
    ):
        Text("a/b", "bench.text").whole(1)
    with pytest.raises(
        ValueError, match=r"^calib\.column=text: a/b has no such column; its columns are title, body\. Type"
    ):
        list(Text("a/b", "calib.text").documents(0))
    assert list(Text("a/b", "calib.text", "body").documents(0)) == ["Two."]


def test_empty_rows_are_part_of_a_whole_text_and_no_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the published codes join WikiText, of which every other line is empty."""
    texts = [" = A = ", "", "One.", None, "Two."]
    rows = datasets.Dataset.from_list([{"text": text} for text in texts])
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows.to_iterable_dataset())
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for name in ("a/b", str(tmp_path / "a.jsonl")):
        text = Text(name, "bench.text")
        assert text.whole(1) == " = A = \n\n\n\nOne.\n\n\n\nTwo."
        assert sorted(text.documents(0)) == [" = A = ", "One.", "Two."]


def test_a_missing_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no such file; type problems\.path"):
        JsonlProblems("nowhere.jsonl", Columns()).read("test")
    one = write(tmp_path / "x.jsonl", [{"problem": "1+1", "answer": "2"}])
    with pytest.raises(ValueError, match=r"no problems: of its rows one in 10 .* type problems.test_path=FILE"):
        JsonlProblems(str(one), Columns()).read("test")


def test_a_column_that_no_row_has_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"problem": "1+1", "answer": "2", "name": "a"}, {"problem": "1+2", "answer": "3"}]
    file = write(tmp_path / "x.jsonl", rows)
    wrong = HubProblems(".", Columns(id="nam", level="lvl", solution="proof"), file=str(file))
    assert [[p.id for p in wrong.read("test")] for _ in range(2)] == [["row/1", "row/2"]] * 2
    assert [re.sub(r":.* has its", " lacks its", line) for line in caplog.messages] == [
        f"columns.{role}={column} lacks its {role} there; type another column, or null"
        for role, column in (("id", "nam"), ("level", "lvl"), ("solution", "proof"))
    ]
    caplog.clear()
    JsonlProblems(str(file), Columns(id="name"), str(file)).read("test")
    assert not caplog.messages, "rows may lack single values"
    choices = [{"problem": f"q{i}", "a": "1", "b": "2", "c": "3" if i else ""} for i in range(2)]
    columns = Columns(choices=["a", "b", "c", "typo"])
    JsonlProblems(str(write(file, choices)), columns, str(file)).read("test")
    assert [line.split(";")[0] for line in caplog.messages] == [
        "columns.choices has typo: no row of x.jsonl has a choice there"
    ]


def test_double_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^here: .*'a' is given twice; .* type problems.columns.id=null"):
        checked([Problem("a", "1", "1"), Problem("a", "2", "2")], "here,")


@pytest.mark.filterwarnings("ignore")
def test_hub_reads_a_local_dataset_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"question": f"q{i}", "answer": f"work #### {i}"} for i in range(30)])
    columns = Columns("question", "answer", solution="answer", answer_after="####")
    problems = HubProblems(str(tmp_path), columns)
    both = problems.read("calibration") + problems.read("test")
    assert {p.answer for p in both} == {str(i) for i in range(30)}
    assert both[0].solution is not None and both[0].solution.startswith("work")


GOLDS = ["2020-01-02", "007", "123456789012345678901234567890", "0.50", "1,000", "true", "null", "two\nlines", "4"]


def write_table(path: Path, columns: dict[str, list[str]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    elif path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text(json.dumps(rows, indent=1) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_of_any_kind_is_a_pool_and_no_answer_is_changed(suffix: str, tmp_path: Path) -> None:
    file = str(write_table(tmp_path / f"train{suffix}", {"q": [f"q{i}" for i in range(len(GOLDS))], "a": GOLDS}))
    columns = Columns("q", "a")
    ways = (
        JsonlProblems(file, columns),
        HubProblems(file, columns),
        HubProblems(file, columns, test_split="test"),  # of a file it is one row in ten, too
        HubProblems(str(tmp_path), columns),
    )
    read = [[[(p.id, p.answer) for p in way.read(split)] for split in ("calibration", "test")] for way in ways]
    assert sorted(read[0][0] + read[0][1]) == [(f"row/{n}", gold) for n, gold in enumerate(GOLDS, 1)]
    assert all(one == read[0] for one in read)
    whole = [JsonlProblems("-", columns, file), HubProblems("-", columns, file=file)]
    assert [[p.answer for p in way.read("test")] for way in whole] == [GOLDS, GOLDS]


@pytest.mark.parametrize("content", ['[{"problem": "1", "answer": 0.50}]', '{"problem": "1", "answer": 0.50}\n'])
def test_a_json_file_is_an_array_or_lines_and_its_numbers_stay_as_written(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(f"\ufeff\n{content}")
    assert [p.answer for p in JsonlProblems("-", Columns(), str(tmp_path / "x.json")).read("test")] == ["0.50"]


def test_a_folder_of_several_files_numbers_its_rows_through(tmp_path: Path) -> None:
    for part in (0, 1, 2):
        questions = [f"{part}{i}" for i in range(20)]
        write_table(tmp_path / f"train-0000{part}-of-00003.csv", {"problem": questions, "answer": ["007"] * 20})
    both = [p for split in ("calibration", "test") for p in HubProblems(str(tmp_path), Columns()).read(split)]
    assert {p.id for p in both} == {f"row/{n}" for n in range(1, 61)} and {p.answer for p in both} == {"007"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"problem,answer\n1+1,2\n1,000+1,1001\n", r"^x\.csv, row 2: more cells than columns"),
        ("x.csv", b'problem,answer\n1+1,2\n"1+2,3\n', r"^x\.csv, row 2: not CSV \(unexpected end of data\)"),
        ("x.csv", b"problem,answer\n1+1,\n", r"^x\.csv, row 1: no answer in column 'answer'"),
        ("x.csv", b"", "holds no problems"),
        ("x.parquet", b"oops", r"^x\.parquet is no Parquet file that can be read"),
        ("x.json", b'[{"problem": "1+1", "answer": "2"},\n{oops]', r"^x\.json: not JSON .* at line 2, column 2"),
        ("x.json", b'[{"problem": "1+1", "answer": "2"},\n3]', r"^x\.json, row 2: a row must be a JSON object"),
        ("x.json", b'{"rows": []}', r"^x\.json, row 1: no question in column 'problem'; its columns are rows"),
        ("x.jsonl", b'{"problem": "1+1", "answer": "2"}\n{oops', r"^x\.jsonl, row 2: not JSON"),
        (
            "x.jsonl",
            b'{"problem": "1+1", "answer": "2"}\n{"problem": "1+1"}',
            r"^x\.jsonl, row 2: no answer in column 'answer'",
        ),
        ("x.jsonl", b"", "holds no problems"),
    ],
)
def test_a_bad_file_and_its_row_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    for way in (JsonlProblems("-", Columns(), str(file)), HubProblems("a/b", Columns(), file=str(file))):
        with pytest.raises(ValueError, match=message):
            way.read("test")
    with pytest.raises(ValueError, match=message):
        HubProblems(str(file), Columns()).read("calibration")


@pytest.mark.filterwarnings("ignore")
def test_hub_says_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"problems\.path=.*nothing.* cannot be loaded"):
        HubProblems(str(tmp_path / "nothing"), Columns()).read("test")


def test_real_problem_files(tmp_path: Path) -> None:
    folder = SHARED / "data" / "problems"
    if not folder.exists():
        pytest.skip("the real problem sets (shared/data) are not on this machine")
    problems = JsonlProblems(str(folder / "math_pool.jsonl"), Columns(id="id", level="level", solution="solution"))
    both = problems.read("calibration") + problems.read("test")
    assert len(both) == 1500
    assert {p.level for p in both} == {1, 2, 3, 4, 5} and all(p.solution for p in both)


def test_what_is_read_does_not_depend_on_the_name_of_the_file(tmp_path: Path) -> None:
    line = json.dumps({"problem": "1+1?", "answer": "2"})
    (tmp_path / "a.jsonl").write_text(line)
    (tmp_path / "b.jsonl").write_text(line)
    read = [
        JsonlProblems(str(tmp_path / f"{n}.jsonl"), Columns(), str(tmp_path / f"{n}.jsonl")).read("test") for n in "ab"
    ]
    assert [(p.id, p.question) for p in read[0]] == [(p.id, p.question) for p in read[1]] == [("row/1", "1+1?")]


def test_a_limit_stops_the_reading(tmp_path: Path) -> None:
    good = json.dumps({"problem": "1+1?", "answer": "2"})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{good}\nnot JSON\n")
    path = str(tmp_path / "a.jsonl")
    assert len(JsonlProblems(path, Columns(), path, limit=2).read("calibration")) == 2
    with pytest.raises(ValueError, match="row 3: not JSON"):
        JsonlProblems(path, Columns(), path, limit=3).read("calibration")


def test_a_solution_ends_where_the_answer_is_marked() -> None:
    row = {"question": "?", "answer": "#### is the mark. It is 7.\n#### 7"}
    problem = Columns("question", "answer", solution="answer", answer_after="####").problem(row, 1, "gsm8k")
    assert (problem.answer, problem.solution) == ("7", "#### is the mark. It is 7.")
