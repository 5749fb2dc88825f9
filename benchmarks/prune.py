"""Prune one model with ssgr and with its peers, on the same rows and threads: python benchmarks/prune.py [--json FILE].

Each engine prunes in a process of its own. Time is that of the pruning alone (for ssgr it holds loading and saving, which
happen block by block), memory the peak of the whole process as the kernel counts it, perplexity that of WikiText-2.
The peers need an environment: bash benchmarks/peers.sh.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from perplexity import DATA, WIKITEXT, found, perplexity
from smollm2 import PEERS, PYTHON
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
ENGINES, PEERS_SH = ROOT / "benchmarks" / "engines", ROOT / "benchmarks" / "peers.sh"
C4 = Path("text", "c4_sample.jsonl")
OURS, ORDERS = "ssgr", {"ssgr": "layer", "ssgr (order=block)": "block"}
SCRIPTS = {**dict.fromkeys(ORDERS, "ours.py"), "llm-compressor": "llm_compressor.py", "papers": "papers.py"}
PRUNERS, PATTERNS, CONTEXT = ("wanda", "sparsegpt"), ("0.5", "2:4"), 512
QUIET = 0.05  # of the machine: when others use more of it, threads that wait for each other make times meaningless

Result = dict[str, Any]


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def model_folder(args: argparse.Namespace) -> Path:
    """The checkpoint to prune, made where it is not there, in the dtype asked for."""
    if args.model is None:
        made = args.work / f"smollm2-{args.dtype or 'float32'}"
        if not (made / "tokenizer.json").exists():  # what is written last
            say(f"making {made}")
            dtype = ["--dtype", args.dtype] if args.dtype else []
            command = [sys.executable, str(ROOT / "benchmarks" / "smollm2.py"), str(made), *dtype]
            if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
                raise ValueError("the model could not be made; type --model DIR, a Hugging Face checkpoint folder")
        return made
    if not (args.model / "config.json").is_file():
        raise ValueError(f"--model {args.model} has no config.json; type --model DIR, a Hugging Face checkpoint folder")
    if args.dtype is None or args.dtype == dtype_of(args.model):
        return Path(args.model)
    cast = args.work / f"{args.model.resolve().name}-{args.dtype}"
    if not (cast / "tokenizer.json").exists():
        AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).save_pretrained(cast)
        AutoTokenizer.from_pretrained(args.model).save_pretrained(cast)
    return cast


def dtype_of(model: Path) -> str:
    """The dtype of a checkpoint, as its configuration says."""
    config = json.loads((model / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def rows_file(args: argparse.Namespace, model: Path, seed: int) -> Path:
    """The calibration rows as token ids: documents in an order drawn with `seed`, joined, and cut."""
    lines = found(args.data, C4).read_text().splitlines()
    random.Random(seed).shuffle(lines)
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = [tokenizer(json.loads(line)["text"], verbose=False).input_ids for line in lines]
    ids = [token for document in documents for token in [*document, tokenizer.eos_token_id]]
    if len(ids) < args.rows * args.tokens:
        raise ValueError(
            f"--rows {args.rows} --tokens {args.tokens}: {C4} has {len(ids)} tokens; type a smaller --rows"
        )
    file = args.work / f"rows-{args.rows}x{args.tokens}-{seed}.json"
    file.write_text(json.dumps([ids[i * args.tokens : (i + 1) * args.tokens] for i in range(args.rows)]))
    return file


def missing(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    needed = {"llm-compressor": PYTHON, "papers": PEERS / "wanda" / "lib" / "prune.py"}
    if all(path.exists() for path in (PYTHON, needed[peer])):
        return None
    return "its environment is not in build/peers; type bash benchmarks/peers.sh"


def once(engine: str, job: dict[str, Any], args: argparse.Namespace) -> Result:
    """Prune in a new process; what it measured, and whether others used so much of the machine that it means nothing.

    Raises:
        ValueError: the process failed.
    """
    out = Path(job["out"])
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "job.json").write_text(json.dumps(job))
    settings = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    settings |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT) if engine in ORDERS else "",
    }
    command = [
        sys.executable if engine in ORDERS else str(PYTHON),
        str(ENGINES / SCRIPTS[engine]),
        str(out / "job.json"),
    ]
    log = out.parent / f"{out.name}.log"
    start, everyone, mine = time.perf_counter(), busy(), children()
    with log.open("w") as stream:
        done = subprocess.run(command, env=os.environ | settings, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        last = log.read_text().strip().splitlines()[-1:] or ["it wrote nothing"]
        raise ValueError(f"{engine} ended with code {done.returncode}: {last[0]}; see {log}")
    result: Result = json.loads((out / "measured.json").read_text())
    wall, own = time.perf_counter() - start, children() - mine
    others = max(0.0, (busy() - everyone - own) / wall / (os.cpu_count() or 1))
    say(
        f"  {engine}: {', '.join(f'{part} {seconds:.1f} s' for part, seconds in result[args.clock].items())}, "
        f"peak {peak(result):.0f} MiB; others used {others:.0%} of the machine"
    )
    return result | {"others": others, "disturbed": args.clock == "wall" and others > QUIET}


def busy() -> float:
    """Seconds that all processors of the machine have worked."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def children() -> float:
    """Seconds of processor time of the processes that this one has waited for."""
    times = os.times()
    return times.children_user + times.children_system


def measure(engine: str, job: dict[str, Any], args: argparse.Namespace) -> Result:
    """The medians of `--repeat` runs, and the geometric mean of their perplexities."""
    runs, folder = [], Path(job["out"], "checkpoint")
    for rows in job["rows"]:
        one = once(engine, job | {"rows": rows}, args)
        runs.append(one | {"perplexity": perplexity(folder, args.data / WIKITEXT, CONTEXT, args.windows)})
        shutil.rmtree(folder)
    return {
        "engine": engine, "pruner": job["pruner"], "pattern": job["pattern"],
        "seconds": {part: statistics.median(run[args.clock][part] for run in runs) for part in runs[0][args.clock]},
        "peak_mib": {part: statistics.median(run["peak_mib"][part] for run in runs) for part in runs[0]["peak_mib"]},
        "perplexity": statistics.geometric_mean(run["perplexity"] for run in runs),
        "disturbed": any(run["disturbed"] for run in runs),
        "versions": runs[0]["versions"],
        "runs": [{k: run[k] for k in ("wall", "processor", "others", "perplexity")} for run in runs],
    }  # fmt: skip


def measured(engine: str, job: dict[str, Any], args: argparse.Namespace) -> Result:
    """`measure`, or what --keep has of a peer; a measurement is kept if the machine was quiet."""
    file = kept(engine, job, args)
    if args.keep and engine not in ORDERS and file.exists():
        say(f"  {engine}: kept from an earlier run")
        return dict(json.loads(file.read_text()))
    result = measure(engine, job, args)
    if args.keep and engine not in ORDERS and not result["disturbed"]:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(result))
    return result


def kept(engine: str, job: dict[str, Any], args: argparse.Namespace) -> Path:
    """Where a result lies, by what can change it."""
    model = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(Path(job["model"]).iterdir())]
    scripts = [file.read_text() for file in (ENGINES / SCRIPTS[engine], ENGINES / "measure.py", PEERS_SH)]
    rows = [Path(file).read_text() for file in job["rows"]]
    content = [engine, job, model, rows, args.clock, args.windows, scripts]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return Path(args.work, "kept", f"{key}.json")


def peak(result: Result) -> float:
    """The peak of the whole process, MiB."""
    return float(max(result["peak_mib"].values()))


def ratios(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Ours over each peer's."""
    ours = {(r["pruner"], r["pattern"]): r for r in results if r["engine"] == OURS}
    return [
        {
            "peer": r["engine"],
            "pruner": r["pruner"],
            "pattern": r["pattern"],
            "time": mine["seconds"]["prune"] / r["seconds"]["prune"],
            "memory": peak(mine) / peak(r),
            "perplexity": mine["perplexity"] / r["perplexity"],
            "perplexities": [a["perplexity"] / b["perplexity"] for a, b in zip(mine["runs"], r["runs"], strict=True)],
        }
        for r in results
        if r["engine"] not in ORDERS and (mine := ours.get((r["pruner"], r["pattern"])))
    ]


def table(results: Sequence[Result]) -> str:
    """The results and ratios, in Markdown."""
    lines = [
        "| pruner | pattern | engine | prune s | load + save s | peak MiB | perplexity | time | memory | perplexity |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    against = {(r["peer"], r["pruner"], r["pattern"]): r for r in ratios(results)}
    for r in results:
        ratio = against.get((r["engine"], r["pruner"], r["pattern"]))
        shares = [f"{ratio[k]:.3f}" for k in ("time", "memory", "perplexity")] if ratio else ["", "", ""]
        apart = "within" if r["engine"] in ORDERS else f"{r['seconds']['load'] + r['seconds']['save']:.1f}"
        seconds = f"{r['seconds']['prune']:.1f}{'*' if r['disturbed'] else ''}"
        cells = [seconds, apart, f"{peak(r):.0f}", f"{r['perplexity']:.3f}", *shares]
        lines.append(f"| {r['pruner']} | {r['pattern']} | {r['engine']} | {' | '.join(cells)} |")
    lines += ["", "The last three columns are ssgr / peer: below 1, ssgr is better."]
    if any(r["disturbed"] for r in results):
        lines.append(
            f"* Others used more than {QUIET:.0%} of the machine meanwhile: the time means nothing; measure again."
        )
    return "\n".join(lines)


def processor() -> str:
    """What the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    if args.repeat < 1:
        raise ValueError(f"--repeat {args.repeat}: type a number of at least 1")
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    text = found(args.data, WIKITEXT)
    engines = list(ORDERS)
    for peer in args.peers:
        if reason := missing(peer):
            say(f"skip {peer}: {reason}")
        else:
            engines.append(peer)
    model = model_folder(args)
    rows = [str(rows_file(args, model, seed)) for seed in range(args.repeat)]
    settings = {
        "model": str(model.name), "dtype": dtype_of(model), "rows": args.rows, "tokens": args.tokens,
        "seeds": [*range(args.repeat)], "threads": args.threads, "clock": args.clock, "context": CONTEXT, "windows": args.windows,
        "processor": processor(), "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "dense_perplexity": perplexity(model, text, CONTEXT, args.windows),
    }  # fmt: skip
    say(f"dense: perplexity {settings['dense_perplexity']:.3f}")
    results = []
    for pruner in args.pruners:
        for pattern in args.patterns:
            say(f"{pruner} {pattern}")
            for engine in engines:
                job = {"model": str(model), "rows": rows, "pruner": pruner, "pattern": pattern}
                name = re.sub(r"\W+", "-", f"{engine}-{pruner}-{pattern.replace(':', 'of')}").replace("0-5", "0.5")
                job |= {"threads": args.threads, "out": str(args.work / name)}
                job |= {"order": ORDERS[engine]} if engine in ORDERS else {}
                try:
                    results.append(measured(engine, job, args))
                except ValueError as error:
                    say(f"skip {error}")
    return {"ratios": ratios(results), "settings": settings, "results": results}


def names(valid: Sequence[str]) -> Any:
    """An option that takes some of `valid`, with commas."""

    def some(given: str) -> list[str]:
        for name in filter(None, given.split(",")):
            if name not in valid:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(valid)}")
        return [name for name in valid if name in given.split(",")]

    return some


def patterns(given: str) -> list[str]:
    """An option that takes shares and n:m, with commas."""
    for pattern in given.split(","):
        n, colon, m = pattern.partition(":")
        try:
            right = 0 < int(n) < int(m) if colon else 0 < float(n) < 1
        except ValueError:
            right = False
        if not right:
            raise argparse.ArgumentTypeError(f"{pattern!r} is no pattern: type a share such as 0.5, or n:m such as 2:4")
    return given.split(",")


def main() -> None:
    """Print the table, and write the file that --json names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="the checkpoint's own by default")
    parser.add_argument("--rows", type=int, default=64, help="calibration rows")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--pruners", type=names(PRUNERS), default=PRUNERS, help=f"some of {','.join(PRUNERS)}")
    parser.add_argument("--patterns", type=patterns, default=PATTERNS, help=f"such as {','.join(PATTERNS)}")
    peers = [name for name in SCRIPTS if name not in ORDERS]
    parser.add_argument("--peers", type=names(peers), default=peers, help=f"some of {','.join(peers)}, or nothing: ''")
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    clocks = "seconds on the wall, or of processor time: with --threads 1 these hold on a machine that is shared"
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help=clocks)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each, on rows of their own; medians are taken")
    parser.add_argument("--windows", type=int, default=24, help=f"of {CONTEXT} tokens, for the perplexity; 0 for all")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "prune", help="folder for models and logs")
    parser.add_argument("--keep", action="store_true", help="keep the peers' results there, and use those kept")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    logging.disable_progress_bar()
    try:
        report = run(args)
    except ValueError as error:
        sys.exit(f"prune: {error}")
    print(table(report["results"]))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
