"""python -m ssgr.grade: any file of answers, one verdict a line, in order; and the letters of multiple choice."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssgr.grade import main
from ssgr.grader.choice import Choice, letter
from ssgr.records import Verdict

ROOT = Path(__file__).parents[1]


def grade(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ssgr.grade", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_each_in_order_whatever_the_answers_do(tmp_path: Path) -> None:
    answers = [
        ("1/2", "$0.5$", "right"), ("7", "<think>8</think>So it is \\boxed{7}.", "right"), ("7", "8", "wrong"),
        ("7", "", "no_answer"), ("7", None, "no_answer"), ("7", "{" * 200_000, "no_answer"),
        ("3", "$5^{5^{5^{5^{5}}}}$", "grader_failed"), ("12", "$12$ \u202e\x00\x1b[31m", "right"),
        (" ", "$1$", "grader_failed"), (5, 5, "right"), ("7", "<think>maybe 7", "no_answer"),
    ]  # fmt: skip
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [json.dumps({"id": i, "gold": g, "pred": p}) for i, (g, p, _) in enumerate(answers)]
    source.write_text("\n".join(rows), encoding="utf-8-sig")  # as Windows writes it
    done = grade("--grader", "math", "--seconds", 3, "--workers", 2, source, out)
    assert done.returncode == 0, done.stderr
    got = lines(out)
    assert [line["id"] for line in got] == list(range(len(answers)))
    assert [line["verdict"] for line in got] == [verdict for *_, verdict in answers]
    assert got[1]["extracted"] == "7" and "over 3 s" in got[6]["why"] and "cannot be read" in got[8]["why"]
    assert "11 answers: 4 right, 4 no_answer, 2 grader_failed, 1 wrong" in done.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "line 1: not JSON"), ('{"id": 1, "gold": "2"}', "line 1: lacks pred"), ("[]", "lacks id, gold, pred"),
        ("[" * 100_000, "line 1: its JSON is nested too deeply"),
        ('{"id": 1, "gold": "2", "pred": ' + "9" * 5000 + "}", "line 1: a number has too many digits"),
        ('{"id": 1, "gold": "2", "pred": "2"}\n' * 2, "line 2: its id '1' is that of line 1"), ("", "holds no answers"),
    ],
    ids=["cut", "lacks one", "lacks all", "deep", "long number", "twice", "empty"],
)  # fmt: skip
def test_a_bad_file_is_named_and_nothing_is_written(content: str, said: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(content)
    done = grade(source, out)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert not out.exists() and list(tmp_path.iterdir()) == [source]


def test_a_missing_file_and_a_missing_folder(tmp_path: Path) -> None:
    done = grade(tmp_path / "no.jsonl", tmp_path / "out.jsonl")
    assert done.returncode == 1 and "there is no such file" in done.stderr
    (tmp_path / "in.jsonl").write_text('{"id": 1, "gold": "2", "pred": "2"}')
    done = grade("--grader", "exact", tmp_path / "in.jsonl", tmp_path / "no" / "out.jsonl")
    assert done.returncode == 1 and f"there is no folder {tmp_path / 'no'}; make it" in done.stderr
    (tmp_path / "folder").mkdir()
    done = grade(tmp_path / "in.jsonl", tmp_path / "folder")
    assert done.returncode == 1 and "folder is a folder; give the JSONL file to write" in done.stderr
    done = grade("--grader", "exact", tmp_path / "in.jsonl", tmp_path / "folder" / ".." / "in.jsonl")
    assert done.returncode == 1 and "is the file that is graded, and would be lost" in done.stderr
    assert '"pred"' in (tmp_path / "in.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "in.jsonl"]


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # without a name, as of what was opened before

    (tmp_path / "in.jsonl").write_text('{"id": 1, "gold": "2", "pred": "2"}')
    monkeypatch.setattr("ssgr.grade._line", full)
    with pytest.raises(SystemExit, match=r"^grade: .*out\.jsonl cannot be written \(No space left on device\)$"):
        main(["--grader", "exact", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_what_lies_beside_the_result_stays(tmp_path: Path) -> None:
    source, out = tmp_path / "out.jsonl.part", tmp_path / "out.jsonl"
    source.write_text('{"id": 1, "gold": "2", "pred": "2"}')
    assert grade("--grader", "exact", source, out).returncode == 0
    assert '"pred"' in source.read_text() and sorted(tmp_path.iterdir()) == [out, source]


def test_what_is_searched_of_a_response_is_said_on_the_command_line(tmp_path: Path) -> None:
    rows = [{"id": text, "gold": "7", "pred": text} for text in ("7", "<think>7", "[think]7", "<think>7</think>8")]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ways = {
        (): ["right", "no_answer", "right", "wrong"],
        ("--start-think", "[think]"): ["right", "right", "no_answer", "wrong"],
        ("--start-think", ""): ["right", "right", "right", "wrong"],
        ("--end-think", ""): ["right", "right", "right", "wrong"],
        ("--require-end-think",): ["no_answer", "no_answer", "no_answer", "wrong"],
    }
    for options, verdicts in ways.items():
        done = grade("--grader", "exact", *options, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
        assert done.returncode == 0, done.stderr
        assert [line["verdict"] for line in lines(tmp_path / "out.jsonl")] == verdicts, options


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\\boxed{C}", "C"), ("A or B? \\boxed{\\text{(D)}}", "D"), ("The answer is (B).", "B"),
        ("**Answer:** C", "C"), ("Answer: A", "A"), ("The correct option is D) 4", "D"), ("I think B", "B"),
        ("A\nB\nC", "C"), ("(A)", "A"), ("B. because A is wrong", "B"), ("Answer: B. But is the answer C? The answer is A", "A"),
        ("I have no idea", None), ("A dog is an animal", None), ("", None), ("answer is $\\mathrm{E}$", "E"),
        ("\\boxed{b}", "B"), ("\\boxed{\\text{(d)}}", "D"), ("\\boxed{c) 4}", "C"), ("C is tempting but it is \\boxed{b}", "B"),
        ("\\boxed{a dog}", None), ("\\boxed{x=2} so C", "C"), ("The answer is A, since option C is false", "A"),
        ("The answer is I think B", "B"), ("The answer is I.", "I"), ("the answer is option C, not choice D", "C"),
        ("The answer is A. No, the answer is B, as option A is odd", "B"), ("Option C", "C"),
        *((f"The answer {one}, not C", "B") for one in ("is 'B'", 'is "B"', "is `B`", "is \u201cB\u201d", "must be B")),
        ("The answer is A's brother, B", "B"),
        ("The answer is Berlin", None), ("The final answer is $\\boxed{A}$. I hope so", "A"),
    ],
)  # fmt: skip
def test_letters(text: str, found: str | None) -> None:
    assert letter(text) == found


@pytest.mark.parametrize("unit", ["\n", " ", "\\boxed{", "answer: **", "("])
def test_letters_of_a_long_text_take_no_time(unit: str) -> None:
    start, text = time.process_time(), "answer is" + unit * 10**5
    assert letter(text + " b") is None and letter(text + "\nB\nno") == "B"
    assert time.process_time() - start < 3  # a quadratic search takes minutes


def test_choice_refuses_golds_that_are_no_letters() -> None:
    grades = Choice().grade([("b", "(B)"), ("B", ""), ("(C)", "Answer: D"), ("blue", "A")])
    assert [g.verdict for g in grades] == [Verdict.RIGHT, Verdict.NO_ANSWER, Verdict.WRONG, Verdict.GRADER_FAILED]
    assert grades[3].why == "the gold answer 'blue' is no letter"
