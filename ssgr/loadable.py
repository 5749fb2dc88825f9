"""A model that is not loaded yet, for engines and measures that load it, or read its files; its context."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel  # by name only: its import takes seconds

TODAY = {"strftime_now": datetime(2025, 1, 1).strftime}  # for templates that print it: prompts are the same every day


def context_of(config: Any) -> int | None:
    """The longest text, in tokens, that a model of this configuration is made for; None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


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
