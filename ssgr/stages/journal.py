"""Journal: what of a prune is on the disk, so that a killed one goes on where it was.

It stays with the result: what comes after the last block, such as the checksums of all shards, can be cut off too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor, nn

from ssgr import files
from ssgr.model.blocks import Matrix
from ssgr.model.checkpoint import Checkpoint, Replica
from ssgr.records import LayerResult, to_json
from ssgr.stages.pruned import read_layer
from ssgr.stages.walk import Walk

_log = logging.getLogger("ssgr")
_DONE, _RATIOS = "blocks.json", "ratios.json"


class Journal:
    """What is on the disk of a prune into `folder`: the pruned blocks, what was found there, and of which source.

    Raises:
        ValueError: the source is not what it was when the prune began, or `folder` is its own.
    """

    def __init__(self, walk: Walk, work: Path, folder: Path) -> None:
        self.walk, self.work = walk, work
        self.source = walk.source.stamp()
        if walk.ranks.rank == 0:
            self.replica = Replica(walk.source, folder)
            self._read()
            if self.replica.fresh:
                for name in (_DONE, _RATIOS):
                    (work / name).unlink(
                        missing_ok=True
                    )  # before a file is begun: what it says of lost files must not outlive them
            self.replica.begin()
            self.replica.copy_rest()
        walk.ranks.meet()
        self.kept = Checkpoint(folder)
        self.done = self._read()

    def _read(self) -> list[list[LayerResult]]:
        file = self.work / _DONE
        if not file.exists():
            return []
        try:
            found = json.loads(file.read_text())
            source, done = found["source"], [[read_layer(one) for one in layers] for layers in found["blocks"]]
        except (ValueError, LookupError, TypeError) as error:
            _log.warning("%s is damaged (%s); the prune begins again", file, error)
            file.unlink()
            return []
        if source != self.source:
            raise changed(self.walk, self.work)
        self.walk.clock.begin(found.get("seconds", {}))
        return done

    def ratios(self, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The share of zeros of every matrix, made once."""
        file = self.work / _RATIOS
        made = None
        if self.walk.ranks.rank == 0:
            with suppress(ValueError):  # damaged; what is made again is the same
                made = json.loads(file.read_text()) if self.done and file.exists() else None
            made = make() if made is None else made
            files.write_json(file, made)
        out: dict[str, float] = self.walk.ranks.tell(made, 0)
        return out

    def keeping(
        self, i: int, block: nn.Module, layers: Mapping[str, Matrix], results: list[LayerResult]
    ) -> Callable[[], None]:
        """Write block `i` and what was found there: work that needs the block no more."""
        self.done.append(results)
        done = [[to_json(layer) for layer in found] for found in self.done]
        if self.walk.ranks.rank:
            return lambda: None
        values = dict(block.named_parameters())
        seconds = self.walk.clock.seconds()
        names = {matrix.parameter: self.walk.full(i, matrix.parameter) for matrix in layers.values()}
        changed = {name: self.walk.exact.get(full, values[name].detach()) for name, full in names.items()}

        def keep() -> None:
            written: dict[str, Tensor] = {}
            for name, value in changed.items():
                written |= self.walk.layout.split(self.walk.full(i, name), value)
            self.replica.write(written)
            self.replica.copy(set(self.walk.stored(i)) - set(written))
            files.write_json(self.work / _DONE, {"source": self.source, "seconds": seconds, "blocks": done})

        return keep

    def finish(self) -> None:
        """Copy what no block holds.

        Raises:
            ValueError: the source is no longer what it was when the prune began.
        """
        if self.walk.source.stamp() != self.source:
            raise changed(self.walk, self.work)
        if self.walk.ranks.rank == 0:
            inside = {stored for i in range(len(self.walk)) for stored in self.walk.stored(i)}
            self.replica.copy(set(self.walk.source.places) - inside)


def written(folder: Path) -> int:
    """Bytes that a killed prune already has on the disk."""
    return sum(file.stat().st_blocks * 512 for file in folder.glob("*.safetensors"))


def changed(walk: Walk, work: Path) -> ValueError:
    """What to raise where the source is no longer what it was."""
    return ValueError(
        f"{walk.source.directory}: the model changed since this work began; bring back the files as they were, or remove "
        f"{work} to begin again"
    )
