"""Every test that README.md or docs/ names as `tests/...::name` exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMED = sorted(
    {
        (page.relative_to(ROOT).as_posix(), path, name)
        for page in PAGES
        for path, name in re.findall(r"(tests/[\w/.]+\.py)::(\w+)", page.read_text())
    }
)


@cache
def names_in(path: str) -> set[str]:
    """Functions, classes, and what a state machine's test case is assigned to."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_the_pages_are_read() -> None:
    assert len([page for page, _, _ in NAMED if page == "docs/guarantees.md"]) >= 10
    assert len([page for page, _, _ in NAMED if page == "README.md"]) >= 15


def test_nothing_that_looks_like_a_test_is_passed_over() -> None:
    for page in PAGES:
        assert len(re.findall(r"tests/[^\s`]*::", page.read_text())) == len(
            re.findall(r"tests/[\w/.]+\.py::\w+", page.read_text())
        )


@pytest.mark.parametrize(("page", "path", "name"), NAMED)
def test_each_named_test_exists(page: str, path: str, name: str) -> None:
    assert (ROOT / path).is_file(), f"{page} names {path}"
    assert name in names_in(path), f"{page} names {path}::{name}"
