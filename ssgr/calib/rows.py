"""Sources that need no traces: text, problem prompts, reference solutions, random tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ssgr.calib import Material, Needs
from ssgr.records import Row
from ssgr.select import Candidates, Policy
from ssgr.text import Text

_POOL = 4  # text is tokenised until it holds this many times the budget, so that draws differ


@dataclass(frozen=True)
class _Plain:
    """What sources without difficulty and length share."""

    name: str
    draw: int

    @property
    def uses(self) -> frozenset[str]:
        """No filter applies."""
        return frozenset()

    @property
    def matches(self) -> bool:
        """Never."""
        return False

    def reference(self, material: Material, policy: Policy) -> Candidates:
        """Not for these sources."""
        raise AssertionError(f"{self.name} matches nothing")


def _check_window(window: int) -> None:
    if not isinstance(window, int) or window < 2:
        raise ValueError(f"calib.window={window}: give a whole number of tokens, at least 2, without point or exponent")


@dataclass(frozen=True)
class Corpus(_Plain):
    """General text in windows of `window` tokens: generated prose, a file of text or of rows, or a dataset id.

    `joined` makes the whole of it one text, its documents in their order with blank lines between: those of WikiText are
    lines, which are no running text one by one.
    """

    text: str
    window: int
    column: str = "text"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    joined: bool = False

    def __post_init__(self) -> None:
        _check_window(self.window)

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return "nothing"

    @property
    def _text(self) -> Text:
        return Text(self.text, "calib.text", self.column, self.subset, self.split, self.revision)

    def key_content(self) -> object:
        """The text is keyed by what it holds."""
        rest = (self.name, self.draw, self.window, self.column, self.subset, self.split, self.revision)
        return {"text": self._text.key_content(), "rest": rest, **({"joined": True} if self.joined else {})}

    def candidates(self, material: Material, policy: Policy) -> Candidates:
        """Non-overlapping windows of the tokenised documents, joined by the end-of-text token."""
        window = min(self.window, material.budget.max_row_tokens)
        pool = _POOL * material.budget.of_rows(window)
        tokenizer = material.tokenizer
        stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids: list[int] = []
        rows: list[Row] = []
        documents = 0
        enough = pool // 8 + 1  # paragraphs of prose: each has more than eight tokens
        for text in [self._text.whole(enough)] if self.joined else self._text.documents(self.draw):
            documents += 1
            own = list(tokenizer(text, verbose=False)["input_ids"])  # with what the tokenizer itself puts before a text
            ids += own + ([] if own[-1:] == stop else stop)
            end = len(ids) - len(ids) % window
            for first in range(0, end, window):
                rows.append(Row(tuple(ids[first : first + window]), 0, f"{self.name}/{len(rows)}"))
            del ids[:end]
            if len(rows) * window >= pool:
                break
        return Candidates(tuple(rows), (("documents", documents), (f"windows of {window}", len(rows))), windowed=True)


@dataclass(frozen=True)
class Prompts(_Plain):
    """Problem prompts alone, through the chat template."""

    @property
    def needs(self) -> Needs:
        """Problems."""
        return "problems"

    def candidates(self, material: Material, policy: Policy) -> Candidates:
        """One row a problem."""
        rows = []
        for problem in material.problems:
            ids = material.prompt_ids(problem.question)
            rows.append(Row(ids, len(ids), problem.id, problem.level))
        return Candidates(tuple(rows), (("problems", len(rows)),))


@dataclass(frozen=True)
class Written(_Plain):
    """Reference solutions, as somebody else wrote them, after the prompt and inside the thinking tags, then the answer.

    An answer that is the whole solution (as in MATH) is not said twice.
    """

    @property
    def needs(self) -> Needs:
        """Problems."""
        return "problems"

    @property
    def uses(self) -> frozenset[str]:
        """The scope applies: there is a prompt and a response."""
        return frozenset(("scope",))

    def candidates(self, material: Material, policy: Policy) -> Candidates:
        """One row a problem that has a solution.

        Raises:
            ValueError: no problem has one.
        """
        tokenizer = material.tokenizer
        stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        rows = []
        for problem in material.problems:
            if problem.solution:
                prompt = material.prompt_ids(problem.question)
                answer = "" if problem.answer == problem.solution else f"\n{problem.answer}"
                start, end = material.thinking.start or "", material.thinking.end or ""
                opened = not start or str(tokenizer.decode(list(prompt[-8:]))).rstrip().endswith(start)
                text = f"{'' if opened else start + chr(10)}{problem.solution}\n{end}{answer}"
                response = [*tokenizer(text, add_special_tokens=False)["input_ids"], *stop]
                rows.append(Row(prompt + tuple(response), len(prompt), problem.id, problem.level))
        if not rows:
            raise ValueError(
                "calib=written: none of the problems has a reference solution; name its column with "
                "problems.columns.solution=COLUMN, or choose calib=self"
            )
        return Candidates(tuple(rows), (("problems", len(material.problems)), ("with a solution", len(rows))))


@dataclass(frozen=True)
class RandomTokens(_Plain):
    """Uniformly random token ids: what is left of calibration when the text means nothing."""

    window: int

    def __post_init__(self) -> None:
        _check_window(self.window)

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return "nothing"

    def candidates(self, material: Material, policy: Policy) -> Candidates:
        """As many windows as the budget needs, twice over."""
        rng = random.Random(f"tokens/{self.draw}")
        window = min(self.window, material.budget.max_row_tokens)
        special = set(material.tokenizer.all_special_ids)
        valid = [i for i in range(len(material.tokenizer)) if i not in special]
        count = 2 * material.budget.of_rows(window) // window + 2
        rows = tuple(Row(tuple(rng.choices(valid, k=window)), 0, f"{self.name}/{i}") for i in range(count))
        return Candidates(rows, ((f"windows of {window}", count),), windowed=True)
