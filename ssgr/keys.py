"""What a result is called: a hash of everything that can change it, and of nothing else."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

KEY_LENGTH = 24  # hex characters: 96 bits, no collision to fear among the results of a lifetime, and still legible


def key(stage: str, version: int, config: object, inputs: Mapping[str, str]) -> str:
    """The name of a stage's result: 24 hex characters over the stage, its version, its config and its inputs' keys.

    Raises:
        TypeError, ValueError: as `describe`.
    """
    whole = {"stage": stage, "version": version, "config": describe(config), "inputs": describe(dict(inputs))}
    return digest(whole)[:KEY_LENGTH]


def digest(obj: object) -> str:
    """The sha256 of the description of `obj`, for what is too long to stand in a manifest."""
    canonical = json.dumps(describe(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def describe(obj: object) -> Json:
    """`obj` as plain JSON values, without the dataclass fields that cannot change a result.

    A frozen dataclass becomes {"_type": its class, field: ...}; a field with metadata {"key": False} (a batch size, a
    device, a path) is left out. An object with a method `key_content` is described by what that returns.
    Describing a description changes nothing.

    Raises:
        TypeError: something that has no description, with the path of its field.
        ValueError: a NaN, which equals nothing, not even itself.
    """
    return _describe(obj, "")


def _describe(obj: object, where: str) -> Json:
    typed: dict[str, Json] = {"_type": type(obj).__qualname__}
    content = None if isinstance(obj, type) else getattr(obj, "key_content", None)
    if callable(content):
        return {**typed, "content": _describe(content(), f"{where}.key_content()")}
    if isinstance(obj, enum.Enum):
        return {**typed, "value": _describe(obj.value, f"{where}.value")}
    if obj is None or isinstance(obj, (bool, int, str)):
        return obj
    if isinstance(obj, float):
        return _describe_float(obj, where)
    if isinstance(obj, PurePath):
        return str(obj)
    if isinstance(obj, (tuple, list)):
        return [_describe(item, f"{where}[{i}]") for i, item in enumerate(obj)]
    if isinstance(obj, dict):
        return {_checked_name(name, where): _describe(item, f"{where}[{name!r}]") for name, item in obj.items()}
    params: Any = getattr(obj, "__dataclass_params__", None)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type) and params.frozen:
        kept = [field.name for field in dataclasses.fields(obj) if field.metadata.get("key", True)]
        assert "_type" not in kept, f"{typed['_type']}: the field name _type is taken"
        return {**typed, **{name: _describe(getattr(obj, name), f"{where}.{name}") for name in kept}}
    raise TypeError(
        f"{_place(where)}: {typed['_type']} cannot be part of a key: valid are frozen dataclasses, tuples, lists, "
        "dicts with str keys, str, int, float, bool, None, Enum, Path and objects with key_content()"
    )


def _describe_float(number: float, where: str) -> Json:
    if math.isnan(number):
        raise ValueError(f"{_place(where)}: nan cannot be part of a key: give a number, or null for none")
    if math.isinf(number):  # strict JSON has no word for it
        return {"_type": "float", "value": str(float(number))}
    return float(number)


def _checked_name(name: object, where: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{_place(where)}: the dict key {name!r} cannot be part of a key: dict keys must be str")
    return name


def _place(where: str) -> str:
    return where.lstrip(".") or "config"
