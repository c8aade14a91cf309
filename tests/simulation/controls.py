"""Negative controls: each breaks one rule of the product, in one place. A simulation that stays green then is worthless.

Only tests turn them. Each is a context in which the named rule does not hold; nothing else changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from billing import usage_admission, usage_step
from billing.chain import Chain
from billing.founding import HORIZON_DAYS
from billing.v1.ledger_pb2 import LedgerRecord
from billing.windows import window_key
from producers.publisher import Publisher
from sinks.tables import SINK_POSITIONS
from sinks.writer import Writer
from stream_processors import ledger_app
from stream_processors.ledger_app import LedgerApp
from stream_processors.ledger_host import LedgerHost
from stream_processors.publisher_app import PublisherApp
from stream_processors.seen_store import SeenStore
from tests.simulation import producing
from tests.simulation.disk import MemoryDb
from tests.simulation.truth import Truth

__all__ = ["CONTROLS"]

Control = Callable[[], contextlib.AbstractContextManager[object]]


@contextlib.contextmanager
def store_before_the_acknowledgement() -> Iterator[None]:
    """The local store applies a record when it is produced, not when the log has it."""
    handle, apply = LedgerHost.handle, LedgerHost._apply

    async def handle_early(self: LedgerHost, *arguments: Any) -> None:
        known = {id(entry) for entry in self._in_flight}
        await handle(self, *arguments)
        for entry in self._in_flight:
            if id(entry) not in known:
                self.store.apply([entry[0]])

    def apply_nothing(self: LedgerHost) -> None:
        with mock.patch.object(self.store, "apply"):
            apply(self)

    with mock.patch.object(LedgerHost, "handle", handle_early), mock.patch.object(LedgerHost, "_apply", apply_nothing):
        yield


@contextlib.contextmanager
def one_token_dropped() -> Iterator[None]:
    """One output token of a batch's last window is not counted."""
    charge = usage_step._Batch.charge

    def charge_less(self: Any, admitted: Any, record: LedgerRecord) -> None:
        charge(self, admitted, record)
        if record.totals and record.totals[-1].output_tokens:
            total = record.totals[-1]
            total.output_tokens -= 1
            window = next(w for w in self.state.windows.values() if window_key(w.key, w.opened_sequence) == total.key)
            window.tokens[1] -= 1

    with mock.patch.object(usage_step._Batch, "charge", charge_less):
        yield


@contextlib.contextmanager
def dedupe_by_payload() -> Iterator[None]:
    """An event is known again by what it says, not by its tenant and request ID."""
    identities = usage_admission.identities  # type: ignore[attr-defined]

    def by_payload(*arguments: Any) -> tuple[list[bytes], list[bytes]]:
        _, fingerprints = identities(*arguments)
        return [fingerprint * 2 for fingerprint in fingerprints], fingerprints

    with mock.patch.object(usage_admission, "identities", by_payload):
        yield


@contextlib.contextmanager
def readers_accept_what_does_not_link() -> Iterator[None]:
    """A reader takes any record of its generation that moves forward, whatever it names as the one before."""
    links = Chain._links

    def links_loosely(self: Chain, record: LedgerRecord) -> bool:
        return links(self, record) or (record.generation == self.generation and record.sequence >= self.sequence > 0)

    with mock.patch.object(Chain, "_links", links_loosely):
        yield


@contextlib.contextmanager
def journal_freed_on_kafkas_word() -> Iterator[None]:
    """A producer lets go of its journal when Kafka has acknowledged, not when the ledger covers it."""
    on_delivery = Publisher._on_delivery

    def free_early(self: Publisher, delivery: Any, epoch: int, first: int, last: int, *rest: Any) -> None:
        on_delivery(self, delivery, epoch, first, last, *rest)
        if rest[2] is None:
            self._journal.free(delivery.partition, last)

    with mock.patch.object(Publisher, "_on_delivery", free_early):
        yield


@contextlib.contextmanager
def offset_mismatch_ignored() -> Iterator[None]:
    """The host believes an acknowledgement whatever offset it names."""
    on_delivered = LedgerHost._on_delivered

    def believe(self: LedgerHost, offset: int, problem: str) -> None:
        if self._in_flight and not problem:
            offset = self._in_flight[0][0].ledger_offset
        on_delivered(self, offset, problem)

    with mock.patch.object(LedgerHost, "_on_delivered", believe):
        yield


@contextlib.contextmanager
def position_before_the_insert() -> Iterator[None]:
    """The sink writes how far it is before it has written what it read."""
    store = Writer.store

    def position_first(self: Writer, prepared: Any) -> Any:
        inserts, positions = list(prepared.inserts), {}
        prepared.inserts.clear()
        positions = store(self, prepared)
        for table, columns in inserts:
            assert table is not SINK_POSITIONS
            self._engine.insert(table, columns)
        return positions

    with mock.patch.object(Writer, "store", position_first):
        yield


@contextlib.contextmanager
def forwards_not_waited_for() -> Iterator[None]:
    """A record says that an event was sent on before the other partition has it."""

    async def send_and_forget(self: LedgerHost, partition: int, value: bytes) -> None:
        self._writer.write(self._settings.events_topic, partition, value, lambda *_: None)

    with mock.patch.object(LedgerHost, "_forward", send_and_forget):
        yield


@contextlib.contextmanager
def inputs_resume_at_the_end() -> Iterator[None]:
    """After a takeover input resumes at the end of its log, not behind the position that the ledger records."""
    positions = LedgerApp._positions

    def at_the_end(self: Any) -> Any:
        logs = self._worker.world.broker
        return {tp: max(at, len(logs.log(tp.topic, tp.partition))) for tp, at in positions(self).items()}

    with mock.patch.object(LedgerApp, "_positions", at_the_end):
        yield


@contextlib.contextmanager
def first_input_not_checked() -> Iterator[None]:
    """After a takeover the host takes whatever input its consumer hands over first."""

    async def check_nothing(self: LedgerHost, source: object) -> None:
        return

    with mock.patch.object(LedgerHost, "_check_none_passed_over", check_nothing):
        yield


@contextlib.contextmanager
def publisher_goes_on_over_a_hole() -> Iterator[None]:
    """The publisher takes what its consumer hands over for what was due."""
    take = PublisherApp._take

    async def take_anything(self: PublisherApp, partition: int, offset: int, stored: bytes, event: Any) -> None:
        self._resume[partition] = offset
        await take(self, partition, offset, stored, event)

    with mock.patch.object(PublisherApp, "_take", take_anything):
        yield


@contextlib.contextmanager
def runs_removed_before_the_list_is_synced() -> Iterator[None]:
    """A run's file goes while a power loss can still bring back the list that names it."""
    with mock.patch.object(MemoryDb, "flush_wal"):
        yield


@contextlib.contextmanager
def delivery_errors_ignored() -> Iterator[None]:
    """The host goes on when a record's fate is not known, as if the log had it."""
    on_delivered = LedgerHost._on_delivered

    def believe(self: LedgerHost, offset: int, problem: str) -> None:
        on_delivered(self, self._in_flight[0][0].ledger_offset if problem and self._in_flight else offset, "")

    with mock.patch.object(LedgerHost, "_on_delivered", believe):
        yield


@contextlib.contextmanager
def cut_log_accepted() -> Iterator[None]:
    """A host whose store stands on a record that the log does not have goes on from the log's end."""

    async def at_the_end(self: LedgerHost, follow: Chain, first: int, end: int) -> int:
        return min(self.store.place.ledger_offset + 1, end) if follow.generation else first

    with mock.patch.object(LedgerHost, "_find_place", at_the_end):
        yield


@contextlib.contextmanager
def readers_not_asked() -> Iterator[None]:
    """A worker whose disk is behind the cut goes on from there, whatever the readers have taken."""

    async def ask_nobody(*_: object) -> None:
        pass

    with mock.patch.object(ledger_app, "check_readers", ask_nobody):
        yield


@contextlib.contextmanager
def keys_in_no_run_forgotten() -> Iterator[None]:
    """What was charged lately is known by the process alone, and dies with it."""
    with mock.patch.object(SeenStore, "restore"):
        yield


@contextlib.contextmanager
def keys_forgotten_early() -> Iterator[None]:
    """A dedupe key lives until the day is over, not until its horizon is."""
    expire = SeenStore.expire
    days = HORIZON_DAYS + 5

    with mock.patch.object(SeenStore, "expire", lambda self, through_day: expire(self, through_day + days)):
        yield


@contextlib.contextmanager
def receipt_before_the_commit() -> Iterator[None]:
    """A producer tells its caller that an event is durable before its journal has it."""
    attempt = Truth.attempt

    def promise(self: Truth, raw: bytes) -> None:
        attempt(self, raw)
        if raw:
            self.durable.add(raw)

    # A disk that takes its time, so that producers die meanwhile.
    with mock.patch.object(Truth, "attempt", promise), mock.patch.object(producing, "_COMMIT_S", 0.4):
        yield


CONTROLS: dict[str, Control] = {
    "a delivery error is ignored": delivery_errors_ignored,
    "a log that was cut is gone on with": cut_log_accepted,
    "a log that lost what its readers have is gone on with": readers_not_asked,
    "dedupe keys that are in no run die with the process": keys_in_no_run_forgotten,
    "dedupe keys are forgotten before their horizon": keys_forgotten_early,
    "the receipt comes before the journal's commit": receipt_before_the_commit,
    "the local store is written before the acknowledgement": store_before_the_acknowledgement,
    "one token is dropped": one_token_dropped,
    "dedupe is by payload": dedupe_by_payload,
    "readers accept what does not link": readers_accept_what_does_not_link,
    "the journal is freed on Kafka's acknowledgement": journal_freed_on_kafkas_word,
    "another acknowledged offset is ignored": offset_mismatch_ignored,
    "the sink's position is written before its inserts": position_before_the_insert,
    "what is forwarded is not waited for": forwards_not_waited_for,
    "the first input after a takeover is not checked": first_input_not_checked,
    "the publisher goes on over a hole": publisher_goes_on_over_a_hole,
    "a run is removed before its list is synced": runs_removed_before_the_list_is_synced,
    "input resumes at the log's end": inputs_resume_at_the_end,
}
