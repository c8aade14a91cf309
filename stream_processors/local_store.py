"""One ledger partition's state on local disk, so that a restart replays a little of the log and not all of it.

Promise: what `load` gives is the state after exactly one record of the log, the one named by `place`; it is never ahead of the
log, because `apply` is called for acknowledged records only and writes all of their effect in one batch.

Nothing is synced here beyond what RocksDB does by itself: the log is the truth. A kill of the process loses nothing (the
write-ahead log is in the page cache); a power loss loses the last records' batches as a whole, in order, and they are replayed.
What lies behind the list of runs is synced before the list names it (`seen_runs`), and the list before what it no longer
names is removed.

In embedded mode, where the broker forgets everything with a restart, the store also keeps the stored bytes of records that the
sink has not confirmed, so that the sink can be fed the missing tail from here.

Keys, by their first byte: m place, h head (times, inputs, expiry), f founding record's settings with what commands changed of
them, p price books, w open windows with the log time that last touched them, a accounts, k API keys, n producers' numbering,
t their registrations, c command IDs, l leases, L the last request for a lease of each holder, q quantities of periods,
i periods' lines that no invoice has, j series of invoices, g credit grants, e what else there is to a tenant's credit,
d budgets, r projects, o active alerts, y places of keys, x corrected events, s runs of the dedupe memory, b dedupe keys that
are in no run yet (by sequence), u unconfirmed records (by sequence), z the fields that whoever wrote here knew. `store_names`
makes those of what a record states.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rocksdict import Options, Rdict, WriteBatch

from billing import chain
from billing.accounts import AccountState
from billing.commands import remembered_id
from billing.leases import Asked, LeaseState
from billing.ledger_rules import with_rules
from billing.prices import PriceBooks
from billing.sequences import ProducerSequences
from billing.state import Corrected, LedgerState, SeriesHead
from billing.v1.account_pb2 import Account, ApiKey, BudgetState, Lease, LedgerPosition, ProducerRegistration, Progress, Project
from billing.v1.alert_pb2 import Alert
from billing.v1.command_pb2 import Command, PriceBook
from billing.v1.invoice_pb2 import PeriodLine
from billing.v1.ledger_pb2 import (
    CorrectedEvent,
    CreditState,
    Founding,
    InvoiceSeries,
    KeyPlaces,
    LedgerRecord,
    PeriodQuantities,
    ProducerMark,
    Tick,
    WindowTotal,
)
from billing.windows import Window, key_of
from stream_processors.errors import LocalStoreError
from stream_processors.known_fields import known_fields, packed_fields, unpack_fields
from stream_processors.seen_store import SeenStore
from stream_processors.store_effect import ASKED, TOUCHED, Effect
from stream_processors.store_names import states_of, window_name

__all__ = ["Acknowledged", "Captured", "LocalStore", "write_pairs"]

_FORMAT = b"1"
_SEQUENCE = struct.Struct(">Q")
_BLOB_HEADER = struct.Struct("<II")
_WRITE_BUFFER_BYTES = 16 << 20
# What a snapshot is written from, in the store's folder: on one file system with it.
_CAPTURED = "captured"


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A record that the log has, the bytes that it has, and where."""

    record: LedgerRecord
    stored: bytes
    ledger_offset: int
    # Of `stored`, where the caller knows it already.
    record_hash: bytes = b""


@dataclass(slots=True)
class Captured:
    """All of a store at one moment, for another thread. `release` it before the store is closed: the pairs hold it open."""

    place: Progress
    log_time_ms: int
    # What RocksDB holds, but for what only this disk is to have.
    pairs: Iterator[tuple[bytes, bytes]]
    # Its folder, and in it the runs, which stay there whatever becomes of them in the store.
    folder: Path
    runs: list[Path]
    released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        """The pairs are read, or not needed any more."""
        self.pairs = iter(())
        self.released.set()


class LocalStore:
    """The store of one partition; one process at a time, one thread."""

    def __init__(self, folder: Path, partition: int, *, keep_unconfirmed: bool = False) -> None:
        """Open it, or make it. Raises LocalStoreError where another process has it open or it is damaged."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.partition = partition
        self._keep_unconfirmed = keep_unconfirmed
        try:
            self._db = Rdict(str(folder / "state"), _options())
        except Exception as error:  # noqa: BLE001  rocksdict raises its own bare Exception
            raise LocalStoreError(
                f"local store {folder} cannot be opened ({error}); if another worker runs with this folder, give each its "
                "own; if it is damaged, delete it: it is rebuilt from the log"
            ) from None
        with self._readable():
            known = self._db.get(b"v")
        if known is None:
            self._db[b"v"] = _FORMAT
        elif known != _FORMAT:
            self._db.close()
            raise LocalStoreError(f"local store {folder} has format {known!r}, this version writes {_FORMAT!r}; delete it")
        with self._readable():
            fields = self._get(b"z")
            unknown = unpack_fields(fields) - known_fields() if fields else frozenset()
        if unknown:
            self._db.close()
            raise LocalStoreError(
                f"local store {folder}: a newer version wrote it, this one does not know {min(unknown)} and would lose a part "
                "of the state. Start that version, or a newer one, here; or delete it: it is rebuilt from the log, where that "
                "holds nothing that this version does not know"
            )
        self._states_fields = fields == packed_fields()
        # Of a process that was killed while it took a snapshot.
        shutil.rmtree(folder / _CAPTURED, ignore_errors=True)
        self.place = Progress(partition=partition)
        try:
            with self._readable():
                self.place.MergeFromString(self._get(b"m"))
                self._expired_through_day = self._head().tick.expired_through_day
                self._settings = Founding.FromString(self._get(b"f"))
                self.unconfirmed_bytes = sum(len(value) for _, value in self._range(b"u")) if keep_unconfirmed else 0
                self.seen = self._open_seen()
        except LocalStoreError:
            self._db.close()
            raise

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """What is read in here may be damaged."""
        try:
            yield
        except OSError as error:
            raise LocalStoreError(f"{self.folder} cannot be read ({error}); look at the disk and start again") from error
        except Exception as error:
            raise LocalStoreError(f"{self.folder} is damaged ({error}); delete it: it is rebuilt from the log") from error

    def _open_seen(self) -> SeenStore:
        seen = SeenStore(self.folder / "seen", (key[1:].decode() for key, _ in self._range(b"s")), self._expired_through_day)
        for key, blob in self._range(b"b"):
            seen.restore(_SEQUENCE.unpack(key[1:])[0], _split_blob(blob))
        return seen

    # --- reading ---

    @property
    def empty(self) -> bool:
        """Whether it holds no state yet."""
        return not self.place.position.generation

    def load(self) -> LedgerState | None:
        """The state after the record that `place` names, on this store's dedupe memory; None for an empty store."""
        if self.empty:
            return None
        with self._readable():
            return self._load()

    def _load(self) -> LedgerState:
        head = self._head()
        state = LedgerState(self.seen)
        state.partition = self.partition
        state.generation = self.place.position.generation
        state.sequence = self.place.position.sequence
        state.record_hash = self.place.record_hash
        state.log_time_ms = head.log_time_ms
        state.resumed_ms = head.resumed_ms
        state.inputs = {position.topic: position.offset for position in head.inputs}
        state.expired_through_day = head.tick.expired_through_day
        state.settings = Founding.FromString(self._get(b"f"))
        state.books = PriceBooks(state.settings.price_books)
        for _, value in self._range(b"p"):
            state.books.add(PriceBook.FromString(value))
        for _, value in self._range(b"a"):
            account = Account.FromString(value)
            state.accounts[account.tenant_id] = AccountState.from_account(account)
        for _, value in self._range(b"k"):
            key = ApiKey.FromString(value)
            state.keys[key.key_id] = key
        for _, value in self._range(b"n"):
            mark = ProducerMark.FromString(value)
            state.producers[mark.producer_id] = ProducerSequences.from_mark(mark)
        for _, value in self._range(b"t"):
            state.registrations.set(ProducerRegistration.FromString(value))
        for _, value in self._range(b"l"):
            state.leases.put(LeaseState.from_lease(Lease.FromString(value)))
        for _, value in self._range(b"q"):
            state.quantities.set(PeriodQuantities.FromString(value))
        for prefix in (b"g", b"e"):
            for _, value in self._range(prefix):
                state.credits.set(CreditState.FromString(value))
        for _, value in self._range(b"i"):
            state.lines.set(PeriodLine.FromString(value))
        for _, value in self._range(b"j"):
            series = InvoiceSeries.FromString(value)
            state.series[series.series] = SeriesHead(series.number, series.head_hash)
        for _, value in self._range(b"d"):
            state.budgets.set(BudgetState.FromString(value))
        for _, value in self._range(b"r"):
            project = Project.FromString(value)
            state.projects.setdefault(project.tenant_id, {})[project.project_id] = project
        for _, value in self._range(b"o"):
            state.alerts.set(Alert.FromString(value))
        for _, value in self._range(b"y"):
            state.places.set(KeyPlaces.FromString(value))
        for _, value in self._range(b"x"):
            entry = CorrectedEvent.FromString(value)
            state.corrected[entry.key] = Corrected(entry.adjustment_id, entry.corrected_ms)
        for name, value in self._range(b"c"):
            state.commands[name[1:].decode()] = TOUCHED.unpack(value)[0]
        for name, value in self._range(b"L"):
            state.leases.asked[name[1:].decode()] = Asked._make(ASKED.unpack(value))
        for _, value in self._range(b"w"):
            total = WindowTotal.FromString(value[TOUCHED.size :])
            window_key = key_of(total.key)
            window = state.windows[window_key] = Window.from_total(total)
            state.touch_window(window, TOUCHED.unpack_from(value)[0])
        return state

    def unconfirmed_records(self, after: int) -> Iterator[bytes]:
        """The stored bytes of kept records with a higher sequence than `after`, in order."""
        for _, stored in self._range(b"u", b"u" + _SEQUENCE.pack(after + 1) if after >= 0 else b"u"):
            yield stored

    def capture(self) -> Captured:
        """What the store holds now; quick, whatever it holds: an iterator, which stands still, and a link for each run."""
        folder = self.folder / _CAPTURED
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        runs = []
        for key, _ in self._range(b"s"):
            name = key[1:].decode()
            os.link(self.folder / "seen" / name, folder / name)
            runs.append(folder / name)
        pairs = ((key, value) for key, value in self._range(b"") if not key.startswith(b"u"))
        return Captured(self.place, self._head().log_time_ms, pairs, folder, runs)

    # --- writing ---

    def apply(self, records: Sequence[Acknowledged]) -> None:
        """Write the effect of these records, in the chain's order: all of it in one batch.

        Where a ledger was founded again between them, in one batch before and one from there on: each ends at a record.
        """
        start = 0
        for index, each in enumerate(records):
            if each.record.sequence == 0 and index > start:
                self._apply(records[start:index])
                start = index
        if start < len(records):
            self._apply(records[start:])

    def _apply(self, records: Sequence[Acknowledged]) -> None:
        batch = WriteBatch(raw_mode=True)
        if records[0].record.WhichOneof("source") == "founding":
            self._finish_runs()
            self._put_founding(batch, records[0].record)
        effect = Effect()
        for acknowledged in records:
            self._add_record(effect, acknowledged)
        effect.write(batch)
        last = records[-1]
        place = Progress(
            partition=self.partition,
            position=LedgerPosition(generation=last.record.generation, sequence=last.record.sequence),
            record_hash=last.record_hash or chain.record_hash(last.stored),
            ledger_offset=last.ledger_offset,
        )
        head = LedgerRecord(
            log_time_ms=last.record.log_time_ms,
            resumed_ms=last.record.resumed_ms,
            inputs=last.record.inputs,
            tick=Tick(expired_through_day=self._expired_through_day),
        )
        if not self._states_fields:
            batch.put(b"z", packed_fields())
        batch.put(b"m", place.SerializeToString())
        batch.put(b"h", head.SerializeToString())
        self._db.write(batch)
        self._states_fields = True
        self.place = place
        for sequence, entries in effect.remembered:
            self.seen.acknowledged(sequence, entries, self._expired_through_day)
        self._note_runs()

    def trim_unconfirmed(self, through: int) -> None:
        """The sink has everything through this sequence of the present generation: let those bytes go."""
        end = b"u" + _SEQUENCE.pack(through + 1)
        gone = sum(len(value) for _, value in itertools.takewhile(lambda pair: pair[0] < end, self._range(b"u")))
        if gone:
            self._db.delete_range(b"u", end)
            self.unconfirmed_bytes -= gone

    def close(self) -> None:
        """Close it; another process may open it then."""
        self.seen.close()
        self._note_runs()
        self._db.close()

    def _add_record(self, effect: Effect, acknowledged: Acknowledged) -> None:
        record = acknowledged.record
        source = record.WhichOneof("source")
        entries: list[tuple[int, bytes]] = []
        if source == "usage":
            entries = [(keys.expires_day, keys.entries) for keys in record.usage.remembered]
            if entries:
                effect.values[b"b" + _SEQUENCE.pack(record.sequence)] = _join_blob(entries)
        elif source == "command" and record.command.applied:
            command = Command.FromString(record.command.command)
            command_id = remembered_id(command)
            if command_id:
                effect.commands[b"c" + command_id.encode()] = command.issued_ms
            if command.WhichOneof("action") == "lease_request":
                asked = command.lease_request
                name = b"L" + asked.holder_id.encode()
                effect.asked[name] = Asked(asked.epoch, asked.request_number, record.log_time_ms)
            if record.command.HasField("price_book"):
                book = record.command.price_book
                # Each currency has its own line of versions, read back in its order.
                effect.values[b"p" + book.currency.encode() + _SEQUENCE.pack(book.version)] = book.SerializeToString()
            if record.command.HasField("rules"):
                self._settings = with_rules(self._settings, record.command.rules)
                effect.values[b"f"] = self._settings.SerializeToString()
        elif source == "tick" and record.tick.expired_through_day > self._expired_through_day:
            self._expired_through_day = record.tick.expired_through_day
            effect.forget(self._range, record.log_time_ms, self._settings)
        effect.states.update(states_of(record))
        for total in record.totals:
            effect.windows[window_name(total.key)] = record.log_time_ms, total
        for window_key in record.released:
            effect.windows[window_name(window_key)] = None
        if self._keep_unconfirmed:
            effect.values[b"u" + _SEQUENCE.pack(record.sequence)] = acknowledged.stored
            self.unconfirmed_bytes += len(acknowledged.stored)
        effect.remembered.append((record.sequence, entries))

    def _put_founding(self, batch: WriteBatch, record: LedgerRecord) -> None:
        batch.put(b"f", record.founding.SerializeToString())
        self._settings = record.founding
        # Of the generation before: its windows were let go, its price books stand in the founding record, its sequences
        # were other numbers. Dedupe keys in no run keep their blobs: they are re-keyed below everything of this generation.
        for key, _ in [*self._range(b"w"), *self._range(b"p"), *self._range(b"u")]:
            batch.delete(key)
        self.unconfirmed_bytes = 0
        carried: list[tuple[int, bytes]] = []
        for key, blob in self._range(b"b"):
            carried += _split_blob(blob)
            batch.delete(key)
        if carried:
            batch.put(b"b" + _SEQUENCE.pack(0), _join_blob(carried))

    def _finish_runs(self) -> None:
        """Before a founding record, whose sequence starts again: no work under way may name blobs by the old ones."""
        while self.seen.writing:
            self.seen.settle()
            self._note_runs()

    def _note_runs(self) -> None:
        change = self.seen.finished()
        if change is None:
            return
        batch = WriteBatch(raw_mode=True)
        for name in change.removed:
            batch.delete(b"s" + name.encode())
        for name in change.added:
            batch.put(b"s" + name.encode(), b"")
        if change.blobs_through_sequence is not None:
            batch.delete_range(b"b", b"b" + _SEQUENCE.pack(change.blobs_through_sequence + 1))
        self._db.write(batch)
        if change.removed:
            # Their files go next: a power loss must not bring back a list that names them.
            self._db.flush_wal(sync=True)
        self.seen.adopt(change)

    def _head(self) -> LedgerRecord:
        return LedgerRecord.FromString(self._get(b"h"))

    def _get(self, key: bytes) -> bytes:
        """The value, empty where there is none (which is an empty message)."""
        value: bytes | None = self._db.get(key)
        return value or b""

    def _range(self, prefix: bytes, start: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Of this moment, whatever is written while it is read."""
        pairs: Iterator[tuple[bytes, bytes]] = self._db.items(from_key=start or prefix)  # type: ignore[assignment]
        return itertools.takewhile(lambda pair: pair[0].startswith(prefix), pairs)


def write_pairs(folder: Path, pairs: Iterable[tuple[bytes, bytes]]) -> None:
    """Make what was captured a store's folder again, synced; the runs must lie in its folder `seen` already, synced too."""
    db = Rdict(str(folder / "state"), _options())
    try:
        batch, size = WriteBatch(raw_mode=True), 0
        for key, value in pairs:
            batch.put(key, value)
            size += len(key) + len(value)
            if size >= _WRITE_BUFFER_BYTES:
                db.write(batch)
                batch, size = WriteBatch(raw_mode=True), 0
        db.write(batch)
        db.flush_wal(sync=True)
    finally:
        db.close()


def _options() -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(_WRITE_BUFFER_BYTES)
    options.set_max_total_wal_size(4 * _WRITE_BUFFER_BYTES)
    options.set_keep_log_file_num(2)
    return options


def _join_blob(entries: Iterable[tuple[int, bytes]]) -> bytes:
    return b"".join([part for day, data in entries for part in (_BLOB_HEADER.pack(day, len(data)), data)])


def _split_blob(blob: bytes) -> list[tuple[int, bytes]]:
    entries = []
    start = 0
    while start < len(blob):
        day, size = _BLOB_HEADER.unpack_from(blob, start)
        start += _BLOB_HEADER.size
        entries.append((day, blob[start : start + size]))
        start += size
    return entries
