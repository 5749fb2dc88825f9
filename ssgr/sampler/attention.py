"""Attention of one new token over a long cache, without copying keys and values for each group of heads.

Shapes: N rows, H heads, K key-value heads, G heads a key-value head, T tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ssgr.loadable import takes_another

_NAME = "ssgr_grouped"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention; a single query is folded into its key-value group; others, and what the model adds to
    scores itself, go to torch's kernel."""
    rows, heads, queries, size = query.shape
    own = kwargs.get("position_bias") is not None or (attention_mask is not None and attention_mask.is_floating_point())
    if queries > 1 or own:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    groups = key.shape[1]
    query_NKGD = query.view(rows, groups, heads // groups, size) * (size**-0.5 if scaling is None else scaling)
    score_NKGT = query_NKGD @ key.transpose(-1, -2)
    if attention_mask is not None:
        score_NKGT.masked_fill_(~attention_mask, float("-inf"))
    out_NKGD = score_NKGT.softmax(-1) @ value
    return out_NKGD.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` attend this way where it would call torch's scaled dot-product attention; other kinds stay."""
    before = model.config._attn_implementation
    if takes_another(model.config):
        model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
