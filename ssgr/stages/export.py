"""Export: in which format a pruned model is written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Export:
    """The format of the pruned checkpoint: safetensors, as its source.

    No kept library makes a GGUF file of a Hugging Face directory: the package gguf writes tensors that others have
    named, transformers only reads. llama.cpp's own script does, and takes our checkpoints as they are.
    """

    format: str = "safetensors"

    def __post_init__(self) -> None:
        if self.format == "gguf":
            raise ValueError(
                "export.format=gguf: a GGUF file is made of the pruned checkpoint by llama.cpp's own script; type "
                "export.format=safetensors here, then in a clone of llama.cpp: python convert_hf_to_gguf.py "
                "FOLDER/checkpoint --outfile FILE.gguf"
            )
        if self.format != "safetensors":
            raise ValueError(f"export.format={self.format!r}: the valid choice is safetensors")
