"""What transformers leaves out of a GGUF file without a word: brought back here, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ssgr.model.blocks import weightless
from ssgr.model.gguf_file import ROTARY, Header

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def check_whole(file: Path, header: Header, model: PreTrainedModel, missing: list[str]) -> None:
    """See that every tensor of the file is in the model, and every parameter of the model in the file, in its shape."""
    config = model.config.get_text_config()
    layers = tuple(f"blk.{i}." for i in range(config.num_hidden_layers))
    aside = {ROTARY} | ({"output.weight"} if config.tie_word_embeddings else set())
    given = sum(
        number
        for name, number in header.numbers.items()
        if name not in aside and (not name.startswith("blk.") or name.startswith(layers))
    )  # blocks past the last predict further tokens, and are no part of the decoder
    found = model.state_dict()
    taken = sum({t.data_ptr(): t.numel() for t in found.values()}.values())
    with weightless():
        wanted = AutoModelForCausalLM.from_config(model.config).state_dict()
    other = [name for name, tensor in wanted.items() if name not in found or found[name].shape != tensor.shape]
    if missing or other or given != taken:
        where = f", {(missing + other)[0]} not as its configuration has it" if missing or other else ""
        raise ValueError(
            f"model.path={file}: transformers {transformers.__version__} does not read this GGUF file whole: it holds "
            f"{given} numbers and {type(model).__name__} {taken}{where}; take the safetensors checkpoint of the model"
        )


def restore_rotary(file: Path, header: Header, config: PretrainedConfig) -> None:
    """Bring back the scaling of rotary frequencies, which a GGUF file has as divisors and the loader ignores.

    Llama 3 gives each frequency a divisor by its wavelength, up to one factor; that factor is read off, and taken only
    if transformers then computes the very divisors of the file (Llama 3.1, github.com/meta-llama/llama-models).
    """
    given: Mapping[str, Any] = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if given.get("rope_type", "default") != "default":
        return
    divisors = header.rotary
    known = header.scaling == "none"
    if known and divisors is not None and bool((divisors != 1).any()) and "rope_theta" in given:
        rope = {"rope_type": "llama3", "rope_theta": given["rope_theta"], "factor": float(divisors.max()), **_LLAMA3}
        width = 2 * len(divisors)
        plain = given["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        config.rope_parameters = rope
        computed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        known = computed.shape == plain.shape and torch.allclose(computed, plain / divisors, rtol=1e-4)
    known = known and not any(name.startswith("rope_factors") for name in header.numbers)
    if not known:
        raise ValueError(
            f"model.path={file}: its rotary scaling ({header.scaling}) is not read by transformers "
            f"{transformers.__version__}, and without it the model is another one; take the safetensors checkpoint"
        )


def keep_whole(file: Path, header: Header, path: Path) -> None:
    """See that each token that must stay whole does, under its own id; the loader spells some of them in bytes.

    DeepSeek's <｜User｜> is one: cut into pieces it means nothing to the model, and a new id has no embedding.
    """
    content = json.loads(path.read_text())
    if _cut(content, header) is None:
        return
    names = content["model"]["vocab"]
    if isinstance(names, dict):
        spelt = {i: name for name, i in names.items()}
        for i, (token, _) in header.whole.items():
            names.pop(spelt.get(i), None)
            names[token] = i
        how = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        content["added_tokens"] = [
            {"id": i, "content": token, **how, "special": control}
            for i, (token, control) in sorted(header.whole.items())
        ]
    if (cut := _cut(content, header)) is not None:
        raise ValueError(
            f"model.path={file}: the tokenizer that transformers {transformers.__version__} makes of this GGUF file does not "
            f"keep {cut!r} whole; take the safetensors checkpoint of the model"
        )
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2))


def _cut(content: dict[str, Any], header: Header) -> str | None:
    """A token that the tokenizer of `content` cuts, or gives another id or one that the model does not have."""
    tokenizer = Tokenizer.from_str(json.dumps(content))
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if header.vocabulary and i >= header.vocabulary}
    kept = (tokenizer.encode(token, add_special_tokens=False).ids == [i] for i, (token, _) in header.whole.items())
    cut = (token for (token, _), whole in zip(header.whole.values(), kept, strict=True) if not whole)
    return next(iter(beyond), None) or next(cut, None)


def check_roles(file: Path, header: Header, tokenizer: PreTrainedTokenizerBase) -> None:
    """See that what begins, ends and pads a text is what the file says."""
    for role, wanted in header.roles.items():
        if (found := getattr(tokenizer, role)) != wanted:
            raise ValueError(
                f"model.path={file}: its {role} is {wanted}, and transformers {transformers.__version__} makes it {found}; "
                "type pip install -U 'transformers>=5.18,<6', or take the safetensors checkpoint of the model"
            )
