"""Card: what a pruned checkpoint says of itself, to programs (ssgr.json) and to people (README.md).

Both are made of what was given alone: no time, host or folder is in them, so the same prune gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from ssgr.model import Model
from ssgr.model.checkpoint import CARD
from ssgr.records import CalibrationSet

FORMAT, FILE = 1, "ssgr.json"
_ZEROS = {  # of a PruneResult, and what the card calls them
    "sparsity_target": "asked for",
    "sparsity_realised": "of the pruned matrices",
    "sparsity_model": "of all weights but embeddings and output layer",
    "sparsity_with_embeddings": "of all weights",
}
_LAYER = ("name", "shape", "target", "sparsity", "tokens", "error", "error_held_out", "condition", "damping")
_LICENCE = ("license", "license_name", "license_link")
_CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})/?$")  # a folder of the hub's cache


def provenance(
    model: Model,
    result: Mapping[str, Any],
    settings: Mapping[str, Any],
    calibration: CalibrationSet | None,
    keys: Mapping[str, str],
    versions: Mapping[str, str],
    converted: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Where a pruned checkpoint comes from, as plain JSON values.

    `result` is a PruneResult as JSON, `settings` what describes pruner, sparsity, allocation and scope (by those names),
    `keys` those of the stages in the store, `converted` the record of a conversion from GGUF, which comes from no folder
    either. Of the calibration it has digests: of the ids of its rows, and of their tokens.
    """
    return {
        "format": FORMAT,
        "versions": dict(versions),
        "source": _source(model, converted),
        **settings,
        "propagate": result["propagate"] if settings.get("passing", True) else None,  # of a pruner that looks at rows
        "zeros": {name: result[name] for name in _ZEROS if name in result},
        "unseen": result.get("unseen", 0),
        "layers": [{name: _finite(layer[name]) for name in _LAYER if name in layer} for layer in result["layers"]],
        "calibration": None if calibration is None else _calibration(calibration),
        "keys": dict(keys),
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value  # strict JSON has no other word


def _source(model: Model, converted: Mapping[str, Any] | None) -> dict[str, Any]:
    """The model that was pruned, by names that mean something elsewhere; one pruned before tells its own story."""
    folder = model.directory
    cached = _CACHED.search(folder.as_posix()) if folder else None
    out: dict[str, Any] = {"name": model.name, "dtype": model.dtype, "fingerprint": model.fingerprint}
    if converted:
        out["gguf"] = dict(converted)
    elif cached:
        out |= {"hub": f"{cached[1]}/{cached[2]}", "revision": cached[3]}
    elif folder is None:
        out |= {"hub": model.path, "revision": model.fingerprint}
    else:
        out["folder"] = model.path if "://" in model.path else folder.resolve().name
    if folder and (folder / FILE).is_file():
        out["pruned"] = json.loads((folder / FILE).read_text())
    return out


def _calibration(calibration: CalibrationSet) -> dict[str, Any]:
    ids, tokens = hashlib.sha256(), hashlib.sha256()
    for row in calibration.rows:
        ids.update(f"{row.id}\n".encode())
        tokens.update(f"{','.join(map(str, row.ids))}\n".encode())
    return {
        "source": calibration.source,
        "rows": len(calibration.rows),
        "tokens": calibration.tokens,
        "funnel": [*map(list, calibration.funnel)],
        "row_ids_sha256": ids.hexdigest(),
        "token_ids_sha256": tokens.hexdigest(),
    }


def licence(source: Path) -> dict[str, str]:
    """What the front matter of the card in the folder `source` says of its licence; nothing if it says nothing."""
    try:
        front = metadata_load(source / CARD) or {}
    except Exception:  # there is no card, or its front matter is no YAML
        return {}
    return {name: str(front[name]) for name in _LICENCE if isinstance(front.get(name), str)}


def write(folder: Path, record: Mapping[str, Any], source: Path) -> None:
    """Write ssgr.json and README.md of the pruned checkpoint in `folder`, made from the one in `source`."""
    (folder / FILE).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    (folder / CARD).write_text(model_card(record, licence(source)))


def model_card(record: Mapping[str, Any], licence: Mapping[str, str]) -> str:
    """The model card of a pruned checkpoint: `record` is its provenance, `licence` the front matter's of its source."""
    parts = [
        _front(record, licence),
        _what(record),
        _zeros(record),
        _calibrated(record),
        _LOAD,
        _LIMITS,
        f"## Licence\nThe licence of the base model applies{_named(licence)}.",
        f"## Provenance\n`{FILE}` beside this file has it all: source, settings, every layer, digests of the calibration "
        "rows, library versions and the keys of the results in the store.",
    ]
    return "\n\n".join(parts) + "\n"


def _front(record: Mapping[str, Any], licence: Mapping[str, str]) -> str:
    known: dict[str, Any] = {"base_model": record["source"].get("hub"), **licence}
    kept = {name: value for name, value in known.items() if value is not None}
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["ssgr", "pruned", "sparse"], **kept
    )
    return f"---\n{data.to_yaml()}\n---"


def _what(record: Mapping[str, Any]) -> str:
    source, name = record["source"], _base(record["source"])
    origin = f" at revision `{source['revision']}`" if source.get("revision") else ""
    if gguf := source.get("gguf"):
        origin = f", converted from {', '.join(gguf['types'])} to {gguf['dtype']}"
    ssgr = record["versions"].get("ssgr", "")
    before = " The model had been pruned before." if "pruned" in source else ""
    return (
        f"# {name}, pruned to {record['zeros']['sparsity_target']:.0%} zeros\n\n"
        f"`{name}`{origin}, pruned with {_setting(record['pruner'])} by `ssgr` {ssgr}: sparsity "
        f"{_setting(record['sparsity'])}{_allocated(record)}. Names, shapes, dtypes and tokenizer are those of the "
        f"source.{before}"
    )


def _base(source: Mapping[str, Any]) -> str:
    named = source["folder"] if source["name"] == "local" and "folder" in source else source["name"]
    return str(source.get("hub") or source.get("gguf", {}).get("file") or named)


def _setting(value: Any) -> str:
    """A described dataclass as its name and what it was set to, SparseGPT(damping=0.01, ...)."""
    if not isinstance(value, Mapping):
        return f"`{value}`"
    fields = {
        name: field for name, field in value.items() if name not in ("_type", "name") and field not in (None, [], {})
    }
    given = ", ".join(f"{name}={json.dumps(field)}" for name, field in fields.items())
    return f"`{value.get('_type', 'settings')}({given})`"


def _allocated(record: Mapping[str, Any]) -> str:
    return f", shared among the layers by {_setting(record['allocation'])}" if record.get("allocation") else ""


def _zeros(record: Mapping[str, Any]) -> str:
    rows = [f"| {what} | {record['zeros'][name]:.4f} |" for name, what in _ZEROS.items() if name in record["zeros"]]
    unseen = record["unseen"]
    note = f"\n\n{unseen} matrices met no calibration token and were pruned by magnitude." if unseen else ""
    if "pruned" in record["source"]:
        note += "\n\nOf matrices that only the earlier pruning changed no zeros are counted."
    return "\n".join(["## Sparsity", "| zeros | share |", "| --- | --- |", *rows]) + note


def _calibrated(record: Mapping[str, Any]) -> str:
    found = record["calibration"]
    if found is None:
        return "## Calibration\nNone: the pruner looks at the weights alone."
    tokens = found["tokens"]
    parts = f" ({tokens['prompt']:,} of prompts, {tokens['response']:,} of responses)" if tokens["prompt"] else ""
    each = {
        "pruned": "Each block saw the rows as the pruned blocks before it leave them. ",
        "dense": "Each block saw the rows as the dense model has them. ",
        None: "They told how the zeros are shared among the layers; the pruner looks at the weights alone. ",
    }[record["propagate"]]
    weighed = f"Tokens weighed {_setting(record['scope'])}." if record.get("scope") else ""
    return (
        f"## Calibration\nSource `{found['source']}`: {found['rows']:,} rows, {tokens['realised']:,} tokens{parts}. "
        f"{each}{weighed}"
    ).rstrip()


def _named(licence: Mapping[str, str]) -> str:
    name = licence.get("license_name") or licence.get("license")
    link = licence.get("license_link")
    return (f": {name}" if name else "") + (f" ({link})" if link else "")


_LOAD = """## Use
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

    vllm serve FOLDER"""

_LIMITS = """## Limits
Zeros are stored like any other number: the files are as large as the source's, and without kernels for sparse matrices
nothing is faster. Pruning costs accuracy, of long reasoning most: evaluate the model on what it is meant for before you
use it."""
