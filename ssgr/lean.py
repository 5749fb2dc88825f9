"""Lean: transformers without the libraries that it loads for other models than decoders."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress

_UNUSED = ("scipy", "sklearn")  # for losses of object detection, and for a metric of assisted generation


def load_transformers() -> None:
    """Import transformers' models as if scipy and scikit-learn were not installed, which saves every process a second or more.

    Both can be imported afterwards. Call this before anything else imports transformers; where it cannot be loaded so,
    whoever imports it next has all of it. Garbage is not collected meanwhile, nor later looked for among what is loaded: of
    modules and classes there is none, and to look takes a quarter of the time.
    """
    hidden, collects = [name for name in _UNUSED if name not in sys.modules], gc.isenabled()
    sys.modules |= dict.fromkeys(hidden)  # type: ignore[arg-type]  # None: it is not found
    gc.disable()
    try:
        with suppress(ImportError):
            from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]
        gc.freeze()
        if collects:
            gc.enable()
