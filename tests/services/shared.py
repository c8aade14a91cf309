"""One service for all processes of a run of pytest: who needs it first starts it, the others use the same.

Promise: however many processes use it, it is started once, and it is stopped when the last of them has left. Who started it
stays until then: what it started ends with it (`taximeter.embedded.process`), so that a run that is killed leaves nothing
behind. If that process dies, the service dies, tests that go on with its address are refused by the kernel, and who asks next
starts another. Nothing waits for a process that is gone: locks of files go with their holder.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["SharedService"]

_POLL_INTERVAL_S = 0.1
# Longer than any run. The lock of a process that hangs is no reason to stay for ever.
_STAY_S_MAX = 7200.0


class SharedService:
    """A service of the run whose processes share `folder`. Each process has one of these, and leaves once."""

    def __init__(self, folder: Path, *, answers: Callable[[str], bool]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._changing = folder / "changing.lock"
        self._users = folder / "users.lock"
        self._address = folder / "address"
        self._answers = answers
        self._used: IO[bytes] | None = None
        self._own: tuple[str, Callable[[], None]] | None = None

    def use(self, start: Callable[[], tuple[str, Callable[[], None]]]) -> str:
        """Its address. `start` is called where nobody runs it: it returns the address and what stops it."""
        assert self._used is None, "a process uses it once and hands the address on"
        with _locked(self._changing):
            address = self._current()
            if not address or not self._answers(address):
                self._own = start()
                address, _ = self._own
                whole = self._address.with_suffix(".new")
                whole.write_text(address)
                whole.replace(self._address)
            self._used = self._users.open("ab")
            fcntl.flock(self._used, fcntl.LOCK_SH)
        return address

    def leave(self) -> None:
        """Who started it waits for the other users and stops it."""
        if self._used is None:
            return
        self._used.close()
        self._used = None
        if self._own is None:
            return
        deadline = time.monotonic() + _STAY_S_MAX
        while not self._stopped(*self._own, anyhow=time.monotonic() >= deadline):
            time.sleep(_POLL_INTERVAL_S)
        self._own = None

    def _current(self) -> str:
        return self._address.read_text() if self._address.exists() else ""

    def _stopped(self, address: str, stop: Callable[[], None], *, anyhow: bool) -> bool:
        # Nobody begins to use it between the look and the stop.
        with _locked(self._changing):
            # Where it died and another took its place, nobody uses it.
            if self._current() == address:
                if not anyhow and _in_use(self._users):
                    return False
                self._address.unlink()
            stop()
            return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _in_use(path: Path) -> bool:
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
