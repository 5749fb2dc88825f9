"""The exact grader: the last bare answer, numbers compared as numbers."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ssgr.grader import Grade
from ssgr.records import Verdict

_log = logging.getLogger("ssgr")
_MAX_DIGITS = 4000  # digits or decimal exponent; beyond it (Python converts 4300 at most) numbers are compared as text

# Every part behind the first digit is optional, so that no match is tried twice: the time is linear in the text.
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}.])[-+\u2212])?{_UNSIGNED}(?:/{_UNSIGNED})?", re.ASCII)  # 10-7 ends in 7, not -7
_PARTS = re.compile(r"([-+]?)0*(\d*)(?:\.(\d*?)0*)?(?:[eE]([-+]?)0*(\d*))?", re.ASCII)


@dataclass(frozen=True)
class Exact:
    """Compare the last number of the answer part with the gold; a gold that is no number, the last line as text."""

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (gold answer, answer part) pairs, in order; golds that only another grader can read are warned of."""
        if odd := [gold for gold, _ in pairs if "\\" in gold or "\n" in gold]:
            _log.warning(
                "grader=exact: %d of %d gold answers are LaTeX or several lines, such as %.60r, and are compared as text; "
                "type grader=math",
                len(odd), len(pairs), odd[0],
            )  # fmt: skip
        return [self._one(gold, part) for gold, part in pairs]

    def _one(self, gold: str, part: str) -> Grade:
        wanted = number(gold)
        found = _last_line(part) if wanted is None else _last_number(part)
        if not found:
            return Grade(Verdict.NO_ANSWER)
        same = found.casefold() == gold.strip().casefold() if wanted is None else number(found) == wanted
        return Grade(Verdict.RIGHT if same else Verdict.WRONG, found)


def number(text: str) -> Fraction | str | None:
    """The value of `text` if it is a number: 1,000 or -0.5 or 3/4 or 2e3, with or without a final full stop.

    Returns:
        A fraction; the digits as text if there are too many to convert; None if `text` is no number.
    """
    bare = text.strip().removesuffix(".")
    if not _NUMBER.fullmatch(bare):
        return None
    over, _, under = bare.replace(",", "").replace("\u2212", "-").partition("/")
    top, bottom = _value(over), _value(under or "1")
    if isinstance(top, str) or isinstance(bottom, str):
        return f"{top}/{bottom}"
    return top / bottom if bottom else None


def _value(decimal: str) -> Fraction | str:
    parts = _PARTS.fullmatch(decimal)
    assert parts is not None, "_NUMBER lets through decimals only"
    sign, whole, rest, exponent_sign, exponent = (part or "" for part in parts.groups())
    bare = f"{sign.strip('+')}{whole or 0}.{rest or 0}e{exponent_sign.strip('+')}{exponent or 0}"
    small = len(whole) + len(rest) <= _MAX_DIGITS and len(exponent) <= len(str(_MAX_DIGITS))
    return Fraction(bare) if small and int(exponent or 0) <= _MAX_DIGITS else bare


def _last_number(text: str) -> str | None:
    last = deque(_NUMBER.finditer(text), maxlen=1)
    return last[0][0] if last else None


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2].strip()
