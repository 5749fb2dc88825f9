"""Fixtures shared by the tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from ssgr import lean

lean.load_transformers()  # as run.py and every job do, before anything else imports it

from transformers import (  # noqa: E402
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ssgr.model import Model  # noqa: E402
from tests.started import Started  # noqa: E402

settings.register_profile("ssgr", deadline=None)  # no test asserts a time
settings.load_profile("ssgr")

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
TINY = Model("tiny", "pkg://ssgr.model.tiny/weights", dtype="float32", device="cpu")
SMALL = (  # a cell that takes seconds
    "problems.calibration=32",
    "problems.test=16",
    "problems.levels=[1,2,3]",
    "sampler.decoding.attempts=4",
    "sampler.decoding.max_new_tokens=160",
    "bench.decoding.attempts=1",
    "bench.decoding.max_new_tokens=160",
    "budget.tokens=400",
    "device=cpu",
)


def pytest_configure(config: pytest.Config) -> None:
    """Tests of a group share what they may not do at the same time, and pytest-xdist 3.8 keeps no groups from pytest 9.2 on."""
    if getattr(config.option, "dist", "no") == "loadgroup" and pytest.version_tuple >= (9, 2):
        raise pytest.UsageError(
            f"pytest {pytest.__version__} keeps no groups: type pip install -c constraints.txt pytest"
        )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the tiny model."""
    return TINY.tokenizer()


@dataclass(frozen=True)
class Loaded:
    """A model that lies in memory, for engines that load it."""

    model: Any
    dtype: str = "auto"
    trust_remote_code: bool = False
    system: str | None = None
    chat: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> PreTrainedModel:
        """The model."""
        return self.model  # type: ignore[no-any-return]

    def generation(self) -> GenerationConfig | None:
        """That of the model."""
        return self.model.generation_config  # type: ignore[no-any-return]

    def files(self) -> Path:
        """None: it has no files."""
        raise AssertionError("this model has no files")


def random_model(seed: int = 0, layers: int = 2, vocabulary: int = 64) -> Qwen2ForCausalLM:
    """A small Qwen2 with random weights, large enough that every layer matters."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).eval()


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def started() -> Iterator[Started]:
    """A process that has the imports of run.py done."""
    with contextlib.closing(Started({**os.environ, "HF_HUB_OFFLINE": "1"})) as process:
        yield process


@pytest.fixture
def run(tmp_path: Path, started: Started) -> Run:
    """Type `python run.py ...` with a store and output folders of the test's own.

    It is forked from a process that has the imports done, unless it is to run `alone`.
    """

    def type_(
        *overrides: str, small: bool = True, alone: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        places = (
            f"store.path={tmp_path / 'store'}",
            f"hydra.run.dir={tmp_path / 'run'}",
            f"hydra.sweep.dir={tmp_path / 'sweep'}",
        )
        given = {o.split("=")[0] for o in overrides}
        extra = [o for o in (*places, *(SMALL if small else ())) if o.split("=")[0] not in given]
        if not alone:
            return started.run([*overrides, *extra], tmp_path, **environment)
        return subprocess.run(
            [sys.executable, str(ROOT / "run.py"), *overrides, *extra],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            timeout=300,
            check=False,
        )

    return type_


TASK = """task: %s
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [%s]
"""


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks of lm-evaluation-harness, whose index of all tasks takes seconds for each folder."""
    folder = tmp_path_factory.mktemp("tasks")
    metrics = {"sums": ["acc"], "sums_of_all": ["acc", "f1", "mcc"]}
    for name, own in metrics.items():
        given = ", ".join(f"{{metric: {metric}}}" for metric in own)
        (folder / f"{name}.yaml").write_text(TASK % (name, folder / "rows.jsonl", given))
    undeclared = (
        TASK % ("sums_own", folder / "rows.jsonl", "{metric: acc}") + "process_results: !function own.results\n"
    )
    (folder / "sums_own.yaml").write_text(undeclared)
    (folder / "own.py").write_text("def results(doc, said):\n    return {'own': float(doc['answer'])}\n")
    return folder


@pytest.fixture
def sums(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Those on local files: which of two sums is right. `sums` has accuracy alone, `sums_of_all` metrics of all rows too, and
    `sums_own` one that it does not declare."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(24):
        a, b = (int(n) for n in rng.integers(2, 40, 2))
        choices = [f" {a + b}", f" {a + b + int(rng.integers(1, 9))}"]
        right = int(rng.integers(2))
        rows.append({"question": f"{a}+{b}=", "choices": choices[:: -1 if right else 1], "answer": right})
    (tasks / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tasks


@contextlib.contextmanager
def tmpfs(folder: Path, kib: int) -> Iterator[Callable[[int], None]]:
    """A file system of so many KiB in memory; what is handed out makes it larger."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a file system of its own")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "ssgr-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine lets nobody mount a file system ({done.stderr.strip()})")
    try:
        yield lambda kib: subprocess.run(["mount", "-o", f"remount,size={kib}k", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
