"""Worker processes that begin with everything imported: forked from one that has done nothing else.

Promise: a `ForkedChild` is a process of its own like any `Child` - its own group, its output in a file, killed with -9 at any
moment, gone when whoever started it is gone, however that ends. What it is spared is the second of imports, which the tests
that start dozens of workers would pay dozens of times.

The process that it is forked from (`multiprocessing`'s fork server) has run nothing but the imports, so no thread and no
connection of the tests is in it.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from taximeter.embedded.process import Child

__all__ = ["ForkedChild", "can_fork"]

_SET_DEATH_SIGNAL = 1
_IMPORTED = ["tests.stream_processors.worker_main", __name__]
_forkserver = multiprocessing.get_context("forkserver")


def can_fork() -> bool:
    """Whether this system can tell a forked process of its parent's death."""
    return sys.platform == "linux"


class _AsPopen:
    """What `Child` asks of a process."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    def poll(self) -> int | None:
        return cast("int | None", self._process.exitcode)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return code


class ForkedChild(Child):
    """`function(**arguments)` in a process of its own; what it returns is the exit code."""

    def __init__(
        self, name: str, function: Callable[..., int | None], arguments: Mapping[str, object], *, log_path: Path
    ) -> None:
        super().__init__(name, [], log_path=log_path)
        self._function = function
        self._arguments = dict(arguments)

    def _spawn(self) -> subprocess.Popen[bytes]:
        # Heard by the first start, which makes the process that all are forked from.
        _forkserver.set_forkserver_preload(_IMPORTED)
        process = _forkserver.Process(
            target=_run, args=(self._function, self._arguments, str(self.log_path)), name=self.name, daemon=True
        )
        process.start()
        # A signal to its group must reach it from now on.
        started = _AsPopen(process)
        while started.poll() is None and not _leads_a_group(started.pid):
            time.sleep(0.001)
        return cast("subprocess.Popen[bytes]", started)


def _leads_a_group(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def _run(function: Callable[..., int | None], arguments: Mapping[str, object], log_path: str) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    # The fork server ends when nobody holds its line to the tests any more: this process, which ends with it, must not.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.setsid()
    # As in `taximeter worker`: what was imported is no garbage.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(function(**arguments))
