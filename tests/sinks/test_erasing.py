"""Erasing a user: found nowhere in ClickHouse afterwards, no total, invoice or chain the worse, come what may."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from billing import chain
from billing.amounts import PICO, to_amount
from billing.erasures import user_digests
from billing.key_places import ADDRESS_ATTRIBUTE
from billing.v1.account_pb2 import ApiKey
from billing.v1.command_pb2 import BudgetUpsert, CreditGrant, InvoiceFinalization, KeyUpsert, UserErasure
from billing.v1.invoice_pb2 import ROUNDING_RULE_HALF_EVEN
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import UsageBatch, UsageEvent
from sinks import account_queries, erasing, queries, tables
from sinks.anchors import append_heads, read_anchors
from sinks.audit import audit
from sinks.engines.chdb import ChdbEngine
from sinks.erasing import erase_pending, erasure_of_user, rows_of_user
from sinks.errors import EngineUnavailable
from sinks.follow import feed
from sinks.invoices import invoices_of
from tests.billing.ledgers import KEYS, NOW_MS, SEAL_KEY, Ledger, batch, tenants_in, usage
from tests.sinks.emptying import empty_tables

ONE, TWO = tenants_in(1)[:2]
# Between the names stands what takes the user's place, so that what is ordered by name changes its order.
USER, OTHER = "maria.muster@example.org", "frank"
PSEUDONYM = "erased-" + "5a" * 16
NOVEMBER, DECEMBER, DAY_MS = 1_761_955_200_000, 1_764_547_200_000, 86_400_000


def of_user(request_id: str, tenant_id: str = ONE, user_id: str = USER, **fields: object) -> UsageEvent:
    attributes = {ADDRESS_ATTRIBUTE: f"{user_id} at home"}
    return usage(
        request_id, tenant_id, user_id=user_id, api_key_id="k1", client_request_id=user_id, attributes=attributes, **fields
    )


def filled(*, everywhere: bool = False) -> Ledger:
    """A ledger in which the user is wherever a user can be; `everywhere`: in the other tenant too."""
    ledger = Ledger()
    ledger.price()
    for tenant_id in (ONE, TWO):
        ledger.tenant(tenant_id)
        ledger.command(credit_grant=CreditGrant(tenant_id=tenant_id, amount=to_amount(PICO), currency="USD"))
    for user_id in (USER, OTHER):
        ledger.command(
            budget_upsert=BudgetUpsert(tenant_id=ONE, user_id=user_id, amount=to_amount(10**6), threshold_millionths=[500_000])
        )
    ledger.command(key_upsert=KeyUpsert(key=ApiKey(key_id="k1", tenant_id=ONE, user_id=USER, secret_hash=b"h" * 32)))
    first = batch([of_user("r1"), of_user("r2", user_id=OTHER), of_user("r3", TWO, USER if everywhere else "zoe")], "p", 1, 3)
    ledger.usage(first)
    ledger.usage(first)
    ledger.usage(batch([of_user("r1", output_tokens=11), of_user("bad", model="")], "p", 4, 5))
    unknown = UsageBatch(schema_version=99, events=[of_user("r9")])
    ledger.usage(unknown.SerializeToString())
    ledger.usage(batch([of_user("r4"), of_user("r5", user_id=OTHER)], "p", 6, 7))
    ledger.command(budget_upsert=BudgetUpsert(tenant_id=ONE, user_id=USER))
    return ledger


def invoiced(ledger: Ledger) -> Ledger:
    said = InvoiceFinalization(
        tenant_id=ONE,
        period_start_ms=NOVEMBER,
        series_prefix="INV",
        rounding_rule=ROUNDING_RULE_HALF_EVEN,
        currency_decimals=2,
    )
    assert ledger.command(DECEMBER + 5 * DAY_MS, invoice_finalization=said).record.command.applied
    return ledger


def erase(ledger: Ledger, log_time_ms: int = NOW_MS, key: bytes = KEYS.command_key) -> LedgerRecord:  # type: ignore[assignment]
    said = UserErasure(tenant_id=ONE, user_digest=user_digests(SEAL_KEY, ONE, USER)[0], pseudonym=PSEUDONYM, key_ids=["k1"])
    return ledger.command(log_time_ms, key, user_erasure=said, issuer="ann", reason="was asked to").record


def naming(engine: ChdbEngine, text: str) -> dict[str, int]:
    """By table, how many rows on the disk have it in any column, replaced ones too."""
    names = [
        str(name)
        for [name] in engine.query(
            "SELECT name FROM system.tables WHERE database = currentDatabase() AND engine != 'View' ORDER BY name"
        ).rows
    ]
    counts = {
        name: engine.query(
            f"SELECT count() FROM {name} WHERE position(toString(tuple(*)), {{text:String}}) > 0", {"text": text}
        )
        for name in [*names, "system.mutations"]
    }
    return {name: int(str(rows.rows[0][0])) for name, rows in counts.items() if rows.rows[0][0]}


@dataclass(frozen=True)
class Figures:
    """What nobody may see move."""

    balances: list[queries.Balance]
    usage: list[tuple[object, ...]]
    totals: list[tuple[object, ...]]
    invoices: list[bytes]
    costs: list[tuple[object, ...]]


def figures(engine: ChdbEngine) -> Figures:
    return Figures(
        queries.balances(engine),
        engine.query("SELECT tenant_id, request_id, cost, output_tokens FROM usage_events FINAL ORDER BY ALL").rows,
        engine.query("SELECT * FROM usage_totals FINAL ORDER BY ALL").rows,
        [issued.stored for issued in invoices_of(engine, ONE)],
        engine.query("SELECT tenant_id, amount, at FROM credit_grants FINAL ORDER BY ALL").rows,
    )


def test_the_user_is_found_nowhere_and_no_figure_moves(engine: ChdbEngine, tmp_path: Path) -> None:
    ledger = invoiced(filled())
    feed(engine, ledger.stored, KEYS.seal_key)
    anchors = tmp_path / "anchors.jsonl"
    append_heads(anchors, engine, KEYS.seal_key, NOW_MS)
    before = figures(engine)
    assert before.invoices
    assert naming(engine, USER).keys() == {
        table.name for table in (tables.USAGE_EVENTS, tables.REJECTED, tables.ALERTS, tables.API_KEYS, tables.BUDGETS)
    } | {"ledger_records"}
    assert rows_of_user(engine, ONE, USER)["usage_events"] == 2
    assert erasure_of_user(engine, SEAL_KEY, ONE, USER) is None

    assert erase(ledger).command.applied
    feed(engine, ledger.stored, KEYS.seal_key)
    assert naming(engine, USER) == {}
    assert figures(engine) == before
    report = audit(engine, KEYS.seal_key, anchors=read_anchors(anchors, KEYS.seal_key))
    assert (report.findings, report.anchors) == ([], 1)
    assert report.redacted == naming(engine, PSEUDONYM)["ledger_records"] - 1, "all that name it but the command's own"

    by_user = {row.group: row.events for row in queries.usage(engine, ONE, ("user",), 0, 2 * NOW_MS)}
    assert by_user == {(PSEUDONYM,): 2, (OTHER,): 2}
    assert [key.user_id for key in account_queries.keys(engine, ONE)] == [PSEUDONYM]
    assert [budget.user_id for budget in account_queries.budgets(engine, ONE)] == [OTHER]
    [[command]] = engine.query("SELECT concat(issuer, ': ', reason) FROM commands FINAL WHERE action = 'user_erasure'").rows
    assert command == "ann: was asked to"
    known = erasure_of_user(engine, SEAL_KEY, ONE, USER)
    assert known is not None
    assert (known.pseudonym, known.done) == (PSEUDONYM, True)


def test_what_comes_late_gets_the_pseudonym_and_is_charged_once(engine: ChdbEngine) -> None:
    ledger = filled()
    erase(ledger)
    feed(engine, ledger.stored, KEYS.seal_key)
    late = ledger.usage(batch([of_user("r4"), of_user("late")])).record
    assert late.usage.duplicates == 1
    ledger.command(key_upsert=KeyUpsert(key=ApiKey(key_id="k9", tenant_id=ONE, user_id=USER, secret_hash=b"h" * 32)))
    feed(engine, ledger.stored, KEYS.seal_key)
    assert naming(engine, USER) == {}
    [late_row] = queries.events(engine, ONE, ["late"])
    assert late_row.user_id == PSEUDONYM
    assert audit(engine, KEYS.seal_key).findings == []


def test_a_database_made_anew_from_the_log_is_the_same_to_the_byte(engine: ChdbEngine) -> None:
    ledger = filled()
    halves = len(ledger.stored) - 3
    feed(engine, ledger.stored[:halves], KEYS.seal_key)
    erase(ledger)
    ledger.usage(batch([of_user("late")]))
    feed(engine, ledger.stored, KEYS.seal_key)

    def content() -> dict[str, list[tuple[object, ...]]]:
        return {
            table.name: engine.query(f"SELECT * FROM {table.name} FINAL ORDER BY ALL").rows
            for table in tables.ALL_TABLES
            if table not in (tables.SINK_POSITIONS, tables.ERASURES_DONE, tables.LEDGER_RECORDS)
        } | {
            "records": engine.query("SELECT sequence, hex(record), hex(redaction) FROM ledger_records FINAL ORDER BY ALL").rows
        }

    first = content()
    empty_tables(engine)
    feed(engine, ledger.stored, KEYS.seal_key)
    assert content() == first
    assert naming(engine, USER) == {}


def test_another_tenants_user_of_the_same_name_is_left_alone_and_twice_is_once(engine: ChdbEngine) -> None:
    ledger = filled(everywhere=True)
    feed(engine, ledger.stored, KEYS.seal_key)
    erase(ledger)
    feed(engine, ledger.stored, KEYS.seal_key)
    assert [row.user_id for row in queries.events(engine, TWO)] == [USER]
    assert {row.user_id for row in queries.events(engine, ONE)} == {PSEUDONYM, OTHER}
    archived = engine.query("SELECT sequence, hex(record), hex(redaction) FROM ledger_records FINAL ORDER BY ALL").rows
    erase(ledger)
    feed(engine, ledger.stored, KEYS.seal_key)
    again = engine.query("SELECT sequence, hex(record), hex(redaction) FROM ledger_records FINAL ORDER BY ALL").rows
    assert again[: len(archived)] == archived
    assert audit(engine, KEYS.seal_key).findings == []


def test_a_forged_erasure_erases_nobody(engine: ChdbEngine) -> None:
    ledger = filled()
    assert not erase(ledger, key=b"x" * 32).command.applied
    feed(engine, ledger.stored, KEYS.seal_key)
    assert rows_of_user(engine, ONE, USER)["usage_events"] == 2
    assert engine.query("SELECT * FROM erasures").rows == []


def test_an_erasure_that_was_cut_off_is_finished(engine: ChdbEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = filled()
    feed(engine, ledger.stored, KEYS.seal_key)
    erase(ledger)
    with monkeypatch.context() as patch:
        patch.setattr(erasing, "_DROP_EVENTS", "ALTER TABLE nowhere DELETE WHERE {tenant:String} = {pseudonym:String}")
        with pytest.raises(Exception, match="nowhere"):
            feed(engine, ledger.stored, KEYS.seal_key)
    # No question finds the user any more; the disk may.
    assert [row.user_id for row in queries.events(engine, ONE) if row.user_id == USER] == []
    known = erasure_of_user(engine, SEAL_KEY, ONE, USER)
    assert known is not None
    assert not known.done
    assert not erase_pending(engine, KEYS.seal_key, lambda: True), "it was told to stop"
    assert erase_pending(engine, KEYS.seal_key)
    assert naming(engine, USER) == {}
    assert audit(engine, KEYS.seal_key).findings == []


def test_two_users_of_one_record_are_erased_one_after_the_other(engine: ChdbEngine) -> None:
    ledger = filled()
    erase(ledger)
    feed(engine, ledger.stored, KEYS.seal_key)
    other = "erased-" + "c3" * 16
    ledger.command(budget_upsert=BudgetUpsert(tenant_id=ONE, user_id=OTHER))
    ledger.command(user_erasure=UserErasure(tenant_id=ONE, user_digest=user_digests(SEAL_KEY, ONE, OTHER)[0], pseudonym=other))
    feed(engine, ledger.stored, KEYS.seal_key)
    assert naming(engine, USER) == naming(engine, OTHER) == {}
    assert {row.user_id for row in queries.events(engine, ONE)} == {PSEUDONYM, other}
    assert audit(engine, KEYS.seal_key).findings == []


def test_the_audit_names_what_was_changed_under_the_name_of_an_erasure(engine: ChdbEngine) -> None:
    ledger = filled()
    erase(ledger)
    feed(engine, ledger.stored, KEYS.seal_key)
    [[sequence, stored, stored_hash]] = engine.query(
        "SELECT sequence, hex(record), hex(record_hash) FROM ledger_records FINAL WHERE redaction != '' "
        "ORDER BY sequence DESC LIMIT 1"
    ).rows

    def kinds_with(record: LedgerRecord, key: bytes) -> set[str]:
        changed = record.SerializeToString()
        mark = chain.redaction(bytes.fromhex(str(stored_hash)), changed, key)
        engine.execute(
            f"ALTER TABLE ledger_records UPDATE record = unhex('{changed.hex()}'), redaction = unhex('{mark.hex()}') "
            f"WHERE sequence = {sequence} SETTINGS mutations_sync = 2"
        )
        return {finding.kind for finding in audit(engine, KEYS.seal_key).findings}

    record = LedgerRecord.FromString(bytes.fromhex(str(stored)))
    assert kinds_with(record, SEAL_KEY) == set(), "the negative control"
    assert "record_unreadable" in kinds_with(record, b"x" * 32)
    record.erased[:] = ["erased-" + "00" * 16]
    assert kinds_with(record, SEAL_KEY) == {"redacted_without_erasure"}


def test_the_sink_waits_for_a_mutation_that_fails(engine: ChdbEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasing, "_MUTATIONS", "SELECT 'usage_events' AS table, 'no space left' AS latest_fail_reason")
    ledger = filled()
    erase(ledger)
    with pytest.raises(EngineUnavailable, match="no space left"):
        feed(engine, ledger.stored, KEYS.seal_key)
    known = erasure_of_user(engine, SEAL_KEY, ONE, USER)
    assert known is not None
    assert not known.done
