"""Experts whose matrices are stacked in one parameter (transformers 5), run one by one so that each can be heard.

Shapes: T tokens, D hidden size, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

Hear = Callable[[str, int, Tensor, Tensor], None]  # parameter, expert, its inputs, which tokens they are
_NAME = "ssgr"


def use(model: PreTrainedModel) -> None:
    """Let the experts of `model` run one by one."""
    for module in model.modules():
        if is_stacked(module):
            module.config._experts_implementation = _NAME  # type: ignore[union-attr]


def stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """The stacks of matrices that `module` itself holds; the kernels of a convolution are none."""
    if isinstance(module, _ConvNd):
        return {}
    return {leaf: p for leaf, p in module.named_parameters(recurse=False) if p.ndim == 3}


def is_stacked(module: nn.Module) -> bool:
    """Whether `module` holds stacked experts behind transformers' experts interface."""
    return bool(stacked(module)) and hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


def forward(self: nn.Module, hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
    """What transformers' eager implementation computes, expert by expert; `self.hear` is told what each is given."""
    hear: Hear | None = getattr(self, "hear", None)
    out_TD = torch.zeros_like(hidden_TD)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    for expert in top_k_index_TK.unique().tolist():
        if expert >= len(self.down_proj):  # type: ignore[arg-type]  # the place of tokens that go nowhere
            continue
        tokens, places = torch.where(top_k_index_TK == expert)
        x = hidden_TD[tokens]
        if hear:
            hear(first, expert, x, tokens)
        x = _linear(self, first, expert, x)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)  # type: ignore[operator]
        if hear:
            hear("down_proj", expert, x, tokens)
        x = _linear(self, "down_proj", expert, x) * top_k_weights_TK[tokens, places, None]
        out_TD.index_add_(0, tokens, x.to(out_TD.dtype))
    return out_TD


def _linear(experts: nn.Module, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return F.linear(x, weight.T if experts.is_transposed else weight, bias)


ALL_EXPERTS_FUNCTIONS.register(_NAME, forward)
