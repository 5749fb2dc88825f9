"""What came out of a cell: its record, and the files of its folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

from ssgr import tables
from ssgr.files import write_bytes
from ssgr.records import BenchResult, PruneResult, Reading, RunResult, Score, to_json
from ssgr.stages import evaluate, select
from ssgr.stages.pruned import CHECKPOINT, RESULT, read_result
from ssgr.store import Artefact, Store

LIBRARIES = ("ssgr", "torch", "transformers", "tokenizers", "safetensors", "numpy", "math-verify")


def result(done: Mapping[str, Artefact], benches: Sequence[str], config: dict[str, Any]) -> RunResult:
    """What came out of a cell whose stages are `done`, by their names."""
    return RunResult(
        config=config,
        keys={name: artefact.key for name, artefact in done.items()},
        versions=versions(),
        stages={name: artefact.run for name, artefact in done.items()},
        calibration=json.loads((done["select"].path / select.SUMMARY).read_text()),
        prune=_read_prune(done["prune"]),
        scores={name: _compared(done[f"evaluate_dense.{name}"], done[f"evaluate_pruned.{name}"]) for name in benches},
    )


def _read_prune(pruned: Artefact) -> PruneResult:
    checkpoint = str((pruned.path / CHECKPOINT).resolve())
    return dataclasses.replace(read_result(pruned.path / RESULT), checkpoint=checkpoint)


def read_score(evaluated: Artefact) -> Score | Reading:
    """What an evaluate artefact found."""
    found = json.loads((evaluated.path / evaluate.SCORE).read_text())
    kind: type[Score] | type[Reading] = Score if "attempts" in found else Reading
    return kind(**{**found, "ci95": tuple(found["ci95"])})


def _compared(dense: Artefact, pruned: Artefact) -> BenchResult:
    one, other = read_score(dense), read_score(pruned)
    files = (pruned.path / evaluate.OUTCOMES, dense.path / evaluate.OUTCOMES)
    if isinstance(one, Score):
        gap = evaluate.difference(*map(tables.read_outcomes, files))
    else:
        gap = evaluate.item_difference(*map(tables.read_items, files))
    return BenchResult(one, other, *gap)


def write(result: RunResult, store: Store, folder: Path) -> None:
    """Write `folder`/result.json, with links to what is large and a copy of the outcomes beside it."""
    links = {
        folder / "checkpoint": Path(result.prune.checkpoint),
        folder / "calibration.parquet": store.root / "select" / result.keys["select"] / select.ROWS,
    }
    small: dict[Path, Path] = {}  # copied, so that the tables outlive the store
    for bench, which in product(result.scores, ("dense", "pruned")):
        at = store.root / "evaluate" / result.keys[f"evaluate_{which}.{bench}"]
        small[tables.outcomes_file(folder, bench, which)] = at / evaluate.OUTCOMES
        if (at / evaluate.TEXTS).exists():
            links[tables.outcomes_file(folder, bench, which, "texts")] = at / evaluate.TEXTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for link, target in links.items():
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(target.resolve())
        for copy, source in small.items():
            copy.parent.mkdir(exist_ok=True)
            copy.unlink(missing_ok=True)
            shutil.copyfile(source, copy)
        write_bytes(folder / "result.json", json.dumps(to_json(result), indent=1, default=str).encode())
    except OSError as error:
        raise ValueError(
            f"the output folder {folder} cannot be written ({error.strerror}): type hydra.run.dir=DIR, or hydra.sweep.dir=DIR "
            "with -m"
        ) from error


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide what comes out."""
    out = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out
