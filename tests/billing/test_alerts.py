"""The life of alerts: raised once, told sparingly, acknowledged, resolved; and the same after a replay and from disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from billing import replay
from billing.amounts import to_amount
from billing.founding import found_again
from billing.rule_limits import rule_limits
from billing.state import LedgerState, MemorySeenKeys
from billing.v1 import alert_pb2 as a
from billing.v1 import usage_pb2 as u
from billing.v1.account_pb2 import ACCOUNT_STATUS_ACTIVE, BILLING_MODE_PREPAID, Plan, RuleAction
from billing.v1.alert_pb2 import Alert
from billing.v1.command_pb2 import AlertAcknowledgement, CreditGrant, TenantUpsert
from stream_processors.local_store import Acknowledged, LocalStore
from tests.billing.ledgers import KEYS, NOW_MS, Ledger, batch, tenants_in, usage

A, B = tenants_in(1, 2)
COOLDOWN_MS, RESOLVE_MS = 10 * 60_000, 15 * 60_000


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    made.price()
    made.tenant(A, Plan(prompt_tokens_max=1_000))
    return made


def oversized(ledger: Ledger, request_id: str, log_time_ms: int, tokens: int = 5_000) -> list[Alert]:
    event = usage(request_id, A, uncached_input_tokens=tokens)
    return list(ledger.usage(batch([event]), log_time_ms).record.alerts)


def test_an_alert_is_raised_updated_once_a_cool_down_and_resolved_when_it_is_quiet(ledger: Ledger) -> None:
    [raised] = oversized(ledger, "r1", NOW_MS)
    assert (raised.state, raised.revision, raised.raised_ms) == (a.ALERT_STATE_RAISED, 1, NOW_MS)
    quiet = [oversized(ledger, f"q{second}", NOW_MS + second * 1_000) for second in range(1, 600, 7)]
    assert not any(quiet), "no storm"
    [updated] = oversized(ledger, "r2", NOW_MS + COOLDOWN_MS, 7_000)
    assert (updated.alert_id, updated.state, updated.revision) == (raised.alert_id, a.ALERT_STATE_UPDATED, 2)
    assert (list(updated.request_ids), updated.figures["prompt_tokens"]) == (["r2"], 7_000)
    assert not ledger.tick(NOW_MS + COOLDOWN_MS + RESOLVE_MS - 1).record.alerts
    [resolved] = ledger.tick(NOW_MS + COOLDOWN_MS + RESOLVE_MS).record.alerts
    assert (resolved.alert_id, resolved.state, resolved.revision) == (raised.alert_id, a.ALERT_STATE_RESOLVED, 3)
    assert not list(ledger.state.alerts.all())
    [again] = oversized(ledger, "r3", NOW_MS + COOLDOWN_MS + RESOLVE_MS + 1)
    assert again.alert_id != raised.alert_id
    assert ledger.replayed().digest() == ledger.state.digest()


def test_what_is_told_is_ordered_by_its_record_and_place(ledger: Ledger) -> None:
    events = [usage(f"{number}", A, model=f"m{number}", uncached_input_tokens=5_000) for number in range(3)]
    told = ledger.usage(batch(events)).record.alerts
    assert [(alert.position.sequence, alert.index) for alert in told] == [(ledger.state.sequence, n) for n in range(4)]
    assert len({alert.alert_id for alert in told}) == 4


def test_what_moved_and_was_told_by_one_record_is_after_a_replay_what_was_told(ledger: Ledger) -> None:
    """The first minute of a batch only moves the figures of an active alert, its second makes it critical."""
    ledger.tenant(A, Plan(billing_mode=BILLING_MODE_PREPAID))
    ledger.command(credit_grant=CreditGrant(tenant_id=A, amount=to_amount(1_000 * 1_400_000), currency="USD"))
    minutes_ms = [NOW_MS + number * 60_000 for number in range(-20, 0)]
    for number, minute_ms in enumerate(minutes_ms[:8]):
        ledger.usage(batch([usage(f"r{number}", A, started_ms=1, ended_ms=minute_ms)]), NOW_MS + number)
    moderate = usage("moderate", A, started_ms=1, ended_ms=minutes_ms[8])
    heavy = usage("heavy", A, started_ms=1, ended_ms=minutes_ms[9], uncached_input_tokens=56_000)
    record = ledger.usage(batch([moderate, heavy]), NOW_MS + 60_000).record
    [told] = [alert for alert in record.alerts if alert.rule == a.ALERT_RULE_BURN_RATE]
    assert (told.state, told.severity, told.revision) == (a.ALERT_STATE_UPDATED, a.SEVERITY_CRITICAL, 2)
    assert not record.alert_states
    assert ledger.replayed().digest() == ledger.state.digest()


def test_subjects_beyond_a_few_share_one_alert(ledger: Ledger) -> None:
    for number in range(40):
        ledger.usage(batch([usage(f"{number}", A, model=f"m{number}")]), NOW_MS + number)
    subjects = [alert.subject for alert in ledger.state.alerts.all()]
    assert sorted(subjects) == sorted([f"m{number}" for number in range(8)] + ["(others)"])


def test_an_acknowledged_alert_is_told_when_it_is_over_and_not_before(ledger: Ledger) -> None:
    [raised] = oversized(ledger, "r1", NOW_MS)
    said = AlertAcknowledgement(alert_id=raised.alert_id, note="called them")
    [told] = ledger.command(NOW_MS + 1, issuer="ann", alert_acknowledgement=said).record.alerts
    assert (told.state, told.acknowledged_by, told.note) == (a.ALERT_STATE_ACKNOWLEDGED, "ann", "called them")
    assert oversized(ledger, "r2", NOW_MS + COOLDOWN_MS) == []
    [resolved] = ledger.tick(NOW_MS + COOLDOWN_MS + RESOLVE_MS).record.alerts
    assert (resolved.state, resolved.acknowledged_by) == (a.ALERT_STATE_RESOLVED, "ann")
    refused = ledger.command(NOW_MS + 2, alert_acknowledgement=said).record.command
    assert "is not active here" in refused.refusal
    assert ledger.replayed().digest() == ledger.state.digest()


def test_active_alerts_are_on_disk_and_carried_on_when_a_ledger_is_founded_again(ledger: Ledger, tmp_path: Path) -> None:
    oversized(ledger, "r1", NOW_MS)
    oversized(ledger, "r2", NOW_MS + 6_000)
    ledger.usage(batch([usage("r3", A, api_key_id="k", region="r1"), usage("r4", A, api_key_id="k", region="r2")]))
    [active] = ledger.state.alerts.all()
    assert active.updated_ms == NOW_MS + 6_000
    store = LocalStore(tmp_path, 1)
    store.apply([Acknowledged(r, s, i) for i, (r, s) in enumerate(zip(ledger.records(), ledger.stored, strict=True))])
    store.close()
    store = LocalStore(tmp_path, 1)
    loaded = store.load()
    assert loaded is not None
    assert loaded.digest() == ledger.state.digest()
    store.close()
    record, stored = found_again(ledger.state, b"h" * 16, NOW_MS + 10_000, KEYS.seal_key, "test")
    state = LedgerState(MemorySeenKeys())
    replay.apply(state, record, stored)
    assert list(state.alerts.all()) == [active]
    assert list(state.places.all()) == list(ledger.state.places.all()) != []


def test_a_rule_acts_says_so_and_an_operator_lifts_it(ledger: Ledger) -> None:
    action = RuleAction(rule=a.ALERT_RULE_PROMPT_OVER_LIMIT, requests_per_minute=6, duration_ms=60_000)
    ledger.tenant(A, Plan(prompt_tokens_max=1_000, rules=rule_limits({}, [action])))
    result = ledger.usage(batch([usage("r1", A, uncached_input_tokens=5_000)])).record
    [alert] = result.alerts
    [account] = result.accounts
    [held] = account.restrictions
    assert (held.rule, held.alert_id, held.until_ms) == (alert.rule, alert.alert_id, NOW_MS + 60_000)
    assert (held.requests_per_minute, held.key_id) == (6, "")
    assert alert.action.startswith(f"gateways let 6 requests per minute of tenant {A} through until ")
    later = ledger.usage(batch([usage("r2", A)]), NOW_MS + 60_000).record
    assert not later.accounts[0].restrictions, "it has expired"
    ledger.usage(batch([usage("r3", A, uncached_input_tokens=5_000)]), NOW_MS + COOLDOWN_MS)
    assert ledger.state.accounts[A].restrictions
    lifted = ledger.command(NOW_MS + COOLDOWN_MS, tenant_upsert=TenantUpsert(tenant_id=A, status=ACCOUNT_STATUS_ACTIVE))
    assert not lifted.record.accounts[0].restrictions
    assert ledger.replayed().digest() == ledger.state.digest()


def test_a_key_from_many_places_is_restricted_alone(ledger: Ledger) -> None:
    action = RuleAction(rule=a.ALERT_RULE_KEY_PLACES, duration_ms=60_000)
    ledger.tenant(A, Plan(rules=rule_limits({"key_places_max": 2}, [action])))
    events = [usage(f"{n}", A, api_key_id="stolen", region=f"r{n}") for n in range(3)] + [usage("own", A, api_key_id="other")]
    record = ledger.usage(batch(events)).record
    [alert] = record.alerts
    assert (alert.rule, alert.subject, alert.figures["places"]) == (a.ALERT_RULE_KEY_PLACES, "stolen", 3)
    assert record.accounts[0].restrictions[0].key_id == "stolen"
    assert ledger.replayed().digest() == ledger.state.digest()


@pytest.mark.parametrize(
    ("values", "actions", "problem"),
    [
        ({"key_places": 1}, [], "key_places: no rule has such a figure"),
        ({"key_places_max": 16}, [], "key_places_max: 16"),
        ({"cancelled_percent": 101}, [], "cancelled_percent: 101"),
        ({}, [RuleAction(rule=99, duration_ms=1)], "actions: rule 99"),
        ({}, [RuleAction(rule=2)], "actions: duration_ms: 0"),
    ],
)
def test_figures_that_make_no_sense_are_refused(values: dict[str, int], actions: list[RuleAction], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        rule_limits(values, actions)


def test_drift_of_counts_is_raised_for_the_model_at_its_producer(ledger: Ledger) -> None:
    def told(backend_tokens: int, samples: int = 100) -> list[Alert]:
        drift = u.CountDrift(model="m", samples=samples, backend_tokens=backend_tokens, tokenizer_tokens=10_000)
        value = u.UsageBatch(schema_version=1, producer_id="gateway-1", count_drifts=[drift]).SerializeToString()
        return list(ledger.usage(value).record.alerts)

    assert told(10_200) == []
    assert told(10_300, samples=19) == []
    [alert] = told(9_700)
    assert (alert.rule, alert.tenant_id, alert.labels["model"]) == (a.ALERT_RULE_COUNTING_DRIFT, "", "m")
    assert (alert.figures["off_millionths"], alert.labels["producer_id"]) == (30_000, "gateway-1")
