"""Supervised processes: order, restarts with back-off, a foundation that takes down what stands on it, a clean stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from taximeter.embedded.process import Child, ChildError
from taximeter.embedded.supervisor import Part, Supervisor

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 60.0
# Says that it runs, then waits for SIGTERM, and says that it ended.
PROGRAM = """
import signal, sys
def end(*_):
    open(sys.argv[1], "a").write(f"-{sys.argv[2]}\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
open(sys.argv[1], "a").write(f"+{sys.argv[2]}\\n")
signal.pause()
"""


class Story:
    """What the processes did, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def lines(self) -> list[str]:
        return self.path.read_text().split()

    def add(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{line}\n")

    def part(self, name: str, *, program: str = PROGRAM) -> Part:
        child = Child(
            name,
            [sys.executable, "-S", "-c", program, str(self.path), name],
            log_path=self.path.with_name(f"{name}.log"),
        )
        return _Told(child, lambda: True, TIMEOUT_S, TIMEOUT_S, self)


class _Told(Part):
    """A part whose readiness is one more line in the story."""

    def __init__(self, child: Child, ready: Callable[[], bool], ready_timeout_s: float, grace_s: float, story: Story) -> None:
        super().__init__(child, ready, ready_timeout_s, grace_s)
        self._story = story

    def launch(self) -> None:
        line = f"+{self.child.name}"
        before = self._story.lines().count(line)
        self.ready = lambda: self._story.lines().count(line) > before
        super().launch()

    def abandon(self) -> None:
        # A machine that is slow for a moment must not cut its last line off.
        self.child.stop(TIMEOUT_S)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path / "story")


@pytest.fixture
def running(story: Story) -> Iterator[tuple[Supervisor, threading.Event, Callable[[str, int], None]]]:
    ended = threading.Event()
    supervisor = Supervisor(
        foundation=story.part("broker"),
        prepare=lambda: story.add("prepare"),
        parts={"worker": story.part("worker"), "gateway": story.part("gateway")},
        stop_order=("gateway", "worker"),
        standing_on_foundation=frozenset({"worker"}),
    )
    changed = threading.Condition()

    def on_change() -> None:
        with changed:
            changed.notify_all()

    supervisor.on_change = on_change
    supervisor.start()
    watcher = threading.Thread(target=supervisor.watch, args=(ended,))
    watcher.start()

    def await_count(line: str, count: int) -> None:
        with changed:
            assert changed.wait_for(lambda: story.lines().count(line) >= count, TIMEOUT_S), story.lines()

    yield supervisor, ended, await_count
    ended.set()
    watcher.join(TIMEOUT_S)
    supervisor.stop()


Running = tuple[Supervisor, threading.Event, Callable[[str, int], None]]


def test_parts_start_in_order_and_stop_in_theirs(story: Story, running: Running) -> None:
    supervisor, ended, _ = running
    assert set(supervisor.pids()) == {"broker", "worker", "gateway"}
    ended.set()
    supervisor.stop()
    lines = story.lines()
    assert lines[:2] == ["+broker", "prepare"]
    assert set(lines[2:4]) == {"+worker", "+gateway"}
    assert lines[4:] == ["-gateway", "-worker", "-broker"]
    assert supervisor.pids() == {}


def test_a_part_that_dies_is_started_again_alone(story: Story, running: Running) -> None:
    supervisor, _, await_count = running
    gateway = supervisor.pids()["gateway"]
    os.kill(supervisor.pids()["worker"], signal.SIGKILL)
    await_count("+worker", 2)
    assert supervisor.restarts() == {"worker": 1}
    assert supervisor.pids()["gateway"] == gateway


def test_a_broker_that_dies_takes_down_what_stands_on_it(story: Story, running: Running) -> None:
    supervisor, _, await_count = running
    gateway = supervisor.pids()["gateway"]
    os.kill(supervisor.pids()["broker"], signal.SIGKILL)
    await_count("+worker", 2)
    assert story.lines()[4:] == ["-worker", "+broker", "prepare", "+worker"]
    assert supervisor.pids()["gateway"] == gateway


def test_a_part_that_does_not_come_up_stops_the_others(story: Story) -> None:
    supervisor = Supervisor(
        foundation=story.part("broker"),
        prepare=lambda: None,
        parts={"worker": story.part("worker"), "gateway": story.part("gateway", program="raise SystemExit('no port')")},
        stop_order=("gateway", "worker"),
        standing_on_foundation=frozenset({"worker"}),
    )
    with pytest.raises(ChildError, match=r"(?s)gateway ended with exit code 1 while starting.*no port"):
        supervisor.start()
    assert story.lines() == ["+broker", "+worker", "-worker", "-broker"]
    assert supervisor.pids() == {}
