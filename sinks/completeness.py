"""Which events of each producer the ledger lacks, as the database knows it, and what arrived around each hole.

Promise: the rule is the ledger's own (`billing.completeness`), over the marks as the archived records state them, in the log
time of each partition's last record: what the alerts call missing or silent is called so here, and a backlog that is being
sent is neither. Nothing is guessed: a mark whose record is not in the archive raises LedgerError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from billing import completeness as rule
from billing.identity import partition_of
from billing.sequences import Hole, ProducerSequences
from billing.v1.ledger_pb2 import LedgerRecord
from sinks.columns import SEQUENCE_BITS, version_of
from sinks.engine import Parameter, Reader
from sinks.errors import LedgerError

__all__ = ["CompletenessReport", "Missing", "Neighbour", "ProducerState", "completeness", "neighbours"]

# Each may be as large as a record may be, and comes as hexadecimal text.
_PAGE_RECORDS = 20
_QUERY_TIMEOUT_S = 120.0
_NEIGHBOUR = ("request_id", "tenant_id", "arrived_ms", "ended_ms", "rejection")


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An event that did arrive, the nearest on one side of a hole."""

    sequence: int
    tenant_id: str
    request_id: str
    # Log time of its record.
    arrived_ms: int
    # 0: it was rejected.
    ended_ms: int
    # Why it was rejected; empty: it was accepted.
    rejection: str


@dataclass(frozen=True, slots=True)
class Missing:
    """A hole, and what arrived around it."""

    hole: Hole
    before: Neighbour | None
    after: Neighbour | None


@dataclass(frozen=True, slots=True)
class ProducerState:
    """One producer in one partition, where something is to be said about it."""

    producer_id: str
    partition: int
    covered: int
    highest: int
    seen_ms: int
    closed: bool
    silent: bool
    lost: tuple[Hole, ...]
    # Numbers that have not come and may still be under way.
    under_way: int

    @property
    def missing(self) -> int:
        """How many events."""
        return sum(hole.numbers for hole in self.lost)


@dataclass(slots=True)
class CompletenessReport:
    """Everything is as of the log time, the earliest of the partitions'."""

    partitions: int = 0
    producers: int = 0
    as_of_ms: int = 0
    incomplete: list[ProducerState] = field(default_factory=list)
    silent: list[ProducerState] = field(default_factory=list)
    # Numbers, of all producers.
    under_way: int = 0

    @property
    def complete(self) -> bool:
        return not self.incomplete


def completeness(reader: Reader) -> CompletenessReport:
    """What is missing and who is silent, by producer and partition."""
    report = CompletenessReport()
    # The marks first: the positions that are read after them are not older.
    marks = _marks(reader)
    positions = reader.query("SELECT ledger_partition, version FROM sink_positions FINAL ORDER BY ledger_partition").rows
    producers = set()
    for partition, version in cast("list[tuple[int, int]]", positions):
        founded = version_of(version >> SEQUENCE_BITS, 0)
        records = dict(_records(reader, partition, sorted({version, founded})))
        last, settings = records[version], records[founded].founding
        report.partitions += 1
        report.as_of_ms = min(report.as_of_ms or last.log_time_ms, last.log_time_ms)
        asked: dict[int, set[str]] = {}
        for producer_id, mark_version, open_ended in marks.get(partition, ()):
            producers.add(producer_id)
            # Whoever lacks nothing can only be silent, which is told at home.
            if open_ended or partition_of(producer_id, settings.partitions) == partition:
                asked.setdefault(mark_version, set()).add(producer_id)
        for mark_version, record in _records(reader, partition, sorted(asked)):
            for mark in record.producers:
                if mark.producer_id not in asked[mark_version]:
                    continue
                producer = ProducerSequences.from_mark(mark)
                now_ms = max(last.log_time_ms, record.log_time_ms)
                lost = rule.lost(producer, settings, last.resumed_ms, now_ms)
                state = ProducerState(
                    producer.producer_id,
                    partition,
                    producer.covered,
                    producer.highest,
                    producer.seen_ms,
                    producer.closed,
                    rule.is_silent(producer, settings, partition, last.resumed_ms, now_ms),
                    tuple(lost),
                    sum(hole.numbers for hole in producer.missing() if hole not in lost),
                )
                report.under_way += state.under_way
                if state.lost:
                    report.incomplete.append(state)
                if state.silent:
                    report.silent.append(state)
    report.producers = len(producers)
    report.incomplete.sort(key=lambda state: (state.producer_id, state.partition))
    report.silent.sort(key=lambda state: state.producer_id)
    return report


def neighbours(reader: Reader, state: ProducerState) -> list[Missing]:
    """Each hole of `state` with the events that arrived around it, accepted or rejected. Reads through the events once."""
    parameters: dict[str, Parameter] = {"producer": state.producer_id, "partition": state.partition}
    parameters |= {f"first{index}": hole.first for index, hole in enumerate(state.lost)}
    firsts = ", ".join(f"{{first{index}:UInt64}}" for index in range(len(state.lost)))
    edges = ", ".join(
        f"{pick}(producer_sequence), " + ", ".join(f"arg{pick.capitalize()}({name}, producer_sequence)" for name in _NEIGHBOUR)
        for pick in ("min", "max")
    )
    rows = reader.query(
        # Between two holes lies a stretch of events; of each the first and the last.
        f"SELECT arrayCount(first -> first <= producer_sequence, [{firsts}]) AS stretch, {edges} FROM ("  # noqa: S608 - names of ours
        "SELECT producer_sequence, request_id, tenant_id, toUnixTimestamp64Milli(accepted) AS arrived_ms, "
        "toUnixTimestamp64Milli(ended) AS ended_ms, '' AS rejection FROM usage_events "
        "WHERE producer_id = {producer:String} AND ledger_partition = {partition:UInt32} AND producer_sequence > 0 "
        "UNION ALL SELECT producer_sequence, request_id, tenant_id, toUnixTimestamp64Milli(rejected) AS arrived_ms, "
        "toInt64(0) AS ended_ms, toString(reason) AS rejection FROM rejected "
        "WHERE producer_id = {producer:String} AND ledger_partition = {partition:UInt32} AND producer_sequence > 0"
        ") GROUP BY stretch ORDER BY stretch",
        parameters,
        timeout_s=_QUERY_TIMEOUT_S,
    ).rows
    width = 1 + len(_NEIGHBOUR)
    stretches = [(cast("int", row[0]), _neighbour(row[1 : 1 + width]), _neighbour(row[1 + width :])) for row in rows]
    return [
        Missing(
            hole,
            next((last for stretch, _, last in reversed(stretches) if stretch <= index), None),
            next((first for stretch, first, _ in stretches if stretch > index), None),
        )
        for index, hole in enumerate(state.lost)
    ]


def _neighbour(cells: Sequence[object]) -> Neighbour:
    sequence, request_id, tenant_id, arrived_ms, ended_ms, rejection = cells
    return Neighbour(
        cast("int", sequence), str(tenant_id), str(request_id), cast("int", arrived_ms), cast("int", ended_ms), str(rejection)
    )


def _marks(reader: Reader) -> dict[int, list[tuple[str, int, bool]]]:
    """By partition: producer, version of the record that states its mark, and whether numbers are open there."""
    marks: dict[int, list[tuple[str, int, bool]]] = {}
    for partition, producer_id, version, open_ended in reader.query(
        "SELECT ledger_partition, producer_id, version, covered_sequence < highest_sequence FROM producer_marks FINAL"
    ).rows:
        marks.setdefault(cast("int", partition), []).append((str(producer_id), cast("int", version), bool(open_ended)))
    return marks


def _records(reader: Reader, partition: int, versions: Sequence[int]) -> Iterator[tuple[int, LedgerRecord]]:
    """The archived records of these versions."""
    for start in range(0, len(versions), _PAGE_RECORDS):
        page = versions[start : start + _PAGE_RECORDS]
        parameters: dict[str, Parameter] = {"partition": partition}
        for index, version in enumerate(page):
            parameters |= {f"o{index}": version >> SEQUENCE_BITS, f"s{index}": version & ((1 << SEQUENCE_BITS) - 1)}
        places = ", ".join(f"({{o{index}:UInt32}}, {{s{index}:UInt64}})" for index in range(len(page)))
        rows = reader.query(
            "SELECT generation_ordinal, sequence, hex(record) FROM ledger_records FINAL "  # noqa: S608 - numbers of ours
            f"WHERE ledger_partition = {{partition:UInt32}} AND (generation_ordinal, sequence) IN ({places})",
            parameters,
            timeout_s=_QUERY_TIMEOUT_S,
        ).rows
        found = {
            version_of(cast("int", ordinal), cast("int", sequence)): LedgerRecord.FromString(bytes.fromhex(str(stored)))
            for ordinal, sequence, stored in rows
        }
        for version in page:
            if version not in found:
                raise LedgerError(
                    f"ledger_records has no record {version >> SEQUENCE_BITS}:{version & ((1 << SEQUENCE_BITS) - 1)} of "
                    f"partition {partition}, which producer_marks or sink_positions name: run `taximeter audit`, and restore "
                    "the table from a backup"
                )
            yield version, found[version]
