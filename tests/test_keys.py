"""ssgr.keys: what a key is made of, and that it stays the same."""

from __future__ import annotations

import dataclasses
import enum
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ssgr
from ssgr.keys import describe, key


class Band(enum.StrEnum):
    HARD = "hard"


@dataclass(frozen=True)
class Sampler:
    temperature: float = 0.6
    stop: tuple[int, ...] = (1, 2)
    batch_size: int = dataclasses.field(default=8, metadata={"key": False})


@dataclass(frozen=True)
class Config:
    sampler: Sampler = Sampler()
    band: Band = Band.HARD
    data: Path = Path("a/b")
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class File:
    path: Path
    checksum: str

    def key_content(self) -> object:
        return self.checksum


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def test_the_key_is_pinned() -> None:
    config = Config(extra={"ü": [1, 1.5, 1e300, None, True], "a": float("-inf")})
    # A change here renames every stored result, so that all are made again: it needs a reason.
    assert key("sample", 3, config, {"model": "m1", "problems": "p1"}) == "940d867449eeca56f213103c"


def test_another_process_finds_the_same_key() -> None:
    code = "from ssgr.keys import key; print(key('s', 1, {'b': 1, 'a': 0.1}, {'i': 'k'}))"
    root = Path(ssgr.__file__).parent.parent
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert keys == {key("s", 1, {"a": 0.1, "b": 1}, {"i": "k"})}


def test_a_description_reads_like_the_config() -> None:
    assert describe(Config()) == {
        "_type": "Config",
        "sampler": {"_type": "Sampler", "temperature": 0.6, "stop": [1, 2]},
        "band": {"_type": "Band", "value": "hard"},
        "data": "a/b",
        "extra": {},
    }


def test_fields_that_cannot_change_a_result_are_no_part_of_its_key() -> None:
    plain, other = Config(), Config(sampler=Sampler(batch_size=64))
    assert key("s", 1, plain, {}) == key("s", 1, other, {})
    assert key("s", 1, plain, {}) != key("s", 1, Config(sampler=Sampler(temperature=0.7)), {})


def test_an_object_may_say_what_it_is_keyed_by() -> None:
    assert describe(File(Path("here"), "abc")) == describe(File(Path("there"), "abc"))
    assert describe(File(Path("here"), "abc")) != describe(File(Path("here"), "abd"))


@pytest.mark.parametrize(
    "other",
    [
        ("t", 1, {"a": 1}, {"i": "k"}),
        ("s", 2, {"a": 1}, {"i": "k"}),
        ("s", 1, {"a": 2}, {"i": "k"}),
        ("s", 1, {"a": 1}, {"i": "l"}),
        ("s", 1, {"a": 1}, {"j": "k"}),
        ("s", 1, {"a": True}, {"i": "k"}),
        ("s", 1, {"a": "1"}, {"i": "k"}),
    ],
)
def test_every_part_of_a_key_counts(other: tuple[Any, ...]) -> None:
    assert key("s", 1, {"a": 1}, {"i": "k"}) != key(*other)


@settings(max_examples=50)
@given(JSON_VALUES)
def test_a_description_survives_json_and_another_description(value: Any) -> None:
    described = describe(value)
    assert json.loads(json.dumps(described)) == described == describe(described)


@settings(max_examples=50)
@given(JSON_VALUES, JSON_VALUES)
def test_keys_are_equal_exactly_when_canonical_json_is(a: Any, b: Any) -> None:
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (key("s", 1, a, {}) == key("s", 1, b, {})) == same


@dataclass
class Thawed:
    x: int = 1


@pytest.mark.parametrize("bad", [{1, 2}, object(), Thawed(), Sampler, b"x", 1j, {1: 2}])
def test_what_has_no_description_is_refused_with_its_place(bad: object) -> None:
    with pytest.raises(TypeError, match=r"^extra\['n'\]\[1\]: .*cannot be part of a key"):
        describe(Config(extra={"n": [0, bad]}))


def test_nan_is_refused_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"^sampler\.temperature: nan cannot be part of a key"):
        describe(Config(sampler=Sampler(temperature=float("nan"))))


def test_infinity_is_described_in_strict_json() -> None:
    assert json.dumps(describe([float("inf"), -float("inf")]), allow_nan=False).count("inf") == 2
    assert describe(float("inf")) != describe("inf")
