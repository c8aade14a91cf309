"""One service for several processes: started once, stopped with the last, started again where it died. A lock belongs to an
open file, so that two users in one process stand for two processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.services.shared import SharedService

DEADLINE_S = 60.0
ROOT = Path(__file__).parents[2]
# Uses what is shared in the folder, says so, and is there until it is ended.
USER = """
import sys
from pathlib import Path
from tests.services.shared import SharedService

def start():
    raise AssertionError("it runs already")

service = SharedService(Path(sys.argv[1]), answers=lambda address: True)
print(service.use(start), flush=True)
sys.stdin.read()
"""


class Service:
    """Counts what happens to it; every start has an address of its own."""

    def __init__(self) -> None:
        self.starts = 0
        self.running: set[str] = set()

    def start(self) -> tuple[str, Callable[[], None]]:
        self.starts += 1
        address = f"service:{self.starts}"
        self.running.add(address)
        return address, lambda: self.running.discard(address)

    def shared(self, folder: Path) -> SharedService:
        return SharedService(folder, answers=self.running.__contains__)


def test_it_is_started_once_and_stops_with_its_last_user(tmp_path: Path) -> None:
    service = Service()
    first, second = service.shared(tmp_path), service.shared(tmp_path)
    assert [user.use(service.start) for user in (first, second)] == ["service:1", "service:1"]
    leaving = threading.Thread(target=first.leave, daemon=True)
    leaving.start()
    leaving.join(0.3)
    assert leaving.is_alive()
    assert service.running == {"service:1"}
    second.leave()
    leaving.join(DEADLINE_S)
    assert not leaving.is_alive()
    assert (service.starts, service.running) == (1, set())


def test_a_user_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    service = Service()
    owner = service.shared(tmp_path)
    owner.use(service.start)
    command = [sys.executable, "-c", USER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"service:1\n"
        leaving = threading.Thread(target=owner.leave, daemon=True)
        leaving.start()
        leaving.join(0.3)
        assert leaving.is_alive()
        user.kill()
    leaving.join(DEADLINE_S)
    assert service.running == set()


def test_one_that_died_is_started_again_by_the_next(tmp_path: Path) -> None:
    service = Service()
    first, second, third = (service.shared(tmp_path) for _ in range(3))
    first.use(service.start)
    service.running.clear()
    assert second.use(service.start) == "service:2"
    first.leave()
    assert third.use(service.start) == "service:2"
    third.leave()
    second.leave()
    assert service.running == set()


def test_one_that_does_not_start_keeps_nobody_waiting(tmp_path: Path) -> None:
    def fails() -> tuple[str, Callable[[], None]]:
        raise OSError("no room")

    service = Service()
    first, second = service.shared(tmp_path), service.shared(tmp_path)
    with pytest.raises(OSError, match="no room"):
        first.use(fails)
    first.leave()
    assert second.use(service.start) == "service:1"
    second.leave()


def test_the_processes_of_this_run_share_a_folder(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    own = tmp_path_factory.getbasetemp()
    assert shared_folder == (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)
