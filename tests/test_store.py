"""ssgr.store: made once, resumed after a kill, checked when read; with real processes where processes matter."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from safetensors import SafetensorError

import ssgr
from ssgr import files
from ssgr import lease as lease_module
from ssgr import store as store_module
from ssgr.lease import Lease
from ssgr.store import Artefact, Store

WORKER = """
import json, os, sys, time
from pathlib import Path
from ssgr.store import Store

root, seconds, stale_seconds = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])

def make(work):
    with open(root / "made", "a") as file:
        file.write(f"{os.getpid()}\\n")
    (work / "part").write_text("first half")
    time.sleep(seconds)
    (work / "out").write_text(str(os.getpid()))

store = Store(root, heartbeat_seconds=0.1, stale_seconds=stale_seconds)
artefact = store.run("stage", "key", make)
print(json.dumps([artefact.run.cached, (artefact.path / "out").read_text()]))
"""


@contextmanager
def worker(root: Path, seconds: float = 0.0, stale_seconds: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    """A process that makes stage/key in `root`, taking `seconds` over it."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(root), str(seconds), str(stale_seconds)],
        env={**os.environ, "PYTHONPATH": str(Path(ssgr.__file__).parent.parent)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[str]) -> tuple[bool, str]:
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    cached, text = json.loads(out)
    return cached, text


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def write(text: str) -> Callable[[Path], None]:
    def make(work: Path) -> None:
        (work / "sub").mkdir(exist_ok=True)
        (work / "out").write_text(text)
        (work / "sub" / "empty").touch()

    return make


def never(work: Path) -> None:
    pytest.fail("made again")


def run(root: Path, make: Callable[[Path], None], stale_seconds: float = 60.0) -> Artefact:
    return Store(root, heartbeat_seconds=0.1, stale_seconds=stale_seconds).run("stage", "key", make)


def foreign_lease(root: Path, age: float, token: str = "theirs") -> Path:
    """A lease held by a process on another host, whose heart last beat `age` seconds ago."""
    lease = root / "stage" / "key.lease"
    lease.parent.mkdir(exist_ok=True)
    lease.write_text(json.dumps({"host": "elsewhere", "pids": "", "pid": 1, "token": token, "started": "then"}))
    os.utime(lease, (time.time() - age,) * 2)
    return lease


def names(root: Path) -> set[str]:
    return {path.name for path in (root / "stage").iterdir()} - {".lock"}


def test_a_result_is_made_once_and_then_read(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "store")
    made = store.run("stage", "key", write("hello"), config={"a": Path("b")}, inputs={"model": "m"})
    read = store.run("stage", "key", never)

    assert (read.path / "out").read_text() == "hello"
    assert (made.run.cached, read.run.cached) == (False, True)
    assert read.run.seconds == made.run.seconds
    assert read.run.peak_rss_mib == made.run.peak_rss_mib > 1
    assert (store.misses, store.hits) == ({"stage": 1}, {"stage": 1})
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert manifest["config"] == {"a": "b"}
    assert manifest["inputs"] == {"model": "m"}
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {"out": 5, "sub/empty": 0}
    assert names(store.root) == {"key"}


@pytest.mark.parametrize("dead_lease", [False, True])
def test_eight_processes_make_one_result(tmp_path: Path, dead_lease: bool) -> None:
    if dead_lease:
        foreign_lease(tmp_path, age=1000)
    with ThreadPoolExecutor(8) as pool:

        def work(_: int) -> tuple[bool, str]:
            with worker(tmp_path, seconds=0.3) as process:
                return finish(process)

        results = list(pool.map(work, range(8)))
    (maker,) = (tmp_path / "made").read_text().split()
    assert sorted(results) == [(False, maker)] + [(True, maker)] * 7
    assert names(tmp_path) == {"key"}


def test_eight_threads_make_one_result(tmp_path: Path) -> None:
    store, made = Store(tmp_path), []

    def make(work: Path) -> None:
        made.append(threading.get_ident())
        time.sleep(0.1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: store.run("stage", "key", make), range(8)))
    assert len(made) == 1
    assert (store.misses["stage"], store.hits["stage"]) == (1, 7)


@pytest.mark.parametrize("reaped", [False, True])
def test_a_waiter_resumes_what_a_killed_holder_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reaped: bool
) -> None:
    caplog.set_level(logging.INFO, "ssgr")

    def resume(work: Path) -> None:
        (work / "out").write_text((work / "part").read_text() + ", second half")

    with worker(tmp_path, seconds=60) as holder, ThreadPoolExecutor(1) as pool:
        wait_for(lambda: [part.read_text() for part in tmp_path.glob("stage/key.*.work/part")] == ["first half"])
        waiter = pool.submit(run, tmp_path, resume)
        wait_for(lambda: f"waiting for process {holder.pid} on " in caplog.text)
        time.sleep(0.3)
        assert not waiter.done()
        holder.kill()
        if reaped:
            holder.wait()
        artefact = waiter.result(timeout=10)
    assert not artefact.run.cached
    assert (artefact.path / "out").read_text() == "first half, second half"
    assert caplog.text.count("waiting for") == 1
    assert names(tmp_path) == {"key"}


def test_a_beating_heart_keeps_the_lease(tmp_path: Path) -> None:
    with worker(tmp_path, seconds=2.2, stale_seconds=1.5) as holder:
        wait_for((tmp_path / "made").exists)
        artefact = run(tmp_path, never, stale_seconds=1.5)
        assert (artefact.path / "out").read_text() == str(holder.pid)
        assert artefact.run.cached


@pytest.mark.parametrize("age", [0, -60])  # a minute ahead: of before the clock was set back
def test_a_silent_holder_elsewhere_is_taken_over_when_stale(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, age: float
) -> None:
    foreign_lease(tmp_path, age)
    start = time.monotonic()
    artefact = run(tmp_path, write("mine"), stale_seconds=0.6)
    assert 0.5 < time.monotonic() - start < 30
    assert not artefact.run.cached
    assert "taken over from process 1 on elsewhere" in caplog.text


def test_a_lease_that_changed_hands_is_given_back(tmp_path: Path) -> None:
    lease = foreign_lease(tmp_path, age=0, token="live")
    taker = Lease(tmp_path / "stage" / "key", 1.0)
    assert not taker._move_aside("what the taker had judged dead")
    assert "live" in lease.read_text()
    assert names(tmp_path) == {"key.lease"}


def test_one_at_a_time_may_take_a_lease(tmp_path: Path) -> None:
    foreign_lease(tmp_path, age=1000)
    first, second = (Lease(tmp_path / "stage" / "key", 1.0) for _ in range(2))
    with ThreadPoolExecutor(1) as pool:
        with first._lock():
            taken = pool.submit(second.take, 60.0)
            time.sleep(0.3)
            assert not taken.done()
        assert taken.result(timeout=10) is None
    with second:
        assert second.ours()


def test_a_lost_lease_publishes_nothing(tmp_path: Path) -> None:
    lease, attempts = tmp_path / "stage" / "key.lease", []

    def make(work: Path) -> None:
        attempts.append(lease.read_text())
        (work / "out").write_text(str(len(attempts)))
        if len(attempts) == 1:  # another process takes over, and dies
            foreign_lease(tmp_path, age=1000)

    artefact = run(tmp_path, make)
    assert (artefact.path / "out").read_text() == "2"
    assert attempts[0] != attempts[1]
    assert names(tmp_path) == {"key"}


def test_the_taker_s_result_is_used_by_who_lost_the_lease(tmp_path: Path) -> None:
    def make(work: Path) -> None:
        (tmp_path / "stage" / "key.lease").unlink()  # as if stale: another process takes over, and is quicker
        assert not run(tmp_path, write("theirs")).run.cached
        (work / "out").write_text("mine")  # fails: the work is the result of the other now

    artefact = run(tmp_path, make)
    assert (artefact.path / "out").read_text() == "theirs"
    assert artefact.run.cached
    assert names(tmp_path) == {"key"}


def test_whatever_fails_after_a_lease_was_lost_the_taker_s_result_is_used(tmp_path: Path) -> None:
    def make(work: Path) -> None:
        (tmp_path / "stage" / "key.lease").unlink()
        run(tmp_path, write("theirs"))
        raise RuntimeError("unable to open file")  # as some libraries call a folder that is gone

    assert run(tmp_path, make).run.cached


def test_who_is_suspended_and_goes_on_never_writes_beside_who_took_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGSTOP until the lease is stale, SIGCONT while the other makes the result."""
    seen: list[set[str]] = []

    with worker(tmp_path, seconds=1.0) as holder:

        def make(work: Path) -> None:
            assert (work / "part").read_text() == "first half"
            holder.send_signal(signal.SIGCONT)
            time.sleep(2.5)
            seen.append({path.name for path in work.iterdir()})
            (work / "out").write_text("the other's")

        wait_for(lambda: [part.read_text() for part in tmp_path.glob("stage/key.*.work/part")] == ["first half"])
        holder.send_signal(signal.SIGSTOP)
        artefact = run(tmp_path, make, stale_seconds=1.0)
        assert finish(holder) == (True, "the other's")
    assert seen == [{"part"}]
    assert "taken over from process" in caplog.text and not artefact.run.cached
    assert names(tmp_path) == {"key"}


def test_who_lost_the_lease_moves_and_removes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Suspended where it was about to move a damaged result aside, and where it ends."""
    folder, told = tmp_path / "stage" / "key", tmp_path / "stage" / "key.progress"
    run(tmp_path, write("hello"))
    lease = Lease(folder, 0.05)
    assert lease.take(60.0) is None
    with lease:
        foreign_lease(tmp_path, age=0)
        wait_for(lambda: "s (was it suspended?), and another took over; its result will be used" in caplog.text)
        told.write_text("theirs")
        _flip_a_byte(folder)
        assert store_module._read_or_move_aside(folder, lease) is None
        assert not lease.resume() and not lease.publish()
    assert names(tmp_path) == {"key", "key.lease", "key.progress"}


def test_a_lease_that_is_not_ours_is_not_released(tmp_path: Path) -> None:
    def make(work: Path) -> None:
        foreign_lease(tmp_path, age=0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, make)
    assert "theirs" in (tmp_path / "stage" / "key.lease").read_text()


def _flip_a_byte(folder: Path) -> None:
    (folder / "out").write_text("hellp")


def _shorten(folder: Path) -> None:
    (folder / "out").write_text("hell")


def _remove(folder: Path) -> None:
    (folder / "out").unlink()


def _truncate_manifest(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])


def _remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _another_version(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 0}))


def _list_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1]")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_flip_a_byte, "key/out: its content has changed"),
        (_shorten, "key/out: 4 bytes, its manifest says 5"),
        (_remove, "key/out: cannot be read (No such file"),
        (_truncate_manifest, "key/manifest.json: cannot be read"),
        (_remove_manifest, "key/manifest.json: cannot be read"),
        (_list_manifest, "key/manifest.json: cannot be read"),
        (_another_version, "key/manifest.json: cannot be read (version 0, not"),
    ],
)
def test_a_damaged_result_is_noticed_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], said: str
) -> None:
    for n in (1, 2):
        caplog.clear()
        damage(run(tmp_path, write("hello")).path)
        artefact = run(tmp_path, write("hello"))
        assert not artefact.run.cached
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert said in record.message
        assert (artefact.path / "out").read_text() == "hello"
        assert names(tmp_path) == {"key", *(f"key.damaged-{i}" for i in range(1, n + 1))}


@pytest.mark.parametrize("damage", [_flip_a_byte, _shorten, _truncate_manifest])
def test_what_a_job_needs_and_is_damaged_is_moved_aside(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store = Store(tmp_path)
    assert not store.sound("stage", "key")
    folder = run(tmp_path, write("hello")).path
    assert store.sound("stage", "key")
    damage(folder)
    assert store.find("stage", "key", checksums=5) is None, "whose files a driver reads"
    assert not store.sound("stage", "key")
    assert store.keys("stage") == []
    assert names(tmp_path) == {"key.damaged-1"}, "so that a driver, which only measures large files, makes it again"


def test_a_large_result_is_checksummed_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "ALWAYS_CHECKSUMMED", 4)
    folder = run(tmp_path, write("hello")).path
    assert run(tmp_path, never).run.cached
    _flip_a_byte(folder)
    assert run(tmp_path, never).run.cached
    assert "its content has changed" in (Store(tmp_path).damage("stage", "key") or ""), "who asks for it reads all"
    monkeypatch.setattr(store_module, "_checksummed", set())  # what a new process starts with
    assert Store(tmp_path).find("stage", "key", checksums=4) is not None, "it is measured only"
    assert not run(tmp_path, write("hello")).run.cached


def test_what_fails_is_never_a_result(tmp_path: Path) -> None:
    def fail(work: Path) -> None:
        (work / "part").touch()
        raise RuntimeError("no luck")

    def succeed(work: Path) -> None:
        assert (work / "part").exists()

    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="no luck"):
        store.run("stage", "key", fail)
    assert [name.endswith(".work") for name in names(tmp_path)] == [True]
    assert not store.run("stage", "key", succeed).run.cached
    assert store.misses["stage"] == 1


def test_a_kill_before_the_last_step_leaves_no_trace(tmp_path: Path) -> None:
    work = tmp_path / "stage" / "key.work"
    work.mkdir(parents=True)
    for name in ("manifest.json", "manifest.json.new"):
        (work / name).write_text("half-writ")
    artefact = run(tmp_path, write("hello"))
    assert {path.name for path in artefact.path.iterdir()} == {"manifest.json", "out", "sub"}
    assert run(tmp_path, never).run.cached


def test_of_several_that_were_killed_the_last_is_resumed(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "stage" / "key", 60.0)
    for age in (3, 1, 2, 4):
        work = tmp_path / "stage" / f"key.{age}.work"
        work.mkdir(parents=True)
        (work / "part").write_text(str(age))
        os.utime(work, (time.time() - age,) * 2)
    assert lease.take(60.0) is None
    with lease:
        assert lease.resume() and (lease.work / "part").read_text() == "1"
        lease.folder.mkdir()
        (lease.folder / "out").touch()  # as another process published, where the file system has no locks
        assert not lease.publish() and not lease.work.exists()


def test_a_pid_of_another_host_says_nothing(tmp_path: Path) -> None:
    here = {**lease_module._whereabouts(), "pid": 2**30}
    assert lease_module._is_dead(json.dumps(here))
    assert not any(lease_module._is_dead(json.dumps(here | {name: "other"})) for name in ("host", "pids"))
    for whose, beats in ((here, False), (here | {"host": "other"}, True)):
        (tmp_path / "key.lease").write_text(json.dumps(whose))
        assert lease_module.beating(tmp_path / "key.lease", 60.0) is beats


def test_only_what_was_made_from_the_same_is_alike(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in "12":
        store.run("stage", key, write(key), config={"n": key}, inputs={"of": key})
    assert [(folder.name, config) for folder, config in store.alike("stage", {"of": "2"})] == [("2", {"n": "2"})]


def test_an_unwritable_store_says_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"store\.path=.*file/store cannot be written \(Not a directory\): .*=DIR"):
        Store(tmp_path / "file" / "store")


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EDQUOT)),
        SafetensorError(f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})"),
        Exception(f"No space left on device (os error {errno.ENOSPC})"),  # of tokenizers
    ],
)
def test_a_full_disk_is_explained_and_the_work_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(fd: int) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match=r"disk is full .*stage/key: free some space.*continues"):
            run(tmp_path, write("hello"))
    assert [name.endswith(".work") for name in names(tmp_path)] == [True]
    assert not run(tmp_path, lambda work: None).run.cached
    assert (tmp_path / "stage" / "key" / "out").read_text() == "hello"


def test_the_peak_is_that_of_the_stage_not_of_the_process(tmp_path: Path) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not reset the peak")
    size = 128 * 2**20

    def fill(work: Path) -> None:
        assert len(bytearray(b"x") * size) == size

    large = Store(tmp_path).run("large", "key", fill)
    small = Store(tmp_path).run("small", "key", lambda work: None)
    assert large.run.peak_rss_mib - small.run.peak_rss_mib > 100


def test_what_is_cached_is_made_once_and_again_if_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[str] = []

    def make() -> str:
        made.append("é\r\nx")
        return made[0]

    for damage, times in ((lambda content: content, 1), (lambda content: content[:-1], 2), (lambda content: b"", 3)):
        assert files.cached("a/b", make) == files.cached("a/b", make) == made[0]
        file = tmp_path / "ssgr" / "a" / "b"
        file.write_bytes(damage(file.read_bytes()))
        assert files.cached("a/b", make) == made[0] and len(made) == times
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert files.cached("a/b", make) == made[0] and len(made) == 4, "where there can be no cache, it is made each time"


def test_a_process_that_proc_hides_is_not_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another user, where /proc is mounted with hidepid: psutil does not see it, the system knows it."""
    one, other = Lease(tmp_path / "a", 1.0), Lease(tmp_path / "a", 1.0)

    def hidden(pid: int) -> None:
        raise psutil.NoSuchProcess(pid)

    def forbidden(pid: int, signal_: int) -> None:
        raise PermissionError

    monkeypatch.setattr("ssgr.lease.psutil.Process", hidden)
    assert one.take(60.0) is None
    with one:
        monkeypatch.setattr("ssgr.lease.os.kill", forbidden)
        assert other.take(60.0) is not None
