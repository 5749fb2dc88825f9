"""Models: where their files lie, what they are keyed by, how they are loaded and prompted."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ssgr import files
from ssgr.errors import first_line
from ssgr.loadable import one_day
from ssgr.model import experts
from ssgr.model.blocks import weightless
from ssgr.model.checkpoint import BESIDE, CARD, LEGAL, SINGLE, Checkpoint, beside, weight_files
from ssgr.products import finite
from ssgr.thinking import Thinking

_PACKAGED = "pkg://"
_IN_TEMPLATE = (TemplateError, TypeError, ValueError, LookupError, AttributeError)  # Jinja's own, or Python's inside
_READ_ALWAYS = 1 << 28  # bytes, which take less than a second: checksums of larger files are remembered
_log = logging.getLogger("ssgr")


@dataclass(frozen=True)
class Model:
    """A Hugging Face decoder: a hub id, a directory, or pkg://PACKAGE/FOLDER for weights that ship with a package."""

    name: str
    path: str
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    chat: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    thinking: Thinking = field(
        default=Thinking(), metadata={"key": False}
    )  # the stages that look at it are keyed by it
    trust_remote_code: bool = False
    max_new_tokens: int = field(default=32768, metadata={"key": False})  # what sampler and bench take by default
    batch_size: int = field(default=64, metadata={"key": False})  # likewise
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
        path = locate(self.path)
        local = path.exists() or self.path.startswith((_PACKAGED, ".", "/", "~")) or self.path.count("/") != 1
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
        for file in sorted([*beside(self.directory), *self.directory.glob("*.safetensors")]):
            whole.update(f"{file.relative_to(self.directory)}\n{checksum(file)}\n".encode())
        return whole.hexdigest()

    def again(self) -> Model:
        """The same, that looks anew at its files; those of a hub's commit never change."""
        return self if self.directory is None else replace(self)

    def _commit(self) -> str:
        from huggingface_hub import HfApi

        if self.revision is not None and re.fullmatch("[0-9a-f]{40}", self.revision):
            return self.revision  # a pinned commit is its own name, offline too
        try:
            return str(HfApi().model_info(self.path, revision=self.revision).sha)
        except Exception as error:  # of the hub's library or of one of those it calls; all mean that there is no answer
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
        }

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises:
            ValueError: it cannot be loaded, or has no vocabulary: transformers makes an empty one where its file is missing.
        """
        with _explained(self):
            made = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(*self._source, **self._how))
        if set(made.encode("abc 123", add_special_tokens=False)) <= {made.unk_token_id}:
            raise ValueError(
                f"model.path={self.path}: its tokenizer has no vocabulary, so a file such as tokenizer.json is missing; put the "
                "model's own tokenizer files beside it"
            )
        return made

    def skeleton(self) -> PreTrainedModel:
        """The model without weights, for a look at its structure before hours of work.

        Raises:
            ValueError: it cannot be loaded, is quantised, has an encoder, a local file of its weights is not whole, or there is
                no such device.
        """
        self.torch_device()
        with _explained(self):
            config = _decoder(AutoConfig.from_pretrained(*self._source, **self._how))
        if self.directory is not None:
            Checkpoint(self.directory)
        with _explained(self), weightless():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)
        experts.use(model)
        _attend_exactly(model)
        return cast(PreTrainedModel, model.eval())

    def load(self) -> PreTrainedModel:
        """Load the model in evaluation mode on its device.

        Raises:
            ValueError: the weights are incomplete, of other shapes than the config says, or hold NaN or infinity in a named
                tensor; or there is no such device.
        """
        device = self.torch_device()
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        how = {**self._how, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        how["ignore_mismatched_sizes"] = True  # they are told below, by name
        with _explained(self):
            loaded: Any = AutoModelForCausalLM.from_pretrained(*self._source, **how)
        model, found = loaded
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"model.path={self.path}: {len(missing)} weights of {type(model).__name__} are not in the checkpoint, the "
                f"first is {missing[0]}; it was saved from a wrapper or another architecture: save the bare model again"
            )
        for name, stored, made in sorted(found["mismatched_keys"]):
            raise ValueError(
                f"model.path={self.path}: {name} is {list(stored)} in the checkpoint, and its config.json asks for {list(made)}: "
                "they are of two models; put the model's own config.json beside its weights"
            )
        if left := _layers_left(model, found["unexpected_keys"]):
            _warn_once(
                f"model.path={self.path}: its weights hold {', '.join(left)}, and its config.json has no such layers: they do "
                "not run; if they should, put the model's own config.json beside them"
            )
        for name, weight in model.named_parameters():
            if not finite(weight):
                raise ValueError(
                    f"model.path={self.path}: {name} holds NaN or infinity; the checkpoint is damaged, use another copy"
                )
        _attend_exactly(model)
        on_device: Any = torch.nn.Module.to(model, device)
        return cast(PreTrainedModel, on_device.eval())

    def generation(self) -> GenerationConfig | None:
        """Its generation config, without loading it, or what its config says of generation, as transformers has it; None if
        there is neither."""
        with suppress(OSError):
            return GenerationConfig.from_pretrained(*self._source, revision=self.revision or "main")
        with suppress(OSError):
            return GenerationConfig.from_model_config(AutoConfig.from_pretrained(*self._source, **self._how))
        return None

    def torch_device(self) -> torch.device:
        """Where it runs.

        Raises:
            ValueError: there is no such device.
        """
        return pick_device(self.device)

    def files(self) -> Path:
        """The directory of the checkpoint's files, from the hub if need be.

        Raises:
            ValueError: the hub has none, or cannot be reached.
        """
        if self.directory is not None:
            return self.directory
        from huggingface_hub import snapshot_download

        kinds = [SINGLE, *(f"*{suffix}" for suffix in BESIDE), CARD, *(f"{name}*" for name in LEGAL)]
        with _explained(self):
            folder = Path(snapshot_download(self.path, revision=self.fingerprint, allow_patterns=kinds))
        shards = weight_files(folder)  # a repository may hold its weights twice
        with _explained(self):
            return Path(snapshot_download(self.path, revision=self.fingerprint, allow_patterns=shards))

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
            ValueError: the tokenizer has no chat template, or one that refuses the system prompt, does not give the turn to the
                model, or begins with two BOS.
        """
        if tokenizer.chat_template is None:
            raise ValueError(f"model={self.name}: its tokenizer has no chat template; use a reasoning or chat model")
        turns = [{"role": "system", "content": self.system}] if self.system else []
        turns.append({"role": "user", "content": question})
        try:
            how: dict[str, Any] = dict(self.chat)
            with one_day():
                ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **how)
                given = _gives_the_turn(tokenizer, self.system, json.dumps(how, default=str))
        except _IN_TEMPLATE as error:
            other = "null" if self.system else "TEXT, or mend chat_template.jinja beside its tokenizer"
            raise ValueError(
                f"model={self.name}: its chat template refuses model.system={self.system!r} model.chat={dict(self.chat)} "
                f"({error}); type model.system={other}"
            ) from error
        if not given:
            raise ValueError(
                f"model={self.name}: its chat template has no generation prompt, so the model would go on with the question; "
                "mend chat_template.jinja beside its tokenizer, or use a reasoning or chat model"
            )
        prompt = tuple(cast(list[int], ids))
        if tokenizer.bos_token_id is not None and prompt[:2] == (tokenizer.bos_token_id,) * 2:
            raise ValueError(
                f"model={self.name}: its chat template begins with two {tokenizer.bos_token}; mend chat_template.jinja beside "
                "its tokenizer"
            )
        return prompt


@lru_cache(8)
def _gives_the_turn(tokenizer: PreTrainedTokenizerBase, system: str | None, chat: str) -> bool:
    """Whether a prompt ends where the answer begins: its template adds a generation prompt, or needs none (Mistral's)."""
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": "Question."})
    render: Any = partial(tokenizer.apply_chat_template, tokenize=False, **json.loads(chat))
    prompt, without = (str(render(turns, add_generation_prompt=on)) for on in (True, False))
    if prompt != without:
        return True
    whole = str(render([*turns, {"role": "assistant", "content": "Answer."}]))
    between, answer, _ = whole.removeprefix(prompt).partition("Answer.")
    return whole.startswith(prompt) and bool(answer) and not between.strip()


def _decoder(config: Any) -> Any:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"it is an encoder and a decoder ({config.model_type}); use a decoder-only model")
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else type(quantised).__name__
        raise ValueError(
            f"its config.json has a quantization_config ({method}), and quantised weights cannot be pruned; take the "
            "unquantised checkpoint, or, if its weights are plain after all, remove quantization_config from config.json"
        )
    return config


def _layers_left(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """The layers that come after those of `model` in its lists, and are only in its checkpoint."""
    own, stored = (
        {found[0] for name in names if (found := re.match(r".*?\.\d+(?=\.)", name))}
        for names in (model.state_dict(), unexpected)
    )
    lists = {name.rpartition(".")[0] for name in own}
    return sorted(name for name in stored - own if name.rpartition(".")[0] in lists)


@cache  # a run loads its model several times
def _warn_once(said: str) -> None:
    _log.warning(said)


def _attend_exactly(model: PreTrainedModel) -> None:
    """Let a model that caps its attention scores run attention that does: torch's fused kernel leaves the cap out."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")


class _explained:
    """Turn what transformers raises while loading into one sentence."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):  # of transformers or of what it calls: all mean that it cannot be loaded
            told = (isinstance(error, StrictDataclassError) and error.__cause__) or error  # which says what was wrong
            plain = isinstance(told, (OSError, ValueError, ImportError, RuntimeError, SafetensorError))
            first = str(told).strip().splitlines()[0] if plain and str(told).strip() else first_line(told)
            hint = (
                "model.trust_remote_code=true runs the code in that repository; " if "remote_code" in str(error) else ""
            )
            raise ValueError(
                f"model={self.model.name} path={self.model.path} cannot be loaded: {hint}{first}"
            ) from error


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is no device: valid are auto, cpu, cuda, cuda:1, ...") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device}: this machine has {torch.cuda.device_count()} GPUs that torch can use; "
            "type device=auto, or install a torch with CUDA"
        )
    return found


def locate(path: str) -> Path:
    """Where `path` would lie on this machine: as it is, or inside the package that it names.

    Raises:
        ValueError: there is no such package.
    """
    if path.startswith(_PACKAGED):
        package, _, inside = path.removeprefix(_PACKAGED).partition("/")
        try:
            spec = importlib.util.find_spec(package)  # which runs nothing of the package itself
        except (ModuleNotFoundError, ValueError):  # of a package around it; of a name that is none
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"model.path={path}: there is no package {package}; install it, or give a directory")
        return Path(spec.submodule_search_locations[0]) / inside
    return Path(path).expanduser()


def checksum(file: Path) -> str:
    """What the content of `file` is."""
    stat = file.stat()
    return _checksum_of(file.resolve(), stat.st_size, (stat.st_mtime_ns, stat.st_ctime_ns))


@cache  # the cells of a grid ask again and again
def _checksum_of(file: Path, size: int, changed: tuple[int, int]) -> str:
    """That of a large file is read once: other processes find it in the user's cache, by path, size and times of change, of
    which nobody sets the second.
    """
    if size <= _READ_ALWAYS:
        return _read(file, size)
    name = hashlib.sha256(f"{file}\n{size}\n{changed}".encode()).hexdigest()

    def read() -> str:
        _log.info("%s is read once, to tell which model it is", file)
        return _read(file, size)

    return files.cached(f"checksums/{name}", read)


def _read(file: Path, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
