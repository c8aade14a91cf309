"""Ledger records as columns of the tables: no I/O, nothing decided, the same records always give the same rows.

Events are read field by field, all at once, and never become Python objects of our own. Of tables that hold the last state of a
key (totals, accounts, keys, marks) only the last one of the batch is kept: the others would be replaced anyway.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from google.protobuf.message import DecodeError

from billing.amounts import from_amount
from billing.limits import REJECTED_PAYLOAD_BYTES_MAX, TIME_MS_MAX
from billing.sequences import first_number
from billing.v1.account_pb2 import AccountStatus, BillingMode, KeyScope
from billing.v1.command_pb2 import Command
from billing.v1.ledger_pb2 import (
    DROP_REASON_DUPLICATE,
    DROP_REASON_FORWARDED,
    Dropped,
    DropReason,
    LedgerRecord,
    WindowTotal,
)
from billing.v1.usage_pb2 import RawUsageBatch, UsageBatch
from sinks import tables
from sinks.account_columns import account_rows
from sinks.adjustment_rows import adjustment_rows, corrected_rows
from sinks.alert_columns import alert_rows
from sinks.coded import Coded
from sinks.engine import Columns, Table, whole
from sinks.erasures import erasure_rows
from sinks.event_columns import OPERATIONS, SERVICE_CLASSES, EnumNames, EventColumns
from sinks.invoice_columns import invoice_rows, line_rows
from sinks.price_books import books_of, commitment_rows, price_rows

__all__ = ["NO_OFFSET", "SEQUENCE_BITS", "Accepted", "build_accounts", "build_columns", "version_of"]

SEQUENCE_BITS = 40
NO_OFFSET = -1


@dataclass(frozen=True, slots=True)
class Accepted:
    """A record that the chain accepted, and where it stands."""

    record: LedgerRecord
    stored: bytes
    record_hash: bytes
    generation_ordinal: int
    # NO_OFFSET: it was handed over, not read from Kafka.
    ledger_offset: int = NO_OFFSET
    # Not empty: somebody was taken out of record and stored bytes since they had that hash; see `billing.chain.redaction`.
    redaction: bytes = b""

    @property
    def version(self) -> int:
        """Its place in the order of all records of its partition, over generations."""
        return version_of(self.generation_ordinal, self.record.sequence)


def version_of(generation_ordinal: int, sequence: int) -> int:
    """A row's version: later records, and later generations, have higher ones."""
    assert 0 < generation_ordinal < 1 << (64 - SEQUENCE_BITS), generation_ordinal
    assert 0 <= sequence < 1 << SEQUENCE_BITS, sequence
    return generation_ordinal << SEQUENCE_BITS | sequence


_DROPS = EnumNames(DropReason.items(), "DROP_REASON_")
_STATUSES = EnumNames(AccountStatus.items(), "ACCOUNT_STATUS_")
_MODES = EnumNames(BillingMode.items(), "BILLING_MODE_")
_SCOPES = EnumNames(KeyScope.items(), "KEY_SCOPE_")

_DAY_MINUTES = 1_440
_TOTAL_COUNTS = ("events", "refused_events", "unrated_events", *tables.TOKEN_COLUMNS)
_KEEP_PAYLOAD = frozenset(set(DropReason.values()) - {DROP_REASON_DUPLICATE, DROP_REASON_FORWARDED})


def build_columns(batch: Sequence[Accepted], usage_topic: str) -> list[tuple[Table, Columns]]:
    """The rows of `batch` for every table that gets any but the position's, in the order in which to insert them."""
    built = {
        tables.GENERATIONS: _generations(batch),
        tables.LEDGER_RECORDS: _ledger_records(batch),
        **_usage(batch, usage_topic),
        tables.USAGE_DAYS_STATED: _stated_days(batch),
        tables.USAGE_TOTALS: _totals(batch),
        tables.ALERTS: _from_rows(tables.ALERTS, alert_rows(batch)),
        **_books(batch),
        tables.ADJUSTMENTS: _from_rows(tables.ADJUSTMENTS, adjustment_rows(batch)),
        tables.CORRECTED_EVENTS: _from_rows(tables.CORRECTED_EVENTS, corrected_rows(batch)),
        tables.COMMANDS: _commands(batch),
        tables.ERASURES: _from_rows(tables.ERASURES, erasure_rows(batch)),
        tables.API_KEYS: _api_keys(batch),
        tables.PRODUCER_MARKS: _producer_marks(batch),
        **_account_parts(batch),
        tables.ACCOUNTS: build_accounts(batch),
        tables.PERIOD_LINES: _from_rows(tables.PERIOD_LINES, line_rows(batch)),
        **{table: _from_rows(table, rows) for table, rows in invoice_rows(batch).items()},
    }
    return [(table, built[table]) for table in tables.ALL_TABLES if table in built and any(map(len, built[table].values()))]


def _account_parts(batch: Sequence[Accepted]) -> dict[Table, Columns]:
    rows = account_rows([(accepted.record, accepted.version) for accepted in batch])
    return {table: _from_rows(table, rows[table]) for table in rows}


def _books(batch: Sequence[Accepted]) -> dict[Table, Columns]:
    stated = [(book, accepted.version) for accepted in batch for book in books_of(accepted.record)]
    return {
        tables.PRICE_BOOKS: _from_rows(tables.PRICE_BOOKS, price_rows(stated)),
        tables.PRICE_COMMITMENTS: _from_rows(tables.PRICE_COMMITMENTS, commitment_rows(stated)),
    }


def _from_rows(table: Table, rows: Iterable[tuple[object, ...]]) -> Columns:
    columns = list(zip(*rows, strict=True)) or [()] * len(table.columns)
    return dict(zip(table.columns, columns, strict=True))


def _last_by_key(entries: Iterable[tuple[object, Accepted, Any]]) -> list[tuple[Accepted, Any]]:
    return list({key: (accepted, message) for key, accepted, message in entries}.values())


def _whole(column: str) -> array[int]:
    return whole(tables.USAGE_EVENTS.columns[column])


class _Usage:
    """The events of a batch and what stands beside each, in the same order."""

    def __init__(self) -> None:
        self.events = EventColumns()
        self.cost_pico: list[int] = []
        self.currencies = Coded()
        self.price_versions = _whole("price_version")
        self.producer_ids = Coded()
        self.producer_sequences = _whole("producer_sequence")
        self.accepted_ms = _whole("accepted")
        self.partitions = _whole("ledger_partition")
        self.generations = Coded()
        self.sequences = _whole("sequence")
        self.indexes = _whole("record_index")
        self.versions = _whole("version")
        self.rejected: list[tuple[object, ...]] = []

    def take(self, accepted: Accepted, usage_topic: str) -> None:
        record = accepted.record
        usage = record.usage
        batch = UsageBatch.FromString(usage.batch)
        # A list of its own: each walk over the batch's would make every event's wrapper anew.
        everything = list(batch.events)
        total = len(everything)
        indexes: Sequence[int] = range(total)
        if usage.dropped:
            dropped = {entry.index for entry in usage.dropped}
            indexes = [index for index in indexes if index not in dropped]
            self._reject(accepted, batch, usage_topic)
        count = len(indexes)
        if not count:
            return
        costs: Sequence[int] = usage.cost_pico_low
        if usage.cost_pico_high:
            costs = [high << 64 | low for high, low in zip(usage.cost_pico_high, usage.cost_pico_low, strict=True)]
        versions: Sequence[int] = usage.price_versions
        if len(versions) == 1:
            versions = array("I", versions) * count
        assert len(costs) == len(versions) == count, (record.partition, record.sequence, len(costs), len(versions), count)
        events = everything if count == total else [everything[index] for index in indexes]
        currency_of = {account.tenant_id: account.currency for account in record.accounts}
        if len(set(currency_of.values())) == 1:
            self.currencies.repeat(record.accounts[0].currency, count)
        else:
            self.currencies.extend(currency_of[event.tenant_id] for event in events)
        self.events.extend(usage.batch, events)
        self.cost_pico += costs
        self.price_versions.extend(versions)
        self.producer_ids.repeat(batch.producer_id, count)
        first = first_number(batch)
        self.producer_sequences.extend([first + index for index in indexes] if first else array("Q", bytes(8 * count)))
        self.accepted_ms += array("q", [record.log_time_ms]) * count
        self.partitions += array("I", [record.partition]) * count
        self.generations.repeat(record.generation.hex(), count)
        self.sequences += array("Q", [record.sequence]) * count
        self.indexes.extend(indexes)
        self.versions += array("Q", [accepted.version]) * count

    def _reject(self, accepted: Accepted, batch: UsageBatch, usage_topic: str) -> None:
        usage = accepted.record.usage
        kept: list[Dropped] = [entry for entry in usage.dropped if entry.reason in _KEEP_PAYLOAD]
        if not kept:
            return
        first = first_number(batch)
        raw = RawUsageBatch.FromString(usage.batch).events
        offset = next((entry.offset for entry in accepted.record.inputs if entry.topic == usage_topic), NO_OFFSET)
        for entry in kept:
            event, payload = batch.events[entry.index], raw[entry.index]
            number = first + entry.index if first else 0
            self.rejected.append(
                (
                    *_position(accepted),
                    entry.index,
                    event.tenant_id,
                    event.request_id,
                    batch.producer_id,
                    number,
                    _DROPS[entry.reason],
                    entry.detail,
                    from_amount(entry.would_have_cost),
                    payload[:REJECTED_PAYLOAD_BYTES_MAX],
                    len(payload),
                    usage_topic,
                    offset,
                    accepted.record.log_time_ms,
                    accepted.version,
                )
            )

    def columns(self) -> Columns:
        return {
            **self.events.columns,
            "cost": self.cost_pico,
            "currency": self.currencies,
            "price_version": self.price_versions,
            "producer_id": self.producer_ids,
            "producer_sequence": self.producer_sequences,
            "accepted": self.accepted_ms,
            "ledger_partition": self.partitions,
            "generation": self.generations,
            "sequence": self.sequences,
            "record_index": self.indexes,
            "version": self.versions,
        }


def _usage(batch: Sequence[Accepted], usage_topic: str) -> dict[Table, Columns]:
    usage = _Usage()
    for accepted in batch:
        match accepted.record.WhichOneof("source"):
            case "usage":
                usage.take(accepted, usage_topic)
            case "rejected":
                usage.rejected.append(_rejected_input(accepted))
    return {tables.USAGE_EVENTS: usage.columns(), tables.REJECTED: _from_rows(tables.REJECTED, usage.rejected)}


def _rejected_input(accepted: Accepted) -> tuple[object, ...]:
    rejected = accepted.record.rejected
    where = (rejected.topic, rejected.offset, accepted.record.log_time_ms, accepted.version)
    what = ("undecodable", rejected.reason, 0, rejected.payload, rejected.payload_bytes)
    return (*_position(accepted), -1, "", "", "", 0, *what, *where)


def _position(accepted: Accepted) -> tuple[int, str, int]:
    record = accepted.record
    return record.partition, record.generation.hex(), record.sequence


def _generations(batch: Sequence[Accepted]) -> Columns:
    rows = []
    for accepted in batch:
        record = accepted.record
        if record.WhichOneof("source") == "founding":
            founding = record.founding
            rows.append(
                (
                    record.partition,
                    accepted.generation_ordinal,
                    record.generation.hex(),
                    founding.founded_ms,
                    founding.partitions,
                    founding.predecessor.generation.hex(),
                    founding.predecessor.sequence,
                    accepted.version,
                )
            )
    return _from_rows(tables.GENERATIONS, rows)


def _ledger_records(batch: Sequence[Accepted]) -> Columns:
    return _from_rows(
        tables.LEDGER_RECORDS,
        [
            (
                (record := accepted.record).partition,
                accepted.generation_ordinal,
                record.sequence,
                record.generation.hex(),
                accepted.record_hash,
                record.previous_hash,
                record.WhichOneof("source") or "",
                record.log_time_ms,
                accepted.ledger_offset,
                accepted.stored,
                accepted.redaction,
            )
            for accepted in batch
        ],
    )


def _stated_days(batch: Sequence[Accepted]) -> Columns:
    last: dict[tuple[str, int, int], int] = {}
    for accepted in batch:
        partition, version = accepted.record.partition, accepted.version
        for key in [total.key for total in accepted.record.totals]:
            last[key.tenant_id, key.minute // _DAY_MINUTES * _DAY_MINUTES * 60, partition] = version
    return _from_rows(tables.USAGE_DAYS_STATED, [(*key, version) for key, version in last.items()])


def _totals(batch: Sequence[Accepted]) -> Columns:
    last: dict[tuple[int, int, bytes], tuple[Accepted, WindowTotal]] = {}
    for accepted in batch:
        partition, ordinal = accepted.record.partition, accepted.generation_ordinal
        for total in accepted.record.totals:
            last[partition, ordinal, total.key.SerializeToString()] = (accepted, total)
    counts = attrgetter(*_TOTAL_COUNTS)
    rows = []
    for accepted, total in last.values():
        key = total.key
        units = sorted(total.units.items())
        rows.append(
            (
                key.tenant_id,
                key.minute * 60,
                key.project_id,
                key.model,
                OPERATIONS[key.operation],
                SERVICE_CLASSES[key.service_class],
                accepted.record.partition,
                accepted.record.generation.hex(),
                key.opened_sequence,
                key.price_version,
                *counts(total),
                [unit for unit, _ in units],
                [quantity for _, quantity in units],
                from_amount(total.cost),
                total.currency,
                accepted.record.sequence,
                accepted.version,
            )
        )
    return _from_rows(tables.USAGE_TOTALS, rows)


def build_accounts(batch: Sequence[Accepted]) -> Columns:
    """Each account as the last record of `batch` that states it does."""
    last = _last_by_key((account.tenant_id, accepted, account) for accepted in batch for account in accepted.record.accounts)
    return _from_rows(
        tables.ACCOUNTS,
        [
            (
                account.tenant_id,
                account.display_name,
                _STATUSES[account.status],
                account.currency,
                from_amount(account.credit),
                from_amount(account.spend),
                account.events,
                account.duplicates,
                account.conflicts,
                account.unrated_events,
                account.plan.plan_id,
                _MODES[account.plan.billing_mode],
                account.plan.prompt_tokens_max,
                from_amount(account.plan.credit_limit),
                account.log_time_ms,
                *_position(accepted),
                accepted.version,
                account.calendar.time_zone,
                list(account.calendar.from_month),
                list(account.calendar.offset_minutes),
                from_amount(account.leased),
            )
            for accepted, account in last
        ],
    )


def _commands(batch: Sequence[Accepted]) -> Columns:
    return _from_rows(
        tables.COMMANDS,
        [_command(accepted) for accepted in batch if accepted.record.WhichOneof("source") == "command"],
    )


def _command(accepted: Accepted) -> tuple[object, ...]:
    record = accepted.record
    applied = record.command
    try:
        command = Command.FromString(applied.command)
    except DecodeError:
        # Refused, and `refusal` says so; the bytes are in the archived record.
        command = Command()
    action = command.WhichOneof("action") or ""
    tenant_id, amount, currency = "", 0, ""
    match action:
        case "credit_grant":
            tenant_id, currency = command.credit_grant.tenant_id, command.credit_grant.currency
            amount = from_amount(command.credit_grant.amount)
        case "adjustment":
            tenant_id, currency = command.adjustment.tenant_id, command.adjustment.currency
            amount = sum(from_amount(line.cost) for line in command.adjustment.lines)
        case "tenant_upsert":
            tenant_id = command.tenant_upsert.tenant_id
        case "invoice_finalization":
            tenant_id = command.invoice_finalization.tenant_id
        case "key_upsert":
            tenant_id = command.key_upsert.key.tenant_id
        case "project_upsert":
            tenant_id = command.project_upsert.tenant_id
        case "budget_upsert":
            tenant_id = command.budget_upsert.tenant_id
        case "user_erasure":
            tenant_id = command.user_erasure.tenant_id
    if not applied.applied:
        # Not checked by anyone: a forged amount may be beyond what a column holds, and changed nothing.
        amount = 0
    return (
        *_position(accepted),
        command.command_id,
        action,
        tenant_id,
        command.issuer,
        command.reason,
        _time_in_range(command.issued_ms),
        int(applied.applied),
        applied.refusal,
        amount,
        currency,
        record.log_time_ms,
        accepted.version,
        applied.outcome,
    )


def _api_keys(batch: Sequence[Accepted]) -> Columns:
    last = _last_by_key((key.key_id, accepted, key) for accepted in batch for key in accepted.record.keys)
    return _from_rows(
        tables.API_KEYS,
        [
            (
                key.key_id,
                key.tenant_id,
                key.project_id,
                key.user_id,
                [_SCOPES[scope] for scope in key.scopes],
                _time_in_range(key.created_ms),
                _time_in_range(key.expires_ms),
                int(key.revoked),
                accepted.version,
            )
            for accepted, key in last
        ],
    )


def _producer_marks(batch: Sequence[Accepted]) -> Columns:
    last = _last_by_key(
        ((mark.producer_id, accepted.record.partition), accepted, mark)
        for accepted in batch
        for mark in accepted.record.producers
    )
    return _from_rows(
        tables.PRODUCER_MARKS,
        [
            (
                mark.producer_id,
                accepted.record.partition,
                mark.covered_sequence,
                mark.highest_sequence,
                [entry.first for entry in mark.beyond],
                [entry.last for entry in mark.beyond],
                mark.seen_ms,
                mark.missing_since_ms,
                accepted.version,
            )
            for accepted, mark in last
        ],
    )


def _time_in_range(time_ms: int) -> int:
    """A time that nobody checked before it stood in a record, held to what the column can keep."""
    return min(max(time_ms, 0), TIME_MS_MAX)
