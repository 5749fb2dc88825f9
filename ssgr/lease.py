"""Leases: which process makes a result, on hosts that share nothing but the folder.

A lease is a file that is ours while it holds our token, kept fresh by a heartbeat. `.lock` guards the leases of a stage:
the kernel drops that lock with its process, so it cannot be left behind; it is held for moments, never while a stage runs.

A process that is stopped (SIGSTOP, a suspended job) is silent, and is taken over from like one that is dead, on this host
too: nobody knows whether it will ever go on. If it does, it finds its folder gone, as that has a name with its token, and
whoever takes over gives it another. So it cannot write into, publish or delete what the other makes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import psutil

from ssgr import progress

log = logging.getLogger("ssgr")


class Lease:
    """The right to make one result: a file that is ours while it holds our token, kept fresh by a heartbeat."""

    def __init__(self, folder: Path, heartbeat_seconds: float) -> None:
        self.folder = folder
        self.path = folder.with_name(f"{folder.name}.lease")
        self.told = folder.with_name(f"{folder.name}.progress")
        self.token = secrets.token_hex(8)
        self.work = folder.with_name(f"{folder.name}.{self.token}.work")
        self._seconds = heartbeat_seconds
        self._heard = (0.0, 0.0)  # the holder's last beat that was seen, and when, by this process's own clock
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"lease {folder.name}", daemon=True)

    def take(self, stale_seconds: float) -> str | None:
        """Take the lease, from a dead holder if need be; who holds it if that is not possible."""
        with self._lock() as now:
            try:
                text, beat = self.path.read_text(), self.path.stat().st_mtime
            except FileNotFoundError:
                pass
            else:
                who = _named(text)
                if beat != self._heard[0]:
                    self._heard = (beat, time.monotonic())
                silent = max(now - beat, time.monotonic() - self._heard[1])  # clocks jump: a beat may lie in the future
                alive = silent <= stale_seconds and not _is_dead(text)
                if alive or not self._move_aside(text):
                    return who
                log.warning("%s: taken over from %s, which is dead or silent", self.path, who)
            if not self._create():
                return "another process"
        self._heart.start()
        return None

    def _create(self) -> bool:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps({**_whereabouts(), "pid": os.getpid(), "token": self.token, "started": started})
        try:
            lease = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:  # only where the file system has no locks
            return False
        try:
            with open(lease, "w") as file:
                file.write(text)
        except OSError:
            self.path.unlink()
            raise
        return True

    def _move_aside(self, text: str) -> bool:
        """Move a dead lease out of the way; False, and nothing changed, if it is no longer the one that was judged."""
        aside = self.path.with_name(f"{self.path.name}.{self.token}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return False
        dead = aside.read_text() == text
        if not dead:  # only where the file system has no locks: another was quicker, give back what is its own
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()
        return dead

    def resume(self) -> bool:
        """Make our folder `work` of what an earlier holder left, or a new one, unless the lease is lost."""
        with self._lock():
            if not self.ours():
                return False
            left = list(self.folder.parent.glob(f"{self.folder.name}.*work"))
            if left:
                max(left, key=lambda path: path.stat().st_mtime).rename(self.work)
            else:
                self.work.mkdir()
        return True

    def publish(self) -> bool:
        """Give `work` its final name, unless the lease is lost or a result is already there."""
        with self._lock():
            if not self.ours():
                return False
            if self.folder.exists():
                shutil.rmtree(self.work)
                return False
            self.work.rename(self.folder)
        return True

    def move(self, path: Path, to: Path) -> bool:
        """Rename what only the holder may touch, unless the lease is lost."""
        with self._lock():
            if not self.ours():
                return False
            path.rename(to)
        return True

    def ours(self) -> bool:
        """Whether the lease still holds our token."""
        try:
            return self.token in self.path.read_text()
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        heard = time.monotonic()
        while not self._stop.wait(self._seconds):
            with contextlib.suppress(OSError):  # a network file system may stumble; the next beat mends it
                if not self.ours():
                    silent = f"this process was silent for {time.monotonic() - heard:.0f} s (was it suspended?)"
                    log.warning("%s: %s, and another took over; its result will be used", self.path, silent)
                    return
                os.utime(self.path)
                heard = time.monotonic()
                self._tell()

    def _tell(self) -> None:
        """Let others read how far the holder is, beside the lease."""
        if (latest := progress.latest) is not None:
            self.told.write_text(json.dumps(latest))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._heart.join()
        try:
            with self._lock():
                if self.ours():
                    self.told.unlink(missing_ok=True)
                    self.path.unlink()
        except OSError as error:  # never hides what went wrong in the stage; the lease goes stale by itself
            log.warning("%s: cannot be released (%s)", self.path, error)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[float]:
        """Hold the lock on the leases of this stage; yields the time by the file system's clock, not by this host's."""
        with open(self.path.with_name(".lock"), "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                log.debug("%s: no locks on this file system (%s)", file.name, error)
            try:
                os.utime(file.name)
                yield os.stat(file.name).st_mtime
            finally:  # by hand, as a child forked at this moment shares the open file
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def held(file: Path, alone: bool) -> Iterator[bool]:
    """Hold `file` beside others, or `alone`; False if others hold it then. The kernel drops it with its process."""
    with open(file, "ab") as stream:
        free = True
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            free = False
        except OSError as error:
            log.debug("%s: no locks on this file system (%s)", file, error)
        try:
            yield free
        finally:  # by hand, as a child forked meanwhile shares the open file
            with contextlib.suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_UN)


def beating(path: Path, stale_seconds: float) -> bool:
    """Whether the lease `path` has a holder that is not known to be dead and was heard of not long ago."""
    try:
        return time.time() - path.stat().st_mtime <= stale_seconds and not _is_dead(path.read_text())
    except OSError:
        return False


def _whereabouts() -> dict[str, str]:
    """Where a pid means something: the host, and the pid namespace, as containers may share a host name."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return {"host": socket.gethostname(), "pids": namespace}


def _named(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} (since {holder['started']})"
    except (ValueError, KeyError, TypeError):
        return "an unknown process"


def _is_dead(text: str) -> bool:
    """Whether a lease's holder is known to be dead; a pid that is reused or elsewhere is left to the heartbeat."""
    try:
        holder = json.loads(text)
        if {name: holder[name] for name in ("host", "pids")} != _whereabouts():
            return False
        return bool(psutil.Process(holder["pid"]).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # or one of another user, where /proc hides those
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False
    except (ValueError, KeyError, TypeError, psutil.Error):
        return False
