"""Grade: traces -> verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ssgr.grader import Grade, Grader
from ssgr.records import Graded, Problem, Trace
from ssgr.stages.progress import Progress

VERSION = 2
GRADED = "graded.parquet"
_CHUNK = 2000  # answers between two marks of progress


def grade(
    traces: Sequence[Trace], problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, grader: Grader
) -> list[Graded]:
    """Grade each trace against its problem's answer; the text is decoded for the grader's eyes only."""
    by_id = {problem.id: problem for problem in problems}
    texts = tokenizer.batch_decode([list(t.generated_ids) for t in traces], skip_special_tokens=False)
    golds = [by_id[t.problem_id].answer for t in traces]
    stop = [s for s in (tokenizer.eos_token, tokenizer.pad_token) if s]
    pairs = [(gold, _without(text, stop)) for gold, text in zip(golds, texts, strict=True)]
    grades: list[Grade] = []
    with Progress("grade", len(pairs)) as progress:
        for first in range(0, len(pairs), _CHUNK):
            grades += grader.grade(pairs[first : first + _CHUNK])
            progress.step(len(grades) - first)
    return [Graded(t, g.answer, g.verdict, by_id[t.problem_id].level) for t, g in zip(traces, grades, strict=True)]


def _without(text: str, stop: Sequence[str]) -> str:
    for token in stop:
        text = text.removesuffix(token)
    return text
