"""What is installed is what was locked: every package at one version, with the hashes of its files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


def test_the_locks_are_those_that_make_lock_writes() -> None:
    written = re.findall(r"\$\(call compile,.*,(\w+)\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(LOCKS) >= 6
    assert sorted(written) == [path.stem for path in LOCKS]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_every_package_has_one_version_and_hashes(lock: Path) -> None:
    lines = lock.read_text().replace("\\\n", " ").splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert packages
    for package in packages:
        assert re.match(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", package), f"{lock.name}: {package[:80]}"


@pytest.mark.parametrize("recipe", ["Makefile", "deploy/Dockerfile"])
def test_nothing_is_installed_beside_the_locks(recipe: str) -> None:
    commands = (ROOT / recipe).read_text().replace("\\\n", " ").splitlines()
    installs = [command for command in commands if re.search(r"pip install", command)]
    assert installs
    # Our own package comes without dependencies.
    assert all("--require-hashes" in command or "--no-deps" in command for command in installs)
