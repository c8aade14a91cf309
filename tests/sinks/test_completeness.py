"""What is missing, as the database knows it: by the ledger's rule, with the events around each hole."""

from __future__ import annotations

import pytest

from billing.founding import LedgerSettings
from billing.identity import partition_of
from billing.v1.command_pb2 import LeaseRetirement
from billing.v1.usage_pb2 import UsageBatch, UsageEvent
from sinks.completeness import Missing, completeness, neighbours
from sinks.engines.chdb import ChdbEngine
from sinks.engines.loopback import LoopbackEngine
from sinks.errors import LedgerError
from sinks.follow import feed
from tests.billing.ledgers import KEYS, NOW_MS, PARTITIONS, Ledger, batch, tenants_in, usage

PARTITION = 1
TENANT = tenants_in(PARTITION)[0]
GRACE_MS, SILENCE_MS = 60_000, 300_000
AT_HOME = [name for name in (f"gateway-{n}" for n in range(99)) if partition_of(name, PARTITIONS) == PARTITION]


class Line:
    """A ledger that ticks, and producers that send to it."""

    def __init__(self) -> None:
        self.ledger = Ledger(
            PARTITION,
            LedgerSettings(partitions=PARTITIONS, dedupe_key=b"k" * 32, missing_grace_ms=GRACE_MS, silence_ms=SILENCE_MS),
        )
        self.now_ms = NOW_MS
        self.ledger.price()
        self.ledger.tenant(TENANT)

    def send(self, producer: str, first: int, last: int, **changes: object) -> None:
        self.events(producer, first, [usage(f"{producer}/{n}", TENANT, **changes) for n in range(first, last + 1)])

    def events(self, producer: str, first: int, events: list[UsageEvent]) -> None:
        self.ledger.usage(batch(events, producer, first, first + len(events) - 1), self.now_ms)

    def heartbeat(self, producer: str, highest: int, *, closed: bool = False) -> None:
        made = UsageBatch(schema_version=1, producer_id=producer, highest_sequence=highest, closed=closed)
        self.ledger.usage(made.SerializeToString(), self.now_ms)

    def wait(self, duration_ms: int) -> None:
        end_ms = self.now_ms + duration_ms
        while self.now_ms < end_ms:
            self.now_ms = min(self.now_ms + 10_000, end_ms)
            self.ledger.tick(self.now_ms)


@pytest.fixture
def line() -> Line:
    return Line()


def around(missing: Missing) -> tuple[int, int, str, str]:
    before, after = missing.before, missing.after
    return (
        missing.hole.first,
        missing.hole.last,
        before.request_id if before else "",
        after.request_id if after else "",
    )


def test_each_hole_has_its_own_start_and_its_neighbours(line: Line, engine: ChdbEngine, loopback: LoopbackEngine) -> None:
    line.send("p", 1, 10)
    line.send("p", 14, 20)
    line.wait(30_000)
    line.send("p", 25, 25, model="")
    line.heartbeat("p", 29)
    line.wait(GRACE_MS)
    feed(engine, line.ledger.stored, KEYS.seal_key)
    report = completeness(loopback)
    [state] = report.incomplete
    assert (state.producer_id, state.partition, state.missing, report.under_way) == ("p", PARTITION, 3 + 4 + 4, 0)
    holes = neighbours(loopback, state)
    assert [around(hole) for hole in holes] == [
        (11, 13, "p/10", "p/14"),
        (21, 24, "p/20", "p/25"),
        (26, 29, "p/25", ""),
    ]
    assert [hole.hole.since_ms for hole in holes] == [NOW_MS, NOW_MS + 30_000, NOW_MS + 30_000]
    before, after = holes[1].before, holes[1].after
    assert before is not None
    assert (before.sequence, before.tenant_id, before.arrived_ms, before.ended_ms) == (20, TENANT, NOW_MS, NOW_MS)
    assert after is not None
    assert (after.rejection, after.arrived_ms) == ("invalid", NOW_MS + 30_000)


def test_within_the_grace_it_is_under_way_and_told_once_it_stays_missing(line: Line, engine: ChdbEngine) -> None:
    line.send("p", 1, 10)
    line.send("p", 12, 20)
    line.wait(GRACE_MS - 10_000)
    fed = len(line.ledger.stored)
    feed(engine, line.ledger.stored, KEYS.seal_key)
    report = completeness(engine)
    assert (report.complete, report.under_way, report.producers) == (True, 1, 1)
    line.wait(30_000)
    # The ledger stands still, and goes on: what had been told is missing all the same.
    line.now_ms += 3_600_000
    line.ledger.tick(line.now_ms)
    feed(engine, line.ledger.stored[fed:], KEYS.seal_key)
    [state] = completeness(engine).incomplete
    assert [(hole.first, hole.last) for hole in state.lost] == [(11, 11)]


def test_stopped_closed_and_retired_are_no_loss(line: Line, engine: ChdbEngine) -> None:
    stopped, closed, retired, lives = AT_HOME[:4]
    for producer in (stopped, closed, retired, lives):
        line.send(producer, 1, 5)
        line.heartbeat(producer, 5)
    line.heartbeat(closed, 5, closed=True)
    line.heartbeat(retired, 9)
    line.ledger.command(line.now_ms, lease_retirement=LeaseRetirement(holder_id=retired))
    line.wait(SILENCE_MS - 10_000)
    line.heartbeat(lives, 5)
    line.wait(20_000)
    feed(engine, line.ledger.stored, KEYS.seal_key)
    report = completeness(engine)
    assert report.incomplete == []
    assert [state.producer_id for state in report.silent] == [stopped]
    assert report.producers == 4


def test_an_archive_without_the_record_of_a_mark_says_so(line: Line, engine: ChdbEngine) -> None:
    line.send("p", 2, 3)
    feed(engine, line.ledger.stored, KEYS.seal_key)
    engine.execute(
        f"ALTER TABLE ledger_records DELETE WHERE sequence = {line.ledger.state.sequence} SETTINGS mutations_sync = 2"
    )
    with pytest.raises(LedgerError, match=r"no record 1:\d+ of partition 1"):
        completeness(engine)
