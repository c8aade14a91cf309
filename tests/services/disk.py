"""A small disk of its own: a tmpfs, for tests that fill it up.

Promise: `small_disk(folder, mib)` mounts one on `folder`, which it makes, and unmounts it at the end, whoever still has files
open there. `Filler` takes all its room but what it is told to leave, and gives it back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Filler", "SmallDiskUnavailableError", "small_disk"]

_PIECE = bytes(4_096)


class SmallDiskUnavailableError(RuntimeError):
    """Nothing can be mounted here; the text says why."""


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """Give the folder while the disk is there."""
    folder.mkdir(parents=True, exist_ok=True)
    # As another user than root, CI's say, where sudo asks no password.
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    options = f"size={mib}m,uid={os.geteuid()}"
    try:
        mounted = subprocess.run(
            [*prefix, "mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise SmallDiskUnavailableError(f"a small disk cannot be mounted here: {error}") from error
    if mounted.returncode != 0:
        raise SmallDiskUnavailableError(f"a small disk cannot be mounted here: {mounted.stderr.strip()}; run it as root")
    try:
        yield folder
    finally:
        # Lazily: after a failure someone may still have a file open there.
        subprocess.run([*prefix, "umount", "-l", folder], check=True)


class Filler:
    """Somebody else's data on a disk."""

    def __init__(self, disk: Path) -> None:
        self._path = disk / "filler"

    def fill(self, leave_bytes: int = 0) -> None:
        """Until the disk says that it is full, or has no more than so much."""
        with self._path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while (room := shutil.disk_usage(self._path.parent).free - leave_bytes) > 0 or not leave_bytes:
                file.write(_PIECE * max(1, min(room // len(_PIECE), 256)))

    def give_back(self) -> None:
        self._path.unlink(missing_ok=True)
