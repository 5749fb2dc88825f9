"""GGUF files: written here from small random models, converted, and compared with what they were written from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ssgr.model import Model, gguf, gguf_file
from ssgr.model.checkpoint import Checkpoint
from ssgr.store import Store
from tests.conftest import tmpfs

gguf_py = pytest.importorskip("gguf")
pytest.importorskip("accelerate")
pytest.importorskip("transformers", "5.18", reason="the extra gguf needs transformers 5.18")

CONFIG = "tokenizer_config.json"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "rms_norm_eps": 2**-20,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


def random(architecture: str, **settings: Any) -> PreTrainedModel:
    """A small random model; Qwen2 has biases."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**SIZES, "vocab_size": 512, **settings})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # else all ones and zeros, and no mistake would show
            torch.nn.init.normal_(parameter, 1, 0.3)
    return model.eval()


def write(
    file: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: str = "F32",
    tokens: dict[int, str] | None = None,
    **fields: Any,
) -> dict[str, Tensor]:
    """Write `model` as llama.cpp's script does; the weights that a reader gets back, by their names in the model."""
    config = model.config
    name = config.model_type
    writer = gguf_py.GGUFWriter(file, name)
    writer.add_name("random")
    writer.add_license("mit")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for key, value in fields.items():
        writer.add_key_value(key.replace("__", "."), value, gguf_py.GGUFValueType.get_type(value))
    _write_tokenizer(writer, tokenizer, tokens or {})
    names = gguf_py.get_tensor_name_map(getattr(gguf_py.MODEL_ARCH, name.upper()), config.num_hidden_layers)
    back = {}
    for full, tensor in model.state_dict().items():
        if full == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = full.rpartition(".")
        own = gguf_py.GGMLQuantizationType[kind if tensor.ndim > 1 else "F32"]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(stem.split(".")[-1])
        folded = tensor
        if heads and name == "llama":  # llama.cpp rotates neighbours, transformers halves
            folded = tensor.view(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        content = gguf_py.quants.quantize(folded.numpy(), own)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", content, raw_dtype=own)
        values = torch.from_numpy(np.array(gguf_py.quants.dequantize(content, own)))
        if heads and name == "llama":
            values = values.view(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        back[full] = values
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", divisors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return back


def divisors(config: Any) -> Any:
    """The divisors that llama.cpp's script writes for Llama 3, from the published definition."""
    rope, width = config.rope_parameters, config.hidden_size // config.num_attention_heads
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    context, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    out = []
    for wavelength in wavelengths:
        smooth = (context / wavelength - low) / (high - low)
        middle = 1 / ((1 - smooth) / rope["factor"] + smooth)
        out.append(1 if wavelength < context / high else rope["factor"] if wavelength > context / low else middle)
    return np.array(out, dtype=np.float32)


def _write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, other: dict[int, str]) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {entry["id"] for entry in content["added_tokens"] if entry["special"]}
    added = {entry["id"] for entry in content["added_tokens"]} - special
    tokens = [other.get(i, token) for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 4 if i in added else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    template = tokenizer.chat_template
    for i, token in other.items():
        template = template.replace(str(tokenizer.convert_ids_to_tokens(i)), token)
    writer.add_chat_template(template)


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(2, 202).reshape(2, 100)
    with torch.no_grad():
        out: Tensor = model(ids).logits
    return out


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("llama", {}), ("llama", {"rope_parameters": LLAMA3}), ("qwen2", {"tie_word_embeddings": True})],
    ids=["llama", "llama3", "qwen2"],
)
def test_the_logits_are_those_of_what_was_written(
    architecture: str, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    written = random(architecture, **settings)
    write(tmp_path / "m.gguf", written, tokenizer)
    model, made = gguf.stored(Model("x", str(tmp_path / "m.gguf"), device="cpu"), Store(tmp_path / "store"))
    assert made is not None and (gguf.record(made) or {})["dtype"] == "float32" and gguf.record(None) is None
    loaded = model.load()
    assert loaded.dtype == torch.float32 and torch.allclose(logits(loaded), logits(written), rtol=1e-4, atol=1e-4)
    for name, weight in written.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert set(Checkpoint(model.files()).places) >= {name for name, _ in written.named_parameters()}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_other_types_are_unpacked_as_they_are_defined(
    kind: str, dtype: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    back = write(tmp_path / "m.gguf", random("llama"), tokenizer, kind)
    with caplog.at_level(logging.WARNING):
        found = gguf.convert(tmp_path / "m.gguf", tmp_path / "out", dtype)
    assert (f"weights are dequantised from {kind} to" in caplog.text) == kind.startswith("Q")
    wanted = torch.float32 if dtype == "float32" else torch.bfloat16
    assert found["types"] == {kind: sum(t.numel() for t in back.values() if t.ndim > 1)}
    assert found["dtype"] == str(wanted).removeprefix("torch.")
    loaded = Model("x", str(tmp_path / "out"), device="cpu").load().state_dict()
    for name, weight in back.items():
        assert torch.equal(loaded[name], weight.to(wanted)), name


def test_the_directory_has_tokenizer_template_and_card_and_no_place(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write(tmp_path / "m.gguf", random("qwen2"), tokenizer)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Nonsense"}')  # of another model: not read
    gguf.convert(tmp_path / "m.gguf", tmp_path / "out", "auto")
    model = Model("x", str(tmp_path / "out"), device="cpu")
    again = model.tokenizer()
    for text in ("12 + 345 = ", "So  the answer\n\nis <think>7</think>", "Ä"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert model.prompt_ids(again, "1 + 1?") == Model("y", str(tmp_path)).prompt_ids(tokenizer, "1 + 1?")
    assert again.eos_token_id == tokenizer.eos_token_id and again.pad_token_id == tokenizer.pad_token_id
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == again.eos_token_id
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
        assert b"quantization_config" not in file.read_bytes(), file
    assert not (tmp_path / "out.new").exists()


def test_tokens_in_no_byte_alphabet_stay_whole(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """DeepSeek's, which transformers 5.19 cuts into bytes, or gives ids past the embeddings."""
    names = dict(enumerate(("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")))
    ids = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        *tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"]),
    )
    tokens = {i: names[n] for n, i in enumerate(ids)}
    write(tmp_path / "m.gguf", random("qwen2"), tokenizer, tokens=tokens)
    gguf.convert(tmp_path / "m.gguf", tmp_path / "out", "auto")
    model = Model("x", str(tmp_path / "out"), device="cpu")
    again = model.tokenizer()
    assert len(again) == len(tokenizer) == 512
    assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert model.prompt_ids(again, "1 + 1?") == Model("y", str(tmp_path)).prompt_ids(tokenizer, "1 + 1?")
    text = "<｜User｜>12 + 3<｜Assistant｜><think>15</think>15<｜end▁of▁sentence｜>"
    assert again(text)["input_ids"] == tokenizer("<|user|>12 + 3<|assistant|><think>15</think>15<|eos|>")["input_ids"]
    assert again.decode(again(text)["input_ids"]) == text
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == "12 + 31515"


def test_it_is_converted_once(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    write(folder / "m.gguf", random("llama"), tokenizer)
    store = Store(tmp_path / "store")
    model, made = gguf.stored(Model("x", str(folder)), store)
    moved = (folder / "m.gguf").rename(tmp_path / "elsewhere.gguf")
    monkeypatch.setattr(gguf, "convert", lambda *a: 1 / 0)
    same, again = gguf.stored(Model("x", str(moved)), store)
    assert made and again and made.key == again.key and model.fingerprint == same.fingerprint
    with pytest.raises(ZeroDivisionError):
        gguf.stored(Model("x", str(moved), dtype="float16"), store)
    monkeypatch.setattr(gguf, "convert", lambda *a: {"checksum": "that of other bytes"})
    with pytest.raises(ValueError, match="the file changed while it was converted"):
        gguf.stored(Model("x", str(moved), dtype="float16"), store)
    assert gguf.stored(model, store) == (model, None)


def test_a_conversion_that_was_killed_is_made_again(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", random("llama"), tokenizer)
    for left in ("out", "out.new"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    gguf.convert(tmp_path / "m.gguf", tmp_path / "out", "auto")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("kib", [150, 250, 420, 440])
def test_a_disk_that_fills_up(kib: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """One sentence, nothing published, and the same goes on when there is room."""
    write(tmp_path / "m.gguf", random("llama"), tokenizer)
    model = Model("x", str(tmp_path / "m.gguf"), device="cpu")
    with tmpfs(tmp_path / "disk", kib) as grow:
        store = Store(tmp_path / "disk" / "store")
        for _ in range(2):
            with pytest.raises(ValueError, match=r"^the disk is full \(No space left on device\) .*again continues"):
                gguf.stored(model, store)
            assert not store.keys("convert")
        grow(8000)
        made, _ = gguf.stored(model, store)
        assert torch.equal(logits(made.load()), logits(gguf.stored(model, Store(tmp_path / "whole"))[0].load()))


def test_a_cut_file_is_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", random("llama"), tokenizer)
    whole = (tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (*range(4, 200, 7), 1000, 5000, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf: this GGUF file is cut or damaged .*; download it again"):
            gguf.convert(cut, tmp_path / "out", "auto")
    for content in (b"", b"PK\x03\x04 and more", b"GGML" * 10):
        cut.write_bytes(content)
        with pytest.raises(ValueError, match=r"cut\.gguf: this is no GGUF file"):
            gguf.convert(cut, tmp_path / "out", "auto")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.new").exists()


def test_what_the_loader_does_not_know_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.gguf"
    write(file, random("llama"), tokenizer)
    file.write_bytes(file.read_bytes().replace(b"llama", b"lmama"))
    with pytest.raises(ValueError, match=r"cannot load this GGUF file of architecture lmama \(.*\); take the safetens"):
        gguf.convert(file, tmp_path / "out", "auto")
    file.unlink()
    write(file, random("llama"), tokenizer, llama__rope__scaling__type="yarn", llama__rope__scaling__factor=4.0)
    with pytest.raises(ValueError, match=r"its rotary scaling \(yarn\) is not read by transformers"):
        gguf.convert(file, tmp_path / "out", "auto")
    file.unlink()
    write(file, random("llama", rope_parameters={**LLAMA3, "original_max_position_embeddings": 999}), tokenizer)
    with pytest.raises(ValueError, match=r"its rotary scaling \(none\) is not read by transformers"):
        gguf.convert(file, tmp_path / "out", "auto")
    file.unlink()
    write(file, random("llama", attention_bias=True), tokenizer)  # which the loader would leave out
    with pytest.raises(ValueError, match=r"does not read this GGUF file whole: it holds \d+ numbers and LlamaFor"):
        gguf.convert(file, tmp_path / "out", "auto")
    file.unlink()
    write(file, random("qwen3", head_dim=16), tokenizer)  # which the loader takes for 128
    with pytest.raises(
        ValueError, match=r"does not read .*q_proj\.weight not as its configuration|cannot load .*mismatch"
    ):
        gguf.convert(file, tmp_path / "out", "auto")
    file.unlink()
    write(file, random("llama"), tokenizer)
    with monkeypatch.context() as older:  # what transformers 5.17 does
        older.setattr("ssgr.model.gguf.keep_whole", lambda file, header, path: path.with_name(CONFIG).write_text("{}"))
        with pytest.raises(
            ValueError, match=r"its bos_token_id is 0, and transformers .* makes it None; type pip install"
        ):
            gguf.convert(file, tmp_path / "out", "auto")
    file.unlink()
    write(file, random("llama"), tokenizer, split__count=3)
    with pytest.raises(ValueError, match=r"one of 3 parts; join them first: type llama-gguf-split --merge"):
        gguf.convert(file, tmp_path / "out", "auto")
    assert not (tmp_path / "out").exists()


def test_what_to_type_where_the_packages_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_file, "find_spec", lambda package: None)
    with pytest.raises(
        ValueError,
        match=r"gguf and accelerate, which are not installed; type pip install 'accelerate>=1\.1' 'gguf>=0\.10'",
    ):
        gguf.stored(Model("x", str(tmp_path / "m.gguf")), Store(tmp_path / "store"))


def test_which_file_a_path_names(tmp_path: Path) -> None:
    assert gguf.find("some/model") is None and gguf.find("pkg://ssgr.model.tiny/weights") is None
    with pytest.raises(ValueError, match=r"model\.path=.*/m\.gguf: there is no such file"):
        gguf.find(str(tmp_path / "m.gguf"))
    (tmp_path / "m.gguf").touch()
    assert gguf.find(str(tmp_path)) == gguf.find(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    (tmp_path / "n.gguf").touch()
    with pytest.raises(
        ValueError, match=r"several GGUF files are there \(m\.gguf, n\.gguf\); type model\.path=.*/FILE\.gguf"
    ):
        gguf.find(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert gguf.find(str(tmp_path)) is None
    with pytest.raises(ValueError, match=r"there is no package no_such_package"):
        gguf.find("pkg://no_such_package/m.gguf")
