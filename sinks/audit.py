"""Proves the database from the archived ledger records, and names every difference.

For each partition, record by record in the order of the chain: the stored bytes have the hash kept beside them (or a mark of
the ledger's key says that they are what an erasure left of the record with that hash), name the hash of the record before and
(with the key) carry the ledger's seal; every event's cost, every window and every account is computed
again (`sinks.recompute`) and compared with what the record states; every event, window and account in ClickHouse says the same,
and so do the copies and sums that dashboards read (`sinks.audit_sums`); nothing is there that no record accounts for. It reads
up to the positions that it finds when it starts, so it may run while the sink does: rows that are newer are left for the next
audit. Memory: one page of records, the events of one query, and what the ledger itself keeps open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from operator import attrgetter
from typing import cast

from billing.chain import Chain, UnreadableRecord, record_hash
from billing.erasures import erasure_of
from billing.key_ring import Keys
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import UsageEvent
from sinks.anchors import Anchor, by_place
from sinks.audit_invoices import InvoiceRows
from sinks.audit_sums import SumRows, window_row_key
from sinks.columns import version_of
from sinks.engine import Reader, decimal_to_pico
from sinks.event_columns import OPERATIONS, SERVICE_CLASSES
from sinks.queries import Freshness, freshness
from sinks.recompute import ExpectedEvent, ExpectedWindow, Finding, Recomputed, WindowId
from sinks.tables import TOKEN_COLUMNS

__all__ = ["AuditReport", "Finding", "audit"]

# Records are fetched as hexadecimal text: a page stays under 2 * 8 MB * this only if every record is as large as one may be.
_PAGE_RECORDS = 50
_KEYS_PER_QUERY = 500
# Events are looked up by keys that lie anywhere in the table, so each query reads much of it: few large ones, within the
# 256 KiB that ClickHouse takes as a query, even if each byte of an ID must be escaped.
_EVENTS_PER_QUERY = 4_000
_ID_BYTES_PER_QUERY = 110_000
_QUERY_TIMEOUT_S = 120.0
_TOKENS = ", ".join(TOKEN_COLUMNS)
# Of an archived record: ordinal, sequence, the hash kept beside it, its bytes, and the mark where they are not as they were.
_Row = tuple[int, int, str, bytes, bytes]


@dataclass(slots=True)
class AuditReport:
    """What was compared, and what was different."""

    findings: list[Finding] = field(default_factory=list)
    partitions: int = 0
    records: int = 0
    events: int = 0
    windows: int = 0
    accounts: int = 0
    invoices: int = 0
    anchors: int = 0
    # Of the records, those that an erased user was taken out of.
    redacted: int = 0

    @property
    def clean(self) -> bool:
        return not self.findings


def audit(
    reader: Reader,
    seal_key: Keys | None = None,
    *,
    anchors: Sequence[Anchor] = (),
    findings_max: int = 1_000,
    on_progress: Callable[[AuditReport], None] | None = None,
) -> AuditReport:
    """Compare everything, the chains' heads as they were with `anchors` too.

    Stops early once there are `findings_max` findings: then something is wrong as a whole.
    """
    report = AuditReport()
    positions = freshness(reader)
    erased = _Erased()
    present = {position.partition for position in positions}
    for position in positions:
        partition = _PartitionAudit(reader, seal_key, position, report, by_place(anchors, position.partition), erased)
        for _ in partition.run():
            if on_progress is not None:
                on_progress(report)
            if len(report.findings) >= findings_max:
                return report
        report.partitions += 1
    report.findings += erased.findings()
    for anchor in anchors:
        if anchor.partition not in present:
            report.findings.append(_missing(anchor))
    return report


def _missing(anchor: Anchor) -> Finding:
    subject = f"anchor of generation {anchor.generation[:12]}, sequence {anchor.sequence}"
    return Finding("anchor_missing", anchor.partition, subject, anchor.record_hash, "no such record in the archive")


class _Erased:
    """Who was taken out of records, and who was to be: whoever has the seal key must not change a record under that name."""

    def __init__(self) -> None:
        self._commanded: set[str] = set()
        # By pseudonym, the first record that lacks it: its partition and name.
        self._missing_in: dict[str, tuple[int, str]] = {}

    def take(self, record: LedgerRecord, subject: str, redacted_in: int | None) -> None:
        """A record of the chain; the partition, if it is not as it was sealed."""
        said = erasure_of(record)
        if said is not None:
            self._commanded.add(said.pseudonym)
        if redacted_in is not None:
            for pseudonym in record.erased or ("",):
                self._missing_in.setdefault(pseudonym, (redacted_in, subject))

    def findings(self) -> Iterator[Finding]:
        """Records that nobody commanded to change; after every partition."""
        for pseudonym, (partition, subject) in sorted(self._missing_in.items()):
            if pseudonym not in self._commanded:
                expected = f"the erasure of {pseudonym or 'somebody'}, commanded in the ledger"
                yield Finding("redacted_without_erasure", partition, subject, expected, "no such command")


class _PartitionAudit:
    def __init__(
        self,
        reader: Reader,
        seal_key: Keys | None,
        position: Freshness,
        report: AuditReport,
        anchors: dict[tuple[str, int], Anchor],
        erased: _Erased,
    ) -> None:
        self._reader = reader
        self._position = position
        self._report = report
        self._partition = position.partition
        self._chain = Chain(position.partition, seal_key)
        self._ordinal = 0
        self._last_hash = ""
        self._erased = erased
        # Those whose record has not been seen yet.
        self._anchors = anchors
        self.recomputed = Recomputed(position.partition)
        self._repeated: dict[str, int] = {}

    def run(self) -> Iterator[None]:
        """One page at a time."""
        # Accepted, and not yet looked up.
        expected: list[ExpectedEvent] = []
        for page in self._pages():
            for row in page:
                if not self._links(row, expected):
                    self._compare_events(expected)
                    yield
                    return
            if len(expected) >= _EVENTS_PER_QUERY:
                self._compare_events(expected)
                expected = []
            self._take_findings()
            self._compare_windows(self.recomputed.closed)
            self.recomputed.closed = []
            self._compare_invoices()
            yield
        self._compare_events(expected)
        if self._last_hash != self._position.record_hash:
            self._differs("position_differs", "sink_positions", self._position.record_hash, self._last_hash or "no record")
        self._compare_windows(list(self.recomputed.open.values()))
        self._compare_accounts()
        self._compare_counts()
        self._compare_bills()
        self._report.findings += map(_missing, self._anchors.values())
        yield

    # -- the chain ------------------------------------------------------------------------------------------------------

    def _pages(self) -> Iterator[list[_Row]]:
        after_ordinal, after_sequence = 0, 0
        end = self._end_version()
        while True:
            rows = self._query(
                "SELECT generation_ordinal, sequence, lower(hex(record_hash)), hex(record), hex(redaction) "
                "FROM ledger_records FINAL "
                "WHERE ledger_partition = {partition:UInt32} AND (generation_ordinal > {ordinal:UInt32} OR "
                "(generation_ordinal = {ordinal:UInt32} AND sequence >= {sequence:UInt64})) "
                "ORDER BY generation_ordinal, sequence LIMIT {limit:UInt32}",
                {"ordinal": after_ordinal, "sequence": after_sequence, "limit": _PAGE_RECORDS},
            )
            page = []
            for ordinal, sequence, kept_hash, stored, redaction in rows:
                assert isinstance(ordinal, int)
                assert isinstance(sequence, int)
                if version_of(ordinal, sequence) > end:
                    break
                content, mark = bytes.fromhex(str(stored)), bytes.fromhex(str(redaction))
                page.append((ordinal, sequence, str(kept_hash), content, mark))
            if page:
                yield page
                after_ordinal, after_sequence = page[-1][0], page[-1][1] + 1
            if len(page) < _PAGE_RECORDS:
                return

    def _end_version(self) -> int:
        """The position that this audit began with; the sink may move on meanwhile."""
        [[ordinal]] = self._query(
            "SELECT max(generation_ordinal) FROM generations FINAL WHERE ledger_partition = {partition:UInt32} "
            "AND generation = {generation:String}",
            {"generation": self._position.generation},
        )
        assert isinstance(ordinal, int)
        if not ordinal:
            self._differs("generation_missing", "generations", self._position.generation, "no row")
            return 0
        return version_of(ordinal, self._position.sequence)

    def _links(self, row: _Row, expected: list[ExpectedEvent]) -> bool:
        """Whether the record is the next one; then its events are in `expected`."""
        ordinal, sequence, kept_hash, stored, redaction = row
        subject = f"record {ordinal}:{sequence}"
        # Of a record that somebody was taken out of, the next one names the hash.
        found_hash = kept_hash if redaction else record_hash(stored).hex()
        if found_hash != kept_hash:
            self._differs("hash_differs", subject, kept_hash, found_hash)
        try:
            if redaction:
                record = self._chain.accept_redacted(stored, bytes.fromhex(kept_hash), redaction)
            else:
                record = self._chain.accept(stored)
        except UnreadableRecord as error:
            self._differs("record_unreadable", subject, "a sealed ledger record", str(error))
            return False
        if self._chain.refusal:
            self._differs("record_unreadable", subject, "a sealed ledger record", self._chain.refusal)
            return False
        if record is None:
            self._differs(
                "link_broken", subject, f"the record after {self._chain.sequence}", f"sequence {sequence}, other links"
            )
            return False
        anchor = self._anchors.pop((record.generation.hex(), record.sequence), None)
        if anchor is not None:
            self._report.anchors += 1
            if anchor.record_hash != found_hash:
                self._differs("anchor_differs", subject, anchor.record_hash, found_hash)
        self._last_hash = found_hash
        self._ordinal = ordinal
        self._erased.take(record, subject, self._partition if redaction else None)
        expected += self.recomputed.take(record)
        self._report.records += 1
        self._report.redacted += bool(redaction)
        return True

    # -- events ---------------------------------------------------------------------------------------------------------

    def _compare_events(self, expected: Sequence[ExpectedEvent]) -> None:
        for part in _in_parts(expected):
            tenants = sorted({entry.event.tenant_id for entry in part})
            found = {
                (str(row[0]), str(row[1])): row
                for row in self._query(
                    f"SELECT tenant_id, request_id, generation, sequence, record_index, cost, price_version, model, "  # noqa: S608 - names of ours
                    f"operation, service_class, toUnixTimestamp64Milli(ended), {_TOKENS} FROM usage_events FINAL "
                    "WHERE tenant_id IN {tenants:Array(String)} AND request_id IN {requests:Array(String)} "
                    "AND ledger_partition = {partition:UInt32}",
                    {"tenants": tenants, "requests": [entry.event.request_id for entry in part]},
                )
            }
            for entry in part:
                self._compare_event(entry, found.get((entry.event.tenant_id, entry.event.request_id)))
            self._report.events += len(part)

    def _compare_event(self, entry: ExpectedEvent, row: tuple[object, ...] | None) -> None:
        expected = _event_values(entry)
        stands = (entry.generation.hex(), entry.sequence, entry.index)
        if row is not None and row[2:5] == stands and row[6:] == expected[1:] and _pico(row[5]) == expected[0]:
            return
        event = entry.event
        subject = f"event {event.tenant_id}/{event.request_id}"
        place = f"record {entry.generation.hex()[:12]}:{entry.sequence}[{entry.index}]"
        if row is None:
            self._differs("event_missing", subject, place, "no row in usage_events")
            return
        if row[2:5] != stands:
            found = f"record {str(row[2])[:12]}:{row[3]}[{row[4]}]"
            self._differs("charged_twice", subject, f"accepted once, by {place}", f"accepted again by {found}")
            self._repeated[event.tenant_id] = self._repeated.get(event.tenant_id, 0) + 1
            return
        actual = (_pico(row[5]), *row[6:])
        for name, value, have in zip(_EVENT_NAMES, expected, actual, strict=True):
            if value != have:
                self._differs("event_differs", f"{subject}: {name}", str(value), str(have))

    # -- windows and accounts -------------------------------------------------------------------------------------------

    def _compare_windows(self, expected: Sequence[tuple[WindowId, ExpectedWindow]]) -> None:
        for start in range(0, len(expected), _KEYS_PER_QUERY):
            part = dict(expected[start : start + _KEYS_PER_QUERY])
            minutes = [window_id.key.minute for window_id in part]
            rows = self._query(
                "SELECT tenant_id, project_id, model, operation, service_class, toInt64(intDiv(toUnixTimestamp(minute), 60)), "  # noqa: S608 - names of ours
                f"generation, opened_sequence, price_version, events, refused_events, unrated_events, {_TOKENS}, unit_names, "
                "unit_quantities, cost, version FROM usage_totals FINAL WHERE tenant_id IN {tenants:Array(String)} "
                "AND minute >= toDateTime({first:Int64}, 'UTC') AND minute <= toDateTime({last:Int64}, 'UTC') "
                "AND ledger_partition = {partition:UInt32}",
                {
                    "tenants": sorted({window_id.key.tenant_id for window_id in part}),
                    "first": min(minutes) * 60,
                    "last": max(minutes) * 60,
                },
            )
            found = {row[:9]: row for row in rows}
            for window_id, window in part.items():
                self._compare_window(window_id, window, found.get(window_row_key(window_id)))
            self._report.windows += len(part)
            until = version_of(self._ordinal, self._chain.sequence)
            self._report.findings += SumRows(self._query, self._partition).compare_minutes(part, until)

    def _compare_window(self, window_id: WindowId, window: ExpectedWindow, row: tuple[object, ...] | None) -> None:
        if row is None:
            self._differs("window_missing", str(window_id), f"{window.events} events", "no row in usage_totals")
            return
        if cast("int", row[23]) > version_of(self._ordinal, self._chain.sequence):
            return
        names, quantities = cast("list[str]", row[20]), cast("list[int]", row[21])
        actual = {
            "events": row[9],
            "refused_events": row[10],
            "unrated_events": row[11],
            "tokens": tuple(row[12:20]),
            "units": dict(zip(names, quantities, strict=True)),
            "cost_pico": _pico(row[22]),
        }
        expected = window.values()
        for name, have in actual.items():
            if (value := expected[name]) != have:
                self._differs("window_differs", f"{window_id}: {name}", str(value), str(have))

    def _compare_accounts(self) -> None:
        rows = self._query(
            "SELECT tenant_id, credit, spend, events, duplicates, conflicts, unrated_events, version FROM accounts FINAL "
            "WHERE ledger_partition = {partition:UInt32}",
            {},
        )
        found = {str(row[0]): row for row in rows}
        end = self._end()
        for tenant_id, account in sorted(self.recomputed.accounts.items()):
            row = found.pop(tenant_id, None)
            self._report.accounts += 1
            if row is None:
                self._differs("account_missing", f"account {tenant_id}", str(account.values()), "no row in accounts")
                continue
            if cast("int", row[7]) > end:
                continue
            names = ("credit_pico", "spend_pico", "events", "duplicates", "conflicts", "unrated_events")
            actual = (_pico(row[1]), _pico(row[2]), *row[3:7])
            for name, value in zip(names, actual, strict=True):
                if account.values()[name] != value:
                    self._differs("account_differs", f"account {tenant_id}: {name}", str(account.values()[name]), str(value))
        for tenant_id, row in sorted(found.items()):
            if cast("int", row[7]) <= end:
                self._differs("account_unknown", f"account {tenant_id}", "no such account", "a row in accounts")

    def _compare_counts(self) -> None:
        """Rows that no record accounts for."""
        end = self._end()
        expected_events = {
            tenant_id: count - self._repeated.get(tenant_id, 0) for tenant_id, count in self.recomputed.events_by_tenant.items()
        }
        self._compare_rows("usage_events", "event_unknown", expected_events, "version", end)
        # A window that was opened within the bound is counted though a newer record restated it.
        if self._ordinal:
            opened = "bitOr(bitShiftLeft(bitShiftRight(version, 40), 40), opened_sequence)"
            windows = dict(self.recomputed.windows_by_tenant)
            self._compare_rows("usage_totals", "window_unknown", windows, opened, end)
            self._compare_rows("usage_by_minute", "minute_unknown", windows, opened, end)
        self._report.findings += SumRows(self._query, self._partition).compare_days()
        self._compare_adjustments(end)

    def _compare_adjustments(self, end: int) -> None:
        rows = self._query(
            "SELECT tenant_id, sum(amount) FROM adjustments FINAL WHERE ledger_partition = {partition:UInt32} "
            "AND version <= {end:UInt64} GROUP BY tenant_id ORDER BY tenant_id",
            {"end": end},
        )
        found = {str(tenant_id): decimal_to_pico(cast("Decimal", amount)) for tenant_id, amount in rows}
        expected = self.recomputed.adjusted_by_tenant
        for tenant_id in sorted(found.keys() | expected.keys()):
            if found.get(tenant_id, 0) != expected[tenant_id]:
                subject = f"adjustments of tenant {tenant_id}"
                self._differs("adjustments_differ", subject, f"{expected[tenant_id]} pico", f"{found.get(tenant_id, 0)} pico")

    def _compare_rows(self, table: str, kind: str, expected: dict[str, int], version: str, end: int) -> None:
        rows = self._query(
            f"SELECT tenant_id, count() FROM {table} FINAL WHERE ledger_partition = {{partition:UInt32}} "  # noqa: S608 - names of ours
            f"AND {version} <= {{end:UInt64}} GROUP BY tenant_id ORDER BY tenant_id",
            {"end": end},
        )
        for tenant_id, count in rows:
            if cast("int", count) > expected.get(str(tenant_id), 0):
                self._differs(kind, f"{table} of tenant {tenant_id}", f"{expected.get(str(tenant_id), 0)} rows", f"{count}")

    # -- invoices -----------------------------------------------------------------------------------------------------------

    def _compare_invoices(self) -> None:
        """What invoices of the last page took, and their bytes."""
        lines = self.recomputed.lines
        if lines.invoices:
            rows = InvoiceRows(self._query, self._partition)
            self._report.findings += rows.compare_lines(lines.invoiced, self._end())
            self._report.findings += rows.compare_invoices(lines.invoices)
            self._report.invoices += len(lines.invoices)
            lines.invoices, lines.invoiced = [], []

    def _compare_bills(self) -> None:
        """Lines that no invoice has; and of each tenant: what invoices have and what they have not is what was charged."""
        rows = InvoiceRows(self._query, self._partition)
        open_pico: Counter[str] = Counter()
        for window_id, window in self.recomputed.open.values():
            open_pico[window_id.key.tenant_id] += window.cost_pico
        spend_pico = {tenant_id: account.spend_pico for tenant_id, account in self.recomputed.accounts.items()}
        self._report.findings += rows.compare_lines([line.to_line() for line in self.recomputed.lines.lines], self._end())
        self._report.findings += rows.compare_sums(spend_pico, open_pico, self._end())

    def _end(self) -> int:
        return version_of(self._ordinal, max(self._chain.sequence, 0)) if self._ordinal else 0

    # -- small things ---------------------------------------------------------------------------------------------------

    def _query(self, sql: str, parameters: dict[str, int | str | Sequence[str]]) -> list[tuple[object, ...]]:
        bound = parameters | {"partition": self._partition} if "{partition:" in sql else parameters
        return self._reader.query(sql, bound, timeout_s=_QUERY_TIMEOUT_S).rows

    def _take_findings(self) -> None:
        self._report.findings += self.recomputed.findings
        self.recomputed.findings = []

    def _differs(self, kind: str, subject: str, expected: str, found: str) -> None:
        self._take_findings()
        self._report.findings.append(Finding(kind, self._partition, subject, expected, found))


def _in_parts(expected: Sequence[ExpectedEvent]) -> Iterator[Sequence[ExpectedEvent]]:
    """As many at a time as one query may name."""
    start = id_bytes = 0
    for end, entry in enumerate(expected):
        # As if each had a tenant of its own.
        own_bytes = len(entry.event.tenant_id.encode()) + len(entry.event.request_id.encode())
        if end - start == _EVENTS_PER_QUERY or (id_bytes + own_bytes > _ID_BYTES_PER_QUERY and end > start):
            yield expected[start:end]
            start, id_bytes = end, 0
        id_bytes += own_bytes
    if start < len(expected):
        yield expected[start:]


_TOKEN_COUNTS = attrgetter(*TOKEN_COLUMNS)
_EVENT_NAMES = ("cost_pico", "price_version", "model", "operation", "service_class", "ended_ms", *TOKEN_COLUMNS)


def _event_values(entry: ExpectedEvent) -> tuple[object, ...]:
    event: UsageEvent = entry.event
    return (
        entry.cost_pico,
        entry.price_version,
        event.model,
        OPERATIONS[event.operation],
        SERVICE_CLASSES[event.service_class],
        event.ended_ms,
        *_TOKEN_COUNTS(event),
    )


def _pico(value: object) -> int:
    assert isinstance(value, Decimal), value
    return decimal_to_pico(value)
