"""What README promises: its commands compose, its choices are all of them, its files exist."""

from __future__ import annotations

import re
import shlex

import pytest
from hydra import compose, initialize_config_dir

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (python run\.py.*?)(?:\s+#.*)?$", README, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str) -> None:
    """Each cell of the command's grid composes."""
    overrides = [o.partition("=") for o in shlex.split(command)[2:] if o != "-m"]
    one = [f"{key}={value.split(',')[-1]}" for key, _, value in overrides]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert compose("config", one)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5


def test_every_group_and_choice_is_named() -> None:
    for group in (p for p in (ROOT / "conf").iterdir() if p.is_dir()):
        line = next(line for line in README.splitlines() if line.startswith(f"| `{group.name}` |"))
        for file in group.rglob("*.yaml"):
            choice = "/".join(file.relative_to(group).with_suffix("").parts)
            assert f"`{choice}`" in line, f"README does not name {group.name}={choice}"


def test_every_dependency_has_its_line() -> None:
    wanted = (ROOT / "setup.cfg").read_text().split("install_requires =")[1].split("[options")[0]
    for name in re.findall(r"^    ([\w-]+)", wanted, re.M):
        assert re.search(rf"^\|.*\b{name}\b.*\|.*\|$", README, re.M), name


def test_the_first_screen_has_the_two_commands() -> None:
    first = "\n".join(README.splitlines()[:20])
    assert "make run" in first and "make test" in first


def test_the_table_of_results_is_there() -> None:
    assert re.search(r"^\| general text \(`corpus`\) \| sparsegpt \| 0\.\d+ \[", README, re.M)
