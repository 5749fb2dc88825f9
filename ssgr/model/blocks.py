"""The structure of a decoder: its blocks and their linear layers, found rather than listed; filled and emptied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch

from torch import Tensor, nn
from transformers import PreTrainedModel

from ssgr.model.checkpoint import Checkpoint


@contextmanager
def weightless() -> Iterator[None]:
    """Modules made inside have parameters without memory; their buffers (rotary frequencies) are real."""
    own = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        own(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = own  # type: ignore[method-assign]


def outside(model: PreTrainedModel, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
    """The parameters before and after the blocks, without those of an output layer of its own."""
    inside = {id(p) for block in blocks for p in block.parameters()}
    head = model.get_output_embeddings()
    own = {id(p) for p in head.parameters()} if head is not None else set()
    tied = {id(p) for p in model.get_input_embeddings().parameters()}
    skipped = inside | (own - tied)
    return {name: p for name, p in model.named_parameters() if id(p) not in skipped}


def stored_names(model: PreTrainedModel, part: str, checkpoint: Checkpoint) -> dict[str, str]:
    """What each parameter of the module `part` of `model` is called in `checkpoint`, by its name inside the module.

    Raises:
        ValueError: one is not there.
    """
    names = [name for name, _ in model.get_submodule(part).named_parameters()]
    return {name: checkpoint.find(f"{part}.{name}".lstrip("."), model.base_model_prefix) for name in names}


def fill(module: nn.Module, stored: dict[str, str], checkpoint: Checkpoint, like: Tensor) -> None:
    """Read the parameters of `module` from `checkpoint`, in the dtype and on the device of `like`.

    Raises:
        ValueError: a tensor is quantised, or is not finite.
    """
    for name, place in stored.items():
        put(module, name, checkpoint.read(place).to(like.device, like.dtype))


def empty(module: nn.Module) -> None:
    """Give back the memory of the parameters of `module`."""
    for name, param in list(module.named_parameters()):
        put(module, name, param.to("meta"))


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Let `value` be the parameter `name` of `module`."""
    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


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
        ValueError: none is left, or the block has experts, whose matrices are stacked.
    """
    if stacked := [name for name, weight in block.named_parameters() if weight.ndim > 2]:
        raise ValueError(
            f"{type(block).__name__} is a mixture of experts ({', '.join(stacked)}), which cannot be pruned yet; "
            "choose a model without experts"
        )
    every = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    kept = {name: m for name, m in every.items() if not any(fnmatch(name, pattern) for pattern in exclude)}
    if not kept:
        raise ValueError(
            f"no linear layer is left to prune in {type(block).__name__}: it has {', '.join(every) or 'none'}, "
            f"and pruner.exclude={list(exclude)}"
        )
    return kept
