"""The same problems through the engines hf, vllm and server: python benchmarks/agree.py [--problems 200].

vLLM runs in an environment of its own (benchmarks/vllm.sh builds it), by `sampler=vllm` and as a server on a loopback port.
Greedy: how far the traces of each agree with those of hf. Sampled: accuracy, lengths and their Kolmogorov-Smirnov test.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from scipy import stats

from ssgr.grader.exact import Exact
from ssgr.intervals import wilson
from ssgr.model import Model
from ssgr.problems.arithmetic import ArithmeticProblems
from ssgr.records import Problem, Trace, Verdict
from ssgr.sampler import Decoding, Request, Sampler
from ssgr.sampler.hf import HfSampler
from ssgr.sampler.server import ServerSampler
from ssgr.sampler.vllm import VllmSampler
from ssgr.stages.grade import grade
from ssgr.tables import read_traces, write_traces

ROOT = Path(__file__).resolve().parent.parent
MODEL = Model("tiny", "pkg://ssgr.model.tiny/weights", dtype="float32", device="cpu")
DECODING = {"greedy": Decoding(1, 0.0, 1.0, 448, 0), "sampled": Decoding(1, 0.6, 0.95, 448, 0)}
_START_SECONDS = 300.0


def problems(count: int) -> list[Problem]:
    """Problems of one to six operations."""
    return ArithmeticProblems((1, 2, 3, 4, 5, 6), 1, count, 11).read("test")


def draw(engine: Sampler, count: int, out: Path) -> None:
    """Write the traces of both decodings, each a trace a problem."""
    tokenizer = MODEL.tokenizer()
    asked = [Request(p.id, 0, MODEL.prompt_ids(tokenizer, p.question)) for p in problems(count)]
    for name, decoding in DECODING.items():
        write_traces(
            out / f"{name}.parquet", [t for some in engine.sample(MODEL, tokenizer, asked, decoding) for t in some]
        )


@contextmanager
def served(python: Path) -> Iterator[str]:
    """vLLM's own server with the shipped model on a loopback port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(MODEL.files()),
        "--host",
        "127.0.0.1",
    ]
    how = ["--port", str(port), "--dtype", "float32", "--served-model-name", "tiny", "--generation-config", "vllm"]
    server = subprocess.Popen([*command, *how], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + _START_SECONDS
        while True:
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if server.poll() is not None or time.monotonic() > until:
                sys.exit("agree: vLLM's server does not start")
            time.sleep(1)
        yield f"{url}/v1"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def environment() -> dict[str, str]:
    """What vLLM's CPU build is told."""
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT)}


def compare(folders: dict[str, Path], count: int) -> None:
    """Print how the engines agree."""
    asked, tokenizer = problems(count), MODEL.tokenizer()
    read = lambda engine, name: {t.problem_id: t for t in read_traces(folders[engine] / f"{name}.parquet")}
    for engine in folders:
        ours, other = read("hf", "greedy"), read(engine, "greedy")
        first = [_common(ours[name], other[name]) for name in ours]
        same = np.mean([ours[name].generated_ids == other[name].generated_ids for name in ours])
        print(
            f"greedy   {engine:<7} same traces {same:.3f}, same first token {np.mean([n > 0 for n in first]):.3f}, ",
            end="",
        )
        print(f"same tokens at the beginning {sum(first) / sum(len(t.generated_ids) for t in ours.values()):.3f}")
    lengths = {}
    for engine in folders:
        traces = list(read(engine, "sampled").values())
        graded = grade(traces, asked, tokenizer, Exact(), MODEL.thinking)
        right = np.array([[float(g.verdict is Verdict.RIGHT)] for g in graded])
        low, high = wilson(right)
        lengths[engine] = [len(t.generated_ids) for t in traces]
        quarters = " ".join(f"{q:.0f}" for q in np.quantile(lengths[engine], [0.25, 0.5, 0.75, 0.95]))
        p = stats.ks_2samp(lengths["hf"], lengths[engine]).pvalue
        print(
            f"sampled  {engine:<7} accuracy {right.mean():.3f} [{low:.3f}, {high:.3f}], lengths {quarters}, KS p {p:.2f}"
        )


def _common(a: Trace, b: Trace) -> int:
    pairs = zip(a.generated_ids, b.generated_ids, strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(a.generated_ids), len(b.generated_ids)))


def main() -> None:
    """Sample with each engine, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument(
        "--vllm", type=Path, default=ROOT / "build" / "vllm" / "bin" / "python", help="Python with vLLM"
    )
    parser.add_argument("--only", type=Path, help="(of this script itself) draw with vLLM into this folder")
    args = parser.parse_args()
    if args.only:
        draw(VllmSampler(batch_size=64), args.problems, args.only)
        return
    with tempfile.TemporaryDirectory() as work:
        folders = {name: Path(work, name) for name in ("hf", "vllm", "server")}
        for folder in folders.values():
            folder.mkdir()
        draw(HfSampler(64), args.problems, folders["hf"])
        command = [str(args.vllm), __file__, "--only", str(folders["vllm"]), "--problems", str(args.problems)]
        subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with served(args.vllm) as url:
            draw(ServerSampler(url, concurrency=64), args.problems, folders["server"])
        compare(folders, args.problems)


if __name__ == "__main__":
    main()
