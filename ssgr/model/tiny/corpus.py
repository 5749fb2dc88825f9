"""What the tiny model reads: solved arithmetic in five styles of thinking, and plain prose."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import TypeAlias

from ssgr import arithmetic, prose
from ssgr.arithmetic import Tree

PROSE_SHARE = 0.15  # share of documents: enough that general text is in distribution, as it is for a real model
SINGLE_SHARE = 0.25  # of the solved problems: one operation on large numbers, where later steps fail, for few tokens
MISTAKE = re.compile(r"\{(\d+)\}")  # a wrong result: the model reads it, and learns to notice it, but not to write it


def _terse(tree: Tree, rng: random.Random) -> str:
    return "; ".join(f"{a}{op}{b}={c}" for op, a, b, c, _ in arithmetic.steps(tree))


def _plain(tree: Tree, rng: random.Random) -> str:
    steps = [f"{a}{op}{b}={c}." for op, a, b, c, _ in arithmetic.steps(tree)]
    return " ".join(f"{'Next' if i else 'First'}, {step}" for i, step in enumerate(steps))


def _rewrite(tree: Tree, rng: random.Random) -> str:
    lines = [f"{a}{op}{b}={c}, so {rest}" for op, a, b, c, rest in arithmetic.steps(tree)]
    return "\n".join([arithmetic.text(tree), *lines])


def _checked(tree: Tree, rng: random.Random) -> str:
    return "\n".join(_step(op, a, b, c, rng) for op, a, b, c, _ in arithmetic.steps(tree))


def _doubting(tree: Tree, rng: random.Random) -> str:
    lines = [f"We need {arithmetic.text(tree)}."]
    for op, a, b, c, _ in arithmetic.steps(tree):
        match rng.choices(("sure", "mistaken", "unsure"), (0.6, 0.2, 0.2))[0]:
            case "mistaken":
                lines.append(f"{a}{op}{b}={_mistake(op, b, c, rng)}? Wait, no: {a}{op}{b}={c}. {_check(op, a, b, c)}")
            case "unsure":
                lines.append(f"{a}{op}{b}={c}? Wait, again: {a}{op}{b}={c}. {_check(op, a, b, c)}")
            case _:
                lines.append(_step(op, a, b, c, rng))
    lines.append(f"So the result is {arithmetic.value(tree)}.")
    return "\n".join(lines)


def _step(op: str, a: int, b: int, c: int, rng: random.Random) -> str:
    """One checked operation; one in ten is a mistake that the check finds."""
    if rng.random() < 0.9:
        return f"{a}{op}{b}={c}. {_check(op, a, b, c)}"
    wrong = _mistake(op, b, c, rng)
    return f"{a}{op}{b}={wrong}. {_check(op, a, b, int(shown(wrong)))} Wait, no: {a}{op}{b}={c}."


def _mistake(op: str, b: int, c: int, rng: random.Random) -> str:
    """A result that misses `c` in one digit, marked as a mistake."""
    by = rng.choice((-2, -1, 1, 2)) * 10 ** rng.randrange(len(str(c)))
    return f"{{{c + by if c + by >= (b if op == '+' else 0) else c - by}}}"


def _check(op: str, a: int, b: int, c: int) -> str:
    """Work back from `a op b = c`, right or wrong."""
    if op != "*":
        back = c - b if op == "+" else c + b
        return f"Check: {c}{'-' if op == '+' else '+'}{b}={back}, {_finding(back, a)}"
    big, small = max(a, b), min(a, b)
    tens, ones = big // 10 * 10, big % 10
    if not tens or not ones:
        return f"Check: {b}*{a}={a * b}, {_finding(a * b, c)}"
    return f"Check: {tens}*{small}={tens * small}, {ones}*{small}={ones * small}, sum {a * b}, {_finding(a * b, c)}"


def _finding(found: int, expected: int) -> str:
    return "ok." if found == expected else f"not {expected}."


STYLES: dict[str, Callable[[Tree, random.Random], str]] = {
    "terse": _terse,
    "plain": _plain,
    "rewrite": _rewrite,
    "checked": _checked,
    "doubting": _doubting,
}
STYLE_WEIGHTS = (0.25, 0.15, 0.2, 0.2, 0.2)

Mix: TypeAlias = tuple[float, ...]  # how often 1 to 8 operations are drawn
# Few of the longest, which therefore stay hard; what they would teach of single operations, short ones teach for less.
WIDE: Mix = (1.2, 1.3, 1.3, 1.2, 1.0, 0.8, 0.6, 0.4)
SHORT: Mix = (3.0, 3.0, 2.5, 1.5, 1.0, 0.7, 0.4, 0.25)


def think(tree: Tree, rng: random.Random, style: str | None = None) -> str:
    """Write a right train of thought for `tree`, in `style` or one drawn by its weight; mistakes are in braces."""
    style = style or rng.choices(list(STYLES), STYLE_WEIGHTS)[0]
    return STYLES[style](tree, rng)


def shown(response: str) -> str:
    """`response` without the braces around its mistakes."""
    return MISTAKE.sub(r"\1", response)


def document(rng: random.Random, mix: Mix = WIDE) -> tuple[str | None, str]:
    """Draw one training document: (question, response), or (None, prose); mistakes in a response are in braces."""
    if rng.random() < PROSE_SHARE:
        return None, prose.paragraph(rng)
    if rng.random() < SINGLE_SHARE:
        problem = arithmetic.single(rng)
    else:
        level = rng.choices(range(1, arithmetic.MAX_LEVEL + 1), mix)[0]
        problem = arithmetic.generate(level, "train", rng)
    return problem.question, f"{think(problem.tree, rng)}\n</think>\n{problem.answer}"
