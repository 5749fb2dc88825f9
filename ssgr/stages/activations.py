"""Activations: the calibration rows on their way through the blocks, in host memory or in a file.

Shapes: N rows of a batch, T tokens (padded on the right), D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssgr.records import CalibrationSet

_BATCH_TOKENS = 4096  # padded tokens of one forward pass


@dataclass
class Batch:
    """Rows of like length: what enters the next block, the tokens' weights, and what else each block is given."""

    hidden_NTD: Tensor  # on the host
    weights_NT: Tensor
    given: list[dict[str, Any]]  # masks, positions

    def through(self, block: nn.Module, i: int, name: str, device: torch.device) -> Tensor:
        """The output of block `i` for these rows.

        Raises:
            ValueError: it is not finite.
        """
        out = block(self.hidden_NTD.to(device), **_moved(self.given[i], device))
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        if not torch.isfinite(hidden).all():
            raise ValueError(
                f"{name}: its output holds NaN or infinity on the calibration rows; use model.dtype=float32"
            )
        return hidden


def groups(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sorted rows in batches of at most _BATCH_TOKENS padded tokens."""
    out: list[list[int]] = [[]]
    for i, length in enumerate(lengths):
        if out[-1] and (len(out[-1]) + 1) * length > _BATCH_TOKENS:
            out.append([])
        out[-1].append(i)
    return out


def padded_tokens(calibration: CalibrationSet) -> int:
    """Tokens of all batches with their padding."""
    lengths = sorted(map(len, calibration.rows))
    return sum(len(group) * lengths[group[-1]] for group in groups(lengths))


def first_inputs(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    calibration: CalibrationSet,
    pad: int,
    device: torch.device,
    file: Path | None,
) -> list[Batch]:
    """What reaches the blocks, batch by batch: causal attention keeps padding on the right from real tokens.

    The first block and what comes before it must have weights; the others need none. The hidden states lie in `file`,
    mapped into memory, or in memory where it is None.

    Raises:
        ValueError: no token has any weight.
    """
    if not any(w > 0 for weights in calibration.weights for w in weights):
        raise ValueError(f"calib={calibration.source}: every token weighs zero in this scope; type scope=both")
    pairs = sorted(zip(calibration.rows, calibration.weights, strict=True), key=lambda pair: len(pair[0]))
    tokens, room = padded_tokens(calibration), torch.empty(0)
    batches: list[Batch] = []
    with _passing_through(blocks) as heard:
        for group in groups([len(row) for row, _ in pairs]):
            width = len(pairs[group[-1]][0])
            ids_NT = torch.tensor([[*pairs[i][0].ids, *[pad] * (width - len(pairs[i][0]))] for i in group])
            weights_NT = torch.tensor([[*pairs[i][1], *[0.0] * (width - len(pairs[i][1]))] for i in group])
            heard.clear()
            with suppress(_Reached):
                model(input_ids=ids_NT.to(device), use_cache=False)
            hidden_NTD = heard[0][0]
            if not batches:
                room = _room(tokens * hidden_NTD.shape[-1], hidden_NTD.dtype, file)
            mine, room = room[: hidden_NTD.numel()], room[hidden_NTD.numel() :]
            mine.copy_(hidden_NTD.flatten())
            seen: dict[int, Any] = {}
            given = [{k: _moved(v, torch.device("cpu"), seen) for k, v in kwargs.items()} for _, kwargs in heard]
            batches.append(Batch(mine.view_as(hidden_NTD), weights_NT, given))
    return batches


def _room(numbers: int, dtype: torch.dtype, file: Path | None) -> Tensor:
    if file is None:
        return torch.empty(numbers, dtype=dtype)
    file.unlink(missing_ok=True)
    return torch.from_file(str(file), shared=True, size=numbers, dtype=dtype)


def _moved(value: Any, device: torch.device, seen: dict[int, Any] | None = None) -> Any:
    """`value` with its tensors on `device`; what several blocks share stays shared."""
    seen = {} if seen is None else seen
    if isinstance(value, dict):
        return {k: _moved(v, device, seen) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(v, device, seen) for v in value)
    if isinstance(value, Tensor):
        return seen.setdefault(id(value), value.to(device))
    return value


class _Reached(Exception):
    """The last block was reached: what follows has no weights."""


@contextmanager
def _passing_through(blocks: nn.ModuleList) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Let every block hand on its input at once, and hear what each is given: blocks may attend in different ways."""
    heard: list[tuple[Tensor, dict[str, Any]]] = []
    own = [block.forward for block in blocks]
    signature = inspect.signature(own[0])
    hidden_name, *_ = signature.parameters
    in_tuple: list[bool] = []  # whether a block's output is the first of a tuple, once known

    def hear(*args: Any, **kwargs: Any) -> Any:
        if not in_tuple:
            in_tuple.append(isinstance(own[0](*args, **kwargs), tuple))
        given = signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        hidden = given.pop(hidden_name)
        heard.append((hidden, given))
        if len(heard) == len(own):
            raise _Reached
        return (hidden,) if in_tuple[0] else hidden

    try:
        for block in blocks:
            block.forward = hear
        yield heard
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.forward = forward
