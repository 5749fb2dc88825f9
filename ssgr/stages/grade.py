"""Grade: traces -> verdicts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssgr.grader import Grade, Grader
from ssgr.progress import Progress
from ssgr.records import Graded, Problem, Trace, Verdict
from ssgr.thinking import Thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # by name only: its import takes seconds

VERSION = 10
GRADED = "graded.parquet"
_CHUNK = 2000  # answers between two marks of progress
_NAMED = 5  # problems that a warning names
_log = logging.getLogger("ssgr")


def grade(
    traces: Sequence[Trace],
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
    thinking: Thinking,
) -> list[Graded]:
    """Grade the answer part of each trace against its problem's answer; what never stops to think has no answer.

    Raises:
        ValueError: the grader can read none of the gold answers.
    """
    by_id = {problem.id: problem for problem in problems}
    parts = [thinking.part(tokenizer, t.prompt_ids, t.generated_ids) for t in traces]
    pairs = [(by_id[t.problem_id].answer, part.answer or "") for t, part in zip(traces, parts, strict=True)]
    grades: list[Grade] = []
    with Progress("grade", len(pairs)) as progress:
        for first in range(0, len(pairs), _CHUNK):
            grades += grader.grade(pairs[first : first + _CHUNK])
            progress.step(len(grades) - first)
    verdicts = {grade.verdict for grade in grades}
    if Verdict.GRADER_FAILED in verdicts:
        failed = {
            t.problem_id for t, grade in zip(traces, grades, strict=True) if grade.verdict is Verdict.GRADER_FAILED
        }
        told = bool(verdicts & {Verdict.RIGHT, Verdict.WRONG})  # else no answer tells of its gold: all are looked at
        _check_golds([problem for problem in problems if problem.id in failed or not told], len(problems), grader)
    return [
        Graded(t, grade.answer, grade.verdict, by_id[t.problem_id].level, part.tokens, part.answer is not None)
        for t, grade, part in zip(traces, grades, parts, strict=True)
    ]


def _check_golds(some: Sequence[Problem], count: int, grader: Grader) -> None:
    """Warn of the gold answers of `some` of `count` problems that do not even grade against themselves."""
    own = grader.grade([(problem.answer, problem.answer) for problem in some])
    unread = [(p.id, g.why) for p, g in zip(some, own, strict=True) if g.verdict is Verdict.GRADER_FAILED]
    if not unread:
        return
    first = f"{unread[0][0]}: {unread[0][1]}"
    if len(unread) == count:
        raise ValueError(
            f"the grader can read none of the {count} gold answers ({first}); type problems.columns.answer=COLUMN, mend the "
            "rows, or choose another grader, such as grader=exact"
        )
    names = ", ".join(name for name, _ in unread[:_NAMED]) + (", ..." if len(unread) > _NAMED else "")
    _log.warning(
        "the grader cannot read %d of %d gold answers, and no answer to these problems counts as right: %s (%s); mend these rows",
        len(unread), count, names, first,
    )  # fmt: skip
