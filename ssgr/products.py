"""Products of matrices, and looks at them, that are quick on a processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def native(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of `dtype` itself; one that emulates it is tens of times slower."""
    flags: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13 and later
    needed = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
    return any(flags.get(flag) for flag in needed[dtype]) if dtype in needed else True


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let products of float32 matrices that hold bfloat16 numbers be formed as such: they stay exact, sums are in float32."""
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def finite(x: Tensor) -> Tensor:
    """Whether no number of `x` is NaN or infinite, as a tensor () of bool; in one pass, where torch.isfinite makes four."""
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    low, high = torch.aminmax(x)  # a NaN anywhere is both
    return torch.isfinite(low) & torch.isfinite(high)
