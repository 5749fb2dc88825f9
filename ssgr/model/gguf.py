"""GGUF: a file of llama.cpp made into a Hugging Face directory, once, by transformers' own loader.

Pruning reads single tensors from safetensors shards, so a GGUF file is converted before anything else and kept in the
store. transformers rebuilds the configuration and the tokenizer from the file's metadata.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ssgr import keys
from ssgr.model import Model, checksum, locate
from ssgr.model.checkpoint import CARD
from ssgr.model.gguf_file import Header, look
from ssgr.model.gguf_gaps import check_roles, check_whole, keep_whole, restore_rotary
from ssgr.store import Artefact, Store

STAGE, VERSION = "convert", 1
CHECKPOINT, RESULT = "checkpoint", "convert.json"
_SHARD = "2GB"  # large enough that a model of 70 billion weights has tens of files, small enough to move one by one
_log = logging.getLogger("ssgr")


def stored(model: Model, store: Store) -> tuple[Model, Artefact | None]:
    """`model` as it is, with no result; or, if its path is a GGUF file, that file as a directory in `store`.

    Raises:
        ValueError: as `find` and `convert`.
    """
    file = find(model.path)
    if file is None:
        return model, None
    config = {"file": checksum(file), "dtype": model.dtype}

    def make(work: Path) -> None:
        made = convert(file, work / CHECKPOINT, model.dtype)
        if made["checksum"] != config["file"]:
            raise ValueError(f"model.path={file}: the file changed while it was converted; give the command again")
        (work / RESULT).write_text(json.dumps(made, indent=1))

    artefact = store.run(STAGE, keys.key(STAGE, VERSION, config, {}), make, config=config)
    return dataclasses.replace(model, path=str(artefact.path / CHECKPOINT)), artefact


def record(artefact: Artefact | None) -> dict[str, Any] | None:
    """What was converted into `artefact`, as `convert` told it."""
    return json.loads((artefact.path / RESULT).read_text()) if artefact else None


def find(path: str) -> Path | None:
    """The GGUF file that `path` names: itself, or the only one of a directory without safetensors; else None.

    Raises:
        ValueError: it is not there, or is one of several.
    """
    place = locate(path)
    if place.suffix == ".gguf" and not place.is_dir():
        if not place.is_file():
            raise ValueError(f"model.path={path}: there is no such file; type model.path=FILE.gguf")
        return place
    files = sorted(place.glob("*.gguf")) if place.is_dir() and not any(place.glob("*.safetensors")) else []
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"model.path={path}: several GGUF files are there ({names}); type model.path={path}/FILE.gguf")
    return files[0] if files else None


def convert(file: Path, folder: Path, dtype: str) -> dict[str, Any]:
    """Make `folder`, a Hugging Face directory, of the GGUF `file`; what was converted, for the record.

    `dtype` is float32, bfloat16, float16 or auto: float32 for a file of F32 alone, else bfloat16, which rounds by less
    than a quantisation did, gives back what was published where an F16 file was made of bfloat16, and does not overflow
    as float16 may. The loader holds the whole model in memory, once as read and once in the model. `folder` appears when
    it is complete.

    Raises:
        ValueError: the packages that read GGUF are not installed, the file is cut or no GGUF file, or the loader does not
            know its architecture or something in it that the model needs.
    """
    header = look(file)
    chosen = target(header, dtype)
    if header.quantised:
        _log.warning(
            "%s: weights are dequantised from %s to %s; what the quantisation lost stays lost, so prefer the original "
            "checkpoint where there is one", file.name, ", ".join(header.quantised), chosen,
        )  # fmt: skip
    beside = folder.with_name(f"{folder.name}.new")
    for stale in (beside, folder):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory() as alone:  # what lies beside the file must not be read with it
        link = Path(alone, "model.gguf")
        link.symlink_to(file.resolve())
        try:
            model, missing = _load(link, getattr(torch, chosen))
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=str(link))
        except Exception as error:  # of the loader, on a file that may hold anything
            first = (str(error).strip().splitlines() or [type(error).__name__])[0].replace(str(link), file.name)
            raise ValueError(
                f"model.path={file}: transformers {transformers.__version__} cannot load this GGUF file of architecture "
                f"{header.architecture} ({first}); take the safetensors checkpoint of the model"
            ) from error
    check_whole(file, header, model, missing)
    restore_rotary(file, header, model.config)
    model.save_pretrained(beside, max_shard_size=_SHARD)
    tokenizer.save_pretrained(beside)
    keep_whole(file, header, beside / "tokenizer.json")
    check_roles(file, header, AutoTokenizer.from_pretrained(beside))
    (beside / CARD).write_text(_readme(header, chosen))
    beside.rename(folder)
    return {
        "file": header.file,
        "checksum": checksum(file),
        "name": header.name,
        "architecture": header.architecture,
        "types": header.types,
        "dtype": chosen,
    }


def target(header: Header, asked: str) -> str:
    """The dtype to convert to: the one asked for, or what `auto` means for this file."""
    if asked != "auto":
        return asked
    return "float32" if set(header.types) <= {"F32"} else "bfloat16"


def _load(link: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, list[str]]:
    """The model of a GGUF file with plain weights, and the names of those that the file lacks."""
    packed = getattr(transformers, "GgufConfig", None)  # of newer versions, which may leave weights in their blocks
    how = {"quantization_config": packed(dequantize=True)} if packed else {}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(link.parent), gguf_file=str(link), dtype=dtype, output_loading_info=True, **how
    )
    model, found = loaded
    return model, sorted(found["missing_keys"])


def _readme(header: Header, dtype: str) -> str:
    front = ModelCardData(library_name="transformers", pipeline_tag="text-generation", **header.licence).to_yaml()
    kinds = ", ".join(header.types)
    return f"---\n{front}\n---\n\n# {header.name}\n\nConverted from `{header.file}` ({kinds}) to {dtype}.\n"
