"""A TCP proxy that breaks connections on command, in a process of its own.

Promise: what it is told takes effect before the command returns, on connections that are open and on those that come, and
stays until `heal`. It changes no byte and no order of bytes; what a fault holds back is delivered after `heal`, even if
whoever sent it has gone away meanwhile, as a network does. Its counts say whether a fault met any traffic.

A broker must advertise the proxy's port, or its clients go round it after their first question.

    cut             open connections are reset, new ones refused
    reset           open connections are reset, once; new ones pass
    half_open       the server loses the open connections, the clients are told nothing; new ones pass
    hold direction  one way stands still, the other goes on: a one-way partition. "both": silence
    slow            so many bytes a second, each way of each connection
    delay           so long for each piece, each way

Run as: python -m tests.chaos.proxy PORT UPSTREAM_PORT CONTROL_PORT
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from taximeter.embedded.process import Child, accepts_connections
from tests.services.ports import free_port

__all__ = ["Direction", "Proxy"]

Direction = Literal["to_server", "to_client", "both"]

_HOST: Final = "127.0.0.1"
_PIECE_BYTES: Final = 65_536
_COMMAND_TIMEOUT_S: Final = 60.0
_START_TIMEOUT_S: Final = 120.0
_ROOT: Final = Path(__file__).parents[2]


class Proxy:
    """One proxy in front of one port on loopback, as its owner sees it. `port` is known before the start."""

    def __init__(self, folder: Path, upstream_port: int, *, name: str = "proxy") -> None:
        self.port = free_port()
        self._control_port = free_port()
        arguments = [str(port) for port in (self.port, upstream_port, self._control_port)]
        self.process = Child(
            name, [sys.executable, "-m", "tests.chaos.proxy", *arguments], log_path=folder / f"{name}.log", cwd=_ROOT
        )

    @property
    def address(self) -> str:
        return f"{_HOST}:{self.port}"

    def start(self) -> None:
        self.process.start()
        self.process.wait_until(lambda: accepts_connections(_HOST, self._control_port), _START_TIMEOUT_S)

    def stop(self) -> None:
        self.process.kill9()

    def cut(self) -> None:
        self._command(fault="cut")

    def reset(self) -> None:
        self._command(fault="reset")

    def half_open(self) -> None:
        self._command(fault="half_open")

    def hold(self, direction: Direction) -> None:
        self._command(fault="hold", direction=direction)

    def slow(self, bytes_per_s: int) -> None:
        self._command(fault="slow", bytes_per_s=bytes_per_s)

    def delay(self, delay_ms: int) -> None:
        self._command(fault="delay", delay_ms=delay_ms)

    def heal(self) -> None:
        """End every fault. Connections that only the client believes in are reset."""
        self._command(fault="heal")

    def counts(self) -> dict[str, int]:
        """Since the start: connections opened and broken, pieces that were held or slowed, bytes each way."""
        return self._command(fault="none")

    def _command(self, **command: Any) -> dict[str, int]:
        with socket.create_connection((_HOST, self._control_port), timeout=_COMMAND_TIMEOUT_S) as connection:
            connection.sendall(json.dumps(command).encode() + b"\n")
            with connection.makefile() as answers:
                answer: dict[str, int] = json.loads(answers.readline())
        return answer


@dataclass(eq=False, slots=True)
class _Link:
    """One client's connection, the one to the server that stands for it, and what pumps between them."""

    client: socket.socket
    server: socket.socket
    pumping: asyncio.Task[None] | None = None


class _Server:
    """The proxy's own process."""

    def __init__(self, port: int, upstream_port: int) -> None:
        self._port = port
        self._upstream_port = upstream_port
        self._listening: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None
        self._links: set[_Link] = set()
        self._abandoned: list[socket.socket] = []
        self._gates = {"to_server": asyncio.Event(), "to_client": asyncio.Event()}
        self._bytes_per_s = self._delay_ms = 0
        self._counts = dict.fromkeys(("connections", "broken", "pieces_held", "pieces_slowed", "to_server", "to_client"), 0)
        self._tasks: set[asyncio.Task[None]] = set()
        self._heal()

    async def serve(self, control_port: int) -> None:
        control = await asyncio.start_server(self._answer, _HOST, control_port)
        await control.serve_forever()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        if line:
            await self._do(json.loads(line))
            writer.write(json.dumps(self._counts).encode() + b"\n")
            await writer.drain()
        writer.close()

    async def _do(self, command: dict[str, Any]) -> None:
        fault = command["fault"]
        if fault == "heal":
            self._heal()
        elif fault == "cut":
            await self._stop_listening()
            await self._break_all(both=True)
        elif fault == "reset":
            await self._break_all(both=True)
        elif fault == "half_open":
            await self._break_all(both=False)
        elif fault == "hold":
            for direction, gate in self._gates.items():
                if command["direction"] in (direction, "both"):
                    gate.clear()
        elif fault == "slow":
            self._bytes_per_s = command["bytes_per_s"]
        elif fault == "delay":
            self._delay_ms = command["delay_ms"]
        elif fault != "none":
            raise ValueError(f"fault: {fault!r}")

    def _heal(self) -> None:
        self._bytes_per_s = self._delay_ms = 0
        for gate in self._gates.values():
            gate.set()
        for side in self._abandoned:
            _reset(side)
        self._abandoned.clear()
        if self._listening is None:
            self._listener = socket.create_server((_HOST, self._port), backlog=128)
            self._listener.setblocking(False)
            self._listening = self._start(self._listen(self._listener))

    async def _stop_listening(self) -> None:
        if self._listening is not None and self._listener is not None:
            listening, self._listening = self._listening, None
            await _ended(listening)
            self._listener.close()

    async def _break_all(self, *, both: bool) -> None:
        links, self._links = self._links, set()
        for link in links:
            # Ended before its sockets are closed: the loop must not watch a number that another socket gets.
            if link.pumping is not None:
                await _ended(link.pumping)
            _reset(link.server)
            if both:
                _reset(link.client)
            else:
                self._abandoned.append(link.client)
            self._counts["broken"] += 1

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _listen(self, listener: socket.socket) -> None:
        while True:
            client, _ = await asyncio.get_running_loop().sock_accept(listener)
            self._start(self._connect(client))

    async def _connect(self, client: socket.socket) -> None:
        server = socket.socket()
        server.setblocking(False)
        for side in (client, server):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.get_running_loop().sock_connect(server, (_HOST, self._upstream_port))
        except OSError:
            # The server is away: its client is to see that, and nothing else.
            _reset(client)
            server.close()
            return
        if self._listening is None:
            _reset(client)
            _reset(server)
            return
        self._counts["connections"] += 1
        link = _Link(client, server)
        self._links.add(link)
        link.pumping = self._start(self._pump_both(link))

    async def _pump_both(self, link: _Link) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(link.client, link.server, "to_server"))
                group.create_task(self._pump(link.server, link.client, "to_client"))
        except* OSError:
            # One side was reset: so is the other.
            _reset(link.client)
            _reset(link.server)
        else:
            link.client.close()
            link.server.close()
        finally:
            self._links.discard(link)

    async def _pump(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        loop = asyncio.get_running_loop()
        gate = self._gates[direction]
        while True:
            piece = await loop.sock_recv(source, min(_PIECE_BYTES, self._bytes_per_s or _PIECE_BYTES))
            if pause_s := self._delay_ms / 1_000 + (len(piece) / self._bytes_per_s if self._bytes_per_s else 0.0):
                self._counts["pieces_slowed"] += 1
                await asyncio.sleep(pause_s)
            if not gate.is_set():
                self._counts["pieces_held"] += 1
                await gate.wait()
            if not piece:
                with contextlib.suppress(OSError):
                    target.shutdown(socket.SHUT_WR)
                return
            await loop.sock_sendall(target, piece)
            self._counts[direction] += len(piece)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _reset(side: socket.socket) -> None:
    """Close with a reset instead of a farewell."""
    with contextlib.suppress(OSError):
        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    side.close()


async def _main(port: int, upstream_port: int, control_port: int) -> None:
    await _Server(port, upstream_port).serve(control_port)


if __name__ == "__main__":
    asyncio.run(_main(*map(int, sys.argv[1:4])))
