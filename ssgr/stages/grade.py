"""Grade: traces -> verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssgr.grader import Grade, Grader
from ssgr.progress import Progress
from ssgr.records import Graded, Problem, Trace
from ssgr.thinking import Thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # by name only: its import takes seconds

VERSION = 5
GRADED = "graded.parquet"
_CHUNK = 2000  # answers between two marks of progress


def grade(
    traces: Sequence[Trace],
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
    thinking: Thinking,
) -> list[Graded]:
    """Grade the answer part of each trace against its problem's answer; what never stops to think has no answer."""
    by_id = {problem.id: problem for problem in problems}
    parts = [thinking.part(tokenizer, t.prompt_ids, t.generated_ids) for t in traces]
    pairs = [(by_id[t.problem_id].answer, part.answer or "") for t, part in zip(traces, parts, strict=True)]
    grades: list[Grade] = []
    with Progress("grade", len(pairs)) as progress:
        for first in range(0, len(pairs), _CHUNK):
            grades += grader.grade(pairs[first : first + _CHUNK])
            progress.step(len(grades) - first)
    return [
        Graded(t, grade.answer, grade.verdict, by_id[t.problem_id].level, part.tokens, part.answer is not None)
        for t, grade, part in zip(traces, grades, parts, strict=True)
    ]
