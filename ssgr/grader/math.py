"""The mathematical grader: Math-Verify in child processes that can be killed.

Math-Verify's own time limit is a signal, which one long call in C blocks; so each answer is graded in a child process
that is killed at a wall-clock limit and bounded in memory. Parent and child speak JSON lines: nothing is unpickled.
This file is also the child: `python -m ssgr.grader.math SECONDS MEMORY_GIB`.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from ssgr.grader import Grade
from ssgr.records import Verdict

_START_SECONDS = 120.0  # importing sympy takes one second, and many on a cold network file system
_SCIENTIFIC = re.compile(
    r"(?:(?<=[{$])|^)\s*([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)\s*(?:(?=[}$])|$)"
)  # 1e-5 is not 1 e - 5
_SMALL = 1e-3
_IN_LATEX = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")  # the gold says itself where its LaTeX is


@dataclass(frozen=True)
class MathVerify:
    """Math-Verify with a wall-clock limit of `seconds` an answer and `memory_gib` above what its libraries take.

    What runs past a limit, dies or raises is `grader_failed`, never wrong; so is a gold answer that cannot be parsed.
    `workers` child processes share the answers; None is one for each core that this process may use.
    """

    seconds: float = 5.0
    memory_gib: float = 2.0
    workers: int | None = field(default=None, metadata={"key": False})

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_gib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"grader.{name}={getattr(self, name)!r}: give a number above 0")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"grader.workers={self.workers}: give 1 or more, or null for one a core")

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (gold answer, answer part) pairs, in order.

        Raises:
            ValueError: the child processes do not start, for example since Math-Verify is not installed.
        """
        grades = [Grade(Verdict.NO_ANSWER)] * len(pairs)
        todo = [(i, gold, part) for i, (gold, part) in enumerate(pairs) if part and not part.isspace()]
        size = min(self.workers or _cores(), len(todo))
        if not todo:
            return grades
        with ExitStack() as stack:
            idle: SimpleQueue[_Child] = SimpleQueue()
            for _ in range(size):
                idle.put(stack.enter_context(closing(_Child(self.seconds, self.memory_gib))))

            def one(task: tuple[int, str, str]) -> Grade:
                child = idle.get()
                try:
                    return child.grade(*task[1:])
                finally:
                    idle.put(child)

            with ThreadPoolExecutor(size) as threads:
                for (i, _, _), grade in zip(todo, threads.map(one, todo), strict=True):
                    grades[i] = grade
        return grades


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Child:
    """One grading process, which is started when it is needed and again after each kill."""

    def __init__(self, seconds: float, memory_gib: float) -> None:
        self.seconds, self.memory_gib = seconds, memory_gib
        self.process: subprocess.Popen[bytes] | None = None

    def grade(self, gold: str, answer: str) -> Grade:
        """Grade one answer; when this returns, the limits hold for the next one as for the first."""
        process = self.process or self._start()
        reply = self._say(process, [gold, answer], self.seconds)
        if reply is None:
            return Grade(Verdict.GRADER_FAILED, why=f"over {self.seconds:g} s or {self.memory_gib:g} GiB")
        return Grade(Verdict(reply[0]), *reply[1:])

    def close(self) -> None:
        """Kill the process and wait until it is gone."""
        if self.process is None:
            return
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what could not be written to a dead child
                _pipe(stream).close()
        self.process.wait()
        self.process = None

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-W", "ignore", "-m", "ssgr.grader.math"]
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        self.process = subprocess.Popen(
            [*command, str(self.seconds), str(self.memory_gib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "0"},  # sympy orders some terms by their hash
        )
        process = self.process
        hello = self._say(process, None, _START_SECONDS)
        if hello is None or "error" in hello:
            said = hello["error"] if hello else f"the process died, or said nothing for {_START_SECONDS:.0f} s"
            raise ValueError(
                f"grader=math does not start: {said}; see what `{sys.executable} -c 'import math_verify'` says, "
                "or type grader=exact"
            )
        if not hello["bounded"]:
            warnings.warn(f"grader.memory_gib={self.memory_gib}: no such limit on {sys.platform}", stacklevel=2)
        return process

    def _say(self, process: subprocess.Popen[bytes], request: object, seconds: float) -> Any:
        """The child's reply, or None if it is not there in `seconds` or never will be; the child is then closed."""
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        line = b""
        timer = threading.Timer(seconds, kill)
        timer.start()
        try:  # a kill ends both the writing and the reading
            _pipe(process.stdin).write(json.dumps(request).encode() + b"\n")
            _pipe(process.stdin).flush()
            line = _pipe(process.stdout).readline()
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
            timer.join()
        if late.is_set() or not line.endswith(b"\n"):
            self.close()
            return None
        return json.loads(line)


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "opened with PIPE"
    return stream


def _serve(seconds: float, memory_gib: float) -> None:
    """The child: answer each line of standard input with one line, until it ends."""
    import signal

    with os.fdopen(os.dup(1), "w", encoding="ascii") as replies:
        os.dup2(2, 1)  # whatever a library prints must not look like a reply
        sys.stdin.readline()
        try:
            from sympy.core.cache import clear_cache  # type: ignore[import-untyped]

            _verdict("1", "$1$")  # compiles the patterns, which is not to be charged to the first answer
        except ImportError as error:
            print(json.dumps({"error": str(error)}), file=replies, flush=True)
            return
        limit = _bound_memory(memory_gib)
        print(json.dumps({"bounded": limit is not None}), file=replies, flush=True)
        for line in sys.stdin:
            if hasattr(signal, "setitimer"):  # the parent's kill comes first, unless the parent is gone
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)
            reply = _verdict(*json.loads(line))
            if limit is not None and _address_space("VmPeak") > limit:
                return  # sympy takes a MemoryError for an answer, so the verdict is not to be trusted
            print(json.dumps(reply), file=replies, flush=True)
            clear_cache()  # a verdict must not depend on the answers before it
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0)


def _bound_memory(gib: float) -> int | None:
    """Limit the address space to what is in use and `gib` more: the bytes at half of that, None if there is no limit.

    An answer whose peak lies above the half is failed: the next doubling would have met the limit.
    """
    try:
        import resource

        used = _address_space("VmSize")
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used + int(gib * 2**30)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ImportError, OSError, ValueError):
        return None
    return (used + limit) // 2


def _address_space(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def _verdict(gold: str, answer: str) -> tuple[Verdict, str | None, str | None]:
    """The verdict on one answer, what was extracted from it, and why the grader failed; here, and without any limit.

    Raises:
        MemoryError: the process is not to be used any more.
    """
    from math_verify import parse as parse_with_limit
    from math_verify import verify

    parse = partial(parse_with_limit, parsing_timeout=None, raise_on_error=True)
    try:
        gold = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", gold)
        golds = _whole(parse(gold if _IN_LATEX.search(gold) else f"${gold}$")) if gold.strip() else []
        found = _whole(
            parse(_SCIENTIFIC.sub(r"\1 \\times 10^{\2}", answer) if "{" in answer or "$" in answer else answer)
        )
    except MemoryError:
        raise
    except Exception as error:
        return Verdict.GRADER_FAILED, None, f"parsing raised {type(error).__name__}"
    if not golds:
        return Verdict.GRADER_FAILED, None, f"the gold answer {gold[:40]!r} cannot be read"
    if not found:
        return Verdict.NO_ANSWER, None, None
    text, raised = str(found[-1]), ""
    for one_gold, one in product(golds, found):
        try:
            if verify(one_gold, one, timeout_seconds=None, raise_on_error=True) and not _differ(one_gold, one):
                return Verdict.RIGHT, text, None
        except MemoryError:
            raise
        except Exception as error:
            raised = f"comparing raised {type(error).__name__}"
    return (Verdict.GRADER_FAILED if raised else Verdict.WRONG), text, raised or None


def _differ(gold: Any, one: Any) -> bool:
    """Whether two small numbers differ: Math-Verify compares decimals, of which 2e-9 and 3e-9 have the same six."""
    if not all(getattr(number, "is_number", False) and number.is_real for number in (gold, one)):
        return False
    try:
        a, b = float(gold), float(one)
    except OverflowError:  # not small
        return False
    return max(abs(a), abs(b)) < _SMALL and not math.isclose(a, b, rel_tol=1e-6)


def _whole(found: list[Any]) -> list[Any]:
    """What was extracted, without text that ends inside a brace: two answers that are cut alike are not the same."""
    return [one for one in found if not isinstance(one, str) or one.count("{") == one.count("}")]


if __name__ == "__main__":
    _serve(float(sys.argv[1]), float(sys.argv[2]))
