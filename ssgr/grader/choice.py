"""The multiple-choice grader: the letter that a response ends on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ssgr.grader import Grade
from ssgr.records import Verdict

# Nothing that is repeated is given back (*+), so that the time is linear in the text.
_BEFORE = r"[(\[{*$ \"'`\u201c\u2018]*+(?:\\(?:text|textbf|mathrm|mathbf){)?[(]?"
_LETTER = _BEFORE + r"((?!I\s[a-z])[A-Z])(?!['\u2019]?[A-Za-z])"  # I with a word behind it is a word
_OPTION = r"(?i:answer|choice|option)[*_]*+\s*+"
_IS = r"(?i:(?:is|(?:would|should|must) be)\s*+:?|[:=])[*_]*+\s*+(?i:(?:the )?(?:option|choice)\s++)?"
_STATED = (  # the surest first; of each the last in the text counts
    re.compile(rf"\\boxed\s*{{(?:{_LETTER}|{_BEFORE}([a-z])(?=\s*[)\].:}}]))"),
    re.compile(_OPTION + _IS + _LETTER),
    re.compile(_OPTION + _LETTER),
    re.compile(r"^[^\w\n]*+([A-Z])(?:[^\w\n]*$|[.):]\s)", re.MULTILINE),
    re.compile(r"(?<![A-Za-z'\u2019])[(]?([B-HJ-Z])(?![A-Za-z'\u2019])"),  # A and I are words
)


@dataclass(frozen=True)
class Choice:
    """Compare the letter that the answer part states with the gold letter.

    The letter is the last in a box, where it may be small; without one, the last that is stated ("the answer is C"); without
    that, the last after "answer", "choice" or "option"; without that, the last that opens a line or stands on one alone;
    without that, the last capital that stands alone, A and I left out. An I with a word behind it is no letter.
    """

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (gold letter, answer part) pairs, in order; a gold that is no letter is `grader_failed`."""
        return [self._one(gold, part) for gold, part in pairs]

    def _one(self, gold: str, part: str) -> Grade:
        wanted = re.fullmatch(r"[(\s]*([A-Za-z])[).\s]*", gold)
        if not wanted:
            return Grade(Verdict.GRADER_FAILED, why=f"the gold answer {gold[:40]!r} is no letter")
        found = letter(part)
        if found is None:
            return Grade(Verdict.NO_ANSWER)
        return Grade(Verdict.RIGHT if found == wanted[1].upper() else Verdict.WRONG, found)


def letter(text: str) -> str | None:
    """The letter that `text` states, or None."""
    for pattern in _STATED:
        if found := pattern.findall(text):
            return "".join(found[-1]).upper()  # a pattern with two groups matches one of them
    return None
