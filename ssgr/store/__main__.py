"""What a store holds: python -m ssgr.store ls | verify | gc [--delete] [--store DIR]."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ssgr.errors import unless_closed
from ssgr.lease import Lease, beating, held
from ssgr.store import MANIFEST, WORKING, Store
from ssgr.sweep import referred, submitted

OUTPUTS = "outputs"


@dataclass(frozen=True)
class Entry:
    """Something in the store; `kind` is result, unfinished, damaged or gone."""

    stage: str
    path: Path
    kind: str
    bytes: int
    seconds: float = 0.0
    inputs: tuple[str, ...] = ()


def entries(store: Store) -> Iterator[Entry]:
    """All that lies in a store, by stage."""
    for path in sorted(store.root.glob("*/*/")):
        size = sum(_bytes(os.path.join(at, name)) for at, _, names in os.walk(path) for name in names)
        kind = {"": "result", ".work": "unfinished", ".gone": "gone"}.get(path.suffix, "damaged")
        seconds, inputs = 0.0, ()
        if kind == "result":
            with contextlib.suppress(OSError, ValueError, KeyError):
                found = json.loads((path / MANIFEST).read_text())
                seconds, inputs = found["seconds"], tuple(found["inputs"].values())
        yield Entry(path.parent.name, path, kind, size, seconds, inputs)


def _bytes(file: str) -> int:
    """Its size; 0 where it is gone since it was listed, as work goes on here."""
    with contextlib.suppress(FileNotFoundError):
        return os.stat(file).st_size
    return 0


def unreferred(found: Sequence[Entry], keys: set[str]) -> list[Entry]:
    """Results that neither `keys` nor what those are made of name, and what is no result and nobody works on."""
    inputs = {entry.path.name: entry.inputs for entry in found if entry.kind == "result"}
    kept, more = set(keys), list(keys)
    while more:
        new = [key for key in inputs.get(more.pop(), ()) if key not in kept]
        kept |= set(new)
        more += new
    out = []
    for entry in found:
        unfinished = entry.kind == "unfinished"
        name = _made(entry).name if unfinished else entry.path.name  # what was moved aside is nobody's
        if name not in kept or (unfinished and name in inputs):
            out.append(entry)
    return out


def _made(entry: Entry) -> Path:
    """The folder of the result that an unfinished entry is to be."""
    return entry.path.with_name(entry.path.name.partition(".")[0])


def delete(store: Store, entry: Entry) -> bool:
    """Remove an entry, whole or not at all, unless a process works on it."""
    lease = Lease(_made(entry) if entry.kind == "unfinished" else entry.path, store.heartbeat_seconds)
    if lease.take(store.stale_seconds) is not None:
        return False
    with lease:
        gone = entry.path.with_name(f"{entry.path.name.replace('.', '-')}.gone")
        if not entry.path.exists() or not lease.move(entry.path, gone):  # another resumed it since it was listed
            return False
    shutil.rmtree(gone)
    return True


def size(count: int) -> str:
    """Bytes in a fitting unit of 1024."""
    return f"{tqdm.format_sizeof(count, divisor=1024)}iB" if count >= 1024 else f"{count} B"


def main(arguments: list[str] | None = None) -> int:
    """List, check or clear a store; 1 if something is damaged or not there."""
    parser = argparse.ArgumentParser(prog="python -m ssgr.store", description="What a store holds.")
    parser.add_argument(
        "command", choices=("ls", "verify", "gc"), help="list; check every file; find what nothing refers to"
    )
    parser.add_argument("--store", type=Path, default=Path(OUTPUTS, "store"), help="its folder (outputs/store)")
    parser.add_argument(
        "--outputs",
        type=Path,
        nargs="+",
        default=[Path(OUTPUTS)],
        help="folders of the runs and sweeps of all who share it (outputs)",
    )
    parser.add_argument("--delete", action="store_true", help="with gc: remove what it finds, else it is only listed")
    args = parser.parse_args(arguments)
    if not args.store.is_dir():
        print(f"error: there is no store in {args.store}; type --store DIR", file=sys.stderr)
        return 1
    results = [path for path in args.store.glob("*/*/") if not path.suffix]
    if results and not any((path / MANIFEST).is_file() for path in results):  # gc would remove what it finds there
        print(f"error: {args.store} is no store, as {results[0]} is no result; type --store DIR", file=sys.stderr)
        return 1
    if args.delete and not os.access(args.store, os.W_OK):
        print(f"error: {args.store} may only be read: leave out --delete, or type it as its owner", file=sys.stderr)
        return 1
    try:
        store = Store(args.store, reads=True)
        return {"ls": _ls, "verify": _verify, "gc": _gc}[args.command](store, args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _ls(store: Store, args: argparse.Namespace) -> int:
    found = list(entries(store))
    for stage in sorted({entry.stage for entry in found}):
        own = [entry for entry in found if entry.stage == stage]
        count = Counter(entry.kind for entry in own)
        rest = "".join(f", {count[kind]} {kind}" for kind in ("unfinished", "damaged", "gone") if count[kind])
        total, seconds = size(sum(entry.bytes for entry in own)), sum(entry.seconds for entry in own)
        print(f"{stage:<10} {count['result']} results, {total}, made in {seconds:.0f} s{rest}")
    print(f"{store.root}: {size(sum(entry.bytes for entry in found))}")
    return 0


def _verify(store: Store, args: argparse.Namespace) -> int:
    bad = 0
    for entry in entries(store):
        if entry.kind == "result" and (why := store.damage(entry.stage, entry.path.name)) is not None:
            bad += 1
            print(why)
        elif entry.kind == "damaged":
            print(f"{entry.path}: was moved aside as damaged; type gc --delete in place of verify to remove it")
    print(
        f"{bad} results are damaged: they are made again when they are next needed" if bad else "every result is sound"
    )
    return 1 if bad else 0


def _gc(store: Store, args: argparse.Namespace) -> int:
    for folder in args.outputs:  # a mistyped one would leave nothing that refers to its results
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder of runs; type --outputs DIR")
    with held(store.root / WORKING, alone=True) if args.delete else contextlib.nullcontext(True) as idle:
        return _clear(store, args, busy=not idle)


def _clear(store: Store, args: argparse.Namespace, busy: bool) -> int:
    found = unreferred(list(entries(store)), referred(args.outputs) | submitted(store.root))
    found.sort(key=lambda entry: entry.kind != "unfinished")  # which tell whether anybody works here, as leases do
    busy |= args.delete and any(beating(lease, store.stale_seconds) for lease in store.root.glob("*/*.lease"))
    freed = 0
    for entry in found:
        gone = args.delete and not (busy and entry.kind == "result") and delete(store, entry)
        busy = busy or (args.delete and not gone)
        freed += entry.bytes if gone else 0
        word = "removed" if gone else "in use, kept" if args.delete else "nothing refers to"
        print(f"{word} {entry.path} ({entry.kind}, {size(entry.bytes)})")
    if busy:
        print("a process works in this store, and may need any result: type this again when it has ended")
    total = size(sum(entry.bytes for entry in found))
    print(f"{size(freed)} were freed" if args.delete else f"{total} could be freed: type this again with --delete")
    return 0


if __name__ == "__main__":
    sys.exit(unless_closed(main))
