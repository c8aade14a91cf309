"""Silence told from loss: when a hole in a producer's numbering, or its silence, is something that somebody should know.

Deterministic, in log time, looked at every few seconds of it whatever the record is, so that idle partitions (ticks) tell it
too. A hole that closes within the grace raises nothing; one alert names all holes that are due, and the next one of that
producer waits for the cool-down. A hole that was told and closes is told as well. A producer is silent when it sends heartbeats
and none came for long, unless it said that it ends: nothing that it announced is missing by that. Only the partition of the
producer's own name tells its silence, where its heartbeats always go: one alert, not one for each partition.

Time in which the ledger itself stood still counts for nothing: what came meanwhile waits in the input, and is taken first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from billing.identity import partition_of
from billing.limits import PRODUCER_ALERTS_MAX
from billing.sequences import Hole, ProducerSequences
from billing.state import LedgerState
from billing.v1.alert_pb2 import (
    ALERT_RULE_MISSING_SEQUENCE,
    ALERT_RULE_SILENT_PRODUCER,
    ALERT_STATE_RESOLVED,
    ALERT_STATE_UNSPECIFIED,
    SEVERITY_CRITICAL,
    SEVERITY_INFO,
    SEVERITY_WARNING,
    Alert,
    AlertRule,
    Severity,
)
from billing.v1.ledger_pb2 import Founding, LedgerRecord

LOOK_INTERVAL_MS = 5_000
# Between two records, of which idle partitions write one every few seconds: longer, and the ledger stood still.
PAUSE_MS = 60_000
# Of a ledger that was founded before its settings named them.
MISSING_GRACE_MS = 2 * 60_000
SILENCE_MS = 5 * 60_000
_RANGES_NAMED = 5


def missing_grace_ms(settings: Founding) -> int:
    """How long a hole may be one before it is called missing. A producer sends again after 30 s, then after a minute."""
    return settings.missing_grace_ms or MISSING_GRACE_MS


def silence_ms(settings: Founding) -> int:
    """How long a producer may say nothing: several of its heartbeats."""
    return settings.silence_ms or SILENCE_MS


def is_due(state: LedgerState, log_time_ms: int) -> bool:
    """Whether the record of `log_time_ms` is one that looks; `state` is that of the record before."""
    return log_time_ms // LOOK_INTERVAL_MS != state.log_time_ms // LOOK_INTERVAL_MS


def lost(producer: ProducerSequences, settings: Founding, resumed_ms: int, now_ms: int) -> list[Hole]:
    """The holes that are no backlog any more: told already, or open for the grace, all of which the ledger worked through."""
    due_ms = now_ms - missing_grace_ms(settings)
    return [
        hole for hole in producer.missing() if hole.last <= producer.alerted_through or max(hole.since_ms, resumed_ms) <= due_ms
    ]


def is_silent(producer: ProducerSequences, settings: Founding, partition: int, resumed_ms: int, now_ms: int) -> bool:
    """Whether nothing is heard where something is due: told already, or for the time that the settings name."""
    if not producer.heartbeats or producer.closed:
        return False
    told = producer.silent_ms >= producer.seen_ms > 0
    for_long = max(producer.seen_ms, resumed_ms) + silence_ms(settings) <= now_ms
    return (told or for_long) and partition_of(producer.producer_id, settings.partitions) == partition


def look(state: LedgerState, record: LedgerRecord) -> None:
    """Raise and resolve what is due, at most PRODUCER_ALERTS_MAX for this record, and state the marks that say so."""
    for producer, alert in islice(_told(state, record.log_time_ms), PRODUCER_ALERTS_MAX):
        record.alerts.append(alert)
        record.producers.append(producer.to_mark())


def _told(state: LedgerState, now_ms: int) -> Iterator[tuple[ProducerSequences, Alert]]:
    """What is to be told, one by one; telling it has changed the producer."""
    settings = state.settings
    for producer_id in sorted(state.producers):
        producer = state.producers[producer_id]
        holes = producer.missing()
        if producer.alerted_through and not (holes and holes[0].first <= producer.alerted_through):
            yield producer, _closed(producer, state.partition, now_ms)
        if holes:
            late = lost(producer, settings, state.resumed_ms, now_ms)
            due = [hole for hole in late if hole.last > producer.alerted_through]
            if due and now_ms >= producer.alerted_ms + settings.alert_cooldown_ms:
                yield producer, _missing(producer, state.partition, due, now_ms)
        if producer.silent_ms and producer.seen_ms > producer.silent_ms:
            yield producer, _heard(producer, state.partition, now_ms)
        if not producer.silent_ms and is_silent(producer, settings, state.partition, state.resumed_ms, now_ms):
            yield producer, _silent(producer, state.partition, now_ms)


def _missing(producer: ProducerSequences, partition: int, due: Sequence[Hole], now_ms: int) -> Alert:
    producer.alerted_through = due[-1].last
    producer.alerted_ms = now_ms
    count = sum(hole.numbers for hole in due)
    named = ", ".join(f"{hole.first}-{hole.last}" for hole in due[:_RANGES_NAMED])
    more = f" and {len(due) - _RANGES_NAMED} more ranges" if len(due) > _RANGES_NAMED else ""
    return _alert(
        producer,
        partition,
        ALERT_RULE_MISSING_SEQUENCE,
        SEVERITY_CRITICAL,
        now_ms,
        f"{count} event(s) that producer {producer.producer_id} counted in partition {partition} are missing: numbers {named}"
        f"{more}, for {(now_ms - due[0].since_ms) // 1000} s; start it on its journal, it sends them again. If the journal is "
        "gone, so is that usage; `taximeter audit --completeness` shows what came around it",
        {
            "first": due[0].first,
            "last": due[-1].last,
            "missing": count,
            "ranges": len(due),
            "since_ms": due[0].since_ms,
            "seen_ms": producer.seen_ms,
        },
        "missing",
    )


def _closed(producer: ProducerSequences, partition: int, now_ms: int) -> Alert:
    through = producer.alerted_through
    producer.alerted_through = 0
    given_up = producer.retired_through >= through > producer.covered
    what = "are given up" if given_up else "are in the ledger now"
    return _alert(
        producer,
        partition,
        ALERT_RULE_MISSING_SEQUENCE,
        SEVERITY_INFO,
        now_ms,
        f"the events of producer {producer.producer_id} that were missing in partition {partition}, up to number {through}, "
        f"{what}",
        {"last": through, "covered": producer.covered},
        "given up" if given_up else "closed",
    )


def _silent(producer: ProducerSequences, partition: int, now_ms: int) -> Alert:
    producer.silent_ms = now_ms
    quiet_s = (now_ms - producer.seen_ms) // 1000
    return _alert(
        producer,
        partition,
        ALERT_RULE_SILENT_PRODUCER,
        SEVERITY_WARNING,
        now_ms,
        f"nothing was heard from producer {producer.producer_id} for {quiet_s} s, and it did not say that it ends: it was "
        "killed, or cannot reach Kafka; start it on its journal, which may hold usage that nobody has seen",
        {"seen_ms": producer.seen_ms, "covered": producer.covered, "highest": producer.highest},
        "silent",
    )


def _heard(producer: ProducerSequences, partition: int, now_ms: int) -> Alert:
    producer.silent_ms = 0
    return _alert(
        producer,
        partition,
        ALERT_RULE_SILENT_PRODUCER,
        SEVERITY_INFO,
        now_ms,
        f"producer {producer.producer_id} is heard again",
        {"seen_ms": producer.seen_ms},
        "heard",
    )


def _alert(
    producer: ProducerSequences,
    partition: int,
    rule: AlertRule.ValueType,
    severity: Severity.ValueType,
    now_ms: int,
    summary: str,
    figures: Mapping[str, int],
    state: str,
) -> Alert:
    return Alert(
        rule=rule,
        severity=severity,
        subject=producer.producer_id,
        state=ALERT_STATE_RESOLVED if severity == SEVERITY_INFO else ALERT_STATE_UNSPECIFIED,
        summary=summary,
        figures={**figures, "partition": partition},
        labels={"producer_id": producer.producer_id, "state": state},
    )
