"""A child process: it starts, is waited for, ends, and says why it did not start."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from taximeter.embedded.process import Child, ChildError, free_port

DEADLINE_S = 60.0


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    child = Child("the sleeper", ["sh", "-c", "echo begun; exec sleep 600"], log_path=tmp_path / "new" / "child.log")
    yield child
    child.kill9()


def started(child: Child) -> None:
    child.start()
    child.wait_until(lambda: "begun" in child.log_tail(), DEADLINE_S)


def test_stop_ends_it_and_it_may_start_again(child: Child) -> None:
    started(child)
    first = child.pid
    child.stop(DEADLINE_S)
    assert (child.alive, child.exit_code) == (False, -15)
    child.start()
    assert child.alive
    assert child.pid != first


def test_it_outlives_the_thread_that_started_it(child: Child) -> None:
    thread = threading.Thread(target=started, args=(child,))
    thread.start()
    thread.join()
    assert child.alive
    child.kill9()
    assert child.exit_code == -9


def test_a_stopped_process_is_ended_all_the_same(child: Child) -> None:
    started(child)
    child.pause()
    child.stop(DEADLINE_S)
    assert child.exit_code == -15


def test_one_that_has_ended_signals_nobody_who_has_its_number_now(child: Child, tmp_path: Path) -> None:
    """Numbers begin again at 32,768 on many machines, and each thread takes one: a long run comes round in minutes."""
    ended = Child("the ended", ["true"], log_path=tmp_path / "ended.log")
    ended.start()
    ended.stop(DEADLINE_S)
    started(child)
    assert ended._process is not None
    ended._process.pid = child.pid
    ended.kill9()
    ended.stop(0)
    ended.pause()
    assert child.alive
    child.stop(DEADLINE_S)
    assert child.exit_code == -15


def test_what_is_left_of_its_group_ends_though_it_has_ended_itself(tmp_path: Path) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    child = Child("the parent", ["sh", "-c", 'exec 3>"$1"; sleep 600 &', "sh", str(held)], log_path=tmp_path / "child.log")
    child.start()
    with held.open("rb") as holders:
        with pytest.raises(ChildError, match="ended with exit code 0"):
            child.wait_until(lambda: False, DEADLINE_S)
        child.kill9()
        assert holders.read() == b"", "nobody is left who holds it"


def test_one_that_ends_while_starting_shows_its_last_words(tmp_path: Path) -> None:
    child = Child("the failure", ["sh", "-c", "echo no disk; exit 3"], log_path=tmp_path / "child.log")
    child.start()
    with pytest.raises(ChildError, match=r"the failure ended with exit code 3 while starting; .*\nno disk"):
        child.wait_until(lambda: False, DEADLINE_S)


def test_one_that_is_not_ready_in_time_is_ended(child: Child) -> None:
    started(child)
    with pytest.raises(ChildError, match=r"the sleeper was not ready after 0\.1 s"):
        child.wait_until(lambda: False, 0.1)
    assert not child.alive


def test_it_is_not_started_twice(child: Child) -> None:
    started(child)
    with pytest.raises(ChildError, match="runs already"):
        child.start()


def test_before_the_start_there_is_no_process(child: Child) -> None:
    assert (child.alive, child.exit_code, child.log_tail()) == (False, None, "")
    child.stop(0)
    with pytest.raises(ChildError, match="was not started"):
        _ = child.pid


def test_a_free_port_is_none_that_a_kernel_gives_to_others() -> None:
    for port in [free_port() for _ in range(20)]:
        # Linux's begin at 32768, others' at 49152.
        assert port < 32_768
        with socket.create_server(("127.0.0.1", port)):
            pass
