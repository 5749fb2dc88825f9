"""Positions of models whose rotary frequencies depend on how long the longest row of a batch is (rope_type=longrope, Phi's).

They turn short rows one way and long ones another. Rows that are decoded together, and keys that are kept while a row grows,
need one way: as in vLLM, the long one, if any row may become long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ssgr.sampler import Decoding, Request


@contextmanager
def one_way(model: PreTrainedModel, requests: Sequence[Request], decoding: Decoding) -> Iterator[None]:
    """Let `model` turn the positions of all `requests` alike, whatever they are decoded with."""
    most = max((len(request.prompt_ids) + request.most(decoding) for request in requests), default=0)
    turned = [module for module in model.modules() if _turns_long(module, most)]
    for module in turned:
        module.forward = partial(_long, module)
    try:
        yield
    finally:
        for module in turned:
            del module.forward


def _turns_long(module: nn.Module, most: int) -> bool:
    rope = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    return getattr(module, "rope_type", None) == "longrope" and most > rope["original_max_position_embeddings"]


@torch.no_grad()
def _long(module: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    """The rotation of `position_ids` beside that of a row which is long."""
    over = module.config.rope_parameters["original_max_position_embeddings"]
    longest = position_ids.new_full((len(position_ids), 1), over)
    cos, sin = type(module).forward(module, x, torch.cat([position_ids, longest], 1))
    return cos[:, :-1], sin[:, :-1]
