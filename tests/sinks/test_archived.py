"""What the archive says of founding, plans and registrations: as the ledger stated it last."""

from __future__ import annotations

import pytest

from billing.founding import LedgerSettings
from billing.ledger_rules import rules_of
from billing.rule_limits import rule_limits
from billing.v1.account_pb2 import Plan, ProducerRegistration
from billing.v1.command_pb2 import ProducerUpsert, RulesChange
from sinks import archived
from sinks.audit import audit
from sinks.engines.chdb import ChdbEngine
from sinks.follow import feed
from sinks.recompute import Recomputed
from tests.billing.ledgers import KEYS, NOW_MS, PARTITIONS, Ledger, batch, tenants_in, usage

ONE, TWO, THREE = tenants_in(1)


@pytest.fixture
def ledger() -> Ledger:
    rules = rule_limits({"refused_requests": 7})
    settings = LedgerSettings(partitions=PARTITIONS, dedupe_key=b"k" * 32, default_rules=rules, registered_producers_only=True)
    made = Ledger(settings=settings)
    made.price()
    return made


def register(ledger: Ledger, at_ms: int, producer_id: str, **said: object) -> None:
    registration = ProducerRegistration(producer_id=producer_id, **said)  # type: ignore[arg-type]
    record = ledger.command(at_ms, producer_upsert=ProducerUpsert(registration=registration)).record
    assert record.command.applied


def test_where_nothing_is_written_nothing_is_known(engine: ChdbEngine) -> None:
    assert archived.founding(engine) is None
    assert archived.rules(engine) is None
    assert archived.plan(engine, ONE) is None
    assert archived.registrations(engine) == []


def test_founding_and_plans_are_those_that_hold(engine: ChdbEngine, ledger: Ledger) -> None:
    ledger.tenant(ONE, Plan(plan_id="first", rules=rule_limits({"key_places_max": 2})))
    ledger.tenant(ONE, Plan(plan_id="second", rules=rule_limits({"key_places_max": 3})))
    ledger.tenant(TWO, Plan(plan_id="other"))
    feed(engine, ledger.stored, KEYS.seal_key)
    founding, plan = archived.founding(engine), archived.plan(engine, ONE)
    assert founding is not None
    assert founding == ledger.state.settings
    assert founding.default_plan.rules.refused_requests == 7
    assert plan is not None
    assert (plan.plan_id, plan.rules.key_places_max) == ("second", 3)
    assert archived.plan(engine, "' OR 1 = 1 --") is None


def test_figures_of_rules_are_those_of_the_last_command(engine: ChdbEngine, ledger: Ledger) -> None:
    for change in (RulesChange(burst_factor=3), RulesChange(drift_millionths=5), RulesChange(burst_factor=2**31)):
        ledger.command(rules_change=change)
    feed(engine, ledger.stored, KEYS.seal_key)
    rules, founding = archived.rules(engine), archived.founding(engine)
    assert (rules, founding) == (rules_of(ledger.state.settings), ledger.records()[0].founding)
    assert rules is not None
    assert (rules.default_plan.burst_factor, rules.drift_millionths) == (3, 5)
    assert audit(engine, KEYS.seal_key).findings == []


def test_the_audit_names_figures_of_rules_that_no_command_gave(ledger: Ledger) -> None:
    ledger.command(rules_change=RulesChange(burst_factor=3))
    recomputed = Recomputed(1)
    for record in ledger.records():
        if record.command.HasField("rules"):
            record.command.rules.default_plan.burst_factor = 4
        recomputed.take(record)
    assert [finding.kind for finding in recomputed.findings] == ["rules_differ"]


def test_registrations_say_since_when_and_who_was_heard_of(engine: ChdbEngine, ledger: Ledger) -> None:
    second_ms = 1_000
    register(ledger, NOW_MS, "gateway-*", all_tenants=True, unsigned=True)
    register(ledger, NOW_MS + second_ms, "batch", tenant_ids=[ONE], unsigned=True)
    register(ledger, NOW_MS + 2 * second_ms, "batch", tenant_ids=[ONE, TWO], unsigned=True)
    register(ledger, NOW_MS + 3 * second_ms, "old", tenant_ids=[TWO])
    register(ledger, NOW_MS + 4 * second_ms, "old", revoked=True)
    for number, producer_id in enumerate(("gateway-1", "gateway-2", "stranger")):
        at_ms = NOW_MS + (10 + number) * second_ms
        ledger.usage(batch([usage(producer_id, ONE, ended_ms=at_ms)], producer_id, 1, 1), at_ms)
    feed(engine, ledger.stored, KEYS.seal_key)
    rows = {row.registration.producer_id: row for row in archived.registrations(engine)}
    assert list(rows) == ["*", "batch", "gateway-*", "old"]
    founded_ms = ledger.records()[0].log_time_ms
    assert {name: (row.since_ms, row.changed_ms) for name, row in rows.items()} == {
        "*": (founded_ms, founded_ms),
        "batch": (NOW_MS + second_ms, NOW_MS + 2 * second_ms),
        "gateway-*": (NOW_MS, NOW_MS),
        "old": (NOW_MS + 4 * second_ms, NOW_MS + 4 * second_ms),
    }
    assert rows["*"].registration.revoked
    assert list(rows["batch"].registration.tenant_ids) == [ONE, TWO]
    assert rows["old"].registration.revoked
    assert (rows["gateway-*"].producers, rows["gateway-*"].seen_ms) == (2, NOW_MS + 11 * second_ms)
    assert (rows["batch"].producers, rows["batch"].seen_ms) == (0, 0)
    # Refused: its numbers are not taken, so there is nothing to be heard of.
    assert rows["*"].producers == 0
