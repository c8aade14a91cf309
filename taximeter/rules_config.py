"""The section `[ledger.rules]`: figures of the abuse rules with which a ledger is founded, with the defaults of the domain."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from billing.alerts import RESOLVE_MS
from billing.drift import DRIFT_MILLIONTHS
from billing.limits import KEY_PLACES_KEPT, RULE_ACTIONS_MAX
from billing.rule_limits import DEFAULT_RULES, PLAN_RULE_DEFAULTS
from taximeter.config_section import Section

__all__ = ["RulesConfig"]

_Figure = Annotated[int, Field(ge=0, lt=2**31)]


class RulesConfig(Section):
    """When the abuse rules of a new ledger speak (docs/alerts.md); 0: that one does not. They stand in its founding record:
    nothing here changes a ledger that is there, where `taximeter rules set` does, or a tenant's plan says otherwise.
    """

    burst_tokens_floor: _Figure = PLAN_RULE_DEFAULTS["burst_tokens_floor"]
    burst_factor: _Figure = PLAN_RULE_DEFAULTS["burst_factor"]
    duplicate_flood_events: _Figure = PLAN_RULE_DEFAULTS["duplicate_flood_events"]
    prompt_outlier_tokens_floor: _Figure = DEFAULT_RULES.prompt_outlier_tokens_floor
    prompt_outlier_factor: _Figure = DEFAULT_RULES.prompt_outlier_factor
    burst_requests_floor: _Figure = DEFAULT_RULES.burst_requests_floor
    burst_requests_factor: _Figure = DEFAULT_RULES.burst_requests_factor
    burn_horizon_minutes: _Figure = DEFAULT_RULES.burn_horizon_minutes
    conflict_flood_events: _Figure = DEFAULT_RULES.conflict_flood_events
    key_places_max: Annotated[int, Field(ge=0, lt=KEY_PLACES_KEPT)] = DEFAULT_RULES.key_places_max
    cancelled_requests: _Figure = DEFAULT_RULES.cancelled_requests
    cancelled_percent: Annotated[int, Field(ge=0, le=100)] = DEFAULT_RULES.cancelled_percent
    refused_requests: _Figure = DEFAULT_RULES.refused_requests
    # RULE:stop=MINUTES and RULE:throttle=REQUESTS/MINUTES, as `tenant create --rule` takes them.
    actions: Annotated[list[str], Field(max_length=RULE_ACTIONS_MAX)] = Field(default_factory=list)
    # In no plan: how far a back end's counts and the tokenizer's may be apart.
    counting_drift_percent: Annotated[float, Field(gt=0, le=100)] = DRIFT_MILLIONTHS / 10_000
    # In no plan: when an alert is over of which nothing more is heard.
    resolve_minutes: Annotated[int, Field(ge=1, le=10_080)] = RESOLVE_MS // 60_000
