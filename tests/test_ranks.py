"""Processes that share a prune: what they make is what one makes, and when one fails all end with one sentence.

Every process imports torch when it starts, so one start does as many jobs as it can.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from ssgr import progress
from ssgr.model import Model
from ssgr.pruner.wanda import Wanda
from ssgr.sparsity import Unstructured
from ssgr.stages import ranks
from ssgr.stages.plan import Memory
from ssgr.stages.prune import prune
from tests import rank_jobs
from tests.conftest import ROOT, random_model
from tests.test_prune import calibration, uniform

LONGEST = 60  # seconds in which all must have ended after one has
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Ranks share the threads there are, and the order of a sum may depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def saved(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    random_model(layers=3).to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


def content(work: Path) -> dict[str, bytes]:
    """Every file of weights and of statistics."""
    return {str(f.relative_to(work)): f.read_bytes() for f in sorted(work.rglob("*.safetensors"))}


def results(work: Path) -> dict[str, object]:
    """What was found in every layer, without the seconds."""
    out: dict[str, object] = {}
    for file in sorted(work.glob("*/prune.json")):
        layers = json.loads(file.read_text())["layers"]
        out[file.parent.name] = [{k: v for k, v in layer.items() if k != "seconds"} for layer in layers]
    return out


def told_peak(work: Path) -> float:
    """Host memory of the last prune, as its result tells it."""
    return float(json.loads((work / "dense" / "prune.json").read_text())["peak_host_mib"])


def running(*marks: str) -> list[psutil.Process]:
    """Processes whose command line or environment holds all `marks`."""
    found = []
    for process in psutil.process_iter():
        try:
            told = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if process.status() != psutil.STATUS_ZOMBIE and all(any(mark in one for one in told) for mark in marks):
            found.append(process)
    return found


def all_end(*marks: str) -> None:
    until = time.monotonic() + LONGEST
    while left := running(*marks):
        assert time.monotonic() < until, left
        time.sleep(0.1)


def on_two_hosts(work: Path, job: str, *arguments: object) -> list[tuple[int, str]]:
    """How either of two hosts ends, one rank on each, and what it says last; they are processes of this host."""
    board, environment = work.parent / "board.json", os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    code = (
        "import sys; from pathlib import Path, PosixPath; from ssgr.stages import ranks; from tests import rank_jobs; "
        f"crew = ranks.Crew(int(sys.argv[1]), 2, {board!r}, '127.0.0.1'); "
        f"ranks.run(1, {work!r}, 'cpu', rank_jobs.{job}, {', '.join(map(repr, arguments))}, crew=crew)"
    )
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(task)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for task in range(2)
    ]
    said = [task.communicate(timeout=5 * LONGEST)[1] for task in tasks]
    assert not board.exists()
    return [(task.returncode, err.splitlines()[-1] if err else "") for task, err in zip(tasks, said, strict=True)]


def test_any_number_of_ranks_makes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches are those of one rank; only the order in which their float64 sums are added is another, which the
    rounding to float32 hides."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")  # the ranks are on one host, whatever other programs are told
    sources = {name: saved(tmp_path / name, getattr(torch, name)) for name in ("float32", "bfloat16")}
    for count in (1, 2, 3):
        work = tmp_path / str(count)
        work.mkdir()
        ranks.run(count, work, "cpu", rank_jobs.everything, sources, work)
        peaks = []
        for rank in range(count):
            ends, there, peak = json.loads((work / f"rank_{rank}.json").read_text())
            peaks.append(peak)
            assert count == 1 or {ip for pair in ends for ip in pair if ip} <= LOOPBACK, ends
            assert (bool(ends), "meeting" in there) == ((True, True) if count > 1 else (False, False))
        assert not (work / "meeting").exists()
        assert told_peak(work) == pytest.approx(sum(peaks), rel=0.2), "of the ranks of a host together"
    hosts = tmp_path / "hosts"
    hosts.mkdir()
    (leader, why), joined = on_two_hosts(hosts, "everything", sources, hosts)
    assert leader == 0, why
    assert joined == (1, "ssgr.stages.ranks.Joined")
    for rank in range(2):  # the leader's port too is open at its own address alone
        ends, _, peak = json.loads((hosts / f"rank_{rank}.json").read_text())
        assert told_peak(hosts) == pytest.approx(peak, rel=0.2), "of one host"
        assert ends and {ip for pair in ends for ip in pair if ip} <= LOOPBACK, ends
    one = content(tmp_path / "1")
    assert {name.split("/")[0] for name in one} == {*rank_jobs.JOBS, "collect", "dense"}
    for several in ("2", "3", "hosts"):
        other = content(tmp_path / several)
        assert one.keys() == other.keys()
        assert sorted({name.split("/")[0] for name in one if one[name] != other[name]}) == [], several
        assert results(tmp_path / several) == results(tmp_path / "1")


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("full", OSError, r"^\[Errno 28\] No space left on device: 'a/file'$"),
        ("killed", ValueError, "^memory.ranks=2: rank 1 was ended by SIGKILL, .* type a smaller memory.ranks, "),
        pytest.param(
            "any other",
            RuntimeError,
            "(?s)^Traceback.*last_fails.*ZeroDivisionError: any other",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_error_in_one_rank_ends_all(
    how: str, kind: type[Exception], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("SSGR_TEST", mark := str(tmp_path))
    began = time.monotonic()
    with pytest.raises(kind, match=message):
        ranks.run(2, tmp_path, "cpu", rank_jobs.last_fails, how)
    assert time.monotonic() - began < LONGEST
    assert not running(mark, "multiprocessing.spawn")
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in capfd.readouterr().err


def test_the_parent_knows_how_far_its_ranks_are(tmp_path: Path) -> None:
    """What a lease's heartbeat tells of a shared prune."""
    seen = []

    def watch() -> None:
        until = time.monotonic() + LONGEST
        while not seen and time.monotonic() < until:
            if progress.latest is not None:
                seen.append(progress.latest)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    ranks.run(2, tmp_path, "cpu", rank_jobs.steps)
    watcher.join()
    assert (seen[0]["what"], seen[0]["done"], seen[0]["total"]) == ("prune", 1, 2)
    assert progress.latest is None


def test_an_error_on_one_host_ends_both(tmp_path: Path) -> None:
    """The leader only misses the other; that one says why."""
    (tmp_path / "work").mkdir()
    (leader, _), (other, said) = on_two_hosts(tmp_path / "work", "last_fails", "full")
    assert leader and other and said == "OSError: [Errno 28] No space left on device: 'a/file'"


def test_a_rank_has_a_gpu_of_its_own_host_and_hosts_have_as_many(tmp_path: Path) -> None:
    devices = [ranks.Ranks(rank, 4, 2).device(torch.device("cuda")) for rank in range(4)]
    assert [device.index for device in devices] == [0, 1, 0, 1]
    crew = ranks.Crew(1, 2, tmp_path / "board", "joins")
    crew.board.write_text(json.dumps({"work": "", "count": 1, "host": "leads", "port": 0}))
    with pytest.raises(ValueError, match=r"leads has 1 processes and joins 2; type memory\.ranks=1$"):
        ranks._Place(2, tmp_path / "meeting", crew).store(2, 4)


@pytest.mark.slow
def test_infinite_weights_are_told_as_by_one_process(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = random_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.inf
    model.save_pretrained(tmp_path / "source")
    source, method = Model("random", str(tmp_path / "source"), device="cpu"), uniform(Wanda(), Unstructured(0.5))
    said = []
    for count in (1, 2):
        work = tmp_path / str(count)
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity") as caught:
            prune(source, tokenizer, calibration(), method, Memory(0, count), work)
        said.append(str(caught.value))
        assert not list(work.glob("activations*")) and not (work / "meeting").exists()
    assert said[0] == said[1]


def started(job: str, work: Path, *arguments: object, before: str = "") -> None:
    """Run a job of two ranks in a group of processes of its own, the first of which is killed meanwhile."""
    work.mkdir(exist_ok=True)
    code = (
        f"{before}from pathlib import Path, PosixPath; from ssgr.stages import ranks; from tests import rank_jobs; "
        f"ranks.run(2, {work!r}, 'cpu', rank_jobs.{job}, {', '.join(map(repr, arguments))})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, start_new_session=True, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("behind", [False, True], ids=["in front", "behind, as a shell's & starts it"])
def test_ranks_end_with_their_parent(behind: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSGR_TEST", mark := str(tmp_path))
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " if behind else ""
    started("orphaned", tmp_path / "work", tmp_path / "work", before=deaf)
    all_end(mark, "multiprocessing.spawn")
    assert not (tmp_path / "work" / "survived").exists() and (tmp_path / "work" / "rank_1").exists()


def test_killed_ranks_go_on_where_they_were(tmp_path: Path) -> None:
    source, work = saved(tmp_path / "source"), tmp_path / "parts"
    prune(*rank_jobs.arguments(source, tmp_path / "whole", 1))
    started("doomed", work, 2, source, work)
    assert len(json.loads((work / "blocks.json").read_text())["blocks"]) == 2
    assert (work / "meeting").exists() and (work / "activations.0.bin").exists()
    prune(*rank_jobs.arguments(source, work, 2))
    assert content(work) == content(tmp_path / "whole")
    assert {file.name for file in work.iterdir()} == {file.name for file in (tmp_path / "whole").iterdir()}
