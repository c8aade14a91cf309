"""A forked process is a process like any: its output in a file, ended by a signal, and with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stream_processors import worker_main
from tests.stream_processors.forked import ForkedChild, can_fork
from tests.stream_processors.harness import ROOT
from tests.taximeter.support import until

# Starts one, says which process it is, and stays.
PARENT = """
import pathlib, signal, sys
from tests.stream_processors.forked import ForkedChild
child = ForkedChild("the child", signal.pause, {}, log_path=pathlib.Path(sys.argv[1]))
child.start()
print(child.pid, flush=True)
signal.pause()
"""

pytestmark = pytest.mark.skipif(not can_fork(), reason="the kernel here tells no process of its parent's death")


def is_gone(pid: int) -> bool:
    """Ended, whether or not somebody has asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_one_that_cannot_go_on_says_why_in_its_log(tmp_path: Path) -> None:
    child = ForkedChild("the failure", worker_main.main, {}, log_path=tmp_path / "child.log")
    child.start()
    until(lambda: not child.alive)
    assert child.exit_code == 1
    assert "TypeError: main() missing 3 required" in child.log_tail()


def test_it_is_stopped_and_killed_as_a_group_of_its_own(tmp_path: Path) -> None:
    child = ForkedChild("the sleeper", signal.pause, {}, log_path=tmp_path / "child.log")
    child.start()
    assert child.alive
    assert os.getpgid(child.pid) == child.pid
    child.kill9()
    assert (child.alive, child.exit_code) == (False, -9)


def test_it_is_gone_when_its_parent_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "child.log")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
        parent.kill()
    until(lambda: is_gone(pid))
