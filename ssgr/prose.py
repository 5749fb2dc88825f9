"""Generated plain prose: general text without numbers or reasoning, the stand-in for C4 on the tiny model."""

from __future__ import annotations

import random

_PLACES = ("the harbour", "the old mill", "the market", "a quiet valley", "the garden", "the library", "a small village",
           "the forest", "the river", "the station", "the hill", "the northern coast")  # fmt: skip
_PEOPLE = ("the baker", "a young painter", "the teacher", "my neighbour", "the captain", "an old farmer", "the doctor",
           "her brother", "a traveller", "the gardener", "the musician", "a child")  # fmt: skip
_DOES = ("walked to", "looked at", "remembered", "wrote about", "dreamed of", "returned to", "talked about", "painted",
         "lived near", "searched for", "waited at", "came from")  # fmt: skip
_ADJ = ("warm", "grey", "gentle", "bright", "strange", "silent", "cold", "golden", "heavy", "distant", "green", "soft")
_NOUNS = ("morning", "wind", "rain", "letter", "song", "window", "light", "road", "evening", "story", "boat", "winter")
_VERBS = ("moved slowly", "seemed to wait", "faded away", "was hard to forget", "felt familiar", "changed everything",
          "came and went", "filled the room", "lasted for days", "brought no news")  # fmt: skip
_JOINS = ("because", "although", "while", "before", "after", "until")
_OPENERS = ("In the morning", "Later that day", "As usual", "Every summer", "Without a word", "For a long time",
            "Near the bridge", "Against all advice")  # fmt: skip


def paragraph(rng: random.Random) -> str:
    """Draw one paragraph of three to eight sentences."""
    return " ".join(_sentence(rng) for _ in range(rng.randint(3, 8)))


def _thing(rng: random.Random) -> str:
    return f"the {rng.choice(_ADJ)} {rng.choice(_NOUNS)}"


def _clause(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return f"{rng.choice(_PEOPLE)} {rng.choice(_DOES)} {rng.choice((rng.choice(_PLACES), _thing(rng)))}"
    return f"{_thing(rng)} {rng.choice(_VERBS)}"


def _sentence(rng: random.Random) -> str:
    form = rng.randrange(4)
    if form == 0:
        words = _clause(rng)
    elif form == 1:
        words = f"{_clause(rng)}, {rng.choice(_JOINS)} {_clause(rng)}"
    elif form == 2:
        words = f"{rng.choice(_OPENERS)}, {_clause(rng)}"
    else:
        words = f"{_clause(rng)} and {_clause(rng)}"
    return words[0].upper() + words[1:] + "."
