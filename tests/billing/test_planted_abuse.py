"""Ten kinds of abuse, planted into a real service's hour: each is raised for whom it is, with its evidence, within a minute.

The trace is the Azure one (19,366 requests), spread over eight tenants of one partition, in batches of ten seconds; log time is
event time. As it is, the hour raises at most one alert. A negative control takes the plants' rules away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from billing.rule_limits import RULE_LIMIT_NAMES, rule_limits
from billing.v1 import alert_pb2 as a
from billing.v1 import usage_pb2 as u
from billing.v1.account_pb2 import (
    ACCOUNT_STATUS_SUSPENDED,
    BILLING_MODE_POSTPAID,
    BILLING_MODE_PREPAID,
    Amount,
    Plan,
    RuleLimits,
)
from billing.v1.alert_pb2 import Alert
from billing.v1.command_pb2 import CreditGrant, TenantUpsert
from taximeter.traces import Trace, read_trace
from tests.billing.ledgers import NOW_MS, Ledger, batch, tenants_in, usage
from tests.services import require

TRACE = Path(__file__).parents[3] / "shared" / "data" / "azure_llm_inference_2023_conv.csv"
ORDINARY, ABUSERS = tenants_in(1, 18)[:8], tenants_in(1, 18)[8:]
SLICE_MS = 10_000
# Ordinary for so long, then abuse.
PLANT_MS = 20 * 60_000
WITHIN_MS = 60_000
MICRO = 10**6


class Planted(NamedTuple):
    rule: int
    # The events of one slice that ends at the time given.
    events: Callable[[str, int], Sequence[u.UsageEvent]]
    figures: Sequence[str]
    credit_pico: int = 0


def _many(count: int, **fields: object) -> Callable[[str, int], Sequence[u.UsageEvent]]:
    return lambda tenant_id, at_ms: [_event(tenant_id, at_ms, n, **fields) for n in range(count)]


def _event(tenant_id: str, at_ms: int, number: int, **fields: object) -> u.UsageEvent:
    fields.setdefault("request_id", f"planted-{tenant_id}-{at_ms}-{number}")
    request_id = str(fields.pop("request_id"))
    return usage(request_id, tenant_id, **{"started_ms": at_ms - 500, "ended_ms": at_ms, "api_key_id": "k", **fields})


def _repeated(tenant_id: str, at_ms: int) -> Sequence[u.UsageEvent]:
    """A producer that sends the same again and again; the first is charged."""
    return [_event(tenant_id, NOW_MS, 0, request_id="again") for _ in range(400)]


def _conflicting(tenant_id: str, at_ms: int) -> Sequence[u.UsageEvent]:
    return [_event(tenant_id, NOW_MS, n, request_id="same", output_tokens=n + at_ms % 7) for n in range(30)]


def _places(tenant_id: str, at_ms: int) -> Sequence[u.UsageEvent]:
    return [_event(tenant_id, at_ms, n, attributes={"client.address": f"203.0.113.{n}"}) for n in range(12)]


PLANTED = [
    Planted(a.ALERT_RULE_PROMPT_OUTLIER, _many(1, uncached_input_tokens=120_000), ["prompt_tokens", "baseline"]),
    Planted(a.ALERT_RULE_TOKEN_BURST, _many(60, uncached_input_tokens=9_000), ["minute_tokens", "baseline"]),
    Planted(a.ALERT_RULE_REQUEST_BURST, _many(450), ["minute_requests", "baseline"]),
    Planted(a.ALERT_RULE_BURN_RATE, _many(10, output_tokens=10_000), ["minutes_left", "hour_cost_micros"], 10**12),
    Planted(a.ALERT_RULE_DUPLICATE_FLOOD, _repeated, ["duplicates", "limit"]),
    Planted(a.ALERT_RULE_CONFLICT_FLOOD, _conflicting, ["conflicts", "limit"]),
    Planted(a.ALERT_RULE_KEY_PLACES, _places, ["places", "limit"]),
    Planted(a.ALERT_RULE_CANCELLATIONS, _many(20, outcome=u.OUTCOME_CANCELLED), ["cancelled", "requests"]),
    Planted(
        a.ALERT_RULE_REFUSALS,
        _many(40, outcome=u.OUTCOME_REJECTED, refusal_reason=u.REFUSAL_REASON_RATE),
        ["refused", "limit"],
    ),
    Planted(a.ALERT_RULE_USAGE_AFTER_SUSPENSION, _many(3), ["requests", "since_ms"]),
]
# What some plants are besides: many requests are also many tokens, conflicts a conflict.
ALSO: dict[int, set[int]] = {a.ALERT_RULE_CONFLICT_FLOOD: {a.ALERT_RULE_CONFLICT}}


@pytest.fixture(scope="module")
def trace() -> Trace:
    require(TRACE.exists(), f"{TRACE.name} is not beside the repository, in shared/data")
    return read_trace(TRACE)


def run(trace: Trace, planted: Sequence[Planted], rules: RuleLimits, minutes: int) -> list[Alert]:
    """What is told, in `minutes` of the trace with the plants among it."""
    ledger = Ledger()
    ledger.price()
    for tenant_id in ORDINARY:
        ledger.tenant(tenant_id, Plan(billing_mode=BILLING_MODE_POSTPAID, burst_tokens_floor=1_000_000, burst_factor=10))
    for tenant_id, plant in zip(ABUSERS, planted, strict=False):
        mode = BILLING_MODE_PREPAID if plant.credit_pico else BILLING_MODE_POSTPAID
        plan = Plan(billing_mode=mode, rules=rules, burst_tokens_floor=1_000_000, burst_factor=10, duplicate_flood_events=1_000)
        ledger.tenant(tenant_id, plan)
        if plant.credit_pico:
            ledger.command(credit_grant=CreditGrant(tenant_id=tenant_id, currency="USD", amount=Amount(low=plant.credit_pico)))
    slices: defaultdict[int, list[u.UsageEvent]] = defaultdict(list)
    for row in trace.rows:
        if row.after_ms < minutes * 60_000:
            at_ms = NOW_MS + row.after_ms
            event = _event(
                ORDINARY[row.number % 8],
                at_ms,
                row.number,
                uncached_input_tokens=row.context_tokens,
                output_tokens=row.generated_tokens,
            )
            slices[row.after_ms // SLICE_MS].append(event)
    told: list[Alert] = []
    for number in range(minutes * 60_000 // SLICE_MS):
        end_ms = NOW_MS + (number + 1) * SLICE_MS
        events = list(slices[number])
        for tenant_id, plant in zip(ABUSERS, planted, strict=False):
            if (number + 1) * SLICE_MS <= PLANT_MS:
                # Ordinary until then: two requests each slice.
                events += [_event(tenant_id, end_ms - 1, n, uncached_input_tokens=300) for n in range(2)]
            else:
                events += plant.events(tenant_id, end_ms - 1)
        if number * SLICE_MS == PLANT_MS - 2 * WITHIN_MS:
            for tenant_id, plant in zip(ABUSERS, planted, strict=False):
                if plant.rule == a.ALERT_RULE_USAGE_AFTER_SUSPENSION:
                    events = [event for event in events if event.tenant_id != tenant_id]
                    upsert = TenantUpsert(tenant_id=tenant_id, status=ACCOUNT_STATUS_SUSPENDED)
                    told += ledger.command(end_ms - SLICE_MS, tenant_upsert=upsert).record.alerts
        if PLANT_MS - 2 * WITHIN_MS <= number * SLICE_MS < PLANT_MS:
            # Whoever was suspended is quiet until then.
            suspended = {t for t, p in zip(ABUSERS, planted, strict=False) if p.rule == a.ALERT_RULE_USAGE_AFTER_SUSPENSION}
            events = [event for event in events if event.tenant_id not in suspended]
        for start in range(0, len(events), 1_000):
            told += ledger.usage(batch(events[start : start + 1_000]), end_ms).record.alerts
    assert ledger.replayed().digest() == ledger.state.digest()
    return told


def of_rules(told: Sequence[Alert]) -> Mapping[str, set[int]]:
    found: defaultdict[str, set[int]] = defaultdict(set)
    for alert in told:
        found[alert.tenant_id].add(alert.rule)
    return found


def test_each_planted_abuse_is_raised_for_its_tenant_with_its_evidence_within_a_minute(trace: Trace) -> None:
    told = run(trace, PLANTED, rule_limits({}), PLANT_MS // 60_000 + 2)
    assert {alert.tenant_id for alert in told} <= set(ABUSERS), "nobody else"
    for tenant_id, plant in zip(ABUSERS, PLANTED, strict=True):
        name = a.AlertRule.Name(plant.rule)  # type: ignore[arg-type]
        [raised] = [x for x in told if (x.tenant_id, x.rule, x.state) == (tenant_id, plant.rule, a.ALERT_STATE_RAISED)]
        assert 0 < raised.raised_ms - (NOW_MS + PLANT_MS) <= WITHIN_MS, name
        assert raised.request_ids, name
        assert all(raised.figures[figure] > 0 for figure in plant.figures), (name, raised.figures)
        others = of_rules(told)[tenant_id] - {plant.rule} - ALSO.get(plant.rule, set())
        assert not others, name
    assert len(told) <= 2 * len(PLANTED), "no storm"


def test_the_trace_as_it_is_raises_at_most_one_alert_an_hour(trace: Trace) -> None:
    assert len(run(trace, (), rule_limits({}), 60)) <= 1


def test_without_the_rules_nothing_of_theirs_is_raised(trace: Trace) -> None:
    """The negative control: what is found above is found by the rules, whose figures a plan can set to nothing."""
    off = rule_limits(dict.fromkeys(RULE_LIMIT_NAMES, 0))
    told = of_rules(run(trace, PLANTED, off, PLANT_MS // 60_000 + 2))
    left = {rule for rules in told.values() for rule in rules}
    assert left <= {
        a.ALERT_RULE_TOKEN_BURST,
        a.ALERT_RULE_DUPLICATE_FLOOD,
        a.ALERT_RULE_CONFLICT,
        a.ALERT_RULE_USAGE_AFTER_SUSPENSION,
    }
