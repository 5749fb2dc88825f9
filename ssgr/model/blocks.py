"""The structure of a decoder: its blocks and the matrices in them, found rather than listed; filled and emptied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ssgr.model import experts


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a block: that of a linear layer, or that of one of its stacked experts."""

    name: str  # inside the block
    parameter: str  # inside the block; the experts share theirs
    module: nn.Module
    expert: int | None = None
    transposed: bool = False

    @property
    def weight_OI(self) -> Tensor:
        """The matrix, as a view: what is written into it is written into the parameter."""
        return self.of(getattr(self.module, self.parameter.rpartition(".")[2]))

    def of(self, whole: Tensor) -> Tensor:
        """The matrix in `whole`, a tensor like its parameter, as a view."""
        own = whole if self.expert is None else whole[self.expert]
        return own.T if self.transposed else own

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        outputs, inputs = self.weight_OI.shape
        return outputs, inputs


@contextmanager
def weightless() -> Iterator[None]:
    """Modules made inside have parameters without memory or values; their buffers (rotary frequencies) are real."""
    own, fill = nn.Module.register_parameter, PreTrainedModel.initialize_weights

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        own(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    PreTrainedModel.initialize_weights = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = own  # type: ignore[method-assign]
        PreTrainedModel.initialize_weights = fill  # type: ignore[method-assign]


def outside(model: PreTrainedModel, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
    """The parameters before and after the blocks, without those of an output layer of its own."""
    inside = {id(p) for block in blocks for p in block.parameters()}
    head = model.get_output_embeddings()
    own = {id(p) for p in head.parameters()} if head is not None else set()
    tied = {id(p) for p in model.get_input_embeddings().parameters()}
    skipped = inside | (own - tied)
    return {name: p for name, p in model.named_parameters() if id(p) not in skipped}


class Tail(nn.Module):
    """What follows the blocks, up to the output layer `head`, which can be pruned as if it were in a block after the last.

    Its parameters are those of the model, under the same names: the ones outside the blocks but for the token embeddings.

    Raises:
        ValueError: the output layer shares its weights with the token embeddings, or the model has none.
    """

    def __init__(self, model: PreTrainedModel, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.whole = (model, blocks)  # in a tuple, it is no part of this module
        self.head = output_layer(model)
        head = model.get_submodule(self.head) if self.head else None
        first = {id(p) for p in model.get_input_embeddings().parameters()}
        if head is None or any(id(p) in first for p in head.parameters()):
            raise ValueError(
                f"pruner.include: {self.head or 'an output layer'} of {type(model).__name__} is "
                f"{'its token embeddings, which stay dense' if self.head else 'not there'}; leave it out"
            )
        last = [f"{self.head}.{name}" for name, _ in head.named_parameters()]
        for name in [n for n, p in outside(model, blocks).items() if id(p) not in first] + last:
            *above, own = name.split(".")[:-1]
            node: nn.Module = self
            for part in above:
                if part not in node._modules:
                    node.add_module(part, nn.Module())
                node = node.get_submodule(part)
            node.add_module(own, model.get_submodule(".".join([*above, own])))

    def forward(self, hidden_NTD: Tensor, form: Callable[[Tensor], Any]) -> Tensor:
        """Bring what the last block puts out to the output layer, which does not run; `form` is that of a block's output."""
        model, blocks = self.whole
        own = [block.forward for block in blocks]
        handle = model.get_submodule(self.head).register_forward_pre_hook(_arrive)
        try:
            for block in blocks:
                block.forward = lambda *args, **kwargs: form(hidden_NTD)
            with suppress(_Arrived):
                model(inputs_embeds=hidden_NTD, use_cache=False)
        finally:
            handle.remove()
            for block, forward in zip(blocks, own, strict=True):
                block.forward = forward
        return hidden_NTD


class _Arrived(Exception):
    """The output layer was reached."""


def _arrive(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _Arrived


def output_layer(model: PreTrainedModel) -> str:
    """The name of the linear layer that gives the logits, or "" where there is none."""
    head = model.get_output_embeddings()
    return next((name for name, m in model.named_modules() if m is head and isinstance(m, nn.Linear)), "")


def prunes_head(model: PreTrainedModel, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether the output layer is pruned: `include` names it, in full, and no pattern of `exclude` matches it."""
    head = output_layer(model)
    return head in include and not any(fnmatch(head, pattern) for pattern in exclude)


def embeddings(model: PreTrainedModel) -> int:
    """How many numbers the token embeddings and the output layer hold; those that are tied count once."""
    head = model.get_output_embeddings()
    parts = [*model.get_input_embeddings().parameters(), *(head.parameters() if head is not None else ())]
    return sum({id(p): p.numel() for p in parts}.values())


def empty(module: nn.Module) -> None:
    """Give back the memory of the parameters of `module`."""
    for name, param in list(module.named_parameters()):
        put(module, name, param.to("meta"))


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Let `value` be the parameter or buffer `name` of `module`; a parameter stays the one it is."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        own = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        owner._parameters[leaf] = own


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the one ModuleList as long as the configuration says.

    Raises:
        ValueError: there is none, or more than one, blocks share a weight, or a token sees those that come after it.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and not _inside_a_list(name)
    ]
    if len(found) != 1:
        lists = [f"{n} ({len(m)})" for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        raise ValueError(
            f"the decoder blocks of {type(model).__name__} cannot be found: its configuration says "
            f"num_hidden_layers={depth}, and its module lists are {', '.join(lists) or 'none'}; use a decoder-only model"
        )
    _see_apart(*found[0])
    for block in found[0][1]:
        causal = {getattr(m, "is_decoder", getattr(m, "is_causal", None)) for m in block.modules()}
        if False in causal and True not in causal:  # with both, it also attends over what it kept itself
            raise ValueError(
                f"{type(model).__name__} is an encoder: its tokens see those that come after them; use a decoder-only model"
            )
    return found[0]


def _see_apart(prefix: str, blocks: nn.ModuleList) -> None:
    """See that every weight belongs to one block.

    Raises:
        ValueError: it belongs to several.
    """
    seen: dict[int, int] = {}
    for i, block in enumerate(blocks):
        for name, param in block.named_parameters():
            if (first := seen.setdefault(id(param), i)) != i:
                raise ValueError(
                    f"{prefix}.{i}.{name} is a weight of {prefix}.{first} too; blocks that share weights cannot be pruned one "
                    "by one: choose another model"
                )


def _inside_a_list(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def matrices(block: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> dict[str, Matrix]:
    """The matrices of `block` that are pruned, by name: those that match a pattern of `include`, or all linear layers
    and experts where it is empty, without those that match one of `exclude`.

    Routers (see `_routers`) are taken only by their full name in `include`.

    Raises:
        NothingLeft: none is left.
        ValueError: the block has matrices of an unknown kind that are stacked, or larger than all others.
    """
    every = _every(block)
    routers = _routers(block, every)
    kept = {
        name: matrix
        for name, matrix in every.items()
        if (name in include if name in routers else not include or _matches(name, include))
        and not _matches(name, exclude)
    }
    if not kept:
        raise NothingLeft(
            f"no linear layer is left to prune in {type(block).__name__}: it has {', '.join(every) or 'none'}; "
            f"pruner.include={list(include)} pruner.exclude={list(exclude)}"
        )
    return kept


class NothingLeft(ValueError):
    """No matrix of a block is to be pruned."""


def names(block: nn.Module, pattern: str) -> list[str]:
    """The matrices of `block`, routers among them, whose name matches `pattern`."""
    return [name for name in _every(block) if fnmatch(name, pattern)]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _every(block: nn.Module) -> dict[str, Matrix]:
    out: dict[str, Matrix] = {}
    others: dict[str, list[tuple[str, int]]] = {}  # of modules of other kinds: their matrices, and how large they are
    for name, module in block.named_modules():
        stacked = experts.stacked(module)
        if isinstance(module, (nn.Linear, Conv1D)):
            out[name] = Matrix(name, f"{name}.weight", module, None, isinstance(module, Conv1D))
        elif not isinstance(module, nn.Embedding):
            others[name] = [(leaf, p.numel()) for leaf, p in module.named_parameters(recurse=False) if p.ndim == 2]
        if stacked and not experts.is_stacked(module):
            raise _unheard(block, name, "stacked matrices", list(stacked))
        for leaf, param in stacked.items():
            for i in range(len(param)):
                own = f"{name}.{i}.{leaf}"
                out[own] = Matrix(own, f"{name}.{leaf}", module, i, module.is_transposed)
    most = max((matrix.weight_OI.numel() for matrix in out.values()), default=0)
    for name, found in others.items():  # smaller ones are routers, biases of experts, states
        if large := [leaf for leaf, size in found if size >= most]:
            raise _unheard(block, name, "matrices as large as the largest linear layer", large)
    return out


def _unheard(block: nn.Module, name: str, what: str, leaves: Iterable[str]) -> ValueError:
    return ValueError(
        f"{type(block).__name__}: {name} holds {what} ({', '.join(leaves)}) that transformers' experts interface does not "
        "run, so what enters them cannot be heard; choose a model of its own classes"
    )


def _routers(block: nn.Module, every: dict[str, Matrix]) -> set[str]:
    """The linear layers that choose experts: those of a child of the module that holds the experts, where the last of
    them has an output for each expert, or the only one of them a single output.
    """
    out: set[str] = set()
    for name, module in block.named_modules():
        before = f"{name}." if name else ""
        children = [(f"{before}{child}", held) for child, held in module.named_children()]
        counts = {count for _, held in children if (count := _experts(held))}
        for child, _ in children if counts else ():
            inside = [m for own, m in every.items() if m.expert is None and f"{own}.".startswith(f"{child}.")]
            if inside and (inside[-1].shape[0] in counts or (len(inside) == 1 and inside[0].shape[0] == 1)):
                out |= {matrix.name for matrix in inside}
    return out


def _experts(module: nn.Module) -> int:
    """How many experts `module` holds, stacked or in a list."""
    if isinstance(module, nn.ModuleList):
        return len(module)
    return max(map(len, experts.stacked(module).values()), default=0)
