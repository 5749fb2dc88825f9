"""A model that is not loaded yet, for engines and measures that load it, or read its files."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel


class Loadable(Protocol):
    """A model that can be loaded."""

    def load(self) -> PreTrainedModel:
        """The loaded model."""
        ...

    def files(self) -> Path:
        """The folder of its files."""
        ...
