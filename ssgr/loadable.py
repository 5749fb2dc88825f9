"""A model that is not loaded yet, for engines and measures that load it, or read its files."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel  # by name only: its import takes seconds

TODAY = {"strftime_now": datetime(2025, 1, 1).strftime}  # for templates that print it: prompts are the same every day


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

    def load(self) -> PreTrainedModel:
        """The loaded model."""
        ...

    def generation(self) -> GenerationConfig | None:
        """Its generation config, without loading it; None if there is none to be had."""
        ...

    def files(self) -> Path:
        """The folder of its files."""
        ...
