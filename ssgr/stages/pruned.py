"""What a prune leaves: the names of its files, and its result as it was written."""

from __future__ import annotations

import json
from pathlib import Path

from ssgr.records import LayerResult, PruneResult

CHECKPOINT, RESULT = "checkpoint", "prune.json"


def read_result(file: Path) -> PruneResult:
    """The result that was written into `file`."""
    found = json.loads(file.read_text())
    return PruneResult(**{**found, "layers": tuple(read_layer(one) for one in found["layers"])})


def read_layer(found: dict[str, object]) -> LayerResult:
    """A layer's result from JSON."""
    return LayerResult(**{**found, "shape": tuple(found["shape"])})  # type: ignore[arg-type]
