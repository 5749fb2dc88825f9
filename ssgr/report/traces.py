"""What the reader of traces shows: a bounded sample of problems, each with the answers of the models side by side.

Answers are untrusted: what steers a terminal or the direction of text is made visible here, and the page shows the rest as
text alone.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ssgr.records import Outcome, Text
from ssgr.report.cells import Cell
from ssgr.tables import outcomes_file, read_outcomes, read_texts

MAX_PROBLEMS, MAX_MODELS, MAX_ATTEMPTS = 48, 12, 2  # of one model and benchmark, in the page
MAX_HEAD, MAX_TAIL = 5_000, 1_500  # characters of one text: where it begins, and where it was cut
MAX_CHARACTERS = 6_000_000  # of all texts in the page
_KEPT = "\n\t\u200d"  # lines, tabs, and what joins emoji
_T = TypeVar("_T")
_PICTURES = 0x2400  # Unicode's control pictures


@dataclass
class Room:
    """How many characters the page still has room for."""

    left: int


def visible(text: str) -> str:
    """`text` with every control, direction override and lone surrogate as a sign that can be seen and does nothing."""
    return "".join(
        _sign(ord(c)) if c not in _KEPT and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c
        for c in text
    )


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(_PICTURES + code)
    return "\u2421" if code == 0x7F else f"⟨U+{code:04X}⟩"


def bounded(text: str) -> dict[str, Any]:
    """Beginning and end of a text, and how many characters between them are left out."""
    left_out = len(text) - MAX_HEAD - MAX_TAIL
    if left_out <= 0:
        return {"head": visible(text), "left_out": 0, "tail": ""}
    return {"head": visible(text[:MAX_HEAD]), "left_out": left_out, "tail": visible(text[-MAX_TAIL:])}


def sample(cells: Sequence[tuple[str, Cell]], room: Room) -> dict[str, Any] | str:
    """Answers of the dense and of the pruned models of `cells`, each with its label; or why there are none.

    The page says how many of how many problems, models and attempts there are.
    """
    there = [(label, cell) for label, cell in cells if _texts(cell, "pruned").exists()]
    if not there or not _texts(there[0][1], "dense").exists():
        return (
            "The texts of the answers lie in the store that the sweep was made with, and are not there any more: give the "
            "command of the sweep again."
        )
    some = _spread(there, MAX_MODELS)
    models = [("dense", some[0][1], "dense"), *((label, cell, "pruned") for label, cell in some)]
    outcomes = [_by_problem(read_outcomes(cell.outcomes(which))) for _, cell, which in models]
    texts = [_by_attempt(read_texts(_texts(cell, which))) for _, cell, which in models]
    ids = sorted(outcomes[0], key=lambda problem: (outcomes[0][problem][0].level or 0, problem))
    thinking = some[0][1].result["config"].get("model", {}).get("thinking") or {}
    some_ids = _spread(ids, MAX_PROBLEMS)
    problems: dict[int, dict[str, Any]] = {}
    for i in sorted(range(len(some_ids)), key=_bits_reversed):  # easy and hard ones alike until the room ends
        if room.left <= 0:
            break
        problems[i] = _problem(some_ids[i], outcomes, texts, thinking, room)
    return {
        "models": [visible(label) for label, _, _ in models],
        "problems": [problems[i] for i in sorted(problems)],
        "attempts": min(MAX_ATTEMPTS, max(len(every) for every in outcomes[0].values())),
        "of": {
            "models": len(cells),
            "problems": len(ids),
            "attempts": max(len(every) for every in outcomes[0].values()),
        },
    }


def _texts(cell: Cell, which: str) -> Path:
    return outcomes_file(cell.path.parent, cell.fields["bench"], which, "texts")


def _spread(every: Sequence[_T], count: int) -> list[_T]:
    """At most `count` of `every`, evenly spaced."""
    step = max(1.0, len(every) / count)
    return [every[int(i * step)] for i in range(min(count, len(every)))]


def _bits_reversed(i: int) -> str:
    """Numbers from 0 on sorted by this are spread over all of them from the beginning: 0, 4, 2, 6, 1, 5, 3, 7."""
    return f"{i:032b}"[::-1]


def _by_problem(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    out: dict[str, list[Outcome]] = defaultdict(list)
    for one in sorted(outcomes, key=lambda outcome: (outcome.problem_id, outcome.attempt)):
        out[one.problem_id].append(one)
    return dict(out)


def _by_attempt(texts: Sequence[Text]) -> dict[tuple[str, int], Text]:
    return {(text.problem_id, text.attempt): text for text in texts}


def _problem(
    problem: str,
    outcomes: Sequence[dict[str, list[Outcome]]],
    texts: Sequence[dict[tuple[str, int], Text]],
    thinking: dict[str, Any],
    room: Room,
) -> dict[str, Any]:
    first = next((text for own in texts for (name, _), text in own.items() if name == problem), None)
    answers = []
    for model, (every, own) in enumerate(zip(outcomes, texts, strict=True)):
        for outcome in every.get(problem, [])[:MAX_ATTEMPTS]:
            text = own.get((problem, outcome.attempt))
            answers.append(_answer(model, outcome, text.response if text else "", thinking, room))
    return {
        "id": visible(problem)[:200],
        "level": outcomes[0][problem][0].level,
        "question": bounded(first.question if first else ""),
        "gold": bounded(first.gold if first else ""),
        "answers": answers,
    }


def _answer(model: int, outcome: Outcome, response: str, thinking: dict[str, Any], room: Room) -> dict[str, Any]:
    before, tag, after = response.rpartition(thinking["end"]) if thinking.get("end") else ("", "", response)
    if not tag and thinking.get("end") and not outcome.closed:
        before, after = response, ""
    parts = {"think": bounded((before + tag).strip()), "text": bounded(after.strip())}
    room.left -= sum(len(part["head"]) + len(part["tail"]) for part in parts.values())
    return {
        "model": model,
        "attempt": outcome.attempt,
        "verdict": str(outcome.verdict),
        "answer": bounded(outcome.answer or ""),
        "tokens": outcome.tokens,
        "thinking": outcome.thinking,
        "cut": outcome.finish == "length",
        "closed": outcome.closed,
        "looping": outcome.looping,
        **parts,
    }
