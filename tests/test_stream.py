"""Pruning from disk to disk, one block at a time: layout, resume, memory, and sources that are not what they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from ssgr.model import Model
from ssgr.pruner.magnitude import Magnitude
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.pruner.wanda import Wanda
from ssgr.sparsity import NM, Unstructured
from ssgr.stages.plan import Memory
from ssgr.stages.prune import check, prune
from tests.conftest import ROOT, random_model
from tests.test_prune import calibration

HALF = Unstructured(0.5)


def saved(folder: Path, layers: int = 4, shard: str = "20KB", dtype: torch.dtype = torch.float32) -> Model:
    """A random model in several shards."""
    random_model(layers=layers).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return Model("random", str(folder), device="cpu")


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layout_is_that_of_the_source(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = saved(tmp_path / "source", dtype=dtype)
    prune(source, tokenizer, calibration(), Wanda(), HALF, Memory(1), tmp_path / "work")
    pruned = tmp_path / "work" / "checkpoint"
    names = {file.name for file in (tmp_path / "source").iterdir()}
    assert {file.name for file in pruned.iterdir()} == names and len(weights(pruned)) > 3
    for file in weights(pruned):
        with safe_open(tmp_path / "source" / file, "pt") as a, safe_open(pruned / file, "pt") as b:  # type: ignore[no-untyped-call]
            assert a.metadata() == b.metadata() and set(a.keys()) == set(b.keys())
            for name in a.keys():  # noqa: SIM118
                old, new = a.get_tensor(name), b.get_tensor(name)
                assert old.dtype == new.dtype == dtype
                zeros = float((new == 0).float().mean())
                if "proj.weight" in name:
                    assert zeros == pytest.approx(0.5, abs=0.03) and torch.equal(new[new != 0], old[new != 0])
                else:
                    assert torch.equal(old, new), name


def test_activations_in_a_file_change_nothing(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    for gib in (0, 1):
        prune(source, tokenizer, calibration(), SparseGPT(), HALF, Memory(gib), tmp_path / str(gib))
        assert not (tmp_path / str(gib) / "activations.bin").exists()
    assert weights(tmp_path / "0" / "checkpoint") == weights(tmp_path / "1" / "checkpoint")


KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from ssgr.model import Model
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.sparsity import Unstructured
from ssgr.stages.plan import Memory
from ssgr.stages.prune import prune
from tests.conftest import TINY
from tests.test_prune import calibration

torch.set_num_threads(1)
model, tokenizer, rows = Model("random", sys.argv[1], device="cpu"), TINY.tokenizer(), calibration(rows=40)
model.fingerprint

def finished(work):
    journal = Path(work, "blocks.json")
    return len(json.loads(journal.read_text())) if journal.exists() else 0

def run(work, blocks=None):
    '''Prune in a child, killed at some moment after it finished `blocks`; whether it came to its end.'''
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        prune(model, tokenizer, rows, SparseGPT(), Unstructured(0.5), Memory(1), Path(work))
        os._exit(0)
    while blocks is None or finished(work) < blocks:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, status
            return True
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)

rng, stops = random.Random(0), [0]
assert run(sys.argv[2] + "/whole")
parts = sys.argv[2] + "/parts"
while not run(parts, stops[-1] + rng.randrange(3)):
    stops.append(finished(parts))
assert run(parts)
print(json.dumps(stops))
"""


def test_a_prune_killed_at_random_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", layers=12)
    command = [sys.executable, "-c", KILLS, source.path, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stops = json.loads(done.stdout)
    assert len(stops) > 4 and len(set(stops) - {0, 12}) > 2, stops  # killed several times, in several blocks
    assert stops == sorted(stops), "what was done was done again"
    assert weights(tmp_path / "parts" / "checkpoint") == weights(tmp_path / "whole" / "checkpoint")


def test_a_shard_that_is_lost_between_two_runs_is_made_again(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source, work = saved(tmp_path / "source"), tmp_path / "work"
    prune(source, tokenizer, calibration(), Wanda(), HALF, Memory(1), work)
    whole = weights(work / "checkpoint")
    assert (work / "blocks.json").exists()  # until the result is written
    (work / "checkpoint" / sorted(whole)[2]).unlink()
    prune(source, tokenizer, calibration(), Wanda(), HALF, Memory(1), work)
    assert weights(work / "checkpoint") == whole


def test_the_peak_does_not_grow_with_the_depth(tmp_path: Path) -> None:
    """Blocks of 25 MiB: 16 of them hold 400 MiB, and the peak over the start is that of 4."""
    code = """
import sys
from pathlib import Path
import psutil, torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from ssgr.model import Model
from ssgr.pruner.wanda import Wanda
from ssgr.sparsity import Unstructured
from ssgr.stages.plan import Memory
from ssgr.stages.prune import prune
from tests.conftest import TINY
from tests.test_prune import calibration
from ssgr.store import _peak_rss_mib, _reset_peak_rss
torch.set_num_threads(1)
model, tokenizer, rows = Model("random", sys.argv[1], device="cpu"), TINY.tokenizer(), calibration()
prune(Model("random", sys.argv[3], device="cpu"), tokenizer, rows, Wanda(), Unstructured(0.5), Memory(1), Path(sys.argv[2] + "w"))
start = psutil.Process().memory_info().rss / 2**20
_reset_peak_rss()
prune(model, tokenizer, rows, Wanda(), Unstructured(0.5), Memory(1), Path(sys.argv[2]))
print(_peak_rss_mib() - start)
"""
    saved(tmp_path / "warm", layers=2)
    peaks = []
    for layers in (4, 16):
        config = Qwen2Config(
            vocab_size=64, hidden_size=512, intermediate_size=3584, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=128,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(tmp_path / str(layers), max_shard_size="60MB")
        command = [
            sys.executable,
            "-c",
            code,
            *(str(tmp_path / name) for name in (str(layers), f"out{layers}", "warm")),
        ]
        own = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # give matrices back at once, as those of real size are
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=own)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout.split()[-1]))
    assert peaks[1] < 1.15 * peaks[0], peaks
    assert peaks[1] < 160, peaks  # the whole model is 416 MiB


def test_a_cut_shard_and_a_missing_one_are_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    shard = sorted((tmp_path / "source").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for content, message in ((whole[:-10], "it is cut"), (whole[:5], "it is cut"), (b"x" * 200, "it is cut|damaged")):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{shard.name}: .*({message})"):
            prune(source, tokenizer, None, Magnitude(), HALF, Memory(1), tmp_path / "work")
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name}: this shard cannot be read"):
        prune(source, tokenizer, None, Magnitude(), HALF, Memory(1), tmp_path / "work")
    assert not list((tmp_path / "work").rglob("*.safetensors"))


def test_what_is_not_finite_or_not_a_float_is_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = random_model(layers=3)
    model.model.layers[2].mlp.up_proj.weight.data[1, 2] = float("inf")
    model.save_pretrained(tmp_path / "inf")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN or infinity"):
        prune(
            Model("x", str(tmp_path / "inf"), device="cpu"),
            tokenizer,
            None,
            Magnitude(),
            HALF,
            Memory(1),
            tmp_path / "w",
        )
    file = tmp_path / "inf" / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"F32"', b'"I32"')
    file.write_bytes(content[:8] + header + content[8 + length :])
    with pytest.raises(ValueError, match="has dtype I32; quantised weights cannot be pruned"):
        prune(
            Model("y", str(tmp_path / "inf"), device="cpu"),
            tokenizer,
            None,
            Magnitude(),
            HALF,
            Memory(1),
            tmp_path / "v",
        )


@pytest.mark.parametrize(
    ("what", "place", "field"),
    [("disk", "shutil.disk_usage", "free"), ("memory", "psutil.virtual_memory", "available")],
)
def test_a_prune_that_does_not_fit_is_refused_before_it_begins(
    what: str,
    place: str,
    field: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = saved(tmp_path / "source")
    monkeypatch.setattr(f"ssgr.stages.plan.{place}", lambda *path: type("Little", (), {field: 1000}))
    with pytest.raises(ValueError, match=rf"prune needs .* of {what}, and .* are free; .*type "):
        prune(source, tokenizer, calibration(), Wanda(), HALF, Memory(1), tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_a_pinned_commit_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: 1 / 0)
    assert Model("hub", "some/model", revision="0a" * 20).fingerprint == "0a" * 20
    with pytest.raises(ValueError, match=r"the hub cannot be asked \(ZeroDivisionError\); pin model\.revision=COMMIT"):
        _ = Model("hub", "some/model", revision="main").fingerprint


def test_a_comparison_without_effect_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(random_model(), Wanda(compare="layer"), NM(2, 4))
    assert "pruner.compare has no effect on n:m" in caplog.text
    caplog.clear()
    check(random_model(), Wanda(), NM(2, 4))
    assert not caplog.text
