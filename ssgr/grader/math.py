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
import select
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ssgr.grader import Grade
from ssgr.records import Verdict

_DEEP = 100_000  # calls within calls: time and memory end sooner, and are told of
_START_SECONDS = 120.0  # importing sympy takes one second, and many on a cold network file system
_SCIENTIFIC = re.compile(
    r"(?:(?<=[{$])|^)\s*([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)\s*(?:(?=[}$])|$)"
)  # 1e-5 is not 1 e - 5
_SMALL = 1e-3
_MOST = 1_000_000  # seconds or GiB: more than any machine has, and less than the system's calls refuse
_COMMAND, _WORD = re.compile(r"\\[A-Za-z]+"), re.compile(r"[^\W\d_]{3}|\n")
_BETWEEN = re.compile(  # a word, where only and, or, units and signs part the boxes of one answer
    r"(?<![^\W\d_])(?<!\\)(?!(?:and|or|cm|mm|km|kg|mg|ml|ft)(?![^\W\d_]))[^\W\d_]{2,}", re.IGNORECASE
)
_SPACED = re.compile(  # thousands; of plain spaces only where nothing else is there
    r"(?<![\d.,])\d{1,3}(?:(?:\\[, ;]|~)\d{3})+(?!\d)|(?:(?<=[{$])|^)\s*[-+]?\d{1,3}(?: \d{3})+\s*(?=[}$]|$)"
)
_SAME = (  # signs that LaTeX sets alike, of which Math-Verify reads the second
    (re.compile(r"~(?!=)"), r"\\ "),
    (re.compile(r"(?<!\\)\\\$|[€£¥]"), ""),  # and money, of which it reads the number in a box alone
    (re.compile("\u2212"), "-"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile("∞"), r"\\infty "),
    (re.compile(r"((?:(?<=[{$])|^)\s*-?\d+) (\d+)/(\d+)(?=\s*(?:[}$]|$))"), r"\1\\frac{\2}{\3}"),  # 3 1/2
    (re.compile(r"\^?(?:°|\\degree(?![A-Za-z]))"), r"^{\\circ}"),
    (re.compile(r"\\\\\s*\[-?[\d.]+\s*[a-z]{2}\]"), r"\\\\"),
)
_REPEATING = re.compile(r"(?<!\d)(\d{1,9})\.(\d{0,9})\\(?:overline|bar)\s*\{(\d{1,30})\}")
# A full stop at the end of what is in braces, not of a.m.
_STOP = re.compile(r"(?<=[\w)}\]])(?<!\.[A-Za-z])\s*\.(?=\s*\})")
_BOX, _BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{(?!\s*\})"), re.compile(r"[{}]")
_CLOSES = re.compile(r"\\[)\]]|\$\$?")
_LETTER = re.compile(
    r"\d([A-Za-z])\s*\$?\s*$"
)  # the last factor of a gold answer, which Math-Verify may take for a unit
_IN_LATEX = re.compile(r"\$|\\boxed|\\\(|\\\[")  # the gold says itself where its LaTeX is


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
            if not 0 < getattr(self, name) <= _MOST:
                raise ValueError(f"grader.{name}={getattr(self, name)!r}: give a number above 0, {_MOST} at most")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"grader.workers={self.workers}: give 1 or more, or null for one a core")

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (gold answer, answer part) pairs, in order.

        Raises:
            ValueError: the child processes do not start, for example since Math-Verify is not installed.
        """
        grades = [Grade(Verdict.NO_ANSWER)] * len(pairs)
        todo = iter([(i, pair) for i, pair in enumerate(pairs) if pair[1] and not pair[1].isspace()])
        children = [_Child(self.seconds, self.memory_gib) for _ in range(min(self.workers or _cores(), len(pairs)))]
        try:
            busy = dict(zip(children, todo, strict=False))
            for child, (_, pair) in busy.items():
                child.ask(pair)
            while busy:
                for child in _answering(list(busy)):
                    if (grade := child.answer()) is None:  # not there yet, or the process began anew
                        continue
                    grades[busy.pop(child)[0]] = grade
                    if (following := next(todo, None)) is not None:
                        busy[child] = following
                        child.ask(following[1])
        finally:
            for child in children:
                child.close()
        return grades


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Child:
    """One grading process, which is started when it is needed and again after each kill; the parent never waits for it."""

    def __init__(self, seconds: float, memory_gib: float) -> None:
        self.seconds, self.memory_gib = seconds, memory_gib
        self.process: subprocess.Popen[bytes] | None = None
        self.deadline = 0.0
        self._asked, self._to_write, self._read = b"", memoryview(b""), bytearray()
        self._greeted = False

    def ask(self, pair: tuple[str, str]) -> None:
        """Begin with one (gold, answer) pair; the limits hold for it as for the first."""
        self._asked = json.dumps(pair).encode() + b"\n"
        if self.process is None:
            self._start()
        else:
            self._send()

    def answer(self) -> Grade | None:
        """The grade of what was asked, or None if it is not there yet.

        Raises:
            ValueError: the process does not start.
        """
        alive = self._move()
        if alive and time.monotonic() < self.deadline and not self._read.endswith(b"\n"):
            return None
        line = bytes(self._read) if self._read.endswith(b"\n") else b""
        if not self._greeted:
            self._greet(line)
            return None
        if not line:
            self.close()
            return Grade(Verdict.GRADER_FAILED, why=f"over {self.seconds:g} s or {self.memory_gib:g} GiB")
        reply = json.loads(line)
        return Grade(Verdict(reply[0]), *reply[1:])

    def files(self) -> tuple[list[int], list[int]]:
        """What to wait for: files to read, and to write."""
        process = self._running()
        return [process.stdout.fileno()], [process.stdin.fileno()] if self._to_write else []  # type: ignore[union-attr]

    def close(self) -> None:
        """Kill the process and wait until it is gone."""
        if self.process is None:
            return
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what could not be written to a dead child
                stream.close()  # type: ignore[union-attr]
        self.process.wait()
        self.process = None

    def _running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None, "asked"
        return self.process

    def _start(self) -> None:
        command = [sys.executable, "-P", "-W", "ignore", "-m", "ssgr.grader.math"]
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        self.process = subprocess.Popen(
            [*command, str(self.seconds), str(self.memory_gib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "0"},  # sympy orders some terms by their hash
        )
        os.set_blocking(self.process.stdin.fileno(), False)  # type: ignore[union-attr]
        os.set_blocking(self.process.stdout.fileno(), False)  # type: ignore[union-attr]
        self._greeted, self._to_write = False, memoryview(b"")
        self._read.clear()
        self.deadline = time.monotonic() + _START_SECONDS

    def _greet(self, line: bytes) -> None:
        hello = json.loads(line) if line else {"error": f"the process died, or said nothing for {_START_SECONDS:.0f} s"}
        if "error" in hello:
            raise ValueError(
                f"grader=math does not start: {hello['error']}; see what `{sys.executable} -c 'import math_verify'` says, "
                "or type grader=exact"
            )
        if not hello["bounded"]:
            warnings.warn(f"grader.memory_gib={self.memory_gib}: no such limit on {sys.platform}", stacklevel=2)
        self._greeted = True
        self._send()

    def _send(self) -> None:
        self._read.clear()
        self._to_write = memoryview(self._asked)
        self.deadline = time.monotonic() + self.seconds
        self._write()

    def _write(self) -> None:
        """Write what can be at once."""
        with suppress(BlockingIOError, BrokenPipeError):  # of a process that is gone, reading tells
            while self._to_write:
                self._to_write = self._to_write[os.write(self._running().stdin.fileno(), self._to_write) :]  # type: ignore[union-attr]

    def _move(self) -> bool:
        """Write and read what can be at once; False if the process is gone."""
        self._write()
        with suppress(BlockingIOError):
            while piece := os.read(self._running().stdout.fileno(), 1 << 16):  # type: ignore[union-attr]
                self._read += piece
            return False
        return True


def _answering(children: Sequence[_Child]) -> list[_Child]:
    """Wait until one of `children` has something to say, or is late, and return all of which that is so."""
    owner: dict[int, _Child] = {}
    poll = select.poll()
    for child in children:
        reads, writes = child.files()
        for files, event in ((reads, select.POLLIN), (writes, select.POLLOUT)):
            for file in files:
                owner[file] = child
                poll.register(file, event)
    wait = max(0.0, min(child.deadline for child in children) - time.monotonic())
    ready = {owner[file] for file, _ in poll.poll(1000 * wait + 1)}
    return [child for child in children if child in ready or time.monotonic() >= child.deadline]


def _serve(seconds: float, memory_gib: float) -> None:
    """The child: answer each line of standard input with one line, until it ends."""
    import signal

    sys.setrecursionlimit(_DEEP)  # the libraries take a RecursionError for text, and text differs from any number
    with os.fdopen(os.dup(1), "w", encoding="ascii") as replies:
        os.dup2(2, 1)  # whatever a library prints must not look like a reply
        try:
            from sympy.core.cache import clear_cache  # type: ignore[import-untyped]

            two_stages()
            percents()
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


def two_stages() -> None:
    """Let ANTLR read LaTeX with its SLL prediction, and with the full one only where that finds a syntax error.

    SLL gives the tree of the full prediction or a syntax error (ANTLR's documentation of PredictionMode), and it is what
    takes half of the time. Where the names that are changed here are no more, all stays as it was.
    """
    from antlr4.atn.PredictionMode import PredictionMode  # type: ignore[import-untyped]
    from latex2sympy2_extended import latex2sympy2  # type: ignore[import-untyped]

    reader = getattr(latex2sympy2, "_Latex2Sympy", None)
    create, parse = (getattr(reader, name, None) for name in ("create_parser", "parse"))
    if reader is None or create is None or parse is None:
        return

    def create_parser(self: Any, text: str) -> Any:
        parser = create(self, text)
        parser._interp.predictionMode = self.prediction
        return parser

    def parse_twice(self: Any, text: str) -> Any:
        self.prediction = PredictionMode.SLL
        try:
            return parse(self, text)
        except MemoryError:
            raise
        except Exception:
            self.prediction = PredictionMode.LL
            return parse(self, text)

    reader.create_parser, reader.parse = create_parser, parse_twice


def percents() -> None:
    """Let a number with a percent sign be read: latex2sympy2_extended asks each atom first for a name that atoms lack."""
    from latex2sympy2_extended import latex2sympy2

    atom = getattr(getattr(latex2sympy2, "PSParser", None), "AtomContext", None)
    if atom is not None and not hasattr(atom, "FUNC_GAMMA"):
        atom.FUNC_GAMMA = lambda _: None


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
        gold, answer = (_STOP.sub("", text) for text in (gold, answer))
        gold, answer = (_SPACED.sub(lambda found: re.sub(r"[\\,; ~]", "", found[0]), text) for text in (gold, answer))
        gold, answer = (_alike(text) for text in (gold, answer))
        gold = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", gold)
        answer = _from_boxes(answer)
        golds = _whole(parse(gold if _IN_LATEX.search(gold) else f"${gold}$")) if gold.strip() else []
        answer = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", answer)
        found = _whole(parse(f"${answer}$" if _all_latex(answer) else answer))
    except MemoryError:
        raise
    except Exception as error:
        return Verdict.GRADER_FAILED, None, f"parsing raised {type(error).__name__}"
    if not golds:
        return Verdict.GRADER_FAILED, None, f"the gold answer {gold[:40]!r} cannot be read"
    if not found:
        return Verdict.NO_ANSWER, None, None
    text, raised = str(found[-1]), ""
    golds, found = (numbers + _of_percents(numbers) for numbers in (golds, found))
    if (last := _LETTER.search(gold)) and _bare(golds) and _bare(found) and last[1] not in _told(answer):
        return Verdict.WRONG, text, None
    for one_gold, one in product(golds, found):
        try:
            if verify(one_gold, one, timeout_seconds=None, raise_on_error=True) and not _differ(one_gold, one):
                return Verdict.RIGHT, text, None
        except MemoryError:
            raise
        except Exception as error:
            raised = f"comparing raised {type(error).__name__}"
    return (Verdict.GRADER_FAILED if raised else Verdict.WRONG), text, raised or None


def _alike(text: str) -> str:
    """The text with each thing written in one way: spaces, money, degrees, the rows of a matrix, repeating decimals."""
    for signs, one in _SAME:
        text = signs.sub(one, text)
    return _REPEATING.sub(_fraction, text)


def _fraction(repeating: re.Match[str]) -> str:
    """0.1\\overline{6} as (16 - 1) / 90."""
    whole, once, again = repeating.groups()
    above = int(whole + once + again) - int(whole + once)
    return rf"\frac{{{above}}}{{{10 ** len(once) * (10 ** len(again) - 1)}}}"


def _of_percents(found: Sequence[Any]) -> list[Any]:
    """The numbers before percent signs: Math-Verify takes 7 % for 7, but not 7.5 % for 7.5."""
    return [one.args[0] for one in found if str(one).endswith("*(1/100)") and getattr(one.args[0], "is_Float", False)]


def _bare(found: Sequence[Any]) -> bool:
    """Whether a number was read, and nothing else but its text."""
    return all(isinstance(one, str) or getattr(one, "is_number", False) for one in found)


def _told(answer: str) -> str:
    """The text that an answer was read from: what is in its last box, or all of it."""
    boxes = [found.end() for found in _BOX.finditer(answer)]
    return answer[boxes[-1] : _end_of_box(answer, boxes[-1])] if boxes else answer


def _from_boxes(answer: str) -> str:
    """What begins with the last box, or those before it that no words part from it; without a box, all of the answer.

    Math-Verify would read all boxes that stand close as one answer and, where it cannot read a box, what is before it.
    """
    boxes = [found.span() for found in _BOX.finditer(answer)]
    if not boxes:
        return answer
    first, inside = boxes[0]
    for (_, before), (start, after) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        end = _end_of_box(answer, before, start)
        if _BETWEEN.search(answer, end, start):
            first, inside = start, after
            break
    closes = _CLOSES.search(answer, _end_of_box(answer, inside))  # the formula of which the first box is a part
    opens = closes[0].translate({ord(")"): "(", ord("]"): "["}) if closes else ""
    return opens + _BOX.sub(r"\\boxed{", answer[first:])


def _end_of_box(answer: str, at: int, stop: int | None = None) -> int:
    """Where the box ends whose inside begins at `at`, or `stop`, by default the end of all."""
    depth, stop = 1, len(answer) if stop is None else stop
    for found in _BRACE.finditer(answer, at, stop):
        depth += 1 if found[0] == "{" else -1
        if not depth:
            return found.end()
    return stop


def _all_latex(answer: str) -> bool:
    """Whether a short answer is LaTeX as a whole, without saying so: a command, and no words beside commands."""
    return (
        bool(_COMMAND.search(answer)) and not _IN_LATEX.search(answer) and not _WORD.search(_COMMAND.sub(" ", answer))
    )


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
