"""Generated arithmetic problems: expressions and word problems with a known number of operations.

A problem is a binary tree over small whole numbers. Its split (train, calibration, test) is a function of the tree
alone, up to the order of commutative operands, so the splits are disjoint by construction whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Literal, TypeAlias

Tree: TypeAlias = "int | tuple[str, Tree, Tree]"
Split = Literal["train", "calibration", "test"]

SPLITS: tuple[Split, ...] = ("train", "calibration", "test")
MAX_LEVEL = 8  # more operations than this no longer fit the tiny model's trained context
MAX_VALUE = 999  # three digits: larger numbers make every step hard, and difficulty would no longer be depth
WORD_SHARE = 0.25  # share of word problems; the rest are bare expressions

_SPLIT_OF_BUCKET: tuple[Split, ...] = ("train",) * 7 + ("calibration",) * 2 + ("test",)  # 70 / 20 / 10 %
_PRECEDENCE = {"+": 1, "-": 1, "*": 2}
_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Ida", "Jonas", "Lena", "Max")
_THINGS = ("apples", "books", "coins", "marbles", "stamps", "shells", "cards", "pens", "nuts", "stones")
_ADD = ("{n} gets {k} more.", "{n} finds {k} more.", "{n} buys {k} more.")
_SUB = ("{n} gives away {k}.", "{n} loses {k}.", "{n} sells {k}.")
_MUL = ("Then the number grows {k} times.", "Then {n} has {k} times as many.")
_ASK = ("Compute {e}.", "What is {e}?", "Find the value of {e}.")


@dataclass(frozen=True)
class Arithmetic:
    """One generated problem: its question, its tree of operations and its answer."""

    question: str
    tree: Tree
    answer: int

    @property
    def level(self) -> int:
        """Number of operations."""
        return operations(self.tree)


def operations(tree: Tree) -> int:
    """Number of operations in `tree`."""
    return 0 if isinstance(tree, int) else 1 + operations(tree[1]) + operations(tree[2])


def apply(op: str, a: int, b: int) -> int:
    """`a op b` for op in + - *."""
    return a + b if op == "+" else a - b if op == "-" else a * b


def value(tree: Tree) -> int:
    """The value of `tree`."""
    return tree if isinstance(tree, int) else apply(tree[0], value(tree[1]), value(tree[2]))


def text(tree: Tree) -> str:
    """`tree` in infix form with as few brackets as the usual precedence allows."""
    if isinstance(tree, int):
        return str(tree)
    op, left, right = tree
    a, b = text(left), text(right)
    if not isinstance(left, int) and _PRECEDENCE[left[0]] < _PRECEDENCE[op]:
        a = f"({a})"
    if not isinstance(right, int) and _PRECEDENCE[right[0]] <= _PRECEDENCE[op]:
        b = f"({b})"
    return f"{a}{op}{b}"


def steps(tree: Tree) -> list[tuple[str, int, int, int, str]]:
    """Reduce `tree` one operation at a time: (op, a, b, result, the whole expression after the step)."""
    out: list[tuple[str, int, int, int, str]] = []
    while not isinstance(tree, int):
        tree, (op, a, b) = _reduce(tree)
        out.append((op, a, b, apply(op, a, b), text(tree)))
    return out


def _reduce(tree: tuple[str, Tree, Tree]) -> tuple[Tree, tuple[str, int, int]]:
    op, left, right = tree
    if not isinstance(left, int):
        new, done = _reduce(left)
        return (op, new, right), done
    if not isinstance(right, int):
        new, done = _reduce(right)
        return (op, left, new), done
    return apply(op, left, right), (op, left, right)


def split_of(tree: Tree) -> Split:
    """The split that `tree` belongs to: a hash of its canonical form."""
    return _SPLIT_OF_BUCKET[hashlib.sha256(_canonical(tree).encode()).digest()[0] % len(_SPLIT_OF_BUCKET)]


def _canonical(tree: Tree) -> str:
    if isinstance(tree, int):
        return str(tree)
    a, b = _canonical(tree[1]), _canonical(tree[2])
    if tree[0] != "-" and b < a:
        a, b = b, a
    return f"({a}{tree[0]}{b})"


def generate(level: int, split: Split, rng: random.Random) -> Arithmetic:
    """Draw one problem with `level` operations from `split`.

    Raises:
        ValueError: `level` outside 1 to 8, or an unknown split.
    """
    if not 1 <= level <= MAX_LEVEL:
        raise ValueError(f"arithmetic level {level!r}: valid levels are 1 to {MAX_LEVEL} operations")
    if split not in SPLITS:
        raise ValueError(f"arithmetic split {split!r}: valid splits are {', '.join(SPLITS)}")
    words = rng.random() < WORD_SHARE
    while True:
        tree = _chain(level, rng) if words else _expression(level, rng)
        if _in_range(tree) and split_of(tree) == split:
            question = _story(tree, rng) if words else rng.choice(_ASK).format(e=text(tree))
            return Arithmetic(question, tree, value(tree))


def single(rng: random.Random) -> Arithmetic:
    """Draw one operation on numbers of one to three digits, as they occur in the middle of long problems; of train."""
    while True:
        a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for digits in rng.choices((1, 2, 3), (1, 2, 2), k=2))
        tree: Tree = (rng.choice("++--*"), a, b)
        if _in_range(tree) and split_of(tree) == "train":
            return Arithmetic(rng.choice(_ASK).format(e=text(tree)), tree, value(tree))


def _expression(level: int, rng: random.Random) -> Tree:
    if level == 0:
        return rng.randint(2, 99)
    op = rng.choice("++--*")
    if op == "*":
        sides: tuple[Tree, Tree] = (_expression(level - 1, rng), rng.randint(2, 9))
        return (op, *(sides if rng.random() < 0.5 else sides[::-1]))
    right = min(rng.choice((0, 0, 0, 1, 2)), level - 1)  # mostly left-deep, as people write sums
    return (op, _expression(level - 1 - right, rng), _expression(right, rng))


def _chain(level: int, rng: random.Random) -> Tree:
    tree: Tree = rng.randint(2, 99)
    for _ in range(level):
        op = rng.choice("++--*")
        tree = (op, tree, rng.randint(2, 9) if op == "*" else rng.randint(2, 99))
    return tree


def _in_range(tree: Tree) -> bool:
    if isinstance(tree, int):
        return True
    if not (_in_range(tree[1]) and _in_range(tree[2])):
        return False
    a, b = value(tree[1]), value(tree[2])
    if tree[0] == "*" and (max(a, b) > 99 or min(a, b) > 9):
        return False  # one digit times two: what a person does in one line
    return 0 <= apply(tree[0], a, b) <= MAX_VALUE


def _story(tree: Tree, rng: random.Random) -> str:
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    sentences: list[str] = []
    while not isinstance(tree, int):
        op, left, k = tree
        form = rng.choice({"+": _ADD, "-": _SUB, "*": _MUL}[op])
        sentences.append(form.format(n=name, k=k))
        tree = left
    sentences.append(f"{name} has {tree} {things}.")
    return " ".join([*reversed(sentences), f"How many {things} does {name} have now?"])
