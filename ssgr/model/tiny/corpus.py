"""What the tiny model reads: solved arithmetic in five styles of thinking, and plain prose."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ssgr import arithmetic, prose
from ssgr.arithmetic import Tree

PROSE_SHARE = 0.15  # share of documents: enough that general text is in distribution, as it is for a real model


def _terse(tree: Tree, rng: random.Random) -> str:
    return "; ".join(f"{a}{op}{b}={c}" for op, a, b, c, _ in arithmetic.steps(tree))


def _plain(tree: Tree, rng: random.Random) -> str:
    steps = [f"{a}{op}{b}={c}." for op, a, b, c, _ in arithmetic.steps(tree)]
    return " ".join(f"{'Next' if i else 'First'}, {step}" for i, step in enumerate(steps))


def _rewrite(tree: Tree, rng: random.Random) -> str:
    return arithmetic.text(tree) + "".join(f"\n={rest}" for *_, rest in arithmetic.steps(tree))


def _checked(tree: Tree, rng: random.Random) -> str:
    return "\n".join(f"{a}{op}{b}={c}. {_check(op, a, b, c)}" for op, a, b, c, _ in arithmetic.steps(tree))


def _doubting(tree: Tree, rng: random.Random) -> str:
    lines = [f"We need {arithmetic.text(tree)}."]
    for op, a, b, c, _ in arithmetic.steps(tree):
        if rng.random() < 0.4:
            wrong = max(0, c + rng.choice((-10, -2, -1, 1, 2, 10)))
            lines.append(f"{a}{op}{b}={wrong}? Wait, no: {a}{op}{b}={c}. {_check(op, a, b, c)}")
        else:
            lines.append(f"{a}{op}{b}={c}. {_check(op, a, b, c)}")
    lines.append(f"So the result is {arithmetic.value(tree)}.")
    return "\n".join(lines)


def _check(op: str, a: int, b: int, c: int) -> str:
    if op == "+":
        return f"Check: {c}-{b}={a}, ok."
    if op == "-":
        return f"Check: {c}+{b}={a}, ok."
    big, small = max(a, b), min(a, b)
    tens, ones = big // 10 * 10, big % 10
    if not tens or not ones:
        return f"Check: {b}*{a}={c}, ok."
    return f"Check: {tens}*{small}={tens * small}, {ones}*{small}={ones * small}, sum {c}, ok."


STYLES: dict[str, Callable[[Tree, random.Random], str]] = {
    "terse": _terse,
    "plain": _plain,
    "rewrite": _rewrite,
    "checked": _checked,
    "doubting": _doubting,
}


@dataclass(frozen=True)
class Mix:
    """How often 1 to 8 operations, and each style in the order of STYLES, are drawn."""

    levels: tuple[float, ...]
    styles: tuple[float, ...]


EVEN = Mix((1.0, 1.0, 1.2, 1.2, 1.2, 1.1, 1.0, 1.0), (0.25, 0.2, 0.2, 0.2, 0.15))
# Short problems are where single operations are learnt, at a fraction of the tokens; and more of the longest style.
SHORT = Mix((3.0, 3.0, 2.5, 1.5, 1.0, 1.0, 0.8, 0.8), (0.28, 0.15, 0.2, 0.17, 0.2))


def think(tree: Tree, rng: random.Random, style: str | None = None, mix: Mix = EVEN) -> str:
    """Write a right train of thought for `tree`, in `style` or one drawn by its weight."""
    style = style or rng.choices(list(STYLES), mix.styles)[0]
    return STYLES[style](tree, rng)


def document(rng: random.Random, mix: Mix = EVEN) -> tuple[str | None, str]:
    """Draw one training document: (question, response), or (None, prose)."""
    if rng.random() < PROSE_SHARE:
        return None, prose.paragraph(rng)
    level = rng.choices(range(1, arithmetic.MAX_LEVEL + 1), mix.levels)[0]
    problem = arithmetic.generate(level, "train", rng)
    return problem.question, f"{think(problem.tree, rng, mix=mix)}\n</think>\n{problem.answer}"
