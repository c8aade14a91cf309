"""The version before this one, as a tree of its own, for tests that run both beside each other.

It is a commit of this repository's history, its code taken out of it; a copy without that history (a shallow clone, an archive)
skips what needs it.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Final

import pytest

__all__ = ["VERSION_BEFORE", "tree_before"]

_ROOT: Final = Path(__file__).parents[2]
# The last release's commit; until there is one, a commit whose ledgers this version must take over. It moves with a release.
VERSION_BEFORE: Final = "0ee13c93c44c77d0760b97979e8c2774f9195b83"
_FOLDERS: Final = ("billing", "producers", "proto", "serving", "sinks", "stream_processors", "taximeter", "tests")


def tree_before(folder: Path) -> Path:
    """Its tree, in `folder`: what is run there as `python -m` is of that version."""
    known = subprocess.run(
        ["git", "cat-file", "-e", f"{VERSION_BEFORE}^{{commit}}"], cwd=_ROOT, capture_output=True, check=False
    )
    if known.returncode:
        pytest.skip(f"this copy has no commit {VERSION_BEFORE[:12]} (a shallow clone?): fetch the history to run this")
    archive = subprocess.run(["git", "archive", VERSION_BEFORE, *_FOLDERS], cwd=_ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        # Not every 3.11 has the argument, and what comes here is our own.
        files.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # type: ignore[arg-type]
    told = "import billing, serving, sinks, taximeter as t; print(*(each.__file__ for each in (billing, serving, sinks, t)))"
    found = subprocess.run([sys.executable, "-c", told], cwd=folder, capture_output=True, check=True, text=True).stdout.split()
    assert [path for path in found if not Path(path).is_relative_to(folder)] == []
    return folder
