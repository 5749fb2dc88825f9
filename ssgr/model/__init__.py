"""Models: where their files lie, what they are keyed by, how they are loaded and prompted."""

from __future__ import annotations

import hashlib
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

_PACKAGED = "pkg://"
_HASHED_WHOLE = 2 << 30  # bytes: of larger weight files the head and one part in sixteen, evenly spread, are hashed
_SAMPLE, _STRIDE = 1 << 16, 1 << 20  # 64 KiB of every MiB: no matrix that changed is missed


@dataclass(frozen=True)
class Model:
    """A Hugging Face decoder: a hub id, a directory, or pkg://PACKAGE/FOLDER for weights that ship with a package."""

    name: str
    path: str
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    chat: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    end_think: str = "</think>"
    trust_remote_code: bool = False
    max_new_tokens: int = field(default=32768, metadata={"key": False})  # what sampler and bench take by default
    calibration_tokens: int = field(default=262144, metadata={"key": False})  # likewise the budget
    max_row_tokens: int = field(default=34816, metadata={"key": False})  # likewise its longest row
    device: str = field(default="auto", metadata={"key": False})

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "bfloat16", "float16", "float32"):
            raise ValueError(f"model.dtype={self.dtype!r}: valid dtypes are auto, bfloat16, float16, float32")
        if not self.path:
            raise ValueError(
                f"model={self.name} needs a path: type model.path=DIR, a Hugging Face checkpoint directory"
            )

    @cached_property
    def directory(self) -> Path | None:
        """The local directory, or None for a hub id.

        Raises:
            ValueError: the path is local and is no checkpoint directory.
        """
        if self.path.startswith(_PACKAGED):
            package, _, folder = self.path.removeprefix(_PACKAGED).partition("/")
            return Path(str(importlib.resources.files(package))) / folder
        path = Path(self.path).expanduser()
        local = path.exists() or self.path.startswith((".", "/", "~")) or self.path.count("/") != 1
        if local and not (path / "config.json").is_file():
            raise ValueError(
                f"model.path={self.path}: no config.json there; give a Hugging Face checkpoint directory, or a hub id "
                "such as deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
            )
        return path if local else None

    @cached_property
    def fingerprint(self) -> str:
        """What the weights and the tokenizer are: a checksum of the files, or the hub's commit."""
        if self.directory is None:
            return self._commit()
        whole = hashlib.sha256()
        for file in sorted(self.directory.iterdir()):
            if file.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt", ".py"):
                whole.update(f"{file.name}\n{_checksum(file)}\n".encode())
        return whole.hexdigest()

    def _commit(self) -> str:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            return str(HfApi().model_info(self.path, revision=self.revision).sha)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            if self.revision is not None and len(self.revision) == 40:
                return self.revision  # a pinned commit is its own name, offline too
            raise ValueError(
                f"model.path={self.path} revision={self.revision}: the hub cannot be asked ({type(error).__name__}); "
                "pin model.revision=COMMIT (40 hex digits) to work from the local hub cache, or give a directory"
            ) from error

    def key_content(self) -> object:
        """A model is keyed by what it is and how it is prompted, not by where it lies."""
        return {
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "chat": dict(self.chat),
            "system": self.system,
            "end_think": self.end_think,
        }

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        with _explained(self):
            return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(*self._source, **self._how))

    def skeleton(self) -> PreTrainedModel:
        """The model without weights, for a look at its structure before hours of work."""
        with _explained(self):
            config = AutoConfig.from_pretrained(*self._source, **self._how)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)
        return cast(PreTrainedModel, model)

    def load(self) -> PreTrainedModel:
        """Load the model in evaluation mode on its device.

        Raises:
            ValueError: the weights hold NaN or infinity, in a named tensor.
        """
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        with _explained(self):
            model = AutoModelForCausalLM.from_pretrained(*self._source, dtype=dtype, use_safetensors=True, **self._how)
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise ValueError(
                    f"model.path={self.path}: {name} holds NaN or infinity; the checkpoint is damaged, use another copy"
                )
        on_device: Any = torch.nn.Module.to(model, pick_device(self.device))
        return cast(PreTrainedModel, on_device.eval())

    @property
    def _source(self) -> tuple[str]:
        return (str(self.directory or self.path),)

    @property
    def _how(self) -> dict[str, Any]:
        revision = {} if self.directory else {"revision": self.revision}
        return {"trust_remote_code": self.trust_remote_code, **revision}

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[int, ...]:
        """Token ids of `question` through the chat template, up to where the model goes on.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if tokenizer.chat_template is None:
            raise ValueError(f"model={self.name}: its tokenizer has no chat template; use a reasoning or chat model")
        turns = [{"role": "system", "content": self.system}] if self.system else []
        turns.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **self.chat)
        return tuple(cast(list[int], ids))


class _explained:
    """Turn what transformers raises while loading into one sentence."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, ValueError, KeyError, ImportError, SafetensorError)):
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            hint = (
                "model.trust_remote_code=true runs the code in that repository; " if "remote_code" in str(error) else ""
            )
            raise ValueError(
                f"model={self.model.name} path={self.model.path} cannot be loaded: {hint}{first}"
            ) from error


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is no device: valid are auto, cpu, cuda, cuda:1, ...") from error


def _checksum(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= _HASHED_WHOLE:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
        else:
            digest.update(stream.read(1 << 24))
            for at in range(1 << 24, size, _STRIDE):
                stream.seek(at)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()
