"""Pruning from disk to disk, one block at a time: layout, resume, memory, and sources that are not what they should be."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ssgr import model as model_module
from ssgr import pipeline, store
from ssgr.model import Model
from ssgr.model.blocks import decoder_blocks
from ssgr.model.checkpoint import Checkpoint, Replica
from ssgr.pruner import Pruner
from ssgr.pruner.magnitude import Magnitude
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.pruner.wanda import Wanda
from ssgr.records import CalibrationSet, Row
from ssgr.sparsity import NM, Unstructured
from ssgr.stages import activations, heap, plan
from ssgr.stages.plan import Memory
from ssgr.stages.prune import Passing, check, prune
from ssgr.stages.solve import Solver
from ssgr.stages.statistics import collect
from ssgr.stages.walk import Walk
from ssgr.store import Store
from tests.conftest import ROOT, random_model, tmpfs
from tests.test_configs import build
from tests.test_prune import calibration, stopped_at, uniform

HALF = Unstructured(0.5)


def saved(folder: Path, layers: int = 4, shard: str = "20KB", dtype: torch.dtype = torch.float32) -> Model:
    """A random model in several shards."""
    random_model(layers=layers).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return Model("random", str(folder), device="cpu")


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layout_is_that_of_the_source(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = saved(tmp_path / "source", dtype=dtype)
    prune(source, tokenizer, calibration(), uniform(Wanda(), HALF), Memory(1), tmp_path / "work")
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


@pytest.mark.parametrize(
    ("stored", "runs", "pruner", "order"),
    [
        (torch.float32, "bfloat16", Wanda(), "layer"),
        (torch.float32, "float16", Wanda(), "block"),
        (torch.float32, "bfloat16", SparseGPT(), "layer"),
        (torch.float64, "auto", Wanda(), "layer"),
    ],
)
def test_weights_are_solved_as_they_are_stored_whatever_they_run_in(
    stored: torch.dtype, runs: str, pruner: Pruner, order: Literal["layer", "block"],
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
) -> None:  # fmt: skip
    model = random_model().to(stored)
    for parameter in model.parameters():
        parameter.data *= 1 + 2**-30  # which float64 alone can tell
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    source = Model("random", str(tmp_path / "source"), dtype=runs, device="cpu")
    given = (source, tokenizer, calibration(), uniform(pruner, HALF), Memory(1))
    prune(*given, tmp_path / "whole", Passing("pruned", order))
    old, new = (tensors(folder) for folder in (tmp_path / "source", tmp_path / "whole" / "checkpoint"))
    for name, value in new.items():
        assert value.dtype == stored
        if not isinstance(pruner, SparseGPT) or "proj.weight" not in name:
            assert torch.equal(value[value != 0], old[name][value != 0]), name
    result = json.loads((tmp_path / "whole" / "prune.json").read_text())
    for layer in result["layers"]:
        assert layer["sparsity"] == float((new[f"{layer['name']}.weight"] == 0).double().mean())
    with stopped_at(1):
        prune(*given, tmp_path / "killed", Passing("pruned", order))
    prune(*given, tmp_path / "killed", Passing("pruned", order))
    assert weights(tmp_path / "killed" / "checkpoint") == weights(tmp_path / "whole" / "checkpoint")


@pytest.mark.parametrize(("name", "content"), [("blocks", "{"), ("blocks", "[1]"), ("blocks", "{}"), ("ratios", "{")])
def test_a_killed_prune_whose_notes_are_damaged_goes_on(
    name: str, content: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    random_model().save_pretrained(tmp_path / "source")
    source = Model("random", str(tmp_path / "source"), device="cpu")
    given = (source, tokenizer, calibration(), uniform(Wanda(), HALF), Memory(1))
    prune(*given, tmp_path / "whole")
    with stopped_at(1):
        prune(*given, tmp_path / "killed")
    (tmp_path / "killed" / f"{name}.json").write_text(content)
    prune(*given, tmp_path / "killed")
    assert weights(tmp_path / "killed" / "checkpoint") == weights(tmp_path / "whole" / "checkpoint")


def test_a_weight_beyond_float16_is_stored_as_it_was(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = random_model()
    model.model.layers[0].mlp.down_proj.weight.data[3, 4] = 1e5
    model.save_pretrained(tmp_path / "source")
    source = Model("random", str(tmp_path / "source"), dtype="float16", device="cpu")
    prune(source, tokenizer, None, uniform(Magnitude(), HALF), Memory(1), tmp_path / "work")
    assert tensors(tmp_path / "work" / "checkpoint")["model.layers.0.mlp.down_proj.weight"][3, 4] == 1e5
    with pytest.raises(ValueError, match=r"layers\.0: its output holds NaN or infinity .*type model\.dtype=float32"):
        prune(source, tokenizer, calibration(), uniform(Wanda(), HALF), Memory(1), tmp_path / "wanda")


def test_activations_in_a_file_change_nothing(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    for gib in (0, 1):
        prune(source, tokenizer, calibration(), uniform(SparseGPT(), HALF), Memory(gib), tmp_path / str(gib))
        assert not list((tmp_path / str(gib)).glob("activations*"))
    assert weights(tmp_path / "0" / "checkpoint") == weights(tmp_path / "1" / "checkpoint")


KILLS = """
import json, os, random, signal, sys, threading
from collections import Counter
from pathlib import Path
import torch
from ssgr.model import Model
from ssgr.model.checkpoint import Replica
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.sparsity import Unstructured
from ssgr import files
from ssgr.stages import statistics
from ssgr.stages.plan import Memory
from ssgr.stages.prune import Passing, prune
from ssgr.stages.walk import Walk
from tests.conftest import TINY
from tests.test_prune import calibration, uniform

torch.set_num_threads(1)
source, root, propagate, order, gib = sys.argv[1:]
model, tokenizer, rows = Model("random", source, device="cpu"), TINY.tokenizer(), calibration(rows=40)
model.fingerprint
rng, events, last = random.Random(order + gib), Counter(), ("", 0, False)

def everything(work):
    dense = None
    if propagate == "dense":
        dense = work / "collected"
        dense.mkdir(parents=True, exist_ok=True)
        statistics.collect(model, tokenizer, rows, "gram", Memory(int(gib)), dense)
    method, passing = uniform(SparseGPT(), Unstructured(0.5)), Passing(propagate, order)
    prune(model, tokenizer, None if dense else rows, method, Memory(int(gib)), work / "pruned", passing, dense)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def watched(owner, name, torn):
    '''Let each call of a function be an event; the `last` one is only begun, or the process dies a little later.'''
    own, event = getattr(owner, name), owner.__name__.rpartition(".")[2] + "." + name
    def call(*args, **options):
        events[event] += 1
        if (event, events[event]) == last[:2]:
            if last[2]:
                torn(*args)
                die()
            threading.Timer(rng.uniform(0, 0.02), die).start()
        return own(*args, **options)
    setattr(owner, name, call)

def half_written(replica, tensors):
    for name in tensors:
        place = replica.source.places[name]
        with open(replica.folder / place.file, "r+b") as stream:
            stream.seek(place.start)
            stream.write(b"x" * ((place.stop - place.start) // 2))

def half_begun(replica):
    replica.folder.mkdir(parents=True, exist_ok=True)
    for file in [file for file in replica._files() if not replica._begun(file)][:1]:
        (replica.folder / file).write_bytes(b"torn")

watched(Replica, "begin", half_begun)
watched(Replica, "copy_rest", lambda replica: (replica.folder / "config.json").write_text("{"))
watched(Replica, "write", half_written)
watched(Replica, "copy", half_written)
watched(files, "write_json", lambda file, content: file.with_name(file.name + ".new").write_text("{"))
watched(statistics, "save_file", lambda tensors, file, *rest: Path(file).write_bytes(b"torn"))
watched(os, "fsync", lambda *args: None)
watched(Walk, "keep", lambda *args: None)

def run(work, *at):
    '''Do everything in a child that dies at the event `at`; how many events it saw if it came to its end.'''
    global last
    last, (there, here) = at, os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        everything(Path(work))
        os.write(here, json.dumps(events).encode())
        os._exit(0)
    os.close(here)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return json.loads(os.read(there, 10000) or b"{}")

def finished(work):
    found = Path(work, "pruned", "blocks.json")
    collected = len(list(Path(work, "collected").glob("block_*")))
    return collected, len(json.loads(found.read_text())["blocks"]) if found.exists() else 0

total = run(root + "/whole", "", 0, False)
parts, stops = root + "/parts", []
for n in (1, 3, 2) if propagate == "dense" else ():
    assert not run(parts, "statistics.save_file", n, True)
    stops.append(("statistics.save_file", *finished(parts)))
for torn in (True, False):
    for kind in rng.sample(sorted(total), len(total)):
        if not run(parts, kind, rng.randrange(1, 2 + total[kind] // 8), torn):
            stops.append((kind, *finished(parts)))
sorted(Path(parts, "pruned", "checkpoint").glob("*.safetensors"))[-1].unlink()  # and a shard is lost
for kind in ("Replica.begin", "os.fsync", "Replica.copy_rest", "Replica.write"):
    assert not run(parts, kind, 1, True)
assert run(parts, "", 0, False)
print(json.dumps(stops))
"""


@pytest.mark.parametrize(
    ("propagate", "order", "gib"),
    [("pruned", "layer", "0"), ("dense", "block", "0"), pytest.param("pruned", "block", "1", marks=pytest.mark.slow)],
)
def test_what_is_killed_at_random_ends_with_the_same_bytes(
    propagate: str, order: str, gib: str, tmp_path: Path
) -> None:
    """Killed in the middle of writes, and at any moment between."""
    source = saved(tmp_path / "source", layers=8)
    command = [sys.executable, "-c", KILLS, source.path, str(tmp_path), propagate, order, gib]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kinds, stops = zip(*((kind, tuple(stop)) for kind, *stop in json.loads(done.stdout)), strict=True)
    assert len(set(stops)) > 3 and len(set(kinds)) > 5, stops  # killed in several blocks, at several moments
    assert list(stops) == sorted(stops), "what was done was done again"
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    for folder in ("collected", "pruned/checkpoint"):
        assert weights(parts / folder) == weights(whole / folder)
    names = [sorted(str(f.relative_to(root)) for f in root.rglob("*")) for root in (parts, whole)]
    assert names[0] == names[1], "what a killed run left"
    assert not [name for name in names[1] if "activations" in name or name.endswith("source.json")]


def test_a_shard_that_is_lost_between_two_runs_is_made_again(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source, work = saved(tmp_path / "source"), tmp_path / "work"
    prune(source, tokenizer, calibration(), uniform(Wanda(), HALF), Memory(1), work)
    whole = weights(work / "checkpoint")
    (work / "checkpoint" / sorted(whole)[2]).unlink()
    prune(source, tokenizer, calibration(), uniform(Wanda(), HALF), Memory(1), work)
    assert weights(work / "checkpoint") == whole


def test_what_stops_after_the_last_block_solves_none_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store reads all shards once more before a result is there, which takes long where they are large."""
    solved: list[int] = []
    block, seal = Solver.block, store._seal
    monkeypatch.setattr(Solver, "block", lambda self, i, *rest: solved.append(i) or block(self, i, *rest))

    def full(work: Path) -> dict[str, dict[str, Any]]:
        if work.parent.name == "prune":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work))
        return seal(work)

    experiment = build("pruner=magnitude", "calib=corpus", "budget.tokens=500", "device=cpu", f"store.path={tmp_path}")
    shelf = Store(tmp_path)
    planned = [p.key for p in pipeline.plan(experiment, shelf) if p.stage in ("select", "prune")]
    monkeypatch.setattr(store, "_seal", full)
    with pytest.raises(ValueError, match="the disk is full"):
        pipeline.make(experiment, shelf, planned)
    assert solved
    monkeypatch.setattr(store, "_seal", seal)
    solved.clear()
    pipeline.make(experiment, shelf, planned)
    seconds = json.loads(next(tmp_path.glob("prune/*/prune.json")).read_text())["seconds"]
    assert not solved and seconds["solve"] > 0


def test_seconds_of_a_slow_disk_are_told(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Replica.write
    monkeypatch.setattr(Replica, "write", lambda self, *rest: time.sleep(0.3) or write(self, *rest))
    result = prune(
        saved(tmp_path / "source"), tokenizer, calibration(), uniform(Wanda(), HALF), Memory(1), tmp_path / "work"
    )
    assert result.seconds["store"] > 0.5, "of two blocks"


def test_masks_and_positions_of_shorter_rows_take_no_memory_of_their_own() -> None:
    """Whatever held-out rows there are, which come last."""
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=16, max_position_embeddings=256,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    blocks = decoder_blocks(model)[1]
    rows = tuple(Row(tuple(range(40 + i)), 5, str(i)) for i in range(12))
    cal = CalibrationSet("test", rows, tuple((1.0,) * len(row) for row in rows), (), 0)
    taken = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(activations, "_BATCH_TOKENS", 60)
        for held_out in ((), (Row(tuple(range(30)), 5, "held out"),)):
            passed = activations.passages(replace(cal, held_out=held_out), None)
            batches = activations.first_inputs(model, blocks, passed, torch.device("cpu"), None)
            assert [batch.hidden_NTD.shape[1] for batch in batches] == [len(row.ids) for row in passed]
            tensors = [t for batch in batches for one in batch.given for t in _tensors(one)]
            taken.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))
    assert taken[1] < 1.2 * taken[0], taken


def test_rows_on_both_sides_of_a_length_are_apart() -> None:
    """Phi-3 turns all positions of a batch otherwise once one of its rows is longer than the first context."""
    rows = [activations.Passage((0,) * n, (1.0,) * n, [("all", 0, n, 1.0)]) for n in (20, 24, 28, 40)]
    assert activations.groups(rows) == [[0, 1, 2, 3]] and activations.groups(rows, 28) == [[0, 1, 2], [3]]
    full = activations.Passage((0,) * 1024, (1.0,) * 1024, [("all", 0, 1024, 1.0)])
    assert activations.groups([full] * 3) == [[0, 1], [2]], "2048 tokens are a batch"
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}  # fmt: skip
    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, original_max_position_embeddings=32, rope_parameters=rope, pad_token_id=0,
    )  # fmt: skip
    model: Any = SimpleNamespace(model=Phi3ForCausalLM(config))
    assert Walk.apart.fget(model) == 32  # type: ignore[attr-defined]
    plain: Any = SimpleNamespace(model=random_model())
    assert Walk.apart.fget(plain) is None  # type: ignore[attr-defined]


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ():
        yield from _tensors(one)


def test_what_a_pruner_takes_is_as_planned(tmp_path: Path) -> None:
    """Its peak beside what it is given, of two tall matrices and of a wide one."""
    code = """
import psutil, torch
from ssgr.pruner import Moments
from ssgr.pruner.alps import ALPS
from ssgr.pruner.dsnot import DSnoT
from ssgr.pruner.ria import RIA
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.pruner.wanda import Wanda
from ssgr.sparsity import Unstructured
from ssgr.store import peak_rss_mib, _reset_peak_rss
torch.set_num_threads(1)
def made(k, o, n):
    x = torch.randn(256, n)
    moments = Moments(256.0, x.mean(0), x.square().mean(0), x.T @ x / 256)
    return [torch.randn(o, n) for _ in range(k)], moments, [Unstructured(0.5)] * k, [str(i) for i in range(k)]
for pruner in (Wanda(), RIA(), DSnoT(Wanda(), skip=()), SparseGPT(), ALPS(iterations=6)):
    pruner.prune(*made(1, 64, 64))  # what is loaded on the way
    for k, o, n in ((2, 4096, 512), (1, 512, 2048)):
        given = made(k, o, n)
        _reset_peak_rss()
        before = psutil.Process().memory_info().rss / 2**20
        out = pruner.prune(*given)
        weight, pair = pruner.work
        print(pruner.name, peak_rss_mib() - before, (weight * k * o * n + pair * n * n) / 2**20)
        del out
"""
    own = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        took, planned = map(float, line.split()[1:])
        assert 0.2 * planned < took < 1.1 * planned + 5, line
    assert len(done.stdout.splitlines()) == 10


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
from tests.test_prune import calibration, uniform
from ssgr.store import peak_rss_mib, _reset_peak_rss
torch.set_num_threads(1)
tokenizer, rows, method = TINY.tokenizer(), calibration(), uniform(Wanda(), Unstructured(0.5))
for source in sys.argv[1:]:
    _reset_peak_rss()
    prune(Model("random", source, device="cpu"), tokenizer, rows, method, Memory(1), Path(source + ".pruned"))
    print(peak_rss_mib(), psutil.Process().memory_info().rss / 2**20)
"""
    saved(tmp_path / "warm", layers=2)
    for layers in (4, 16):
        config = Qwen2Config(
            vocab_size=64, hidden_size=512, intermediate_size=3584, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=128,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(tmp_path / str(layers), max_shard_size="60MB")
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in ("warm", "4", "16"))]
    own = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # give matrices back at once, as those of real size are
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr
    _, start, *rest = map(float, done.stdout.split())  # what the first one loads for all is none of theirs
    peaks = [peak - start for peak in rest[::2]]
    assert peaks[1] < 1.15 * peaks[0], peaks
    assert peaks[1] < 160, peaks  # the whole model is 416 MiB


@pytest.fixture
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan finds room on every disk, as when others fill it after the work began."""
    monkeypatch.setattr("ssgr.stages.plan.shutil.disk_usage", lambda path: type("Large", (), {"free": 2**50}))


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("order", ["layer", "block"])
def test_a_disk_that_fills_up_in_the_middle(
    order: Literal["layer", "block"],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One sentence, nothing damaged, and the rest is made when there is room."""
    source, solved = saved(tmp_path / "source", layers=16), []
    block = Solver.block
    monkeypatch.setattr(Solver, "block", lambda self, i, *rest: solved.append(i) or block(self, i, *rest))

    def make(work: Path) -> None:
        prune(source, tokenizer, calibration(), uniform(SparseGPT(), HALF), Memory(1), work, Passing("pruned", order))

    make(tmp_path / "whole")
    whole = weights(tmp_path / "whole" / "checkpoint")
    with tmpfs(tmp_path / "disk", 350) as grow:
        store = Store(tmp_path / "disk" / "store")
        for attempt in range(2):  # nor does another attempt help
            solved.clear()
            with pytest.raises(
                ValueError, match=r"^the disk is full .*store\.path=DIR; the same command run again continues"
            ):
                store.run("prune", "key", make)
            (work,) = store.root.glob("prune/key.*.work")
            done = json.loads((work / "blocks.json").read_text())["blocks"]
            assert 0 < len(done) < 15 and 0 not in solved[: -len(done)] * attempt
        solved.clear()
        with pytest.raises(OSError, match="No space left on device") as caught:
            make(work)
        assert caught.value.errno == errno.ENOSPC
        grow(8000)
        solved.clear()
        result = store.run("prune", "key", make)
        assert weights(result.path / "checkpoint") == whole
        assert set(solved) == set(range(len(done), 16)), "what was done was done again"
        left = [
            sorted(str(file.relative_to(root)) for file in root.rglob("*"))
            for root in (result.path, tmp_path / "whole")
        ]
        assert set(left[0]) - set(left[1]) == {"manifest.json"}


def test_a_prune_whose_folder_another_took_makes_none(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suspended while it loads the model, before it has written anything."""
    source, work, begin = saved(tmp_path / "source"), tmp_path / "work", Replica.begin
    monkeypatch.setattr(Replica, "begin", lambda self: [work.rename(tmp_path / "taken"), begin(self)])
    with pytest.raises(FileNotFoundError):
        prune(source, tokenizer, None, uniform(Magnitude(), HALF), Memory(1), work)
    assert not work.exists()


@pytest.mark.usefixtures("unwarned")
def test_statistics_on_a_disk_that_fills_up(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", layers=8)
    (tmp_path / "whole").mkdir()
    collect(source, tokenizer, calibration(), "gram", Memory(1), tmp_path / "whole")
    with tmpfs(tmp_path / "disk", 200) as grow:
        for _ in range(2):
            with pytest.raises(OSError, match=r"No space left on device.*block\.new") as caught:
                collect(source, tokenizer, calibration(), "gram", Memory(1), tmp_path / "disk")
            assert caught.value.errno == errno.ENOSPC
        done = weights(tmp_path / "disk")
        assert 0 < len(done) < 8
        grow(8000)
        collect(source, tokenizer, calibration(), "gram", Memory(1), tmp_path / "disk")
        assert weights(tmp_path / "disk") == weights(tmp_path / "whole")
        assert weights(tmp_path / "disk").items() >= done.items()
        names = [{file.name for file in folder.iterdir()} for folder in (tmp_path / "disk", tmp_path / "whole")]
        assert names[0] == names[1]


@pytest.mark.usefixtures("unwarned")
def test_activations_on_a_full_disk_are_told_before_the_first_row(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A write to a mapped page that has no room on the disk would end the process by a signal, without a word."""
    source = saved(tmp_path / "source", layers=1)
    given = (source, tokenizer, calibration(rows=60), uniform(Wanda(), HALF), Memory(0))
    with tmpfs(tmp_path / "disk", 100) as grow:
        with pytest.raises(OSError, match="No space left on device") as caught:
            prune(*given, tmp_path / "disk")
        assert caught.value.errno == errno.ENOSPC and any("_room" in str(entry) for entry in caught.traceback)
        assert not list((tmp_path / "disk").glob("activations*"))
        grow(8000)
        prune(*given, tmp_path / "disk")
        prune(*given, tmp_path / "whole")
        assert weights(tmp_path / "disk" / "checkpoint") == weights(tmp_path / "whole" / "checkpoint")


def test_a_prune_within_a_third_of_the_memory_of_the_model(tmp_path: Path) -> None:
    """The process may not have more than 64 MiB beyond what its libraries take; the model has 197 MiB."""
    code = """
import resource, sys, threading
from pathlib import Path
import torch
from ssgr.model import Model
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.pruner.wanda import Wanda
from ssgr.sparsity import Unstructured
from ssgr.stages.plan import Memory
from ssgr.stages.prune import Passing, prune
from tests.conftest import TINY
from tests.test_prune import calibration, uniform

torch.set_num_threads(1)
source, warm, out, mib = sys.argv[1:]
tokenizer, rows = TINY.tokenizer(), calibration()
def run(path, out):
    for pruner, order in ((Wanda(), "layer"), (SparseGPT(), "block")):
        work = Path(out) / pruner.name
        method, passing = uniform(pruner, Unstructured(0.5)), Passing("pruned", order)
        prune(Model("random", path, device="cpu"), tokenizer, rows, method, Memory(0), work, passing)
run(warm, out + "/warm")
data = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData:")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + int(mib) * 2**20,) * 2)
run(source, out)
"""
    saved(tmp_path / "warm", layers=2)
    config = Qwen2Config(
        vocab_size=64, hidden_size=512, intermediate_size=512, num_hidden_layers=28, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    size = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    assert size > 3 * 64
    model.save_pretrained(tmp_path / "large", max_shard_size="60MB")
    del model
    own = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}  # matrices are given back at once
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in ("large", "warm", "out")), "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr[-3000:]
    for pruner in ("wanda", "sparsegpt"):
        with safe_open(sorted((tmp_path / "out" / pruner / "checkpoint").glob("*.safetensors"))[0], "pt") as file:  # type: ignore[no-untyped-call]
            (name, *_) = (name for name in file.keys() if name.endswith("up_proj.weight"))  # noqa: SIM118
            assert float((file.get_tensor(name) == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow  # by all families: test_families
def test_more_tokens_than_fit_in_the_middle_of_a_block(tmp_path: Path) -> None:
    """The process may have 64 MiB beyond its libraries; rows that pause would need 256. The bytes are those of the others."""
    code = """
import logging, resource, sys
from pathlib import Path
import torch
from ssgr.model import Model
from ssgr.pruner.sparsegpt import SparseGPT
from ssgr.records import CalibrationSet, Row
from ssgr.sparsity import Unstructured
from ssgr.stages.plan import Memory
from ssgr.stages.prune import prune
from tests.conftest import TINY
from tests.test_prune import uniform

torch.set_num_threads(1)
source, mib = sys.argv[1:]
tokenizer, method = TINY.tokenizer(), uniform(SparseGPT(), Unstructured(0.5))
rows = tuple(Row(tuple((7 * i + 3 * t * t) % 64 for t in range(128)), 5, str(i)) for i in range(512))
calibration = CalibrationSet("test", rows, ((1.0,) * 128,) * 512, (), 0)
def run(name):
    prune(Model("random", source, device="cpu"), tokenizer, calibration, method, Memory(0), Path(source + name))
run(".free")
print("--", flush=True)
data = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData:")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + int(mib) * 2**20,) * 2)
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
run(".bounded")
"""
    config = Qwen2Config(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "wide")
    own = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}  # matrices are given back at once
    command = [sys.executable, "-c", code, str(tmp_path / "wide"), "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr[-3000:]
    bounded = done.stdout.split("--")[1]
    assert "again for each set of layers: in its middle they need 0.2 GiB more" in bounded, bounded
    assert weights(tmp_path / "wide.free" / "checkpoint") == weights(tmp_path / "wide.bounded" / "checkpoint")


def test_a_cut_shard_and_a_missing_one_are_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    shard = sorted((tmp_path / "source").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for content, message in ((whole[:-10], "it is cut"), (whole[:5], "it is cut"), (b"x" * 200, "it is cut|damaged")):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{shard.name}: .*({message})"):
            prune(source, tokenizer, None, uniform(Magnitude(), HALF), Memory(1), tmp_path / "work")
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name}: this shard cannot be read"):
        prune(source, tokenizer, None, uniform(Magnitude(), HALF), Memory(1), tmp_path / "work")
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
            uniform(Magnitude(), HALF),
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
            uniform(Magnitude(), HALF),
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
        prune(source, tokenizer, calibration(), uniform(Wanda(), HALF), Memory(1), tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("version", [1, 2])
def test_the_plan_knows_the_memory_of_a_job(
    version: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM and containers bound a group of processes, at any of its levels, and count the files that are cached for it."""
    own, where, limit, used, cached = (
        (
            "4:cpu,memory:/job/step",
            "memory/job",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        )
        if version == 1
        else ("0::/job/step", "job", "memory.max", "memory.current", "inactive_file")
    )
    (tmp_path / "own").write_text(f"9:name=systemd:/\n{own}\n")
    job = tmp_path / "groups" / where
    (job / "step").mkdir(parents=True)
    (job / "step" / limit).write_text("max\n")
    for name, text in ((limit, "1000000"), (used, "950000"), ("memory.stat", f"anon 1\n{cached} 40000\nx 2")):
        (job / name).write_text(text + "\n")
    monkeypatch.setattr(plan, "_OWN", tmp_path / "own")
    monkeypatch.setattr(plan, "_ROOT", tmp_path / "groups")
    with pytest.raises(ValueError, match=r"of memory, and 0\.1 MiB are free; type memory"):
        prune(
            saved(tmp_path / "source"), tokenizer, calibration(), uniform(Wanda(), HALF), Memory(1), tmp_path / "work"
        )


def test_the_plan_knows_the_limits_of_the_process(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.resource, "getrlimit", lambda kind: (100_000, 100_000))
    with pytest.raises(ValueError, match=r"of memory for a process \(ulimit\), and 0\.0 MiB are free; type memory"):
        prune(
            saved(tmp_path / "source"), tokenizer, calibration(), uniform(Wanda(), HALF), Memory(1), tmp_path / "work"
        )


def test_a_model_that_was_used_leaves_memory_at_once_though_it_is_held_in_circles() -> None:
    model = torch.nn.Linear(2, 2)
    model.__dict__["itself"], gone = model, weakref.ref(model)
    with heap.reused():
        del model
    assert gone() is None


def test_memory_that_ends_all_the_same_is_told() -> None:
    with (
        pytest.raises(ValueError, match=r"memory ended \(.*allocate memory.*\); type less; the same command"),
        heap.enough("type less"),
    ):
        torch.empty(2**55)
    with pytest.raises(ValueError, match=r"memory ended \(MemoryError\); type less"), heap.enough("type less"):
        bytearray(1 << 46)
    for said in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
    ):
        with pytest.raises(ValueError, match=r"memory ended \(RuntimeError: CUDA"), heap.enough("type less"):
            raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="another"), heap.enough("type less"):
        raise RuntimeError("another")


def twice(folder: Path) -> Model:
    """A model whose shards hold other weights than its single file, with a copy of these under another name."""
    saved(folder)
    random_model(seed=1, layers=4).save_pretrained(folder / "single")
    shutil.move(folder / "single" / "model.safetensors", folder / "model.safetensors")
    shutil.rmtree(folder / "single")
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")
    return Model("random", str(folder), device="cpu")


@pytest.mark.parametrize("named", [None, "consolidated.safetensors"])
def test_weights_that_are_there_twice_are_those_that_transformers_loads(
    named: str | None, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source, own = twice(tmp_path / "source"), named or "model.safetensors"
    if named:
        (tmp_path / "source" / "model.safetensors").unlink()
        config = json.loads((tmp_path / "source" / "config.json").read_text())
        (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
    prune(source, tokenizer, None, uniform(Magnitude(), HALF), Memory(1), tmp_path / "work")
    assert set(weights(tmp_path / "work" / "checkpoint")) == {own}
    dense, pruned = (Model("m", str(folder), device="cpu").load().state_dict()
                     for folder in (tmp_path / "source", tmp_path / "work" / "checkpoint"))  # fmt: skip
    assert all(torch.equal(value[value != 0], dense[name][value != 0]) for name, value in pruned.items())
    if not named:
        assert not (tmp_path / "work" / "checkpoint" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("single", [True, False])
def test_of_a_hub_repository_only_what_is_used_is_fetched(
    single: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice(tmp_path / "hub")
    if not single:
        (tmp_path / "hub" / "model.safetensors").unlink()
    (tmp_path / "cache").mkdir()

    def fetch(path: str, revision: str, allow_patterns: list[str]) -> str:
        for file in filter_repo_objects([f.name for f in (tmp_path / "hub").iterdir()], allow_patterns=allow_patterns):
            shutil.copyfile(tmp_path / "hub" / file, tmp_path / "cache" / file)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    files = Model("hub", "some/model", revision="0a" * 20).files()
    assert (files / "config.json").exists() and not (files / "consolidated.safetensors").exists()
    assert set(weights(files)) == (
        {"model.safetensors"} if single else {p.file for p in Checkpoint(files).places.values()}
    )


def test_a_model_is_known_by_every_byte_and_a_large_file_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "_READ_ALWAYS", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    saved(tmp_path / "m", shard="5GB")
    file = tmp_path / "m" / "model.safetensors"

    def told(folder: str = "m") -> str:
        model_module._checksum_of.cache_clear()  # what a new process starts with
        return Model("random", str(tmp_path / folder), device="cpu").fingerprint

    before, content, stat = told(), file.read_bytes(), file.stat()
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "model.safetensors", (1, 1))
    assert told("copy") == before
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "_read", lambda file, size: 1 / 0 if size > 1000 else "small")
        assert told() == told("copy") != before  # the large file is not read, or it would fail
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a bit of the last norm
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if it had not changed
    assert told() != before
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    assert told() != before == told("copy")


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
