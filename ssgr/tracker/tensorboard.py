"""TensorBoard: the event files of a cell, in the folder `tensorboard` beside its result.json."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssgr.records import to_json
from ssgr.tracker import Cell, content

FOLDER = "tensorboard"


@dataclass(frozen=True)
class TensorBoard:
    """Scalars, text and histograms; a cell that is tracked again replaces its events."""

    name: str = "tensorboard"
    samples: int = 16
    sample_chars: int = 4000

    def __post_init__(self) -> None:
        content.check(self.samples, self.sample_chars)

    def track(self, cell: Cell) -> None:
        """Write the events of a cell beside, then in place of those that were there.

        Raises:
            ImportError: the extra `tensorboard` is not installed.
            OSError: the folder cannot be written.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard is not installed; type pip install -e '.[tensorboard]'") from error
        result = to_json(cell.result)
        beside = cell.folder / f"{FOLDER}.new"
        shutil.rmtree(beside, ignore_errors=True)
        writer = SummaryWriter(str(beside))
        try:
            self._write(writer, cell.folder, result)
        finally:
            writer.close()
        shutil.rmtree(cell.folder / FOLDER, ignore_errors=True)
        beside.rename(cell.folder / FOLDER)

    def _write(self, writer: Any, folder: Path, result: dict[str, Any]) -> None:
        for name, value in content.scalars(result).items():
            writer.add_scalar(name, value)
        kinds: dict[tuple[str, str], list[float]] = defaultdict(list)
        for i, layer in enumerate(content.layers(result)):
            for name in content.LAYER:
                if layer[name] is not None:
                    writer.add_scalar(f"layer/{name}", layer[name], i)
                    kinds[name, layer["name"].rpartition(".")[2]].append(layer[name])
        for (name, kind), values in kinds.items():
            writer.add_histogram(f"layers/{name}/{kind}", np.asarray(values))
        settings = json.dumps(content.without_secrets(result["config"]), indent=1, default=str)
        writer.add_text("config", _verbatim(settings))
        for row in content.without_secrets(content.samples(folder, result, self.samples, self.sample_chars)):
            shown = dict(zip(content.SAMPLE, row, strict=True))
            told = "\n\n".join(f"{name}\n{value}" for name, value in shown.items())
            writer.add_text(f"samples/{shown['bench']}/{shown['problem_id']} {shown['attempt']}", _verbatim(told))


def _verbatim(text: str) -> str:
    """Text as a block of code of Markdown, so that TensorBoard renders nothing of it."""
    return "\n".join(f"    {line}" for line in text.splitlines())
