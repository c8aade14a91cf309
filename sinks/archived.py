"""What stands in archived ledger records and in no column of its own: how the ledger was founded, its figures of rules, a
tenant's whole plan, who is registered to report usage.

Promise: it is what the ledger stated last, as far as the sink has written. Few records are fetched: those that say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from billing.ledger_rules import rules_of
from billing.registrations import Registrations
from billing.v1.account_pb2 import Plan, ProducerRegistration
from billing.v1.ledger_pb2 import Founding, LedgerRecord, LedgerRules
from sinks.engine import Parameter, Reader

__all__ = ["RegistrationRow", "founding", "plan", "registrations", "rules"]

_QUERY_TIMEOUT_S = 120.0
# What concerns everyone is stated in every partition.
_ONE_PARTITION = "ledger_partition = (SELECT min(ledger_partition) FROM sink_positions)"
_FOUNDINGS = "sequence = 0"
_APPLIED = f"""(generation, sequence) IN (SELECT generation, sequence FROM commands FINAL
WHERE {_ONE_PARTITION} AND action = {{action:String}} AND applied = 1)"""  # noqa: S608  no text of others


@dataclass(frozen=True, slots=True)
class RegistrationRow:
    """A registration of a producer, or of all whose IDs begin so, as it holds."""

    registration: ProducerRegistration
    # Log time: since when it is registered, or revoked; and when it was given last.
    since_ms: int
    changed_ms: int
    # Producers that it holds for and that were heard of, and when one of them was last; 0: never.
    producers: int
    seen_ms: int


def founding(reader: Reader) -> Founding | None:
    """With what the ledger was founded; None: no record of it is written yet."""
    records = _records(reader, f"{_ONE_PARTITION} AND {_FOUNDINGS}")
    return records[-1].founding if records else None


def rules(reader: Reader) -> LedgerRules | None:
    """The ledger's own figures of rules as they hold, of the partition that is looked at; None: no record is written yet."""
    holds = None
    for record in _records(reader, f"{_ONE_PARTITION} AND ({_FOUNDINGS} OR {_APPLIED})", {"action": "rules_change"}):
        holds = rules_of(record.founding) if record.HasField("founding") else record.command.rules
    return holds


def plan(reader: Reader, tenant_id: str) -> Plan | None:
    """The plan of a tenant; None: there is no such tenant."""
    records = _records(
        reader,
        "(ledger_partition, generation, sequence) IN (SELECT ledger_partition, generation, sequence FROM accounts FINAL "
        "WHERE tenant_id = {tenant:String})",
        {"tenant": tenant_id},
    )
    return next((account.plan for record in records for account in record.accounts if account.tenant_id == tenant_id), None)


def registrations(reader: Reader) -> list[RegistrationRow]:
    """Who is registered, by name; none: everybody's usage is taken."""
    known, since_ms, changed_ms = Registrations(), dict[str, int](), dict[str, int]()
    for record in _records(reader, f"{_ONE_PARTITION} AND ({_FOUNDINGS} OR {_APPLIED})", {"action": "producer_upsert"}):
        is_command = record.WhichOneof("source") == "command"
        for stated in record.registrations:
            name, before = stated.producer_id, known.get(stated.producer_id)
            if before is None or before.revoked != stated.revoked:
                since_ms[name] = record.log_time_ms
            if before is None or is_command:
                changed_ms[name] = record.log_time_ms
            known.set(stated)
    seen_ms: dict[str, list[int]] = {}
    for producer_id, at_ms in _seen(reader):
        found = known.find(producer_id)
        if found is not None:
            seen_ms.setdefault(found.producer_id, []).append(at_ms)
    return [
        RegistrationRow(each, since_ms[name], changed_ms[name], len(heard := seen_ms.get(name, [])), max(heard, default=0))
        for each in known.all()
        for name in [each.producer_id]
    ]


def _records(reader: Reader, condition: str, parameters: Mapping[str, Parameter] | None = None) -> list[LedgerRecord]:
    """In the order of the ledger."""
    rows = reader.query(
        f"SELECT hex(record) FROM ledger_records FINAL WHERE {condition} "  # noqa: S608  conditions of ours
        "ORDER BY ledger_partition, generation_ordinal, sequence",
        parameters,
        timeout_s=_QUERY_TIMEOUT_S,
    ).rows
    return [LedgerRecord.FromString(bytes.fromhex(cast("str", stored))) for (stored,) in rows]


def _seen(reader: Reader) -> list[tuple[str, int]]:
    sql = "SELECT producer_id, max(toUnixTimestamp64Milli(seen)) FROM producer_marks FINAL GROUP BY producer_id"
    return cast("list[tuple[str, int]]", reader.query(sql, timeout_s=_QUERY_TIMEOUT_S).rows)
