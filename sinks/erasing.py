"""Takes erased users out of what was written before their erasure.

`erase_pending` does, for each tenant with an erasure that is not over:
 1. find the user among the tenant's users here, by digest: the ID itself stands in no erasure.
 2. write again, without the user, every archived record that names one, and its rows: they replace the old ones by key, so no
    query sees these any more.
 3. drop what was replaced from the disk: small tables are merged, of large ones the replaced rows are deleted by mutations,
    whose texts name the pseudonym alone.
 4. say in `erasures_done` that it is over.
A crash anywhere repeats it from 1; what was done is not found again. The sink goes on meanwhile. Rows that hold no name of a
user (totals, accounts, invoices) are not touched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from google.protobuf.message import DecodeError

from billing.erasures import Erasures, user_digests
from billing.key_ring import Keys
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import UsageEvent
from sinks import tables
from sinks.columns import Accepted, build_columns
from sinks.engine import Engine, Reader
from sinks.erasures import known_erasures, redacted
from sinks.errors import EngineUnavailable
from sinks.parameters import Parameter, bind

__all__ = ["Erasure", "erase_pending", "erasure_of_user", "rows_of_user"]

_LOG = logging.getLogger(__name__)

# Tables with rows that may name a user, or show where a user was.
_TABLES = (tables.LEDGER_RECORDS, tables.USAGE_EVENTS, tables.REJECTED, tables.ALERTS, tables.API_KEYS, tables.BUDGETS)
# Of these no more is kept than a merge may copy.
_SMALL = (tables.REJECTED, tables.ALERTS, tables.API_KEYS, tables.BUDGETS)
_PAGE_RECORDS = 50
_PAGE_ROWS = 10_000
# As many needles as ClickHouse looks for at once.
_NEEDLES_MAX = 250
_TIMEOUT_S = 120.0
_LOOK_S = 0.2
_PENDING = """
SELECT tenant_id, pseudonym, max(version) FROM erasures FINAL GROUP BY tenant_id, pseudonym
HAVING (tenant_id, pseudonym, max(version)) NOT IN (SELECT tenant_id, pseudonym, version FROM erasures_done FINAL)
ORDER BY tenant_id, pseudonym
"""
_RECORDS = """
SELECT ledger_partition, generation_ordinal, sequence, hex(record_hash), ledger_offset, hex(record) FROM ledger_records FINAL
WHERE (ledger_partition, generation_ordinal, sequence) > ({partition:UInt32}, {ordinal:UInt32}, {sequence:UInt64})
AND position(record, {tenant:String}) > 0 AND multiSearchAny(record, {needles:Array(String)})
ORDER BY ledger_partition, generation_ordinal, sequence LIMIT {limit:UInt32}
"""
_REJECTED = """
SELECT ledger_partition, generation, sequence, record_index, hex(payload) FROM rejected FINAL
WHERE (ledger_partition, generation, sequence, record_index)
> ({partition:UInt32}, {generation:String}, {sequence:UInt64}, {index:Int64}) AND tenant_id = {tenant:String}
ORDER BY ledger_partition, generation, sequence, record_index LIMIT {limit:UInt32}
"""
_USERS = """
SELECT DISTINCT user_id FROM (
SELECT user_id FROM usage_events WHERE tenant_id = {tenant:String} UNION ALL
SELECT user_id FROM api_keys WHERE tenant_id = {tenant:String} UNION ALL
SELECT user_id FROM budgets WHERE tenant_id = {tenant:String} UNION ALL
SELECT label_values[indexOf(label_names, 'user_id')] FROM alerts WHERE tenant_id = {tenant:String}
) WHERE user_id > {after:String} ORDER BY user_id LIMIT {limit:UInt32}
"""
# A budget's key names its user: nothing replaces the row, so it is marked first.
_MARK_BUDGETS = """
INSERT INTO budgets SELECT * REPLACE (2 AS gone) FROM budgets FINAL
WHERE tenant_id = {tenant:String} AND user_id IN {users:Array(String)}
"""
_DROP_BUDGETS = "ALTER TABLE budgets DELETE WHERE gone = 2 SETTINGS mutations_sync = 2"
# Of a record what FINAL shows stays, of an event the row of the pseudonym.
_DROP_RECORDS = """
ALTER TABLE ledger_records DELETE WHERE
(ledger_partition, generation_ordinal, sequence) IN
(SELECT ledger_partition, generation_ordinal, sequence FROM ledger_records WHERE redaction != '')
AND (ledger_partition, generation_ordinal, sequence, redaction) NOT IN
(SELECT ledger_partition, generation_ordinal, sequence, redaction FROM ledger_records FINAL)
"""
_DROP_EVENTS = """
ALTER TABLE usage_events DELETE WHERE tenant_id = {tenant:String} AND user_id != {pseudonym:String}
AND (request_id, version) IN
(SELECT request_id, version FROM usage_events WHERE tenant_id = {tenant:String} AND user_id = {pseudonym:String})
"""
_MUTATIONS = """
SELECT table, latest_fail_reason FROM system.mutations
WHERE database = currentDatabase() AND table IN ('ledger_records', 'usage_events') AND NOT is_done ORDER BY create_time
"""
_COUNTS = {
    "usage_events": "usage_events FINAL WHERE tenant_id = {tenant:String} AND user_id = {user:String}",
    "rejected": "rejected FINAL WHERE tenant_id = {tenant:String} AND position(payload, {user:String}) > 0",
    "alerts": "alerts FINAL WHERE tenant_id = {tenant:String} AND has(label_values, {user:String})",
    "api_keys": "api_keys FINAL WHERE tenant_id = {tenant:String} AND user_id = {user:String}",
    "budgets": "budgets FINAL WHERE tenant_id = {tenant:String} AND user_id = {user:String}",
    "ledger_records": "ledger_records FINAL WHERE position(record, {tenant:String}) > 0 "
    "AND position(record, {user:String}) > 0",
}


@dataclass(frozen=True, slots=True)
class Erasure:
    """One that the ledger has applied."""

    pseudonym: str
    erased_ms: int
    # Nothing that was written before it names the user any more.
    done: bool


def erasure_of_user(reader: Reader, seal_keys: Keys, tenant_id: str, user_id: str) -> Erasure | None:
    """The last erasure of the user; None: there is none."""
    digests = user_digests(seal_keys, tenant_id, user_id)
    pending = {(tenant, pseudonym) for tenant, pseudonym, _ in reader.query(_PENDING).rows}
    rows = reader.query(
        "SELECT pseudonym, user_digest, toUnixTimestamp64Milli(erased) FROM erasures FINAL "
        "WHERE tenant_id = {tenant:String} ORDER BY version DESC",
        {"tenant": tenant_id},
    ).rows
    for pseudonym, digest, erased_ms in rows:
        if bytes.fromhex(str(digest)) in digests:
            return Erasure(str(pseudonym), cast("int", erased_ms), (tenant_id, pseudonym) not in pending)
    return None


def rows_of_user(reader: Reader, tenant_id: str, user_id: str) -> dict[str, int]:
    """By table, how many rows name the user. Of rejected and ledger_records at most so many: texts are only searched."""
    names = {"tenant": tenant_id, "user": user_id}
    return {
        table: cast("int", reader.query(f"SELECT count() FROM {where}", names, timeout_s=_TIMEOUT_S).rows[0][0])  # noqa: S608
        for table, where in _COUNTS.items()
    }


def erase_pending(
    engine: Engine,
    seal_keys: Keys,
    stopped: Callable[[], bool] = lambda: False,
    *,
    usage_topic: str = "usage.events",
) -> bool:
    """Finish every erasure that the database knows; True: none is left.

    Belongs beside the writer, which leaves out who was erased from then on. Raises EngineError; then call it again.
    """
    pending: dict[str, list[tuple[str, int]]] = {}
    for tenant_id, pseudonym, version in engine.query(_PENDING).rows:
        pending.setdefault(str(tenant_id), []).append((str(pseudonym), cast("int", version)))
    for tenant_id, asked in pending.items():
        erasures = known_erasures(engine, seal_keys)
        users = [user for user in _users(engine, tenant_id) if erasures.pseudonym_of(tenant_id, user)]
        records = _rewrite(engine, seal_keys, erasures, tenant_id, users, usage_topic, stopped)
        if records is None:
            return False
        _drop(engine, tenant_id, [pseudonym for pseudonym, _ in asked])
        if not _mutated(engine, stopped):
            return False
        done_ms = time.time_ns() // 1_000_000
        rows = [(tenant_id, pseudonym, done_ms, version) for pseudonym, version in asked]
        columns = dict(zip(tables.ERASURES_DONE.columns, zip(*rows, strict=True), strict=True))
        engine.insert(tables.ERASURES_DONE, columns)
        _LOG.info("%d erasure(s) of users of tenant %s are over: %d records were rewritten", len(asked), tenant_id, records)
    return True


def _users(reader: Reader, tenant_id: str) -> Iterator[str]:
    """Every user of the tenant that a row names, each at least once."""
    after = ""
    while True:
        found = reader.query(_USERS, {"tenant": tenant_id, "after": after, "limit": _PAGE_ROWS}, timeout_s=_TIMEOUT_S).rows
        for [user] in found:
            yield str(user)
        if len(found) < _PAGE_ROWS:
            break
        after = str(found[-1][0])
    place: dict[str, int | str] = {"partition": 0, "generation": "", "sequence": 0, "index": -1}
    while True:
        rows = reader.query(_REJECTED, {"tenant": tenant_id, "limit": _PAGE_ROWS, **place}, timeout_s=_TIMEOUT_S).rows
        for row in rows:
            try:
                yield UsageEvent.FromString(bytes.fromhex(str(row[4]))).user_id
            except DecodeError:
                # Cut at its bound, or never an event.
                continue
        if len(rows) < _PAGE_ROWS:
            return
        place = dict(zip(place, cast("tuple[int | str, ...]", rows[-1][:4]), strict=True))


def _rewrite(
    engine: Engine,
    seal_keys: Keys,
    erasures: Erasures,
    tenant_id: str,
    users: Sequence[str],
    usage_topic: str,
    stopped: Callable[[], bool],
) -> int | None:
    """Write each archived record and its rows without those who were erased; how many records, or None: it was stopped."""
    needles = [*users, *erasures.keys_of(tenant_id)]
    rewritten = 0
    for begin in range(0, len(needles), _NEEDLES_MAX):
        for page in _records(engine, tenant_id, needles[begin : begin + _NEEDLES_MAX]):
            if stopped():
                return None
            batch = [found for accepted in page if (found := redacted(accepted, erasures, seal_keys)) is not None]
            for table, columns in build_columns(batch, usage_topic):
                if table in _TABLES:
                    engine.insert(table, columns)
            rewritten += len(batch)
    for begin in range(0, len(users), _NEEDLES_MAX):
        engine.execute(bind(_MARK_BUDGETS, {"tenant": tenant_id, "users": users[begin : begin + _NEEDLES_MAX]}))
    return rewritten


def _records(reader: Reader, tenant_id: str, needles: Sequence[str]) -> Iterator[list[Accepted]]:
    """Archived records that may name one of these, page by page."""
    place = {"partition": 0, "ordinal": 0, "sequence": 0}
    while True:
        parameters: dict[str, Parameter] = {"tenant": tenant_id, "needles": needles, "limit": _PAGE_RECORDS, **place}
        rows = reader.query(_RECORDS, parameters, timeout_s=_TIMEOUT_S).rows
        page = []
        for partition, ordinal, sequence, stored_hash, offset, stored in cast(
            "list[tuple[int, int, int, str, int, str]]", rows
        ):
            content = bytes.fromhex(stored)
            page.append(Accepted(LedgerRecord.FromString(content), content, bytes.fromhex(stored_hash), ordinal, offset))
            place = {"partition": partition, "ordinal": ordinal, "sequence": sequence}
        if page:
            yield page
        if len(page) < _PAGE_RECORDS:
            return


def _drop(engine: Engine, tenant_id: str, pseudonyms: Sequence[str]) -> None:
    """Let go of what was replaced: merges of small tables at once, mutations of large ones begin."""
    for table in _SMALL:
        engine.execute(f"OPTIMIZE TABLE {table.name} FINAL")
    engine.execute(_DROP_BUDGETS)
    engine.execute(_DROP_RECORDS)
    for pseudonym in pseudonyms:
        engine.execute(bind(_DROP_EVENTS, {"tenant": tenant_id, "pseudonym": pseudonym}))


def _mutated(reader: Reader, stopped: Callable[[], bool]) -> bool:
    """Wait for the mutations; False: it was stopped."""
    while rows := reader.query(_MUTATIONS).rows:
        for table, reason in rows:
            if reason:
                raise EngineUnavailable(f"erased users are still in parts of {table} that were replaced: {reason}")
        if stopped():
            return False
        time.sleep(_LOOK_S)
    return True
