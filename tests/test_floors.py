"""The house keeps its floors: a file imports only from floors below its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "ssgr").rglob("*.py"))
VARIANT_ROOMS = ("model", "problems", "sampler", "grader", "calib", "pruner", "allocation", "measure", "tracker")


def imports(file: Path) -> set[str]:
    """Every module that `file` imports; a name imported from a package counts as a module of it."""
    out: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            out |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return out


def floor(module: str) -> int:
    """0 records; 1 policy and store; 2 rooms with variants; 3 stages and report; 4 the pipeline and commands."""
    parts = module.split(".")
    if len(parts) < 2:
        return 0
    if parts[-1] == "__main__":
        return 4
    if parts[1] in VARIANT_ROOMS:
        return 2
    return {
        "records": 0,
        "stages": 3,
        "report": 3,
        "experiment": 4,
        "flow": 4,
        "results": 4,
        "pipeline": 4,
        "grade": 4,
        "export": 4,
        "status": 4,
        "assemble": 4,
    }.get(parts[1], 1)


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_come_from_below(file: Path) -> None:
    own = name_of(file)
    for module in imports(file):
        if not module.startswith("ssgr."):
            continue
        assert floor(module) <= floor(own), f"{own} imports {module} from a floor above"
        room = own.split(".")[1] if own.count(".") else ""
        if floor(own) == floor(module) == 2:
            assert module.split(".")[1] == room, f"{own} imports {module}: rooms with variants never import each other"
        if floor(own) == 3 and floor(module) == 2:
            what = module.split(".")
            door = (
                len(what) == 2
                or (len(what) == 3 and what[2][0].isupper())
                or what[1:3]
                in (["model", "blocks"], ["model", "checkpoint"], ["model", "layout"], ["model", "attention"])
            )
            assert door, f"{own} imports the variant {module}, not the Protocol of its room"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_hydra_stays_outside(file: Path) -> None:
    assert not {m for m in imports(file) if m.split(".")[0] in ("hydra", "omegaconf")}


def test_records_are_standard_library() -> None:
    assert imports(ROOT / "ssgr" / "records.py") <= {
        "__future__", "__future__.annotations", "dataclasses", "dataclasses.dataclass", "dataclasses.field", "enum",
        "math", "typing", "typing.Any", "typing.Literal",
    }  # fmt: skip


def test_nothing_is_unpickled() -> None:
    for file in FILES:
        assert not imports(file) & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, file
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), file
