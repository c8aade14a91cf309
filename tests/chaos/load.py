"""The load driver for usage events: outside of everything that is killed, it asks, listens, and notes both.

Promise: an attempt is synced to the history before it is sent; every answer is synced; when the producer's connection breaks,
what it had not answered is noted as unknown. Of those, a part is sent again to the producer that comes back, with the same ID
and the same counts, as a client that retries would: it must be charged once all the same.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.chaos.history import Attempt, History, Outcome, Receipt

__all__ = ["EventLoad", "Marks"]

_TICK_S: Final = 0.04
_OUTSTANDING_MAX: Final = 400
# How long an accepted connection may take to swallow a line: a producer that was stopped must not stop the driver.
_SEND_TIMEOUT_S: Final = 20.0

Marks = dict[str, object]


class EventLoad:
    """One at a time: `begin`, `end`. `events_per_s` may be changed between trials."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        self.events_per_s = 250
        # How far the clock is off that usage is stamped by: the producer's.
        self.clock_ahead_ms = 0
        socket_path.parent.mkdir(parents=True, exist_ok=True)
        socket_path.unlink(missing_ok=True)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(socket_path))
        self._server.listen(4)
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()
        self._history: History | None = None
        self._outstanding: dict[str, Attempt] = {}
        self._again: list[Attempt] = []
        self._marks: dict[int, Marks] = {}
        self._asked_marks = 0
        self._running = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._prices: dict[str, int] = {}
        self._tenants: Sequence[str] = ()
        self._prefix = ""
        self._draw = random.Random(0)
        self._count = 0
        self._retry = random.Random(0)
        self.acknowledged = 0
        threading.Thread(target=self._accept, name="load-accept", daemon=True).start()
        threading.Thread(target=self._send, name="load-send", daemon=True).start()

    @property
    def connected(self) -> bool:
        """Whether a producer listens."""
        return self._connection is not None

    @property
    def outstanding(self) -> set[str]:
        """Sent and not answered."""
        with self._lock:
            return set(self._outstanding)

    def begin(
        self, history: History, prefix: str, tenants: Sequence[str], prices_pico: dict[str, int], draw: random.Random
    ) -> None:
        """Ask for usage of these tenants from now on, under IDs that begin with `prefix`."""
        assert not self._running.is_set()
        self._history, self._prefix, self._tenants, self._prices = history, prefix, tenants, prices_pico
        self._draw, self._retry = draw, random.Random(draw.random())
        self._count, self.acknowledged = 0, 0
        with self._lock:
            self._outstanding, self._again = {}, []
        self._running.set()

    def end(self, timeout_s: float = 60.0) -> bool:
        """Ask no more, and wait for answers; False when some did not come: then they are unknown."""
        self._running.clear()
        # It syncs to disk and sends; a round that went on behind this would write to a history that is closed.
        self._idle.wait(timeout_s + _SEND_TIMEOUT_S)
        deadline = time.monotonic() + timeout_s
        while self._outstanding and time.monotonic() < deadline:
            time.sleep(0.02)
        answered = not self._outstanding
        self._give_up("no answer came", retry=False)
        return answered

    def marks(self, timeout_s: float = 10.0) -> Marks | None:
        """What the producer's journal has numbered by now; None when it does not answer in time."""
        self._asked_marks += 1
        number = self._asked_marks
        if not self._write([{"marks": number}]):
            return None
        deadline = time.monotonic() + timeout_s
        while number not in self._marks:
            if time.monotonic() > deadline or not self.connected:
                return None
            time.sleep(0.01)
        return self._marks.pop(number)

    def close(self) -> None:
        self._running.clear()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._hang_up(self._connection)

    # --- threads ---

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            connection.settimeout(_SEND_TIMEOUT_S)
            self._connection = connection
            threading.Thread(target=self._listen, args=(connection,), name="load-listen", daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        rest = b""
        while True:
            try:
                data = connection.recv(65_536)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            self._note([json.loads(line) for line in lines])
        self._hang_up(connection)
        self._give_up("the producer's connection broke", retry=True)

    def _note(self, answers: Sequence[dict[str, object]]) -> None:
        receipts = []
        now_ms = time.time_ns() // 1_000_000
        for answer in answers:
            if "marks" in answer:
                self._marks[int(str(answer["marks"]))] = answer
                continue
            outcome = Outcome(str(answer["outcome"]))
            with self._lock:
                if self._outstanding.pop(str(answer["id"]), None) is None:
                    continue
            self.acknowledged += outcome is Outcome.OK
            receipts.append(Receipt(str(answer["id"]), outcome, reason=str(answer["reason"]), at_ms=now_ms))
        if receipts and self._history is not None:
            self._history.add(receipts)

    def _send(self) -> None:
        carried = 0.0
        while True:
            time.sleep(_TICK_S)
            if self._server.fileno() < 0:
                return
            if not self._running.is_set() or not self.connected or len(self._outstanding) > _OUTSTANDING_MAX:
                continue
            self._idle.clear()
            if self._running.is_set():
                carried += self.events_per_s * _TICK_S
                fresh = [self._attempt() for _ in range(int(carried))]
                carried -= len(fresh)
                self._ask(fresh)
            self._idle.set()

    def _ask(self, fresh: list[Attempt]) -> None:
        assert self._history is not None
        with self._lock:
            again, self._again = self._again, []
        self._history.add(fresh)
        asked = again + fresh
        with self._lock:
            self._outstanding |= {attempt.request_id: attempt for attempt in asked}
        lines: list[dict[str, object]] = [
            {"id": each.request_id, "tenant": each.tenant_id, "tokens": each.tokens, "at_ms": each.at_ms} for each in asked
        ]
        if not self._write(lines):
            self._give_up("the request could not be sent whole", retry=True)

    def _attempt(self) -> Attempt:
        self._count += 1
        draw = self._draw
        tokens = {"uncached_input_tokens": draw.randint(1, 4_000), "output_tokens": draw.randint(0, 2_000)}
        if draw.random() < 0.3:
            tokens["cache_read_tokens"] = draw.randint(1, 8_000)
        if draw.random() < 0.2:
            tokens["reasoning_tokens"] = draw.randint(1, 900)
        name = f"{self._prefix}{self._count}"
        return Attempt(
            name, draw.choice(self._tenants), tokens, self._prices, at_ms=time.time_ns() // 1_000_000 + self.clock_ahead_ms
        )

    def _write(self, lines: Sequence[dict[str, object]]) -> bool:
        connection = self._connection
        if connection is None:
            return False
        try:
            connection.sendall("".join(json.dumps(line) + "\n" for line in lines).encode())
        except OSError:
            self._hang_up(connection)
            return False
        return True

    def _hang_up(self, connection: socket.socket | None) -> None:
        if connection is None:
            return
        if self._connection is connection:
            self._connection = None
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()

    def _give_up(self, reason: str, *, retry: bool) -> None:
        with self._lock:
            outstanding, self._outstanding = self._outstanding, {}
            if retry and self._running.is_set():
                # Half of them are never sent again: what became of them must be looked up.
                self._again += [attempt for attempt in outstanding.values() if self._retry.random() < 0.5]
        if outstanding and self._history is not None:
            self._history.add([Receipt(request_id, Outcome.UNKNOWN, reason=reason) for request_id in outstanding])
