"""The proxy: each fault does what its name says to a real connection, and nothing is changed by those that only hold."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.proxy import Proxy

TIMEOUT_S = 60.0


class Echo:
    """Sends back what it is sent, and counts connections that were reset under it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.received = 0
        self.resets = threading.Semaphore(0)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while piece := connection.recv(65_536):
                    self.received += len(piece)
                    connection.sendall(piece)
            except OSError:
                self.resets.release()

    def close(self) -> None:
        # A thread that waits in accept would keep it open.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proxy")


@pytest.fixture
def proxy(folder: Path, echo: Echo) -> Iterator[Proxy]:
    between = Proxy(folder, echo.port)
    between.start()
    yield between
    between.stop()


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=TIMEOUT_S)


def ask(connection: socket.socket, content: bytes) -> bytes:
    connection.sendall(content)
    answer = b""
    while len(answer) < len(content):
        piece = connection.recv(65_536)
        if not piece:
            break
        answer += piece
    return answer


def until(holds: Callable[[], object]) -> None:
    """Wait for what the proxy's process, or a thread of the echo's, does."""
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_silent(connection: socket.socket) -> bool:
    connection.settimeout(0.2)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(TIMEOUT_S)
    return False


def test_bytes_pass_unchanged_and_an_end_is_passed_on(proxy: Proxy) -> None:
    content = os.urandom(3_000_000)
    with connect(proxy) as connection:
        asking = threading.Thread(target=connection.sendall, args=(content,))
        asking.start()
        with connection.makefile("rb") as answers:
            assert answers.read(len(content)) == content
        asking.join()
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    counts = proxy.counts()
    assert counts["to_server"] == counts["to_client"] == len(content)


def test_cut_resets_and_refuses_until_healed(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as connection:
        assert ask(connection, b"a") == b"a"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert echo.resets.acquire(timeout=TIMEOUT_S)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.heal()
    with connect(proxy) as connection:
        assert ask(connection, b"b") == b"b"
    assert proxy.counts()["broken"] == 1


def test_reset_lets_new_connections_pass(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert ask(connection, b"a") == b"a"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with connect(proxy) as connection:
        assert ask(connection, b"b") == b"b"


def test_half_open_tells_the_server_alone(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as old:
        assert ask(old, b"a") == b"a"
        proxy.half_open()
        assert echo.resets.acquire(timeout=TIMEOUT_S)
        old.sendall(b"into the void")
        assert is_silent(old)
        with connect(proxy) as new:
            assert ask(new, b"b") == b"b"
        proxy.heal()
        with pytest.raises(ConnectionResetError):
            old.recv(1)
    assert echo.received == 2


def test_one_way_held_is_late_and_whole(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as connection:
        proxy.hold("to_client")
        connection.sendall(b"arrives")
        # The other way goes on, and the answer comes as far as the proxy.
        until(lambda: proxy.counts()["pieces_held"] == 1)
        assert echo.received == len(b"arrives")
        assert is_silent(connection)
        proxy.heal()
        assert connection.recv(100) == b"arrives"
        proxy.hold("to_server")
        connection.sendall(b"waits")
        until(lambda: proxy.counts()["pieces_held"] == 2)
        assert is_silent(connection)
        assert echo.received == len(b"arrives")
        # Who sent it has gone, and it arrives all the same, as from a network that was mended.
    proxy.heal()
    until(lambda: echo.received == len(b"arriveswaits"))


def test_slow_and_delayed(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        proxy.slow(10_000)
        began = time.monotonic()
        assert ask(connection, bytes(2_000)) == bytes(2_000)
        assert time.monotonic() - began >= 0.2
        proxy.heal()
        proxy.delay(100)
        began = time.monotonic()
        assert ask(connection, b"a") == b"a"
        assert time.monotonic() - began >= 0.2
    assert proxy.counts()["pieces_slowed"] >= 4


def test_a_server_that_is_away_is_seen_as_away(proxy: Proxy, echo: Echo) -> None:
    echo.close()
    # The reset may come before the connection is told to stand.
    with pytest.raises(ConnectionResetError), connect(proxy) as connection:
        connection.recv(1)
