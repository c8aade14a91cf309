"""Which advisories stop a change: all but those with an exception that is not over."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

import pytest

from tests.requirements.advisories import LOCKS, ROOT, problems

TODAY = date(2026, 11, 26)
FOUND: list[Mapping[str, Any]] = [
    {"name": "left", "version": "1.0", "vulns": [{"id": "PYSEC-1", "aliases": ["GHSA-1"], "fix_versions": ["1.1"]}]},
    {"name": "right", "version": "2.0", "vulns": []},
]


@pytest.mark.parametrize(
    ("exceptions", "said"),
    [
        ([], ["left 1.0: PYSEC-1, mended in 1.1: run make lock, or write an exception into requirements/advisories.toml"]),
        ([{"id": "GHSA-1", "until": date(2026, 11, 26), "why": "not reached"}], []),
        (
            [{"id": "GHSA-1", "until": date(2026, 11, 25), "why": "not reached"}],
            ["left 1.0: PYSEC-1, mended in 1.1: its exception ended on 2026-11-25 (not reached)"],
        ),
        (
            [{"id": "PYSEC-1", "until": date(2027, 1, 1), "why": "x"}, {"id": "OLD", "until": date(2027, 1, 1), "why": "x"}],
            ["the exception OLD meets nothing any more: remove it from requirements/advisories.toml"],
        ),
    ],
)
def test_an_advisory_needs_an_exception_that_is_not_over(exceptions: list[dict[str, Any]], said: list[str]) -> None:
    assert list(problems(FOUND, exceptions, TODAY, is_whole=True)) == said


def test_every_role_is_looked_at() -> None:
    locked = {path.stem for path in (ROOT / "requirements").glob("*.txt")}
    assert locked - set(LOCKS) == {"dev", "sbom", "triton"}, "what only tests use"
