"""A process's wall clock, shifted from its start or while it runs.

Promise: every wall clock reading of a process that runs with `ShiftedClock.environment` is off by `shift_s`, in Python and in
the C libraries alike; monotonic time and the length of waits are right. `shift` takes effect at once, in all processes that
have this clock. (libfaketime leaves librdkafka waiting for a day: it does not know C11's waits.)

It is a small C library, compiled on first use; Linux with a C compiler is needed.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.services import require

__all__ = ["ShiftedClock", "compiler"]

_SOURCE: Final = Path(__file__).with_name("clock.c")
_COMPILE_TIMEOUT_S: Final = 60.0


def compiler() -> str | None:
    """The C compiler, on Linux; None elsewhere."""
    return (shutil.which("cc") or shutil.which("gcc")) if sys.platform == "linux" else None


class ShiftedClock:
    """One clock in `folder`, for any number of processes."""

    def __init__(self, folder: Path, shift_s: float = 0.0) -> None:
        found = compiler()
        require(found, "shifting a process's clock needs Linux and a C compiler; on Debian: apt-get install gcc libc6-dev")
        assert found is not None
        folder.mkdir(parents=True, exist_ok=True)
        self._library = folder / "clock.so"
        subprocess.run(
            [found, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", self._library, _SOURCE, "-ldl"],
            check=True,
            timeout=_COMPILE_TIMEOUT_S,
        )
        self._path = folder / "clock.shift"
        self._path.write_bytes(bytes(8))
        with self._path.open("r+b") as file:
            self._mapped = mmap.mmap(file.fileno(), 8)
        self.shift(shift_s)

    def shift(self, shift_s: float) -> None:
        """Set the clock off by so much, from now on."""
        self._mapped[:] = struct.pack("=q", int(shift_s * 1_000_000_000))

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to have this clock."""
        return {"LD_PRELOAD": str(self._library), "CLOCK_SHIFT_FILE": str(self._path)}
