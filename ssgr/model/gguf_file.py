"""What a GGUF file says of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROTARY = "rope_freqs.weight"  # divisors of the rotary frequencies; of Llama 3.1 and its distillations
_PLAIN = {"F32", "F16", "BF16"}
_LICENCE = {  # of the file's metadata and of a model card
    "general.license": "license",
    "general.license.name": "license_name",
    "general.license.link": "license_link",
}
_ROLES = {  # what transformers calls them, and the file's metadata
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_CONTROL, _OWN = 3, 4  # types of tokens (llama.cpp, llama_token_type): control, and defined by the user


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    `types` counts the weights stored in each type, without vectors (always F32). Of a byte-level vocabulary, `vocabulary`
    is the size, and `whole` are the tokens that are never cut, by their ids, and whether they are control tokens. `roles`
    are the ids of the tokens that begin, end and pad.
    """

    file: str
    name: str
    architecture: str
    types: dict[str, int]
    numbers: dict[str, int]
    scaling: str
    rotary: Tensor | None
    licence: dict[str, Any]
    whole: dict[int, tuple[str, bool]]
    vocabulary: int
    roles: dict[str, int]

    @property
    def quantised(self) -> list[str]:
        """The quantised types in it, the most frequent first."""
        return [name for name, _ in Counter(self.types).most_common() if name not in _PLAIN]


def look(file: Path) -> Header:
    """Read the header of `file`, and see that all its tensors are there.

    Raises:
        ValueError: the packages that read GGUF are not installed, or it is cut, one of several parts or no GGUF file.
    """
    tensors, fields, whole = _read(file)
    types: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            types[tensor.tensor_type.name] += int(tensor.n_elements)
    if int(fields.get("split.count", 0)) > 1:
        raise ValueError(
            f"model.path={file}: this is one of {fields['split.count']} parts; join them first: type "
            "llama-gguf-split --merge FIRST.gguf WHOLE.gguf"
        )
    architecture = str(fields["general.architecture"])
    bytewise = fields.get("tokenizer.ggml.model") == "gpt2"
    return Header(
        file=file.name,
        name=str(fields.get("general.name", file.stem)),
        architecture=architecture,
        types=dict(types.most_common()),
        numbers={tensor.name: int(tensor.n_elements) for tensor in tensors},
        scaling=str(fields.get(f"{architecture}.rope.scaling.type", "none")),
        rotary=next((torch.tensor(tensor.data) for tensor in tensors if tensor.name == ROTARY), None),
        licence={card: str(fields[field]) for field, card in _LICENCE.items() if field in fields},
        whole=whole if bytewise else {},
        vocabulary=int(fields.get("tokenizer.ggml.tokens", 0)) if bytewise else 0,
        roles={role: int(fields[field]) for role, field in _ROLES.items() if field in fields},
    )


def _read(file: Path) -> tuple[list[Any], dict[str, Any], dict[int, tuple[str, bool]]]:
    """The tensors (their bytes unread) of a GGUF file, its single values and the lengths of its lists, its whole tokens."""
    if absent := [package for package in ("gguf", "accelerate") if find_spec(package) is None]:
        raise ValueError(
            f"model.path={file}: reading GGUF needs {' and '.join(absent)}, which {'are' if absent[1:] else 'is'} not "
            "installed; type pip install 'accelerate>=1.1' 'gguf>=0.10', or install ssgr with its extra gguf"
        )
    from gguf import GGUFReader

    with open(file, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"model.path={file}: this is no GGUF file, it does not begin with GGUF; give another one")
    try:
        reader = GGUFReader(file)
        fields = {name: _content(field) for name, field in reader.fields.items()}
        whole = _whole(reader.fields)
        end = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors)
        if "general.architecture" not in fields:
            raise ValueError("it names no architecture")
    except Exception as error:  # of the reader, on bytes that may be anything
        raise ValueError(f"model.path={file}: this GGUF file is cut or damaged ({error}); download it again") from error
    assert end <= file.stat().st_size, "the reader has seen every tensor"
    return reader.tensors, fields, whole


def _content(field: Any) -> Any:
    return field.contents() if field.types[0].name != "ARRAY" else len(field.data)


def _whole(fields: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    tokens, kinds = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type")
    if tokens is None or kinds is None:
        return {}
    found = {i: int(kinds.parts[at][0]) for i, at in enumerate(kinds.data)}
    return {i: (tokens.contents(i), kind == _CONTROL) for i, kind in found.items() if kind in (_CONTROL, _OWN)}
