"""Calibration problems that are in the benchmark are left out, counted and listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ssgr.flow import Flow
from ssgr.problems.decontaminate import Decontaminate, Hit, tokens
from ssgr.problems.table import Columns, JsonlProblems
from ssgr.records import Problem
from ssgr.store import Store
from tests.conftest import ROOT, Run
from tests.test_configs import build

DATA = Path(__file__).parents[2] / "shared" / "data" / "problems"
LONG = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many in all?"


def problem(name: str, question: str) -> Problem:
    return Problem(name, question, "1", "test")


def hits(question: str, benchmark: str, **how: object) -> list[Hit]:
    return Decontaminate(**how).hits([problem("a", question)], [problem("b", benchmark)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is  $2+3$?", "what is 2 + 3?", True),
        ("Find \\left(x\\right) in $\\mathrm{cm}$", "find ( x ) in {cm}", True),
        ("Add $\\dfrac{1}{2}$ and $\\tfrac13$.", "Add $\\frac{1}{2}$ and $\\frac13$.", True),
        ("Solve \\(x^2=4\\) and \\[y=1\\]", "Solve $x^2 = 4$ and $$y=1$$", True),
        ("What is 2+3?", "What is 2*3?", False),
        ("What is 2+3?", "What is 2+31?", False),
        ("Find $x_1$", "Find $x_2$", False),
        (LONG, LONG.replace("Natalia", "Maria"), True),  # all but the runs with the name
        (LONG, "A tale. " + LONG, True),
        (LONG, "How many in all? She sold clips to 48 of her friends in June.", False),
    ],
)
def test_what_is_the_same(one: str, other: str, same: bool) -> None:
    assert bool(hits(one, other)) == bool(hits(other, one)) == same


def test_options_in_another_order_are_the_same_problem() -> None:
    rows = [{"q": f"What is {i}?", "c": ["one", "two", "three", "four"], "answer": i % 4} for i in range(40)]
    turned = [{**row, "c": row["c"][::-1], "answer": 3 - row["answer"]} for row in rows]
    first, other = (
        [Columns("q", choices="c", shuffle=seed).problem(row, n, "s") for n, row in enumerate(some)]
        for seed, some in enumerate((rows, turned))
    )
    assert sum(a.question != b.question for a, b in zip(first, other, strict=True)) > 30
    found = Decontaminate().hits(first, other)
    assert [(hit.id, hit.benchmark_id, hit.why) for hit in found] == [(p.id, p.id, "the same text") for p in other]


@pytest.mark.parametrize(
    ("question", "same"),
    [
        ("Which planet of the solar system is the largest?", True),
        ("Which planet of the solar system is the LARGEST ?", True),
        ("Which of the following is true?", False),  # of anything
    ],
)
def test_a_short_question_without_its_options(question: str, same: bool) -> None:
    def asked(*options: str) -> list[Problem]:
        row = {"q": question.replace("LARGEST ", "largest"), "c": list(options), "answer": 0}
        return [Columns("q", choices="c").problem(row, 0, "s")]

    options = "the planet Jupiter", "the planet Mars", "the planet Venus", "the planet Saturn, which has rings"
    plain = [problem("a", question)]
    for one, other in ((plain, asked(*options)), (asked(*options), plain)):
        assert [hit.why for hit in Decontaminate().hits(one, other)] == [
            "the same question, with and without options"
        ] * same
        assert not Decontaminate(ngram=None).hits(one, other)
    assert not Decontaminate().hits(asked("this", "that"), asked("one", "two")), "other options ask something else"


def test_the_options() -> None:
    near = LONG.replace("Natalia", "Maria")
    assert not hits(LONG, near, ngram=None)
    assert not hits(LONG, near, enabled=False)
    assert not hits(LONG, near, share=1.0)
    run = " ".join(LONG.split()[:12])  # one sentence of it, as the beginning of another text
    assert not hits(LONG, f"{run} She also bought a bag of marbles and a hat, for how much did she do so?")
    assert hits(
        LONG, f"{run} She also bought a bag of marbles and a hat, for how much did she do so?", share=0.0, ngram=11
    )
    assert hits("one two", "one three", ngram=1), "half of the runs are enough"
    assert hits("one two", "one two three", ngram=2), "the last run counts"
    several = [problem(name, near) for name in "hbgfcdea"]
    assert [Decontaminate().hits([problem("x", LONG)], some)[0].benchmark_id for some in (several, several[::-1])] == [
        "h"
    ] * 2
    assert hits(LONG, near)[0].benchmark_id == "b" and "13 tokens" in hits(LONG, near)[0].why
    for wrong in ({"ngram": 0}, {"share": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Decontaminate(**wrong)  # type: ignore[arg-type]


def test_tokens_keep_signs() -> None:
    assert tokens("$2+3$ is  5.") == ["2", "+", "3", "is", "5", "."]


@pytest.mark.skipif(not DATA.exists(), reason="the collected problems (shared/data) are not beside this checkout")
def test_real_problem_sets() -> None:
    """A pool that is known to be disjoint loses next to nothing, and a benchmark against itself all."""

    def read(name: str) -> list[Problem]:
        rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]
        return [problem(row["id"], row["problem"]) for row in rows]

    math500, pool, train, test = read("math500"), read("math_pool"), read("gsm8k_train"), read("gsm8k_test")
    assert len(Decontaminate().hits(math500, math500)) == 500
    assert len(Decontaminate().hits(pool, math500)) <= 0.02 * len(pool)
    assert len(Decontaminate().hits(train, test)) <= 0.01 * len(train)
    mixed = [*train[:50], *test[:10]]
    assert {hit.id for hit in Decontaminate().hits(mixed, test)} >= {one.id for one in test[:10]}


def read_file(file: Path, **how: Any) -> list[Problem]:
    return JsonlProblems(str(file), Columns(**how), str(file)).read("test")


@pytest.mark.parametrize("name", ["gsm8k", "math500", "mmlu", "gpqa_diamond"])
def test_the_prompt_of_a_benchmark_is_not_compared(name: str, tmp_path: Path) -> None:
    prompt = OmegaConf.load(ROOT / "conf" / "bench" / f"{name}.yaml").problems.columns.prompt
    for file, question in (("same", "What is $2+3$?"), ("lower", "what is 2 + 3?"), ("other", "Find the sine of 7.")):
        (tmp_path / f"{file}.jsonl").write_text(json.dumps({"problem": question, "answer": "5"}))
    asked = read_file(tmp_path / "same.jsonl", prompt=prompt)
    assert asked[0].question == prompt.replace("{question}", "What is $2+3$?")
    for how in ({}, {"prompt": prompt}):
        assert [hit.why for hit in Decontaminate().hits(read_file(tmp_path / "lower.jsonl", **how), asked)] == [
            "the same text"
        ]
        assert not Decontaminate().hits(read_file(tmp_path / "other.jsonl", **how), asked)


@pytest.mark.skipif(not DATA.exists(), reason="the collected problems (shared/data) are not beside this checkout")
def test_a_copy_of_a_benchmark_is_found_whole() -> None:
    prompt = OmegaConf.load(ROOT / "conf" / "bench" / "math500.yaml").problems.columns.prompt
    pool, asked = (read_file(DATA / "math500.jsonl", id="id", **how) for how in ({}, {"prompt": prompt}))
    hits = Decontaminate().hits(pool, asked)
    assert len(pool) == 500 and {(hit.id, hit.why) for hit in hits} == {(one.id, "the same text") for one in pool}


def test_a_run_leaves_them_out_and_says_so(run: Run, tmp_path: Path) -> None:
    rows = [{"problem": f"Compute {a}+{b}.", "answer": str(a + b)} for a in range(2, 8) for b in range(2, 8)]
    pool, bench = tmp_path / "pool.jsonl", tmp_path / "bench.jsonl"
    pool.write_text("\n".join(map(json.dumps, rows)))
    bench.write_text("\n".join(json.dumps({**row, "problem": row["problem"].lower()}) for row in rows[:6]))
    given = [
        "problems=jsonl", f"problems.path={pool}", f"problems.test_path={bench}", "calib=self", "budget.tokens=512",
        "sampler.decoding.attempts=1", "bench.decoding.attempts=1", "sampler.decoding.max_new_tokens=48",
        "bench.decoding.max_new_tokens=48", "budget.held_out=0", f"hydra.run.dir={tmp_path}/out",
    ]  # fmt: skip
    done = run(*given, "device=cpu", small=False)
    assert done.returncode == 0, done.stderr
    assert "6 of 36 calibration problems are in the benchmark and are left out" in done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["calibration"]["funnel"][:2] == [["problems", 36], ["not in the benchmark", 30]]
    listed = next(Path(tmp_path).glob("**/contaminated.json"))
    assert [hit["why"] for hit in json.loads(listed.read_text())] == ["the same text"] * 6
    done = run(
        *[one for one in given if "test_path" not in one], f"problems.test_path={pool}", "device=cpu", small=False
    )
    assert done.returncode == 1 and "type decontaminate.enabled=false" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["select.balance=level"], "select.balance=level: these problems have no level"),
        (["problems.test_path=p.jsonl"], "all 20 calibration problems are in the benchmark"),
    ],
)
def test_what_problems_lack_is_told_before_hours_of_sampling(
    asked: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Flow, "sampled", lambda *_: pytest.fail("it samples"))
    Path("p.jsonl").write_text(
        "\n".join(json.dumps({"problem": f"What is {i}+{i}?", "answer": "2"}) for i in range(20))
    )
    with pytest.raises(ValueError, match=said):
        Flow(build("problems=jsonl", "problems.path=p.jsonl", *asked), Store(tmp_path)).selected()
