"""Layout: which tensors of a checkpoint make up a parameter of a model, both ways.

Most are one and the same. Stacked experts lie on the disk one by one, and some names have changed over the years: what
transformers does when it loads and saves is asked for, not repeated here.
"""

from __future__ import annotations

import re
from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ssgr.model.checkpoint import DTYPES, Checkpoint


class Layout:
    """The parameters and persistent buffers of `model` (with or without weights) in `checkpoint`."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._converters = {pattern: t for t in converters for pattern in t.source_patterns}
        self._parts: dict[str, list[tuple[str, str | None]]] = {}  # stored name and the pattern of its converter
        wanted = model.state_dict(keep_vars=True)
        for stored in sorted(checkpoint.places, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, wanted)
            if name not in wanted:
                name, pattern = rename_source_key(stored, [], [], model.base_model_prefix, wanted)
            if name in wanted:
                self._parts.setdefault(name, []).append((stored, pattern))
        held = {id(wanted[name]): parts for name, parts in self._parts.items()}
        for name, value in wanted.items():  # of tied weights one name is enough, whichever
            if id(value) in held:
                self._parts.setdefault(name, held[id(value)])
        used = [t for t in transforms if t.was_used()]  # what is undone when a part is written
        model._weight_conversions = used  # type: ignore[assignment]

    def stored(self, name: str) -> list[str]:
        """The stored tensors that make up the parameter `name`.

        Raises:
            ValueError: there are none.
        """
        if name not in self._parts:
            raise ValueError(
                f"{self.checkpoint.directory}: {name} is not in the checkpoint; it was saved from a wrapper or another "
                "architecture, or transformers splits what is stored there: load the bare model, and save it again with "
                "save_pretrained(FOLDER, save_original_format=False)"
            )
        return [stored for stored, _ in self._parts[name]]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which the parameter `name` is stored."""
        return DTYPES[self.checkpoint.places[self.stored(name)[0]].dtype]

    def run_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """What `name` is in when the model runs in `dtype`: transformers keeps some of it in float32, biases of routers say."""
        exact = self.model._get_dtype_plan(dtype)
        return next((kept for part, kept in exact.items() if re.search(part.replace("*", ".*"), name)), dtype)

    def read(self, name: str, checkpoint: Checkpoint | None = None) -> Tensor:
        """The parameter `name`, in memory of its own; from another checkpoint of the same layout if one is given.

        Raises:
            ValueError: it is not there, is quantised, or is not finite.
        """
        source = checkpoint or self.checkpoint
        first, *others = self.stored(name)
        pattern = self._parts[name][0][1]
        if pattern is None:
            assert not others, name
            return source.read(first)
        converter = deepcopy(self._converters[pattern])
        for stored, own in self._parts[name]:
            converter.add_tensor(name, stored, own or "", source.read(stored))  # type: ignore[arg-type]
        out = converter.convert(name, model=self.model, config=self.model.config)[name]
        tensor: Tensor = out[0] if isinstance(out, list) else out
        return tensor

    def split(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """The stored tensors of the parameter `name` when it is `value`."""
        stored = self.stored(name)
        if self._parts[name][0][1] is None:
            return {stored[0]: value}
        parts = revert_weight_conversion(self.model, {name: value})
        out = {}
        for short, part in parts.items():  # the base model's name may stand before the one or the other
            (place,) = (s for s in stored if s == short or s.endswith(f".{short}") or short.endswith(f".{s}"))
            out[place] = part
        assert len(out) == len(stored), name
        return out
