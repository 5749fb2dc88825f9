"""A model that is not loaded yet, for engines and measures that load it, or read its files; its configuration; prompts' day."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel  # by name only: its import takes seconds


class _Day(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls(2025, 1, 1)


@contextmanager
def one_day() -> Iterator[None]:
    """Let chat templates that print today's date print 1 January 2025 inside: prompts are the same every day."""
    from transformers.utils import chat_template_utils  # since 5.24 it gives them no function of ours

    templates: Any = chat_template_utils
    own, templates.datetime = templates.datetime, _Day
    try:
        yield
    finally:
        templates.datetime = own


def context_of(config: Any) -> int | None:
    """The longest text, in tokens, that a model of this configuration is made for; None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def takes_another(config: Any) -> bool:
    """Whether a model of this configuration calls torch's scaled dot-product attention, and would call another likewise.

    Those that choose which tokens to attend to (DeepSeek-V3.2) mask the others for kernels that they know by name.
    """
    return config._attn_implementation == "sdpa" and not hasattr(config.get_text_config(), "index_topk")


class Loadable(Protocol):
    """A model that can be loaded; `dtype` is what it runs in, auto for what it is stored in."""

    @property
    def dtype(self) -> str:
        """The name of a dtype of torch, or auto."""
        ...

    @property
    def trust_remote_code(self) -> bool:
        """Whether code in the folder of the model is run."""
        ...

    @property
    def system(self) -> str | None:
        """The system prompt of its chat template."""
        ...

    @property
    def chat(self) -> Mapping[str, Any]:
        """The settings of its chat template."""
        ...

    def load(self) -> PreTrainedModel:
        """The loaded model."""
        ...

    def generation(self) -> GenerationConfig | None:
        """Its generation config, without loading it; None if there is none to be had."""
        ...

    def files(self) -> Path:
        """The folder of its files."""
        ...
