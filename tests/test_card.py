"""What a pruned checkpoint says of itself, and what lies beside its weights."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.repocard import metadata_load
from transformers import AutoTokenizer

from ssgr.keys import describe
from ssgr.model import Model
from ssgr.model.checkpoint import Checkpoint, Replica
from ssgr.pruner.wanda import Wanda
from ssgr.records import CalibrationSet, Row
from ssgr.sparsity import Unstructured
from ssgr.stages import card
from ssgr.stages.export import Export
from tests.conftest import TINY, random_model

ROWS = CalibrationSet(
    "ssgr",
    (Row((5, 6, 7), 1, "p1/0"), Row((5, 8), 1, "p2/3")),
    ((1.0,) * 3, (1.0,) * 2),
    (("graded", 9), ("right", 2)),
    5,
)
LAYER = {"name": "model.layers.0.mlp.up_proj", "shape": [48, 32], "sparsity": 0.5, "error": 0.25, "damping": 0.01}
RESULT = {
    "pruner": "wanda",
    "propagate": "pruned",
    "sparsity_target": 0.5,
    "sparsity_realised": 0.50012,
    "sparsity_model": 0.49,
    "sparsity_with_embeddings": 0.4,
    "unseen": 0,
    "seconds": {"solve": 12.34},
    "peak_host_mib": 5678.9,
    "layers": [{**LAYER, "seconds": 91.23}],
    "checkpoint": "/home/somebody/store/prune/abc/checkpoint",
}
SETTINGS = {"pruner": describe(Wanda()), "sparsity": describe(Unstructured(0.5))}
KEYS = {"select": "1" * 24, "prune": "2" * 24}
VERSIONS = {"ssgr": "0.1.0", "torch": "2.13.0"}


def record(model: Model = TINY, calibration: CalibrationSet | None = ROWS, **more: Any) -> dict[str, Any]:
    return card.provenance(model, {**RESULT, **more}, SETTINGS, calibration, KEYS, VERSIONS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with all that may lie beside the weights."""
    folder = tmp_path / "Some-7B"
    random_model().save_pretrained(folder)
    TINY.tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: some-licence\nlicense_link: LICENSE\nbase_model: a/b\n---\n# Some-7B is best\n"
    )
    (folder / "LICENSE").write_text("Terms")
    (folder / "NOTICE").write_text("Notice")
    (folder / "training_args.bin").write_bytes(b"no")
    return folder


def test_all_but_weights_and_card_is_copied_as_it_is(source: Path, tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    Replica(Checkpoint(source), tmp_path / "pruned").copy_rest()
    copied = {file.name for file in (tmp_path / "pruned").iterdir()} - {"model.safetensors"}
    assert copied == {file.name for file in source.iterdir()} - {"README.md", "training_args.bin", "model.safetensors"}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
            "LICENSE", "NOTICE"} <= copied  # fmt: skip
    for file in (tmp_path / "pruned").iterdir():
        if file.suffix != ".safetensors":
            assert file.read_bytes() == (source / file.name).read_bytes(), file.name
    same = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    assert same.chat_template == AutoTokenizer.from_pretrained(source).chat_template
    assert same("12 + 3")["input_ids"] == TINY.tokenizer()("12 + 3")["input_ids"]


def test_several_chat_templates_go_along_and_are_part_of_the_model(source: Path, tmp_path: Path) -> None:
    tokenizer, model = TINY.tokenizer(), Model("local", str(source), device="cpu")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tools": "{{ messages }}"}
    before = model.fingerprint
    tokenizer.save_pretrained(source)
    assert (source / "additional_chat_templates" / "tools.jinja").is_file()
    (tmp_path / "pruned").mkdir()
    Replica(Checkpoint(source), tmp_path / "pruned").copy_rest()
    assert AutoTokenizer.from_pretrained(tmp_path / "pruned").chat_template == tokenizer.chat_template
    prints = [before, Model("local", str(source), device="cpu").fingerprint]
    for name in ("additional_chat_templates/tools.jinja", "vocabulary.tiktoken"):
        (source / name).write_text("{{ tools }}")
        prints.append(Model("local", str(source), device="cpu").fingerprint)
    assert len(set(prints)) == 4


def test_what_a_source_says_of_its_own_sparsity_is_not_copied(source: Path, tmp_path: Path) -> None:
    """Readers would take the pruned weights for what they are not."""
    config = json.loads((source / "config.json").read_text())
    of_source = {"format": "dense", "sparsity_structure": "2:4"}
    more = {"sparsity_config": of_source, "compression_config": {"format": "dense", "sparsity_config": of_source}}
    (source / "config.json").write_text(json.dumps({**config, **more}))
    (tmp_path / "pruned").mkdir()
    Replica(Checkpoint(source), tmp_path / "pruned").copy_rest()
    found = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert found == {**config, "compression_config": {"format": "dense"}}


def test_the_record_says_where_it_comes_from_and_not_when_or_where_it_was_made(source: Path, tmp_path: Path) -> None:
    model = Model("local", str(source), device="cpu")
    found = record(model)
    assert found["source"] == {
        "name": "local", "dtype": "auto", "fingerprint": model.fingerprint, "folder": "Some-7B",
    }  # fmt: skip
    assert found["zeros"] == {name: value for name, value in RESULT.items() if name.startswith("sparsity_")}
    assert found["layers"] == [LAYER] and found["keys"] == KEYS and found["propagate"] == "pruned"
    assert found["pruner"]["_type"] == "Wanda" and found["sparsity"]["ratio"] == 0.5
    assert found["calibration"]["tokens"] == {"asked": 5, "realised": 5, "prompt": 2, "response": 3}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        card.write(tmp_path / folder, record(model), source)
    for name in ("ssgr.json", "README.md"):
        text = (tmp_path / "a" / name).read_text()
        assert text == (tmp_path / "b" / name).read_text()
        for trace in (str(tmp_path), "/home", "somebody", "12.34", "5678", "91.23", "seconds", "peak"):
            assert trace not in text, trace
        assert not re.search(r"\b20\d\d-\d\d|\d\d:\d\d", text)
    assert json.loads((tmp_path / "a" / "ssgr.json").read_text()) == found


def test_digests_tell_rows_and_tokens_apart() -> None:
    first = record()["calibration"]
    renamed = dataclasses.replace(ROWS, rows=(Row((5, 6, 7), 1, "p1/1"), ROWS.rows[1]))
    other = record(calibration=renamed)["calibration"]
    assert other["row_ids_sha256"] != first["row_ids_sha256"] and other["token_ids_sha256"] == first["token_ids_sha256"]
    moved = dataclasses.replace(ROWS, rows=(Row((5, 6), 1, "p1/0"), Row((7, 5, 8), 1, "p2/3")))
    last = record(calibration=moved)["calibration"]
    assert last["row_ids_sha256"] == first["row_ids_sha256"] and last["token_ids_sha256"] != first["token_ids_sha256"]


def test_sources_are_named_by_what_means_something_elsewhere(source: Path, tmp_path: Path) -> None:
    commit = "0a" * 20
    assert record(Model("r1", "some/R1-7B", revision=commit))["source"]["hub"] == "some/R1-7B"
    cached = tmp_path / "models--some--R1-7B" / "snapshots" / commit
    cached.parent.mkdir(parents=True)
    source.rename(cached)
    model = Model("local", str(cached), device="cpu")
    found = record(model)["source"]
    assert (found["hub"], found["revision"]) == ("some/R1-7B", commit) and "folder" not in found
    assert record()["source"]["folder"] == "pkg://ssgr.model.tiny/weights"
    converted = {"file": "m.Q8_0.gguf", "types": {"Q8_0": 9}, "dtype": "bfloat16"}
    made = card.provenance(model, RESULT, SETTINGS, None, KEYS, VERSIONS, converted)
    assert made["source"]["gguf"] == converted and made["calibration"] is None
    text = card.model_card(made, {})
    assert "`m.Q8_0.gguf`, converted from Q8_0 to bfloat16, pruned with" in text and "base_model" not in text
    card.write(cached, record(), cached)
    again = record(Model("local", str(cached), device="cpu"))
    assert again["source"]["pruned"] == record()
    said = "Of matrices that only the earlier pruning changed no zeros are counted."
    assert said in card.model_card(again, {}) and said not in card.model_card(record(), {})


def test_the_card(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    card.write(tmp_path / "out", record(Model("r1", "some/R1-7B", revision="0a" * 20)), source)
    assert metadata_load(tmp_path / "out" / "README.md") == {
        "base_model": "some/R1-7B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ssgr", "pruned", "sparse"],
        "license": "other",
        "license_name": "some-licence",
        "license_link": "LICENSE",
    }
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# some/R1-7B, pruned to 50% zeros" in text and "is best" not in text
    assert "| of the pruned matrices | 0.5001 |" in text and "| of all weights | 0.4000 |" in text
    assert "Source `ssgr`: 2 rows, 5 tokens (2 of prompts, 3 of responses)." in text
    assert "AutoModelForCausalLM.from_pretrained" in text and "vllm serve" in text
    assert "The licence of the base model applies: some-licence (LICENSE)." in text
    assert "Zeros are stored like any other number" in text and "evaluate the model" in text
    assert "`Wanda(" in text and "`Unstructured(ratio=0.5)`" in text


def test_the_card_says_of_the_rows_what_is_so() -> None:
    """Text is no response, and a pruner that looks at the weights alone saw no rows."""
    text = dataclasses.replace(ROWS, rows=tuple(dataclasses.replace(row, prompt_tokens=0) for row in ROWS.rows))
    said = card.model_card(record(calibration=text), {})
    assert "2 rows, 5 tokens. Each block saw the rows as the pruned blocks before it leave them.\n" in said
    found = card.provenance(TINY, RESULT, {**SETTINGS, "passing": None}, ROWS, KEYS, VERSIONS)
    said = card.model_card(found, {})
    assert found["propagate"] is None and "Each block saw" not in said
    assert "They told how the zeros are shared among the layers" in said


def test_a_card_without_calibration_licence_or_whole_numbers() -> None:
    found = record(calibration=None, unseen=3, layers=[{**LAYER, "error": float("nan")}])
    assert found["layers"][0]["error"] is None
    text = card.model_card(found, {})
    assert "the pruner looks at the weights alone" in text and "\nThe licence of the base model applies.\n" in text
    assert "3 matrices met no calibration token" in text


@pytest.mark.parametrize(
    "front", ["", "# no front matter", "---\n: [broken\n---\n", "---\n- a list\n---\n", "---\nlicense:\n  - a\n---\n"]
)
def test_a_source_card_that_says_nothing_of_a_licence(front: str, tmp_path: Path) -> None:
    assert card.licence(tmp_path) == {}
    (tmp_path / "README.md").write_text(front)
    assert card.licence(tmp_path) == {}


def test_a_quantised_source_is_refused(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"has a quantization_config \(gptq\), and quantised weights cannot be pruned; take"
    ):
        Model("local", str(source), device="cpu").skeleton()


def test_the_formats_of_an_export() -> None:
    assert Export().format == Export("safetensors").format == "safetensors"
    with pytest.raises(ValueError, match=r"export\.format=gguf: .* python convert_hf_to_gguf\.py FOLDER/checkpoint"):
        Export("gguf")
    with pytest.raises(ValueError, match=r"export\.format='bin': the valid choice is safetensors"):
        Export("bin")
