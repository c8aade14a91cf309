"""One ledger partition, hosted: the pure step between an input log and `usage.ledger`.

Promise: each input becomes exactly one record, or none if the state has taken it before; `done` is called for it only after its
record is in the log and in the local store; whenever this host cannot be sure that nobody else wrote, it stops with a
reason and writes nothing more. The log decides everything: a host that stopped is thrown away, and a new one replays.

A record's way, and what a crash after each number means:

1. step: the state moves in memory. Crash: nothing happened.
2. what it forwards to other partitions is acknowledged there. Crash: it is sent again, and is a duplicate there.
3. the record is produced; up to `in_flight_max` are on their way, in order. Crash: the log has it or not; replay tells.
4. the acknowledged offset is compared with the expected log end. Another offset, or an error: somebody else may have written.
5. the local store applies it. Crash: it is behind the log and replays.
6. `done`: the input's acknowledgement, which is a lag metric and nothing more.

Faust is not in here, nor Kafka: a simulator hosts the same class over logs in memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from billing import replay
from billing.chain import Chain, UnreadableRecord, record_hash
from billing.state import LedgerState
from billing.step import CommandInput, Input, LedgerKeys, TickInput, UsageInput, step
from billing.v1.ledger_pb2 import LedgerRecord, RefusedRecord, SnapshotTaken
from stream_processors.errors import HostStopped, RefusedToStart, SnapshotRefused
from stream_processors.known_fields import is_known
from stream_processors.local_store import Acknowledged, LocalStore
from stream_processors.log_place import Standing, find_place
from stream_processors.tally import Tally
from stream_processors.untold import Untold

__all__ = ["APPLY_RECORDS", "HostSettings", "LedgerHost", "LogReader", "LogWriter"]

logger = logging.getLogger(__name__)

_REPLAY_RECORDS_MAX = 64
# One batch of the local store for so many records, while more are on their way: of a window or an account that all of them
# touched it writes one state. With nothing on its way it is written at once.
APPLY_RECORDS = 16


class LogReader(Protocol):
    """Reads a partition of a log."""

    async def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """The first offset that is there, and the one that the next message will get."""
        ...

    def read(self, topic: str, partition: int, start: int, end: int) -> AsyncIterator[Sequence[tuple[int, bytes]]]:
        """The messages from `start` up to and without `end`, in chunks of (offset, value). Offsets may have gaps."""
        ...


class LogWriter(Protocol):
    """Appends to partitions of logs, in order, each message once."""

    def write(self, topic: str, partition: int, value: bytes, on_done: Callable[[int, str], None], *, time_ms: int = 0) -> None:
        """Send; `on_done(offset, "")` or `on_done(-1, what happened)` follows on the event loop, in order per partition.

        `time_ms`, the record's log time, is the message's own time: Kafka refuses what is too far ahead of its clock.
        """
        ...


@dataclass(frozen=True, slots=True)
class HostSettings:
    """What a host is told. Bounds are per partition."""

    events_topic: str
    ledger_topic: str
    partitions: int
    keys: LedgerKeys
    writer: str
    in_flight_max: int = 8
    unconfirmed_bytes_max: int = 4 << 30

    def __post_init__(self) -> None:
        if self.in_flight_max < 1:
            raise ValueError(f"in_flight_max: {self.in_flight_max}; give at least 1")


class LedgerHost:
    """Make it, `recover` it, then `handle` inputs in the order of their logs. One event loop."""

    def __init__(
        self,
        settings: HostSettings,
        partition: int,
        store: LocalStore,
        reader: LogReader,
        writer: LogWriter,
        clock_ms: Callable[[], int],
        on_stopped: Callable[[HostStopped], None] = lambda _: None,
        *,
        restored: SnapshotTaken | None = None,
        tally: Tally | None = None,
        on_recorded: Callable[[LedgerRecord], None] = lambda _: None,
    ) -> None:
        self.partition = partition
        self.store = store
        self.state = LedgerState(store.seen)
        self.replayed_records = 0
        self.ignored_records = 0
        # Of those, what the ledger's key did not seal; and what of it no record has told yet.
        self.refused_records = 0
        self._untold = Untold()
        self.acknowledged_records = 0
        # Of records that were replayed or acknowledged here.
        self.logged_bytes = 0
        self._settings = settings
        self._reader = reader
        self._writer = writer
        self._clock_ms = clock_ms
        self._on_stopped = on_stopped
        # What the store was made from.
        self._restored = restored
        self._tally = tally or Tally()
        # Hears of each record that was acknowledged here and is in the local store; it neither waits nor raises.
        self._on_recorded = on_recorded
        self._owned = False
        self._stopped: HostStopped | None = None
        self._next_offset = 0
        # Produced and not yet acknowledged, oldest first: as it will be applied if it gets the offset that is expected,
        # and what to tell the input.
        self._in_flight: deque[tuple[Acknowledged, Callable[[], None]]] = deque()
        self._delivered: list[tuple[Acknowledged, Callable[[], None]]] = []
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._apply_scheduled = False
        # Topics of which an input came since the partition was owned, the one that was due.
        self._in_order: set[str] = set()

    @property
    def where(self) -> str:
        return f"{self._settings.ledger_topic}[{self.partition}]"

    @property
    def owned(self) -> bool:
        """Whether it takes input now."""
        return self._owned and self._stopped is None

    @property
    def stopped(self) -> HostStopped | None:
        """Why it stopped, if it did."""
        return self._stopped

    @property
    def in_flight(self) -> int:
        """Records that are produced and not applied yet."""
        return len(self._in_flight) + len(self._delivered)

    # --- taking over ---

    async def recover(self) -> None:
        """Bring the state to the end of the log, and own the partition. Raises RefusedToStart, saying what to do, and
        SnapshotRefused where the log announces another snapshot than the store was made from.
        """
        local = self.store.load()
        first, end = await self._reader.bounds(self._settings.ledger_topic, self.partition)
        follow = Chain(self.partition, self._settings.keys.seal_key)
        if local is not None:
            self.state = local
            follow.generation, follow.sequence = local.generation, local.sequence
            follow.record_hash = local.record_hash
        try:
            start = await self._find_place(follow, first, end)
            await self._replay(follow, start, end)
        except UnreadableRecord as error:
            raise RefusedToStart(f"{self.where}: {error}") from error
        if not self.state.founded and first > 0:
            raise RefusedToStart(
                f"{self.where} begins at offset {first} without a founding record: its beginning was deleted, by retention "
                "say. A new disk needs a snapshot that is not older, or the topic restored: let the worker that still has its "
                "disk take snapshots (ledger.snapshot_url), and give this one the same"
            )
        if not self.state.founded:
            if follow.refused:
                raise RefusedToStart(
                    f"{self.where}: {follow.refused} records are sealed with another key than this worker's, and none "
                    "with it: give it the installation's seal key (ledger.seal_key)"
                )
            raise RefusedToStart(
                f"{self.where} holds no founding record ({end - first} messages from offset {first}); run: taximeter topics "
                "apply. If there was a ledger before, restore the topic first"
            )
        founded_with = self.state.settings.partitions
        if founded_with != self._settings.partitions:
            raise RefusedToStart(
                f"{self.where}: the ledger was founded with {founded_with} partitions, the topics have "
                f"{self._settings.partitions}; tenants would move: give the topics {founded_with} partitions again"
            )
        self.ignored_records += follow.ignored
        self.refused_records += follow.refused
        self._next_offset = end
        self._owned = True
        logger.info(
            "%s: at sequence %d, offset %d; %d records replayed, %d refused",
            self.where,
            self.state.sequence,
            end,
            self.replayed_records,
            follow.refused,
        )

    async def resume(self) -> bool:
        """Own the partition again after `drain`, if the log ends where this host left it; False: recover a new one."""
        if self._stopped is not None or self.in_flight or not self.state.founded:
            return False
        _, end = await self._reader.bounds(self._settings.ledger_topic, self.partition)
        self._owned = end == self._next_offset
        self._in_order.clear()
        return self._owned

    async def _find_place(self, follow: Chain, first: int, end: int) -> int:
        """The offset to read on from. The local store must stand on a record that the log has."""
        if not follow.generation:
            return first
        topic, seal_key = self._settings.ledger_topic, self._settings.keys.seal_key
        found = await find_place(self._reader, topic, self.store.place, seal_key, first, end)
        if found.standing is Standing.FITS:
            return found.next_offset
        stands = self.store.place.ledger_offset
        here = f"generation {follow.generation.hex()[:12]}, sequence {follow.sequence}, offset {stands}"
        raise RefusedToStart(
            f"{self.where}: the local store stands at {here}, and the log, offsets {first} to {end}, does not have that "
            "record: it was deleted, cut, or recreated. Restore the topic from its replicas or a backup. Only if it is known "
            f"that the log is right and this disk is wrong, delete {self.store.folder}. Where the broker keeps nothing "
            "(embedded), run: taximeter up"
        )

    async def _replay(self, follow: Chain, start: int, end: int) -> None:
        pending: list[Acknowledged] = []
        async for chunk in self._reader.read(self._settings.ledger_topic, self.partition, start, end):
            for offset, stored in chunk:
                record = follow.accept(stored)
                if record is None:
                    if follow.refusal:
                        self._refuse(offset, stored, follow.refusal)
                    continue
                if not is_known(record, stored):
                    raise RefusedToStart(
                        f"{self.where}, offset {offset}: a newer version wrote sequence {record.sequence}, with fields that "
                        "this one does not know: it would lose a part of the state. Start that version, or a newer one, here"
                    )
                if record.founding.HasField("predecessor") and not self.state.founded and not pending:
                    raise RefusedToStart(
                        f"{self.where} begins by carrying on a state that is not in it: what was charged before is known only "
                        f"to the local store that it was founded on. Put that in the place of {self.store.folder}, or give "
                        "this worker snapshots that were taken since (ledger.snapshot_url)"
                    )
                if record.tick.refused:
                    self._untold.leave_told(record.tick.refused)
                self._compare_announced(record.tick.snapshot)
                # What a day's first tick lets go of depends on accounts as they are then, not as they are stated last.
                lets_go = record.tick.expired_through_day > self.state.expired_through_day
                if len(pending) >= _REPLAY_RECORDS_MAX or record.sequence == 0 or lets_go:
                    self._replay_together(pending)
                    pending = []
                    await asyncio.sleep(0)  # heartbeats go on
                pending.append(Acknowledged(record, stored, offset, follow.record_hash))
        self._replay_together(pending)

    def _refuse(self, offset: int, stored: bytes, reason: str) -> None:
        if self._untold.add(RefusedRecord(offset=offset, hash=record_hash(stored), reason=reason)):
            logger.error("%s: offset %d was refused: %s", self.where, offset, reason)

    def _compare_announced(self, announced: SnapshotTaken) -> None:
        restored = self._restored
        if restored is not None and announced.position == restored.position and announced.digest != restored.digest:
            raise SnapshotRefused(
                f"{self.where}: the log announces the snapshot {announced.digest.hex()} of sequence "
                f"{announced.position.sequence}, this one is {restored.digest.hex()}"
            )

    def _replay_together(self, records: Sequence[Acknowledged]) -> None:
        """Apply records of one generation, then write what they leave behind."""
        _leave_last_statements([each.record for each in records])
        for each in records:
            replay.apply(self.state, each.record, each.stored)
        self.store.apply(records)
        self.replayed_records += len(records)
        self.logged_bytes += sum(len(each.stored) for each in records)

    # --- working ---

    async def handle(self, source: Input, done: Callable[[], None]) -> None:
        """Take one input; returns when its record is on its way. Raises HostStopped once this host may not write any more."""
        async with self._turn:
            while len(self._in_flight) >= self._settings.in_flight_max and self._stopped is None:
                self._changed.clear()
                await self._changed.wait()
            self._check_owned()
            if isinstance(source, UsageInput | CommandInput):
                if source.offset <= self.state.inputs.get(source.topic, -1):
                    done()
                    return
                if source.topic not in self._in_order:
                    await self._check_none_passed_over(source)
            try:
                began_s = time.perf_counter()
                result = step(self.state, source, self._clock_ms(), keys=self._settings.keys, writer=self._settings.writer)
                self._tally.stepped(time.perf_counter() - began_s)
                for forward in result.forwards:
                    await self._forward(forward.partition, forward.value)
            except BaseException as error:
                # The state has moved and the record is not written: nothing may be built on this state.
                self.stop(f"the step after sequence {self.state.sequence} was interrupted ({error!r})")
                raise
            self._check_stopped()
            expected = Acknowledged(result.record, result.stored, self._next_offset, self.state.record_hash)
            self._in_flight.append((expected, done))
            self._next_offset += 1
            time_ms = result.record.log_time_ms
            self._writer.write(self._settings.ledger_topic, self.partition, result.stored, self._on_delivered, time_ms=time_ms)

    async def tick(self) -> None:
        """Let time pass: windows close, keys expire. Skipped while records are on their way; they carry the time.

        What the takeover refused is told in any case: its record raises the alert.
        """
        if self.owned and self._untold.records:
            untold, self._untold = self._untold, Untold()
            await self.handle(TickInput(refused=untold.named, refused_records=untold.records), _nothing)
        elif self.owned and not self._in_flight and not self._turn.locked():
            await self.handle(TickInput(), _nothing)

    async def announce(self, snapshot: SnapshotTaken) -> None:
        """Say in the ledger that this snapshot is durable; it is as good where the partition is gone meanwhile."""
        if self.owned:
            await self.handle(TickInput(snapshot), _nothing)

    async def drain(self, timeout_s: float) -> bool:
        """Take no more input, and wait until nothing is in flight; False when that takes too long or the host stopped."""
        self._owned = False
        try:
            async with asyncio.timeout(timeout_s):
                async with self._turn:
                    while self.in_flight and self._stopped is None:
                        self._changed.clear()
                        await self._changed.wait()
        except TimeoutError:
            return False
        return self._stopped is None

    def stop(self, reason: str) -> None:
        """Write nothing more."""
        if self._stopped is None:
            self._stopped = HostStopped(f"{self.where}: {reason}")
            logger.error("%s", self._stopped)
            self._on_stopped(self._stopped)
        self._changed.set()

    def _check_stopped(self) -> None:
        if self._stopped is not None:
            raise self._stopped

    def _check_owned(self) -> None:
        self._check_stopped()
        if not self._owned:
            raise HostStopped(f"{self.where}: this worker does not own the partition any more")
        if self.store.unconfirmed_bytes > self._settings.unconfirmed_bytes_max:
            self.stop(
                f"the sink has not confirmed {self.store.unconfirmed_bytes} bytes of records, over the "
                f"{self._settings.unconfirmed_bytes_max} that this store keeps for it; start the sink"
            )
            self._check_stopped()

    async def _check_none_passed_over(self, source: UsageInput | CommandInput) -> None:
        """The first input after a takeover follows the recorded position, whatever a consumer still had in its buffers."""
        due = self.state.inputs.get(source.topic, -1) + 1
        if source.offset > due:
            # Offsets may have gaps, a transaction's marker say: only messages that are there can be passed over.
            async for chunk in self._reader.read(source.topic, self.partition, due, source.offset):
                if chunk:
                    self.stop(
                        f"{source.topic}: input {source.offset} came and {chunk[0][0]} was due, which would be lost; starting "
                        "over from the log"
                    )
            self._check_owned()
        self._in_order.add(source.topic)

    async def _forward(self, partition: int, value: bytes) -> None:
        sent: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self._writer.write(
            self._settings.events_topic,
            partition,
            value,
            lambda offset, problem: None if sent.done() else sent.set_result((offset, problem)),
        )
        _, problem = await sent
        if problem:
            self.stop(f"events could not be forwarded to {self._settings.events_topic}[{partition}]: {problem}")

    def _on_delivered(self, offset: int, problem: str) -> None:
        if self._stopped is not None:
            return
        expected, done = self._in_flight.popleft()
        sequence = expected.record.sequence
        if problem:
            self.stop(f"the record of sequence {sequence} was not acknowledged ({problem}); the log will tell")
            return
        if offset != expected.ledger_offset:
            self.stop(
                f"the record of sequence {sequence} got offset {offset}, expected {expected.ledger_offset}: somebody else "
                "wrote to this partition; starting over from the log"
            )
            return
        self._delivered.append((expected, done))
        self._changed.set()
        if not self._apply_scheduled and (not self._in_flight or len(self._delivered) >= APPLY_RECORDS):
            # Deliveries come in bunches too: the batch takes all that arrive in this turn of the loop.
            self._apply_scheduled = True
            asyncio.get_running_loop().call_soon(self._apply)

    def _apply(self) -> None:
        self._apply_scheduled = False
        delivered, self._delivered = self._delivered, []
        if self._stopped is not None:
            return
        try:
            self.store.apply([acknowledged for acknowledged, _ in delivered])
        except Exception as error:  # noqa: BLE001  whatever the disk says: nothing more may be written on top of it
            self.stop(f"the local store failed ({error}); free space or mend the disk of {self.store.folder}")
            return
        self.acknowledged_records += len(delivered)
        self.logged_bytes += sum(len(acknowledged.stored) for acknowledged, _ in delivered)
        for acknowledged, done in delivered:
            self._tally.took(acknowledged.record)
            self._on_recorded(acknowledged.record)
            done()
        self._changed.set()


def _leave_last_statements(records: Sequence[LedgerRecord]) -> None:
    """Of each window and account leave the last statement: they are absolute, so the ones before it change nothing any more.

    Of one generation: a window's name holds the sequence that opened it, so one that was let go and opened again is another.
    """
    stated: set[bytes | str] = set()
    for record in reversed(records):
        totals = []
        for total in record.totals:
            name = total.key.SerializeToString(deterministic=True)
            if name not in stated:
                stated.add(name)
                totals.append(total)
        if len(totals) < len(record.totals):
            del record.totals[:]
            record.totals.extend(totals)
        accounts = [account for account in record.accounts if account.tenant_id not in stated]
        stated.update(account.tenant_id for account in accounts)
        if len(accounts) < len(record.accounts):
            del record.accounts[:]
            record.accounts.extend(accounts)


def _nothing() -> None:
    """A tick has nobody to tell."""
