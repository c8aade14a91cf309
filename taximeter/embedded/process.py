"""A child process that never outlives its parent.

Promise: a `Child` is one process of its own group, with its output in a file. It ends when `stop` is called, when the
parent's interpreter ends, and, on Linux, also when the parent is killed with -9: the kernel sends it SIGKILL
(`PR_SET_PDEATHSIG`). Elsewhere a killed parent leaves the child running; nothing portable prevents that.

The kernel ties that signal to the *thread* that started the child, so every start goes through one thread that lives
as long as the interpreter. And it is asked for by a short program that then becomes the child, not by code that runs
between fork and exec: a parent that holds gRPC or librdkafka threads must not run Python there.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["Child", "ChildError", "accepts_connections", "free_port"]

_POLL_INTERVAL_S = 0.02
# A process that is in the middle of a write to a slow disk ends when that is over.
_KILL_TIMEOUT_S = 60.0
# Linux gives out those from 32768 on, others from 49152 on; what lies lower are ports of services that everybody knows. The
# tests of this repository hand out those in between.
_PORTS = range(10_000, 18_000)
_PORT_TRIES = 100

# Runs in place of the child until it has asked the kernel for the signal. A parent that died before that is noticed by
# its process id.
_LEASH = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])\n"
)

_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="child-starter")


class ChildError(RuntimeError):
    """A child process did not start, ended by itself or was not ready in time; the text ends with its last output."""


class Child:
    """One child process. Not for use from several threads at once."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log_path: Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._argv = list(argv)
        self._cwd = cwd
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process's id; raises `ChildError` before the first start."""
        if self._process is None:
            raise ChildError(f"{self.name} was not started")
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs or was never started; negative when a signal ended it."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start the process; it appends to its log. Returns at once: readiness is `wait_until`'s matter."""
        if self.alive:
            raise ChildError(f"{self.name} runs already, as process {self.pid}")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._process = _starter.submit(self._spawn).result()
        atexit.register(self.kill9)

    def _spawn(self) -> subprocess.Popen[bytes]:
        argv = self._argv
        if sys.platform == "linux":
            argv = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), *argv]
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._cwd,
                env=None if self._environment is None else dict(self._environment),
                start_new_session=True,  # Ctrl-C reaches the parent alone, which then stops its children in order
            )

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Poll `ready` until it holds; `ChildError` when the process ends, or is too slow and therefore ended."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if not self.alive:
                raise ChildError(f"{self.name} ended with exit code {self.exit_code} while starting{self._evidence()}")
            if time.monotonic() >= deadline:
                self.kill9()
                raise ChildError(f"{self.name} was not ready after {timeout_s:g} s{self._evidence()}")
            time.sleep(_POLL_INTERVAL_S)

    def stop(self, grace_s: float) -> None:
        """SIGTERM to the process group, and SIGKILL after `grace_s`. Does nothing when the process has ended."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)  # a stopped process takes no SIGTERM
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
        self.kill9()

    def kill9(self) -> None:
        """SIGKILL to the process group, and wait until the process is gone."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait(_KILL_TIMEOUT_S)
            atexit.unregister(self.kill9)

    def pause(self) -> None:
        """SIGSTOP: the process keeps its sockets and answers nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of its output, empty when there is none."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def _evidence(self) -> str:
        tail = self.log_tail()
        return f"; the end of {self.log_path}:\n{tail}" if tail else f"; {self.log_path} is empty"

    def _signal(self, number: signal.Signals) -> None:
        # Once it has ended and been waited for, what is left of its group keeps the number from others. A process that has
        # the number after that shows that nothing was left, and has nothing to do with this one.
        if not self.alive and _exists(self.pid):
            return
        with contextlib.suppress(ProcessLookupError):  # the whole group has ended already
            os.killpg(self.pid, number)


def _exists(pid: int) -> bool:
    try:
        os.getpgid(pid)
    except ProcessLookupError:
        return False
    return True


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now. Another process may take it first: bind at once, or be ready to retry.

    It is none of those that a kernel gives to connections and to whoever binds port 0, so it stays free while what is to listen
    there starts, or starts again; unless the others are taken.
    """
    for _ in range(_PORT_TRIES):
        with contextlib.suppress(OSError):
            return _bound_once(host, secrets.choice(_PORTS))
    return _bound_once(host, 0)


def _bound_once(host: str, port: int) -> int:
    with socket.socket() as probe:
        probe.bind((host, port))
        bound: int = probe.getsockname()[1]
        return bound


def accepts_connections(host: str, port: int, timeout_s: float = 0.5) -> bool:
    """Whether something listens there. It says nothing about whether it is ready to answer."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return True
    except OSError:
        return False
