"""How a command finds the `up` that runs in a data directory, and how two of them never share one.

Promise: `lock` is held by one process for as long as it lives (the kernel lets go of it when the process dies,
however it dies). `RunState` names its pids and ports and the configuration that its parts run with; `running` returns
it only while the lock is held, so a file that a killed `up` left behind misleads nobody. Whoever looks holds the lock together
with others for a moment; one that starts lets them look and is not refused for them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from taximeter.errors import TaximeterError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DataDir", "RunState"]

# A look takes microseconds, unless the process that looks is stopped in the middle of it.
_LOOKS_S: Final = 30.0
_AGAIN_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class RunState:
    """What a running `up` says about itself."""

    pid: int
    config_path: Path
    ports: dict[str, int] = field(default_factory=dict)
    pids: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DataDir:
    """Where everything of an embedded installation lies."""

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "run" / "taximeter.toml"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def secrets(self) -> Path:
        return self.path / "secrets"

    @property
    def _state_path(self) -> Path:
        return self.path / "run" / "state.json"

    @property
    def _lock_path(self) -> Path:
        return self.path / "run" / "lock"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the data directory; TaximeterError when another process does."""
        self._lock_path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock_path.open("a+b") as file:
            deadline_s = time.monotonic() + _LOOKS_S
            while not self._take(file):
                if time.monotonic() >= deadline_s:
                    raise self._in_use()
                time.sleep(_AGAIN_S)
            try:
                yield
            finally:
                self._state_path.unlink(missing_ok=True)

    def write(self, state: RunState) -> None:
        """State what runs now; whole or not at all."""
        fresh = self._state_path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(state), default=str, indent=1))
        fresh.replace(self._state_path)

    def running(self) -> RunState | None:
        """The `up` that holds this directory and has started its parts; None when there is none."""
        try:
            with self._lock_path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
        except FileNotFoundError:
            return None
        except BlockingIOError:
            pass
        try:
            values = json.loads(self._state_path.read_text())
        except FileNotFoundError:
            return None
        return RunState(int(values["pid"]), Path(values["config_path"]), values["ports"], values["pids"])

    def _take(self, file: IO[bytes]) -> bool:
        """Whether the lock is ours now; no: others look at it."""
        try:
            # Shared with those who look, never with one that runs.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use() from None
        # Of one that was killed. It goes before the lock is ours alone: who looks from then on must not take it for our state.
        self._state_path.unlink(missing_ok=True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(file, fcntl.LOCK_UN)
            return False
        return True

    def _in_use(self) -> TaximeterError:
        return TaximeterError(
            f"data directory {self.path} is in use by another `taximeter up`: stop that one, or choose another --data-dir"
        )
