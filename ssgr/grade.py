"""Grade any file of answers: python -m ssgr.grade --grader math IN.jsonl OUT.jsonl.

IN has a JSON object a line with `id`, `gold` and `pred` (a short answer or a whole response: one that opens its thinking
and does not close it has no answer). OUT has as many lines in the
same order with `id`, `verdict` (right, wrong, no_answer, grader_failed), `extracted` (what was found, or null), and where
the grader failed `why`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ssgr.files import parsed
from ssgr.grader import Grade, Grader
from ssgr.grader.choice import Choice
from ssgr.grader.exact import Exact
from ssgr.grader.math import MathVerify
from ssgr.progress import Progress
from ssgr.records import Verdict
from ssgr.thinking import Thinking

_CHUNK = 1000  # answers graded between two marks of progress


def read(path: Path) -> list[dict[str, str]]:
    """The lines of `path`.

    Raises:
        ValueError: a line is not a JSON object, lacks a field, or has the id of another; the line is named.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; give a JSONL file with id, gold and pred")
    out: list[dict[str, str]] = []
    seen: dict[str, int] = {}
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = parsed(line, f"{path.name}, line {number}")
            lacking = [f for f in ("id", "gold", "pred") if not isinstance(row, dict) or f not in row]
            if lacking:
                raise ValueError(
                    f"{path.name}, line {number}: lacks {', '.join(lacking)}; a line has id, gold and pred"
                )
            name = str(row["id"])
            if name in seen:
                raise ValueError(
                    f"{path.name}, line {number}: its id {name!r} is that of line {seen[name]}; ids are unique"
                )
            seen[name] = number
            out.append({"id": row["id"], **{f: "" if row[f] is None else str(row[f]) for f in ("gold", "pred")}})
    if not out:
        raise ValueError(f"{path}: it holds no answers")
    return out


def grade(
    grader: Grader, thinking: Thinking, rows: Sequence[dict[str, str]], out: Path, opened: bool = False
) -> Counter[Verdict]:
    """Grade `rows` and write `out`, whole or not at all; how often each verdict was given.

    `opened` says that the prompts opened the thinking.
    """
    beside, counts = out.with_name(f".{out.name}.{os.getpid()}.tmp"), Counter[Verdict]()
    try:
        with beside.open("w", encoding="utf-8") as file, Progress("grade", len(rows)) as progress:
            for first in range(0, len(rows), _CHUNK):
                some = rows[first : first + _CHUNK]
                pairs = [(row["gold"], thinking.part_of_text(row["pred"], opened) or "") for row in some]
                for row, one in zip(some, grader.grade(pairs), strict=True):
                    file.write(json.dumps(_line(row["id"], one)) + "\n")
                    counts[one.verdict] += 1
                progress.step(len(some))
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return counts


def _line(name: str, one: Grade) -> dict[str, str | None]:
    line = {"id": name, "verdict": str(one.verdict), "extracted": one.answer}
    return line | ({"why": one.why} if one.why else {})


def main(argv: Sequence[str] | None = None) -> None:
    """Grade a file.

    Raises:
        SystemExit: it cannot be read, or the result cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m ssgr.grade", description=__doc__)
    parser.add_argument("input", type=Path, help="JSONL file with id, gold and pred")
    parser.add_argument("output", type=Path, help="JSONL file to write")
    parser.add_argument(
        "--grader", choices=["math", "exact", "choice"], default="math", help="how answers are compared (math)"
    )
    told = "a response with it and without the other tag has no answer; '' for none"
    parser.add_argument("--start-think", default="<think>", help=told)
    parser.add_argument(
        "--end-think", default="</think>", help="the answer is what follows the last such tag; '' for all"
    )
    parser.add_argument("--require-end-think", action="store_true", help="without the tag there is no answer")
    parser.add_argument("--seconds", type=float, default=5.0, help="that an answer may take, with math (5)")
    parser.add_argument(
        "--memory-gib", type=float, default=2.0, help="of a grading process above its libraries, with math (2)"
    )
    parser.add_argument("--workers", type=int, help="child processes, with math; one a core by default")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    end = args.end_think or None
    thinking = Thinking((args.start_think or None) if end else None, end)
    try:
        if args.output.is_dir():
            raise ValueError(
                f"{args.output} is a folder; give the JSONL file to write, such as {args.output / 'OUT.jsonl'}"
            )
        if not args.output.parent.is_dir():
            raise ValueError(f"{args.output}: there is no folder {args.output.parent}; make it, or give another file")
        if args.output.exists() and args.input.exists() and args.output.samefile(args.input):
            raise ValueError(f"{args.output} is the file that is graded, and would be lost; give another to write")
        limits = (args.seconds, args.memory_gib, args.workers)
        grader: Grader = (
            MathVerify(*limits) if args.grader == "math" else Exact() if args.grader == "exact" else Choice()
        )
        counts = grade(grader, thinking, read(args.input), args.output, args.require_end_think)
    except ValueError as error:
        sys.exit(f"grade: {error}")
    except OSError as error:  # one of a write to an open file names none
        sys.exit(f"grade: {error if error.filename else f'{args.output} cannot be written ({error.strerror})'}")
    print(f"{sum(counts.values())} answers: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
    print(f"verdicts: {args.output}")


if __name__ == "__main__":
    main()
