"""Silence is told from loss: what raises an alert about a producer, what resolves it, and what must not raise one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing import replay
from billing.completeness import LOOK_INTERVAL_MS
from billing.founding import LedgerSettings, found_again
from billing.identity import partition_of
from billing.limits import ID_CHARS_MAX, PRODUCER_ALERTS_MAX
from billing.state import LedgerState, MemorySeenKeys
from billing.v1.alert_pb2 import (
    ALERT_RULE_MISSING_SEQUENCE,
    ALERT_RULE_SILENT_PRODUCER,
    ALERT_STATE_RESOLVED,
    SEVERITY_CRITICAL,
    SEVERITY_WARNING,
    Alert,
)
from billing.v1.command_pb2 import LeaseRetirement
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import UsageBatch
from tests.billing.ledgers import KEYS, NOW_MS, PARTITIONS, Ledger, batch, tenants_in, usage

PARTITION = 1
TENANT = tenants_in(PARTITION)[0]
GRACE_MS, COOLDOWN_MS, SILENCE_MS = 60_000, 120_000, 300_000
TICK_MS = 10_000
# Its silence is told in this partition.
AT_HOME = next(name for name in (f"gateway-{n}" for n in range(99)) if partition_of(name, PARTITIONS) == PARTITION)
NOT_AT_HOME = next(name for name in (f"gateway-{n}" for n in range(99)) if partition_of(name, PARTITIONS) != PARTITION)


class Timeline:
    """A ledger that ticks; what producers send in between, and the alerts that came of it."""

    def __init__(self) -> None:
        self.ledger = Ledger(
            PARTITION,
            LedgerSettings(
                partitions=PARTITIONS,
                dedupe_key=b"k" * 32,
                alert_cooldown_ms=COOLDOWN_MS,
                missing_grace_ms=GRACE_MS,
                silence_ms=SILENCE_MS,
            ),
        )
        self.now_ms = NOW_MS
        self.alerts: list[Alert] = []
        self.ledger.price()
        self.ledger.tenant(TENANT)

    def send(self, producer: str, first: int, last: int, highest: int = 0, *, closed: bool = False) -> None:
        events = [usage(f"{producer}/{n}", TENANT, ended_ms=self.now_ms) for n in range(first, last + 1)]
        made = UsageBatch.FromString(batch(events, producer, first if events else 0, highest or last))
        made.closed = closed
        self._take(self.ledger.usage(made.SerializeToString(), self.now_ms).record)

    def heartbeat(self, producer: str, highest: int, *, closed: bool = False) -> None:
        self.send(producer, 1, 0, highest, closed=closed)

    def wait(self, duration_ms: int) -> list[Alert]:
        """Let time pass in ticks; the alerts of it."""
        before = len(self.alerts)
        end_ms = self.now_ms + duration_ms
        while self.now_ms < end_ms:
            self.now_ms = min(self.now_ms + TICK_MS, end_ms)
            self._take(self.ledger.tick(self.now_ms).record)
        return self.alerts[before:]

    def _take(self, record: LedgerRecord) -> None:
        self.alerts += [a for a in record.alerts if a.rule in (ALERT_RULE_MISSING_SEQUENCE, ALERT_RULE_SILENT_PRODUCER)]

    def close(self) -> None:
        """Whoever replays comes to the same state."""
        assert self.ledger.replayed().digest() == self.ledger.state.digest()


@pytest.fixture
def line() -> Timeline:
    return Timeline()


def figures(alert: Alert) -> tuple[int, int, int]:
    return alert.figures["first"], alert.figures["last"], alert.figures["missing"]


def test_a_hole_is_told_once_after_the_grace_and_told_when_it_closes(line: Timeline) -> None:
    line.send("p", 1, 10)
    line.send("p", 14, 20)
    assert line.wait(GRACE_MS - TICK_MS) == []
    [alert] = line.wait(2 * TICK_MS)
    assert (alert.severity, alert.tenant_id) == (SEVERITY_CRITICAL, "")
    assert dict(alert.labels) == {"producer_id": "p", "state": "missing"}
    assert figures(alert) == (11, 13, 3)
    assert alert.figures["partition"] == PARTITION
    assert "producer p counted in partition 1 are missing: numbers 11-13" in alert.summary
    assert alert.alert_id
    line.send("p", 21, 30)
    assert line.wait(5 * COOLDOWN_MS) == []
    line.send("p", 11, 13, 30)
    [closed] = line.wait(TICK_MS)
    assert (closed.rule, closed.state, closed.labels["state"]) == (ALERT_RULE_MISSING_SEQUENCE, ALERT_STATE_RESOLVED, "closed")
    assert closed.alert_id == alert.alert_id
    assert line.wait(5 * COOLDOWN_MS) == []
    line.close()


def test_a_hole_that_closes_within_the_grace_raises_nothing(line: Timeline) -> None:
    line.send("p", 5, 8)
    line.wait(GRACE_MS - TICK_MS)
    line.send("p", 1, 4, 8)
    assert line.wait(3 * GRACE_MS) == []
    line.close()


def test_a_tail_that_does_not_come_is_told(line: Timeline) -> None:
    line.send("p", 1, 4, 9)
    [alert] = line.wait(2 * GRACE_MS)
    assert figures(alert) == (5, 9, 5)
    line.heartbeat("p", 9)
    assert line.wait(3 * COOLDOWN_MS) == []
    line.send("p", 5, 7, 9)
    assert line.wait(2 * COOLDOWN_MS) == [], "the rest was told"
    line.send("p", 8, 9)
    [closed] = line.wait(TICK_MS)
    assert closed.labels["state"] == "closed"
    line.close()


def test_a_backlog_that_is_being_sent_is_no_loss_and_a_hole_in_it_is(line: Timeline) -> None:
    for number in range(1, 60):
        line.send("p", number, number, 100)
        assert line.wait(TICK_MS) == []
    for number in range(61, 80):
        line.send("p", number, number, 100)
        line.wait(TICK_MS)
    [alert] = line.alerts
    assert figures(alert) == (60, 60, 1)
    line.close()


def test_later_holes_wait_for_the_cool_down_and_come_in_one_alert(line: Timeline) -> None:
    line.send("p", 2, 2)
    [first] = line.wait(GRACE_MS + TICK_MS)
    for number in range(4, 30, 2):
        line.send("p", number, number)
    assert line.wait(COOLDOWN_MS - 2 * TICK_MS) == []
    [second] = line.wait(3 * TICK_MS)
    assert figures(first) == (1, 1, 1)
    assert figures(second) == (3, 27, 13)
    assert "3-3, 5-5, 7-7, 9-9, 11-11 and 8 more ranges" in second.summary
    line.close()


def test_what_lands_within_a_hole_leaves_two_as_old_as_it_was(line: Timeline) -> None:
    line.send("p", 11, 12)
    line.wait(GRACE_MS - TICK_MS)
    line.send("p", 5, 6, 12)
    [alert] = line.wait(2 * TICK_MS)
    assert figures(alert) == (1, 10, 8)
    line.close()


def test_busy_partitions_tell_it_too(line: Timeline) -> None:
    """A tick is skipped while records are on their way: they carry the time."""
    line.send("p", 2, 2)
    for number in range(1, 3 * GRACE_MS // TICK_MS):
        line.now_ms += TICK_MS
        line.send("other", number, number)
    assert [figures(alert) for alert in line.alerts] == [(1, 1, 1)]
    line.close()


def test_a_producer_whose_heartbeats_stop_is_silent_and_nothing_is_missing(line: Timeline) -> None:
    line.send(AT_HOME, 1, 5)
    for _ in range(20):
        line.heartbeat(AT_HOME, 5)
        assert line.wait(30_000) == []
    [alert] = line.wait(SILENCE_MS + TICK_MS)
    assert (alert.rule, alert.severity, alert.labels["state"]) == (ALERT_RULE_SILENT_PRODUCER, SEVERITY_WARNING, "silent")
    assert AT_HOME in alert.summary
    assert line.wait(5 * SILENCE_MS) == []
    line.heartbeat(AT_HOME, 5)
    [heard] = line.wait(TICK_MS)
    assert (heard.state, heard.labels["state"]) == (ALERT_STATE_RESOLVED, "heard")
    assert heard.alert_id == alert.alert_id
    line.close()


@pytest.mark.parametrize("how", ["said that it ends", "sends no heartbeats", "lives elsewhere"])
def test_whose_silence_says_nothing(line: Timeline, how: str) -> None:
    producer = NOT_AT_HOME if how == "lives elsewhere" else AT_HOME
    line.send(producer, 1, 5)
    if how != "sends no heartbeats":
        line.heartbeat(producer, 5, closed=how == "said that it ends")
    assert line.wait(3 * SILENCE_MS) == []
    line.close()


def test_time_in_which_the_ledger_stood_still_counts_for_nothing(line: Timeline) -> None:
    line.send(AT_HOME, 1, 5, 9)
    line.heartbeat(AT_HOME, 9)
    line.now_ms += 10 * SILENCE_MS
    assert line.wait(TICK_MS) == []
    line.send(AT_HOME, 6, 9)
    line.heartbeat(AT_HOME, 9)
    assert line.wait(SILENCE_MS - TICK_MS) == []
    line.close()


def test_a_retired_producer_is_neither_silent_nor_missing_until_it_is_heard_again(line: Timeline) -> None:
    line.send(AT_HOME, 1, 5, 9)
    line.heartbeat(AT_HOME, 9)
    [missing] = line.wait(GRACE_MS + TICK_MS)
    assert figures(missing) == (6, 9, 4)
    applied = line.ledger.command(line.now_ms, lease_retirement=LeaseRetirement(holder_id=AT_HOME)).record.command
    assert applied.applied
    assert "4 event(s) that it counted are given up" in applied.outcome
    [given_up] = line.wait(4 * SILENCE_MS)
    assert given_up.labels["state"] == "given up"
    assert line.ledger.state.producers[AT_HOME].covered == 5, "its journal may not be freed by this"
    line.send(AT_HOME, 12, 12)
    [again] = line.wait(GRACE_MS + TICK_MS)
    assert figures(again) == (10, 11, 2)
    line.close()


def test_many_producers_at_once_stay_within_the_bound_of_a_record(line: Timeline) -> None:
    for number in range(PRODUCER_ALERTS_MAX + 7):
        line.send(f"p{number:03}", 2, 2)
    assert line.wait(GRACE_MS - LOOK_INTERVAL_MS) == []
    counts = []
    for _ in range(4):
        line.now_ms += LOOK_INTERVAL_MS
        before = len(line.alerts)
        line._take(line.ledger.tick(line.now_ms).record)
        counts.append(len(line.alerts) - before)
    assert counts == [PRODUCER_ALERTS_MAX, 7, 0, 0]
    line.close()


def test_a_ledger_that_is_founded_again_tells_nothing_twice_and_forgets_nothing(line: Timeline) -> None:
    line.send("p", 2, 2)
    assert len(line.wait(GRACE_MS + TICK_MS)) == 1
    line.send("q", 3, 3)
    record, stored = found_again(line.ledger.state, b"h" * 16, line.now_ms, KEYS.seal_key, "test")
    state = line.ledger.state = LedgerState(MemorySeenKeys())
    replay.apply(state, record, stored)
    line.ledger._offsets = dict.fromkeys(line.ledger._offsets, -1)
    [alert] = line.wait(3 * COOLDOWN_MS)
    assert (alert.labels["producer_id"], *figures(alert)) == ("q", 1, 2, 2)


def test_nonsense_numbers_are_passed_over_and_the_events_charged(line: Timeline) -> None:
    state = line.ledger.state
    for number, (producer, first, highest) in enumerate(
        (("p", 2**64 - 1, 1), ("p", 1, 2**64 - 1), ("x" * (ID_CHARS_MAX + 1), 1, 1))
    ):
        line.ledger.usage(batch([usage(f"r{number}", TENANT)], producer, first, highest), line.now_ms)
    assert state.producers == {}
    assert state.accounts[TENANT].events == 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=20))
def test_whatever_comes_within_the_grace_in_any_order_raises_nothing(batches: Sequence[tuple[int, int]]) -> None:
    """Each batch (how many events, how many ticks late) is announced when it is made and comes within the grace."""
    line = Timeline()
    due: dict[int, list[tuple[int, int]]] = {}
    highest = 0
    for made, (count, late) in enumerate(batches):
        due.setdefault(made + late, []).append((highest + 1, highest + count))
        highest += count
    announced = 0
    for tick in range(max(due) + 1):
        announced += batches[tick][0] if tick < len(batches) else 0
        for first, last in due.get(tick, ()):
            line.send("p", first, last, announced)
        line.heartbeat("p", announced)
        line.wait(TICK_MS)
    assert line.wait(2 * GRACE_MS) == []
    assert line.ledger.state.producers["p"].missing() == []
    line.close()
