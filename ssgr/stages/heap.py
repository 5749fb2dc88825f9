"""Heap: tensors that are freed leave their memory to the next ones, instead of giving it back to the system.

The system hands out memory page by page, each cleared when it is first touched: on a small model that costs as much as the
arithmetic (LOG.md).
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ssgr.errors import first_line

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's mallopt
_KEPT = 64 << 20  # bytes; what is larger, such as a matrix of a large model, goes back as soon as it is freed
_ENDED = ("allocate memory", "out of memory", "ALLOC_FAILED")  # what torch and CUDA's libraries say of it
_USUAL = 32 << 20  # where glibc's own thresholds end


@contextmanager
def enough(remedy: str) -> Iterator[None]:
    """Say in one sentence that memory ended, on a device or the host, and what to type then.

    Raises:
        ValueError: it did.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(said in str(error) for said in _ENDED)
        if not known:
            raise
        said = first_line(error)[:200]
        raise ValueError(
            f"memory ended ({said}); {remedy}; the same command run again goes on from what is there"
        ) from error


@contextmanager
def reused() -> Iterator[None]:
    """Keep freed memory while inside, and give it back at the end, that of GPUs too, which torch always keeps.

    Where the system's library is not glibc, the host's is as it always is. What the environment asks of glibc stands.
    """
    libc = ctypes.CDLL(None)
    own = hasattr(libc, "mallopt") and not any(name.startswith("MALLOC_") for name in os.environ)
    if own:
        libc.mallopt(_MMAP, _KEPT)
        libc.mallopt(_TRIM, 2**31 - 1)
    try:
        yield
    finally:
        gc.collect()  # models are held in circles
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        if own:
            libc.mallopt(_MMAP, _USUAL)
            libc.mallopt(_TRIM, 2 * _USUAL)
            libc.malloc_trim(0)
