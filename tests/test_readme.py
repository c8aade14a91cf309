"""The README is true: each promise names a test that exists, and the table of commands names every command."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from taximeter.cli import application

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROMISES = re.findall(r"^\| [^|]+ \| `(tests/[^`]+)::(test_[^`]+)` \|$", README, re.MULTILINE)


def command_names() -> list[str]:
    """Every command by its words: groups may hold groups."""

    def below(group: Any, words: str) -> Iterator[str]:
        for name, command in group.commands.items():
            if not command.hidden:
                if hasattr(command, "commands"):
                    yield from below(command, f"{words}{name} ")
                else:
                    yield f"{words}{name}"

    return sorted(below(typer.main.get_command(application()), ""))


def test_the_table_is_read() -> None:
    assert 10 <= len(PROMISES) <= 20, "the less important ones stand in docs/guarantees.md"
    assert len(PROMISES) == len(re.findall(r"`tests/[^`]+::", README))


@pytest.mark.parametrize(("path", "name"), PROMISES)
def test_each_promise_names_a_test_that_exists(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert name in functions


@pytest.mark.parametrize("command", command_names())
def test_each_command_is_in_the_readme(command: str) -> None:
    table = README.split("## Commands")[1]
    assert f"`{command}" in table or f"`taximeter {command}" in table


def test_what_make_is_said_to_do_it_does() -> None:
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
