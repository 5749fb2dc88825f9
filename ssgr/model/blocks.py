"""The structure of a decoder: its blocks and their linear layers, found rather than listed."""

from __future__ import annotations

from fnmatch import fnmatch

from torch import nn
from transformers import PreTrainedModel


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the one ModuleList as long as the configuration says.

    Raises:
        ValueError: there is none, or more than one.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and len({type(block) for block in module}) == 1
    ]
    if len(found) != 1:
        lists = [f"{n} ({len(m)})" for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        raise ValueError(
            f"the decoder blocks of {type(model).__name__} cannot be found: its configuration says "
            f"num_hidden_layers={depth}, and its module lists are {', '.join(lists) or 'none'}; use a decoder-only model"
        )
    return found[0]


def linear_layers(block: nn.Module, exclude: tuple[str, ...] = ()) -> dict[str, nn.Linear]:
    """The linear layers of `block` by name, without those that match a pattern of `exclude`.

    Raises:
        ValueError: none is left.
    """
    every = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    kept = {name: m for name, m in every.items() if not any(fnmatch(name, pattern) for pattern in exclude)}
    if not kept:
        raise ValueError(
            f"no linear layer is left to prune in {type(block).__name__}: it has {', '.join(every) or 'none'}, "
            f"and pruner.exclude={list(exclude)}"
        )
    return kept
