"""Decontamination: calibration problems that are those of a benchmark, or nearly, are left out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ssgr.records import Problem

_TOKEN = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")  # a word, a number, or a sign: 2+3 is not 2*3
_SPACING = re.compile(
    r"\\[,;:!()[\]]|\\(?:left|right|displaystyle|quad|qquad|text|mathrm|mathbf|[dt]?frac)(?![A-Za-z])|[~$]"
)


@dataclass(frozen=True)
class Hit:
    """A calibration problem, the problem of the benchmark that it is, and how that was seen."""

    id: str
    benchmark_id: str
    why: str


@dataclass(frozen=True)
class Decontaminate:
    """Problems are the same if their text is, but for case, spaces, the signs around formulas and LaTeX's spacing, or if they
    share `ngram` tokens in a row: at least `share` of all such runs of the calibration problem stand in one of the benchmark.
    What is asked beside the question, such as to reason step by step, is not compared. A question of multiple choice is also
    the same as one without options, if it has more words than half of `ngram`: fewer may ask anything ("Which is true?").

    `enabled=false` keeps all; `ngram=null` compares whole texts only.

    Raises:
        ValueError: `ngram` is not at least 1, or `share` not between 0 and 1.
    """

    enabled: bool = True
    ngram: int | None = 13
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.ngram is not None and self.ngram < 1:
            raise ValueError(
                f"decontaminate.ngram={self.ngram}: give 1 or more, such as 13, or null for whole texts only"
            )
        if not 0 <= self.share <= 1:
            raise ValueError(
                f"decontaminate.share={self.share}: give a share between 0 and 1; 0 stands for a single run"
            )

    def hits(self, problems: Sequence[Problem], benchmark: Sequence[Problem]) -> list[Hit]:
        """Which of `problems` are in the benchmark."""
        if not self.enabled:
            return []
        texts = {" ".join(_tokens_of(problem)): problem.id for problem in reversed(benchmark)}
        alone = {text: problem.id for problem in reversed(benchmark) if (text := self._alone(problem))}
        where: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for problem in benchmark:
            for run in self._runs(_tokens_of(problem)):
                where[run].add(problem.id)
        out = []
        for problem in problems:
            own = _tokens_of(problem)
            if same := texts.get(" ".join(own)):
                out.append(Hit(problem.id, same, "the same text"))
                continue
            question = self._alone(problem)
            if same := texts.get(question) if question else alone.get(" ".join(own)):
                out.append(Hit(problem.id, same, "the same question, with and without options"))
                continue
            runs, counts = self._runs(own), defaultdict[str, int](int)
            for run in runs:
                for name in where.get(run, ()):
                    counts[name] += 1
            best = max(counts, key=lambda name: (counts[name], name), default=None)
            if best is not None and counts[best] >= self.share * len(runs):
                out.append(Hit(problem.id, best, f"{counts[best]} of {len(runs)} runs of {self.ngram} tokens"))
        return out

    def _alone(self, problem: Problem) -> str:
        """The text of a question without its options; nothing where it has none, or too few words to be told by."""
        own = tokens(problem.alone or "")
        words = sum(token.isalnum() for token in own)
        return " ".join(own) if self.ngram is not None and 2 * words > self.ngram else ""

    def _runs(self, own: Sequence[str]) -> set[tuple[str, ...]]:
        n = self.ngram
        return set() if n is None else {tuple(own[i : i + n]) for i in range(len(own) - n + 1)}


def _tokens_of(problem: Problem) -> list[str]:
    return tokens(problem.question if problem.bare is None else problem.bare)


def tokens(text: str) -> list[str]:
    """Words, numbers and signs of `text`, without case and spacing."""
    return _TOKEN.findall(_SPACING.sub(" ", text).casefold())
