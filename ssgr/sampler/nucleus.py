"""The next token: drawn from the nucleus of a distribution by a number between 0 and 1.

Shapes: N rows, V vocabulary, K candidates of the nucleus, T steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssgr.sampler import Decoding

_NUCLEUS = 64  # candidates looked at first: the nucleus of a language model at 0.95 is nearly always smaller
_MORE = 16  # times as many, where it is not


def uniforms(seed: int, steps: int) -> Tensor:
    """The numbers of one row (T,), from its seed; those of fewer steps are the first of them."""
    return torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pick(logits_NV: Tensor, uniform_N: Tensor, decoding: Decoding) -> Tensor:
    """Draw one token a row by inverting the distribution function of the nucleus at `uniform_N`.

    Top-p without sorting the vocabulary: the largest logits against the exact normaliser, more of them only in rows whose
    nucleus does not fit. The distribution is the same either way. Temperature 0 is greedy.
    """
    if decoding.temperature == 0:
        return logits_NV.argmax(1)
    logits_NV = logits_NV / decoding.temperature
    return _drawn(logits_NV, logits_NV.logsumexp(1, keepdim=True), uniform_N, decoding.top_p, _NUCLEUS)


def _drawn(logits_NV: Tensor, norm_N1: Tensor, uniform_N: Tensor, top_p: float, candidates: int) -> Tensor:
    size = min(candidates, logits_NV.shape[1])
    top_NK, ids_NK = logits_NV.topk(size, dim=1)
    mass_NK = (top_NK - norm_N1).double().exp().cumsum(1)
    inside_N = (mass_NK < top_p).sum(1).clamp(max=size - 1)  # the token that crosses top_p is the last
    total_N = mass_NK.gather(1, inside_N[:, None])[:, 0]
    chosen_N = (mass_NK <= (uniform_N * total_N)[:, None]).sum(1)
    token_N = ids_NK.gather(1, torch.minimum(chosen_N, inside_N)[:, None])[:, 0]
    if size < logits_NV.shape[1]:
        larger = (mass_NK[:, -1] < top_p).nonzero()[:, 0]  # rows whose nucleus is larger
        if len(larger):
            more = (logits_NV[larger], norm_N1[larger], uniform_N[larger], top_p, candidates * _MORE)
            token_N[larger] = _drawn(*more)
    return token_N
