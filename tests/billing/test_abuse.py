"""The abuse rules: raised with evidence, quiet while cooling down, silent on ordinary use."""

from __future__ import annotations

from dataclasses import replace

import pytest

from billing.v1 import alert_pb2 as alerts
from billing.v1 import usage_pb2 as u
from billing.v1.account_pb2 import Plan
from tests.billing.ledgers import NOW_MS, PLAN, Ledger, batch, tenants_in, usage

A, B = tenants_in(1, 2)
MINUTE_MS = 60_000


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    made.price()
    made.tenant(A, Plan(prompt_tokens_max=1_000, burst_tokens_floor=1_000, burst_factor=5, duplicate_flood_events=3))
    return made


def raised(ledger: Ledger, value: bytes, log_time_ms: int = NOW_MS) -> list[alerts.Alert]:
    return list(ledger.usage(value, log_time_ms).record.alerts)


def test_an_oversized_prompt_is_raised_with_its_request_and_figures(ledger: Ledger) -> None:
    refused = usage("big", A, uncached_input_tokens=5_000, outcome=u.OUTCOME_REJECTED)
    (alert,) = raised(ledger, batch([usage("small", A), refused]))
    assert alert.rule == alerts.ALERT_RULE_PROMPT_OVER_LIMIT
    assert list(alert.request_ids) == ["big"]
    assert dict(alert.figures) == {"prompt_tokens": 5_000, "limit": 1_000, "requests": 1}
    assert alert.alert_id
    assert alert.position.sequence == ledger.state.sequence


def test_a_prompt_that_a_gateway_refused_by_its_own_limit_is_raised_too(ledger: Ledger) -> None:
    ledger.tenant(B, PLAN)
    refusal = {"outcome": u.OUTCOME_REJECTED, "refusal_reason": u.REFUSAL_REASON_PROMPT_TOO_LARGE}
    (alert,) = raised(ledger, batch([usage("big", B, **refusal)]))
    assert (alert.rule, alert.tenant_id) == (alerts.ALERT_RULE_PROMPT_OVER_LIMIT, B)
    # Whatever a ledger was founded with, the step goes on.
    founded = Ledger(settings=replace(ledger.settings, default_prompt_tokens_max=2**64 - 1))
    assert founded.usage(batch([usage("big", B, **refusal)])).record.alerts[-1].figures["limit"] == 2**63 - 1


def test_a_rule_is_quiet_about_a_tenant_while_it_cools_down(ledger: Ledger) -> None:
    def big(request_id: str, log_time_ms: int) -> list[alerts.Alert]:
        return raised(ledger, batch([usage(request_id, A, uncached_input_tokens=5_000)]), log_time_ms)

    cooldown_ms = ledger.settings.alert_cooldown_ms
    assert len(big("b1", NOW_MS)) == 1
    assert big("b2", NOW_MS + cooldown_ms - 1) == []
    assert len(big("b3", NOW_MS + cooldown_ms)) == 1
    assert ledger.replayed().digest() == ledger.state.digest()


def test_a_burst_over_the_baseline_is_raised_and_steady_use_is_not(ledger: Ledger) -> None:
    start_ms = NOW_MS - 20 * MINUTE_MS
    steady = [usage(f"s{n}", A, uncached_input_tokens=900, started_ms=1, ended_ms=start_ms + n * MINUTE_MS) for n in range(10)]
    assert raised(ledger, batch(steady)) == []
    burst = [usage(f"b{n}", A, uncached_input_tokens=1_000, ended_ms=NOW_MS - 5 * MINUTE_MS, started_ms=1) for n in range(20)]
    (alert,) = raised(ledger, batch(burst))
    assert alert.rule == alerts.ALERT_RULE_TOKEN_BURST
    assert alert.figures["minute_tokens"] == 20 * 1_010
    assert 0 < alert.figures["baseline"] < 910


def test_a_new_tenant_has_no_baseline_to_burst(ledger: Ledger) -> None:
    burst = [usage(f"b{n}", A, uncached_input_tokens=1_000) for n in range(50)]
    assert raised(ledger, batch(burst)) == []


def test_a_duplicate_flood_is_raised_and_a_single_retry_is_not(ledger: Ledger) -> None:
    value = batch([usage("r1", A), usage("r2", A)])
    raised(ledger, value)
    assert raised(ledger, value) == []
    (alert,) = raised(ledger, value)
    assert (alert.rule, alert.figures["duplicates"]) == (alerts.ALERT_RULE_DUPLICATE_FLOOD, 4)
    assert set(alert.request_ids) == {"r1", "r2"}


def test_unknown_tenants_models_and_times_are_raised(ledger: Ledger) -> None:
    (unknown,) = raised(ledger, batch([usage("r1", B)]))
    assert (unknown.rule, unknown.tenant_id) == (alerts.ALERT_RULE_UNKNOWN_TENANT, B)
    (model,) = raised(ledger, batch([usage("r2", A, model="nobody-prices-me")]))
    assert (model.rule, model.labels["model"]) == (alerts.ALERT_RULE_UNKNOWN_MODEL, "nobody-prices-me")
    (future,) = raised(ledger, batch([usage("r3", A, ended_ms=NOW_MS + 10 * MINUTE_MS)]))
    assert (future.rule, future.figures["ahead_ms"]) == (alerts.ALERT_RULE_FUTURE_USAGE, 10 * MINUTE_MS)


def test_a_conflict_is_raised(ledger: Ledger) -> None:
    raised(ledger, batch([usage("r1", A)]))
    (alert,) = raised(ledger, batch([usage("r1", A, output_tokens=11)]))
    assert (alert.rule, list(alert.request_ids)) == (alerts.ALERT_RULE_CONFLICT, ["r1"])
