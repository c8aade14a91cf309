"""Kafka as the code under test meets it: logs in memory, clients with their own queues, and everything that can go wrong.

What a client sends lies in its queue, then on the wire, then in the log, then its acknowledgement is on the wire; a process
may die or stop between any two. Per client and partition, order holds and acknowledgements come in order (an idempotent
producer's contract), except on topics that are named in `reordered`. Faults, by the rates that the run sets:

    lost            never written, an error is reported
    unsure          written, an error is reported
    twice           written twice, at once or later; the first or the second offset is reported
    nameless        written, acknowledged without an offset
    late            acknowledged seconds later
    ahead           refused: its own time is too far ahead of the broker's clock (no rate: a client's clock does it)
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field

from stream_processors.errors import RefusedToStart
from tests.simulation.loop import PROCESS, Process, SimLoop

__all__ = ["Broker", "Client", "Rates"]

OnDone = Callable[[int, str], None]
_CHUNK_MAX = 40
# What is due at the same time runs in any order: acknowledgements of one partition are never due at the same time.
_NEXT_S = 1e-6


@dataclass
class Rates:
    """How often each fault strikes a message, and how long things take."""

    lost: float = 0.0
    unsure: float = 0.0
    twice: float = 0.0
    nameless: float = 0.0
    late: float = 0.0
    reorder: float = 0.0
    unreadable: float = 0.0
    delay_s: float = 0.01


@dataclass
class Message:
    key: bytes
    value: bytes
    on_done: OnDone
    context: Context
    time_ms: int = 0


@dataclass
class _Lane:
    """One client's way to one partition."""

    topic: str
    partition: int
    sending: deque[Message] = field(default_factory=deque)
    arrives_at: float = 0.0
    acknowledged_at: float = 0.0
    cut: bool = False


class Broker:
    def __init__(self, loop: SimLoop, choices: random.Random, on_append: Callable[[str, int, int, bytes], None]) -> None:
        self.loop = loop
        self.choices = choices
        self.rates = Rates()
        self.down_until_s = 0.0
        # The latest time of its own that a message may have by now.
        self.time_ms_max: Callable[[], int] = lambda: 1 << 62
        # How often a consumer still holds a message from before a rebalance.
        self.stale_rate = 0.0
        self.reordered: frozenset[str] = frozenset()
        self.counts: dict[str, int] = {}
        self._on_append = on_append
        self._logs: dict[tuple[str, int], list[tuple[bytes, bytes]]] = {}
        self._waiting: dict[tuple[str, int], list[asyncio.Future[None]]] = {}

    @property
    def is_down(self) -> bool:
        return self.loop.time() < self.down_until_s

    def log(self, topic: str, partition: int) -> list[tuple[bytes, bytes]]:
        return self._logs.setdefault((topic, partition), [])

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def append(self, topic: str, partition: int, key: bytes, value: bytes) -> int:
        log = self.log(topic, partition)
        log.append((key, value))
        offset = len(log) - 1
        self._on_append(topic, partition, offset, value)
        self.wake(topic, partition)
        return offset

    def wake(self, topic: str, partition: int) -> None:
        for future in self._waiting.pop((topic, partition), ()):
            if not future.done():
                future.set_result(None)

    async def more_than(self, topic: str, partition: int, count: int) -> None:
        """Wait until the log has more messages than that."""
        while len(self.log(topic, partition)) <= count or self.is_down:
            if self.is_down:
                await asyncio.sleep(self.down_until_s - self.loop.time())
                continue
            future = self.loop.create_future()
            self._waiting.setdefault((topic, partition), []).append(future)
            await future

    def fate(self, topic: str) -> str:
        """What becomes of a message that arrives."""
        rates = self.rates
        draw = self.choices.random()
        for name in ("lost", "unsure", "twice", "nameless", "late"):
            draw -= getattr(rates, name)
            if draw < 0:
                self.count(f"{name} {topic}")
                return name
        return "fine"


class _Reading:
    """The messages from `start` to `end`, as `LogReader.read` gives them. Not a generator: nothing is to be run when it is
    dropped."""

    def __init__(self, broker: Broker, topic: str, partition: int, start: int, end: int) -> None:
        self._broker, self._topic, self._partition, self._next, self._end = broker, topic, partition, start, end

    def __aiter__(self) -> _Reading:
        return self

    async def __anext__(self) -> Sequence[tuple[int, bytes]]:
        if self._next >= self._end:
            raise StopAsyncIteration
        broker = self._broker
        await asyncio.sleep(broker.choices.random() * broker.rates.delay_s)
        if broker.is_down or broker.choices.random() < broker.rates.unreadable:
            raise RefusedToStart(f"{self._topic}[{self._partition}]: cannot be read: the broker is away")
        log = broker.log(self._topic, self._partition)
        count = broker.choices.randint(1, _CHUNK_MAX)
        chunk = [(o, log[o][1]) for o in range(self._next, min(self._next + count, self._end, len(log)))]
        if not chunk:
            raise RefusedToStart(f"{self._topic}[{self._partition}]: nothing came after offset {self._next}; cannot be read")
        self._next = chunk[-1][0] + 1
        return chunk


class Client:
    """`LogReader` and `LogWriter` of one process; a producer's client too."""

    def __init__(self, broker: Broker, process: Process) -> None:
        self._broker = broker
        self._process = process
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._done: deque[Callable[[], None]] = deque()

    async def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        broker = self._broker
        await asyncio.sleep(broker.choices.random() * broker.rates.delay_s)
        if broker.is_down or broker.choices.random() < broker.rates.unreadable:
            raise RefusedToStart(f"{topic}[{partition}]: cannot be read: the broker is away")
        return 0, len(broker.log(topic, partition))

    def read(self, topic: str, partition: int, start: int, end: int) -> _Reading:
        return _Reading(self._broker, topic, partition, start, end)

    def write(
        self, topic: str, partition: int, value: bytes, on_done: OnDone, key: bytes | None = None, *, time_ms: int = 0
    ) -> None:
        if not self._process.alive:
            return
        lane = self._lanes.setdefault((topic, partition), _Lane(topic, partition))
        lane.sending.append(Message(key or b"", value, on_done, copy_context(), time_ms))
        self._schedule(lane)

    async def close(self, timeout_s: float) -> None:
        """Wait for what is on its way, as a flush does."""
        deadline = self._broker.loop.time() + timeout_s
        while any(lane.sending for lane in self._lanes.values()) and self._broker.loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    def _schedule(self, lane: _Lane) -> None:
        loop = self._broker.loop
        lane.arrives_at = max(lane.arrives_at, loop.time() + self._delay_s())
        loop.call_at(lane.arrives_at, self._arrive, lane, context=loop.outside)

    def _delay_s(self) -> float:
        return self._broker.choices.expovariate(1 / self._broker.rates.delay_s)

    def _arrive(self, lane: _Lane) -> None:
        broker = self._broker
        if lane.cut or not lane.sending:
            return
        if not self._process.alive and broker.choices.random() < 0.5:
            # What was on the wire has arrived; the rest lay in the memory of the dead.
            lane.cut = True
            return
        if self._process.paused and broker.choices.random() < 0.7:
            self._process.on_resume.append(lambda: self._schedule(lane))
            return
        if broker.is_down:
            broker.loop.call_at(broker.down_until_s, self._arrive, lane, context=broker.loop.outside)
            return
        is_reordered = (
            lane.topic in broker.reordered and len(lane.sending) > 1 and broker.choices.random() < broker.rates.reorder
        )
        if is_reordered:
            lane.sending.rotate(-1)
            broker.count(f"reordered {lane.topic}")
        message = lane.sending.popleft()
        if is_reordered:
            lane.sending.rotate(1)
        self._land(lane, message)

    def _land(self, lane: _Lane, message: Message) -> None:
        broker = self._broker
        fate = broker.fate(lane.topic)
        if message.time_ms > broker.time_ms_max():
            fate = "ahead"
            broker.count("log time ahead refused")
        offset, problem, delay_s = -1, "", self._delay_s()
        if fate not in ("lost", "ahead"):
            offset = broker.append(lane.topic, lane.partition, message.key, message.value)
        if fate == "ahead":
            problem = "the time is ahead of the broker's clock"
        elif fate in ("lost", "unsure"):
            offset, problem = -1, "timed out"
            delay_s *= 50
        elif fate == "twice":
            if broker.choices.random() < 0.5:
                again = broker.append(lane.topic, lane.partition, message.key, message.value)
                offset = broker.choices.choice((offset, again))
            else:
                broker.loop.call_later(
                    self._delay_s() * 10,
                    broker.append,
                    lane.topic,
                    lane.partition,
                    message.key,
                    message.value,
                    context=broker.loop.outside,
                )
        elif fate == "nameless":
            offset = -1
        elif fate == "late":
            delay_s += broker.choices.uniform(1, 15)
        lane.acknowledged_at = max(lane.acknowledged_at + _NEXT_S, broker.loop.time() + delay_s)
        broker.loop.call_at(lane.acknowledged_at, self._tell, message, offset, problem, context=broker.loop.outside)

    def _tell(self, message: Message, offset: int, problem: str) -> None:
        """Acknowledgements that are due together are told in their order, whichever callback runs first."""
        self._done.append(lambda: message.on_done(offset, problem))
        self._broker.loop.call_soon(self._deliver, context=message.context)

    def _deliver(self) -> None:
        assert PROCESS.get() is self._process
        while self._done:
            self._done.popleft()()
