"""A real `taximeter up` for tests: started and stopped as a user does, asked through the command line.

The installation is processes of its own. A command that asks it runs in the test's process: an interpreter takes most of a
second to begin, a hundred times over. A command that a test kills, or whose signals matter, is `Up.start`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from typer.testing import CliRunner

from taximeter.cli import application
from taximeter.embedded.process import Child
from taximeter.embedded.state import DataDir
from tests.services.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ROOT", "STOP_GRACE_S", "Up", "azure_trace", "environment", "said", "until"]

ROOT: Final = Path(__file__).parents[2]
START_TIMEOUT_S: Final = 300.0
# Each part in turn may take its own grace, on a machine that does much else.
STOP_GRACE_S: Final = 120.0
_PORTS: Final = ("broker", "gateway", "model_server", "loopback", "api_http", "api_grpc")
AZURE: Final = ROOT.parent / "shared" / "data" / "azure_llm_inference_2023_conv.csv"
SAMPLE: Final = ROOT / "taximeter" / "data" / "azure_trace_sample.csv"


def azure_trace() -> Path:
    """The whole trace where it is there, else the sample that comes with the package."""
    return AZURE if AZURE.exists() else SAMPLE


def until(holds: Callable[[], object], timeout_s: float = 180.0, what: str = "it") -> None:
    """Wait for something that another process does. To look costs both of them, so what takes long is looked at less often."""
    began = time.monotonic()
    while not holds():
        waited_s = time.monotonic() - began
        assert waited_s < timeout_s, f"{what} did not happen within {timeout_s:g} s"
        time.sleep(min(max(waited_s / 8, 0.1), 1.0))


class Up:
    """`taximeter up` in a data directory. `flags` are its settings; gateway, model and API only where they are asked for."""

    def __init__(self, data_dir: Path, *flags: str, gateway: bool = False, api: bool = False) -> None:
        self.data_dir = DataDir(data_dir)
        flags = (*flags, f"embedded.gateway={gateway}", f"embedded.model_server={gateway}", "embedded.models=trace")
        flags = (*flags, f"embedded.api={api}")
        flags = (f"embedded.ready_timeout_s={START_TIMEOUT_S}", *flags)
        if not (data_dir / "run" / "ports.json").exists():
            # Another that starts at the same time may choose what this one has chosen; one that ran here keeps what it had.
            flags = (*flags, *(f"embedded.{name}_port={free_port()}" for name in _PORTS))
        settings = [part for flag in flags for part in ("--set", flag)]
        self.child = Child(
            "taximeter up",
            [sys.executable, "-m", "taximeter", "up", "--data-dir", str(data_dir), *settings],
            log_path=data_dir / "up.log",
            cwd=ROOT,
            environment=environment(),
        )

    def __enter__(self) -> Up:
        self.child.start()
        self.child.wait_until(lambda: self.data_dir.running() is not None, START_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.child.stop(STOP_GRACE_S)

    def revive(self) -> None:
        """Start it again after it was killed."""
        self.__enter__()

    @property
    def alive(self) -> bool:
        return self.child.alive

    def kill9_all(self) -> None:
        """SIGKILL to the supervisor: the kernel ends its parts with it."""
        parts = list(self.pids().values())
        os.kill(self.child.pid, signal.SIGKILL)
        # The kernel may end them before the last thread of their supervisor, which holds the data directory until then.
        until(lambda: not self.alive, what="the end of the supervisor")
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in parts), what="the end of all parts")

    def pids(self) -> dict[str, int]:
        state = self.data_dir.running()
        return {} if state is None else state.pids

    def kill9(self, part: str) -> None:
        """SIGKILL to one part, and wait until the supervisor has started another."""
        until(lambda: part in self.pids(), what=f"{part} runs")
        before = self.pids()[part]
        os.kill(before, signal.SIGKILL)
        until(lambda: self.pids().get(part, before) != before, what=f"the restart of {part}")

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "taximeter", *map(str, arguments), "--data-dir", str(self.data_dir.path)]

    def run(self, *arguments: str | Path, expected: int | None = 0) -> str:
        """What the command printed; it must end with `expected`, if anything is."""
        return said(*arguments, "--data-dir", self.data_dir.path, expected=expected)

    def json(self, *arguments: str | Path, expected: int | None = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", expected=expected))

    def start(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """The command, running; for those that are killed."""
        log = (self.data_dir.path / "started.log").open("ab")
        with log:
            return subprocess.Popen(
                self.command(*arguments), cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
            )


def said(*arguments: str | Path, expected: int | None = 0) -> str:
    """What a command printed to standard output; it must end with `expected`, if anything is."""
    unset = dict.fromkeys(os.environ.keys() - environment().keys())
    ended = CliRunner().invoke(application(str(arguments[0])), list(map(str, arguments)), env=unset)
    why = "".join(traceback.format_exception(*ended.exc_info)) if ended.exc_info and ended.exit_code != expected else ""
    assert expected in (ended.exit_code, None), f"{arguments}: {ended.exit_code}\n{ended.output}\n{why}"
    return ended.stdout


def environment() -> dict[str, str]:
    """The tests' environment, without settings of whoever runs them."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TAXIMETER_")}
