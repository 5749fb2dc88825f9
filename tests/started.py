"""run.py in forks of one process that has its imports done: they are most of the time of a command that is small.

A line on the standard input is a command as JSON, its answer on the standard output the exit status. A fork goes on where
`python run.py` would begin, and ends as it would.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ssgr import lean

RUN = Path(__file__).parent.parent / "run.py"
SECONDS = 300  # as long as one may take


class Started:
    """Such a process, which ends with its owner."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, overrides: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """What `python run.py` with `overrides` does in `folder`; `environment` is of variables that no import reads."""
        process = self._process
        assert process.stdin and process.stdout
        with tempfile.TemporaryDirectory() as place:
            files = [os.devnull, *(str(Path(place, name)) for name in ("stdout", "stderr"))]
            asked = {"arguments": [str(RUN), *overrides], "folder": str(folder), "files": files, "env": environment}
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            status = int(process.stdout.readline())
            told = [Path(file).read_text() for file in files[1:]]
        return subprocess.CompletedProcess(asked["arguments"], status, *told)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _forked() -> Any:
    """Fork for each command, and return it in the fork."""
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


if __name__ == "__main__":
    sys.path[0] = str(RUN.parent)
    runpy.run_path(
        str(RUN)
    )  # its settings, which what is imported reads; under another name than __main__ it runs nothing
    lean.load_transformers()
    for name in ("launchers.experiment", "ssgr.pipeline"):
        importlib.import_module(name)
    asked = _forked()
    for stream, file in enumerate(asked["files"]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), stream)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    os.chdir(asked["folder"])
    os.environ.update(asked["env"])
    sys.argv = asked["arguments"]
    runpy.run_path(sys.argv[0], run_name="__main__")
