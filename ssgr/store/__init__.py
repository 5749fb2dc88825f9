"""Where results lie: root/<stage>/<key>/ with a manifest, made once, published whole, checked when read.

Beside a result may lie `<key>.<token>.work/` (an unfinished attempt, which the next one resumes under a token of its own),
`<key>.lease` (who is making it), and `<key>.damaged-<n>/` (a result that failed its check).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ssgr.errors import system_number
from ssgr.keys import Json, describe
from ssgr.lease import Lease, held
from ssgr.records import StageRun

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
WORKING = ".working"  # held by whoever makes results that nothing refers to yet, and alone by who clears a store
ALWAYS_CHECKSUMMED = 64 * 2**20  # bytes a result: a fraction of a second; a larger one is checksummed once a process
SMALL = 256 * 2**10  # bytes a file: notes, scores and small tables, which a driver checks of every result of a grid
POLL_SECONDS = (0.2, 2.0)  # first and longest pause of a waiter; it grows, as a grid may wait with hundreds
FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger("ssgr")
_checksummed: set[tuple[Path, str]] = set()  # large results that this process has checked: folder, creation time


@dataclass(frozen=True)
class Artefact:
    """A result in the store: its files lie under `path`."""

    path: Path
    key: str
    stage: str
    run: StageRun


@dataclass(frozen=True)
class _Manifest:
    version: int
    stage: str
    key: str
    inputs: dict[str, str]
    config: Json
    files: dict[str, dict[str, Any]]  # relative path -> size, sha256
    seconds: float  # of the attempt that finished
    peak_rss_mib: float
    created: str


class _Damaged(Exception):
    """A result that is not what its manifest says; the message names the file and what is wrong."""


class Store:
    """Results by stage and key, shared by any number of processes, threads and hosts; each result is made once.

    Whoever only reads says `reads=True`: nothing is written then, and the store may be another's.

    Raises:
        ValueError: `root` cannot be created or written.
    """

    def __init__(
        self, root: Path, *, heartbeat_seconds: float = 2.0, stale_seconds: float = 60.0, reads: bool = False
    ) -> None:
        self.root = Path(root).expanduser().absolute()
        self.heartbeat_seconds = heartbeat_seconds
        self.stale_seconds = stale_seconds  # a holder on another host that is silent for as long counts as dead
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self._counting = threading.Lock()
        if not reads:
            self._open("")

    def run(
        self,
        stage: str,
        key: str,
        make: Callable[[Path], None],
        *,
        config: object = None,
        inputs: Mapping[str, str] = MappingProxyType({}),
    ) -> Artefact:
        """The result of `stage` under `key`: read if it is there and sound, waited for if another makes it, else made.

        `make` gets a folder to write into and finds there what a killed attempt left. `config` and `inputs` are only
        written into the manifest.

        Raises:
            ValueError: the store cannot be written, or the disk is full.
            Exception: whatever `make` raises; its folder is kept for the next attempt.
        """
        assert Path(stage, key).parts == (stage, key), f"{stage!r}, {key!r}: one folder name each"
        folder = self._open(stage) / key
        manifest, made = None, False
        with contextlib.suppress(_Damaged):  # judged again below, where no other process can be mending it
            manifest = _read(folder)
        while manifest is None:
            with _explained_if_full(folder), self._wait_for_lease(folder) as lease:
                manifest = _read_or_move_aside(folder, lease)
                if manifest is None:
                    manifest = self._make(folder, make, config, inputs, lease)
                    made = manifest is not None
        with self._counting:
            (self.misses if made else self.hits)[stage] += 1
        return Artefact(folder, key, stage, StageRun(manifest.seconds, not made, manifest.peak_rss_mib))

    def find(self, stage: str, key: str, checksums: float = 0) -> Artefact | None:
        """The result of `stage` under `key` if it is there and sound, as far as sizes tell, and the checksums of files of up
        to `checksums` bytes.
        """
        folder = self.root / stage / key
        with contextlib.suppress(_Damaged):
            if (manifest := _read(folder, checksums)) is not None:
                return Artefact(folder, key, stage, StageRun(manifest.seconds, True, manifest.peak_rss_mib))
        return None

    def sound(self, stage: str, key: str) -> bool:
        """Whether a result is there, and what it was in every byte; one that is not is moved aside, to be made again."""
        folder = self.root / stage / key
        try:
            return _read(folder) is not None
        except _Damaged:
            with self._wait_for_lease(folder) as lease:
                return _read_or_move_aside(folder, lease) is not None

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Be the only process of all hosts that is here with `what`; a dead one's place is taken."""
        with self._wait_for_lease(self._open(what) / "driver"):
            yield

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Keep what is made and read here from being cleared, between stages too, until something refers to it."""
        with held(self._open("") / WORKING, alone=False):
            yield

    def damage(self, stage: str, key: str) -> str | None:
        """What is wrong with a result, whose files are all read; None if it is sound or not there."""
        folder = self.root / stage / key
        for seen in [one for one in _checksummed if one[0] == folder]:
            _checksummed.discard(seen)
        try:
            _read(folder)
        except _Damaged as damage:
            return str(damage)
        return None

    def keys(self, stage: str) -> list[str]:
        """The keys of all results of `stage`."""
        return sorted(path.parent.name for path in self.root.glob(f"{stage}/*/{MANIFEST}") if not path.parent.suffix)

    def alike(self, stage: str, inputs: Mapping[str, str]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every sound result of `stage` that was made from `inputs`: its folder and the configuration it was made with."""
        for key in self.keys(stage):
            folder = self.root / stage / key
            with contextlib.suppress(_Damaged, OSError, ValueError, KeyError):
                found = json.loads((folder / MANIFEST).read_text())
                if found["inputs"] == dict(inputs) and _read(folder) is not None:
                    yield folder, found["config"]

    def _open(self, stage: str) -> Path:
        folder = self.root / stage
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            raise ValueError(
                f"store.path={self.root} cannot be written ({error.strerror}): choose another with store.path=DIR"
            ) from error

    def _wait_for_lease(self, folder: Path) -> Lease:
        pause, longest = POLL_SECONDS
        lease, announced = Lease(folder, self.heartbeat_seconds), False
        while True:
            holder = lease.take(self.stale_seconds)
            if holder is None:
                return lease
            if not announced:
                log.info("%s %s: waiting for %s, which is making it", folder.parent.name, folder.name, holder)
                announced = True
            time.sleep(pause)
            pause = min(pause * 1.2, longest)

    def _make(
        self, folder: Path, make: Callable[[Path], None], config: object, inputs: Mapping[str, str], lease: Lease
    ) -> _Manifest | None:
        """Make and publish; None if another process took the lease meanwhile, and so the work."""
        described, work = describe(config), lease.work
        try:
            if not lease.resume():
                return None
            for stale in (work / MANIFEST, work / f"{MANIFEST}.new"):  # of an attempt killed in its last steps
                stale.unlink(missing_ok=True)
            _reset_peak_rss()
            start = time.monotonic()
            make(work)
            seconds, peak = time.monotonic() - start, peak_rss_mib()
            files = _seal(work)
            manifest = _Manifest(
                version=MANIFEST_VERSION,
                stage=folder.parent.name,
                key=folder.name,
                inputs=dict(inputs),
                config=described,
                files=files,
                seconds=seconds,
                peak_rss_mib=peak,
                created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            )
            _write_manifest(work, manifest)
            if not lease.publish():
                return None
            _sync_folder(folder.parent)
            return manifest
        except Exception as error:  # whatever comes of a folder that is gone
            if lease.ours():
                raise
            log.warning(
                "%s %s: stopped here, as another process makes it now (%s)", folder.parent.name, folder.name, error
            )
            return None


@contextlib.contextmanager
def _explained_if_full(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # safetensors and tokenizers raise their own
        number = system_number(error)
        if number not in FULL:
            raise
        place = getattr(error, "filename", None) or folder
        raise ValueError(
            f"the disk is full ({os.strerror(number)}) at {place}: free some space, or choose another "
            "place with store.path=DIR; the same command run again continues from what is there"
        ) from error


def _read_or_move_aside(folder: Path, lease: Lease) -> _Manifest | None:
    try:
        return _read(folder)
    except _Damaged as damage:
        n = 1
        while (aside := folder.with_name(f"{folder.name}.damaged-{n}")).exists():
            n += 1
        if lease.move(folder, aside):
            log.warning("%s; moved to %s, making it again", damage, aside.name)
        return None


def _read(folder: Path, checksums: float = math.inf) -> _Manifest | None:
    """The manifest of a sound result, None if there is no result; files of more than `checksums` bytes are only measured.

    Raises:
        _Damaged: a result is there and is not what was published.
    """
    if not folder.exists():
        return None
    path = folder / MANIFEST
    try:
        manifest = _Manifest(**json.loads(path.read_text()))
        sizes = {folder / name: int(entry["size"]) for name, entry in manifest.files.items()}
        sums = {folder / name: str(entry["sha256"]) for name, entry in manifest.files.items()}
        if manifest.version != MANIFEST_VERSION:
            raise ValueError(f"version {manifest.version}, not {MANIFEST_VERSION}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(f"{path}: cannot be read ({error})") from error
    try:
        _check_sizes(sizes)
        seen = (folder, str(manifest.created))
        if sum(sizes.values()) <= ALWAYS_CHECKSUMMED or seen not in _checksummed:
            _check_sums({path: sha256 for path, sha256 in sums.items() if sizes[path] <= checksums})
            if checksums == math.inf:
                _checksummed.add(seen)
    except OSError as error:
        raise _Damaged(f"{error.filename or folder}: cannot be read ({error.strerror})") from error
    return manifest


def _check_sizes(sizes: dict[Path, int]) -> None:
    for path, size in sizes.items():
        if (found := path.stat().st_size) != size:
            raise _Damaged(f"{path}: {found} bytes, its manifest says {size}")


def _check_sums(sums: dict[Path, str]) -> None:
    for path, sha256 in sums.items():
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise _Damaged(f"{path}: its content has changed, the sha256 is not that of its manifest")


def _seal(work: Path) -> dict[str, dict[str, Any]]:
    """Bring every file under `work` to the disk; size and checksum of each by its relative path."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(work.rglob("*")):
        if path.is_dir():
            _sync_folder(path)
            continue
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            files[path.relative_to(work).as_posix()] = {"size": file.tell(), "sha256": sha256}
    assert MANIFEST not in files, f"{MANIFEST} is the store's own file: give the stage's file another name"
    return files


def _write_manifest(work: Path, manifest: _Manifest) -> None:
    beside = work / f"{MANIFEST}.new"
    with open(beside, "w") as file:
        json.dump(asdict(manifest), file, indent=1, sort_keys=True, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(work / MANIFEST)
    _sync_folder(work)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot, and need not, sync a folder
            raise
    finally:
        os.close(fd)


def _reset_peak_rss() -> None:
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then that since the process started
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_mib() -> float:
    """The process's largest resident memory since `_reset_peak_rss`, of all its threads; not that of processes it started."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, others KiB
