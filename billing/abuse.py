"""The abuse rules: deterministic, in event time and log time, integers only. What they find has evidence.

A rule sees what one record adds to one tenant, and what the account remembers. How often what it finds is told is the business
of `alerts`. The figures at which rules speak come with the ledger's founding record, or with a tenant's plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from billing.accounts import AccountState
from billing.alerts import Alerts, name_request_ids
from billing.limits import ALERT_REQUEST_IDS_MAX, ALERTS_MAX, MINUTE_COST_PICO_MAX, MINUTE_TOKENS_MAX
from billing.periods import period_at
from billing.v1.account_pb2 import ACCOUNT_STATUS_CLOSED, ACCOUNT_STATUS_UNKNOWN, BILLING_MODE_PREPAID, RuleLimits
from billing.v1.alert_pb2 import (
    ALERT_RULE_BURN_RATE,
    ALERT_RULE_CANCELLATIONS,
    ALERT_RULE_CONFLICT,
    ALERT_RULE_CONFLICT_FLOOD,
    ALERT_RULE_DUPLICATE_FLOOD,
    ALERT_RULE_FUTURE_USAGE,
    ALERT_RULE_KEY_PLACES,
    ALERT_RULE_PROMPT_OUTLIER,
    ALERT_RULE_PROMPT_OVER_LIMIT,
    ALERT_RULE_REFUSALS,
    ALERT_RULE_REQUEST_BURST,
    ALERT_RULE_TOKEN_BURST,
    ALERT_RULE_UNKNOWN_MODEL,
    ALERT_RULE_UNKNOWN_TENANT,
    ALERT_RULE_USAGE_AFTER_SUSPENSION,
    SEVERITY_CRITICAL,
    SEVERITY_WARNING,
    Alert,
    AlertRule,
    Severity,
)
from billing.windows import MINUTE_MS

# A baseline of fewer minutes says nothing; over this many empty minutes it has decayed to nothing.
BASELINE_MINUTES_MIN = 5
IDLE_MINUTES_MAX = 64
# Gateways hear of a suspension within seconds; what began before that is the business of nobody.
SUSPENSION_GRACE_MS = 60_000
# A balance that ends within it is urgent.
_BURN_CRITICAL_MINUTES = 60
_MONTH_MINUTES_MAX = 31 * 24 * 60 + 120
_FIGURE_MAX = 2**63 - 1
_PLACES_SHOWN_CHARS = 512


@dataclass(slots=True)
class MinuteUse:
    """What one record adds to one minute of event time."""

    tokens: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cost_pico: int = 0
    cancelled: int = 0
    refused: int = 0


@dataclass(slots=True)
class Evidence:
    """What one record adds to one tenant, as the step collected it."""

    # Of the batch's last window, by index; `request_ids` names a few of them, for rules that speak of all usage.
    last_indexes: Sequence[int] = ()
    request_ids: Sequence[str] = ()
    # What the batch costs the tenant.
    cost_pico: int = 0
    minutes: dict[int, MinuteUse] = field(default_factory=dict)
    # Of its plan; 0: prompts may be of any size.
    prompt_limit: int = 0
    # A prompt with more tokens is far beyond the tenant's own; 0: nothing is said.
    outlier_tokens: int = 0
    duplicates: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    # Charged although the tenant was suspended or closed when it began.
    suspended: list[str] = field(default_factory=list)
    # Request ID, prompt tokens.
    oversized: list[tuple[str, int]] = field(default_factory=list)
    outliers: list[tuple[str, int]] = field(default_factory=list)
    # Request ID, how many milliseconds ahead of log time.
    future: list[tuple[str, int]] = field(default_factory=list)
    # Model to the requests that nothing prices.
    unrated: dict[str, list[str]] = field(default_factory=dict)
    # Key to its places of this hour, and requests that came from them.
    places: dict[str, tuple[Sequence[str], list[str]]] = field(default_factory=dict)


def outlier_tokens(account: AccountState, limits: RuleLimits) -> int:
    """A prompt of more tokens is far beyond what the tenant's are; 0: nothing is said."""
    if not limits.prompt_outlier_factor or account.baseline_minutes < BASELINE_MINUTES_MIN or not account.baseline_prompt_x256:
        return 0
    return max(limits.prompt_outlier_tokens_floor, limits.prompt_outlier_factor * account.baseline_prompt_x256 // 256)


class Rules:
    """Applies the rules for one record; `found` is what they found."""

    def __init__(self, log_time_ms: int, cooldown_ms: int, alerts: Alerts) -> None:
        self.found: list[Alert] = []
        self._log_time_ms = log_time_ms
        self._cooldown_ms = cooldown_ms
        self._alerts = alerts

    def look(self, account: AccountState, evidence: Evidence, limits: RuleLimits) -> None:
        """Judge what `evidence` adds to `account`, and move what the account remembers."""
        if account.status == ACCOUNT_STATUS_UNKNOWN and evidence.request_ids:
            self._find(
                account,
                ALERT_RULE_UNKNOWN_TENANT,
                SEVERITY_CRITICAL,
                f"usage of tenant {account.tenant_id}, which nobody has created; it is kept and rated at the default plan",
                evidence.request_ids,
                {"events": account.events},
            )
        self._prompts(account, evidence, limits)
        for model, request_ids in sorted(evidence.unrated.items()):
            self._find(
                account,
                ALERT_RULE_UNKNOWN_MODEL,
                SEVERITY_CRITICAL,
                f"usage of model {model}, which no price book prices in {account.currency}; it is kept unrated",
                request_ids,
                {"requests": len(request_ids)},
                {"model": model},
                subject=model,
            )
        if evidence.future:
            ahead_ms = max(ms for _, ms in evidence.future)
            self._find(
                account,
                ALERT_RULE_FUTURE_USAGE,
                SEVERITY_WARNING,
                f"usage of tenant {account.tenant_id} ends {ahead_ms // 1000} s in the future; check the clock of its server",
                [request_id for request_id, _ in evidence.future],
                {"ahead_ms": ahead_ms, "requests": len(evidence.future)},
            )
        if evidence.suspended:
            state = "closed" if account.status == ACCOUNT_STATUS_CLOSED else "suspended"
            self._find(
                account,
                ALERT_RULE_USAGE_AFTER_SUSPENSION,
                SEVERITY_CRITICAL,
                f"{len(evidence.suspended)} request(s) of tenant {account.tenant_id} began after it was {state}; they are "
                "charged: see which server does not ask a gateway, or does not hear of accounts",
                evidence.suspended,
                {"requests": len(evidence.suspended), "since_ms": account.status_ms},
            )
        if evidence.duplicates or evidence.conflicts:
            self._repeats(account, evidence, limits)
        for key_id, (places, request_ids) in sorted(evidence.places.items()):
            if limits.key_places_max and len(places) > limits.key_places_max:
                self._find(
                    account,
                    ALERT_RULE_KEY_PLACES,
                    SEVERITY_WARNING,
                    f"key {key_id} of tenant {account.tenant_id} is used from {len(places)} places within an hour; if they are "
                    "not all its owner's, revoke it",
                    request_ids,
                    {"places": len(places), "limit": limits.key_places_max},
                    {"key_id": key_id, "places": ", ".join(places)[:_PLACES_SHOWN_CHARS]},
                    subject=key_id,
                )
        for minute, use in sorted(evidence.minutes.items()):
            self._minute(account, minute, use, evidence, limits)

    def _prompts(self, account: AccountState, evidence: Evidence, limits: RuleLimits) -> None:
        if evidence.oversized:
            worst = max(tokens for _, tokens in evidence.oversized)
            limit = account.plan.prompt_tokens_max
            self._find(
                account,
                ALERT_RULE_PROMPT_OVER_LIMIT,
                SEVERITY_WARNING,
                f"{len(evidence.oversized)} prompt(s) of tenant {account.tenant_id} over the limit; the largest has "
                f"{worst} tokens" + (f", {limit} are allowed" if limit else ""),
                [request_id for request_id, _ in evidence.oversized],
                {"prompt_tokens": worst, "limit": min(limit, _FIGURE_MAX), "requests": len(evidence.oversized)},
            )
        if evidence.outliers:
            worst = max(tokens for _, tokens in evidence.outliers)
            baseline = account.baseline_prompt_x256 // 256
            self._find(
                account,
                ALERT_RULE_PROMPT_OUTLIER,
                SEVERITY_WARNING,
                f"a prompt of tenant {account.tenant_id} has {worst} tokens; its own mean is {baseline}",
                [request_id for request_id, _ in evidence.outliers],
                {
                    "prompt_tokens": worst,
                    "baseline": baseline,
                    "factor": limits.prompt_outlier_factor,
                    "floor": limits.prompt_outlier_tokens_floor,
                    "requests": len(evidence.outliers),
                },
            )

    def _repeats(self, account: AccountState, evidence: Evidence, limits: RuleLimits) -> None:
        minute = self._log_time_ms // MINUTE_MS
        if account.duplicate_minute != minute:
            account.duplicate_minute = minute
            account.minute_duplicates = account.minute_conflicts = 0
        account.minute_duplicates += len(evidence.duplicates)
        account.minute_conflicts += len(evidence.conflicts)
        if evidence.conflicts:
            self._find(
                account,
                ALERT_RULE_CONFLICT,
                SEVERITY_CRITICAL,
                f"{len(evidence.conflicts)} request ID(s) of tenant {account.tenant_id} came again with another payload; "
                "the first stays charged, the second is kept beside it",
                evidence.conflicts,
                {"requests": len(evidence.conflicts), "conflicts": account.conflicts},
            )
        limit = limits.conflict_flood_events
        if evidence.conflicts and 0 < limit < account.minute_conflicts:
            self._find(
                account,
                ALERT_RULE_CONFLICT_FLOOD,
                SEVERITY_CRITICAL,
                f"{account.minute_conflicts} request IDs of tenant {account.tenant_id} came again within a minute with another "
                "payload; a producer gives IDs twice, or somebody invents usage",
                evidence.conflicts,
                {"conflicts": account.minute_conflicts, "limit": limit},
            )
        limit = account.plan.duplicate_flood_events
        if evidence.duplicates and 0 < limit < account.minute_duplicates:
            self._find(
                account,
                ALERT_RULE_DUPLICATE_FLOOD,
                SEVERITY_WARNING,
                f"{account.minute_duplicates} events of tenant {account.tenant_id} came again within a minute; none is charged "
                "twice, but a producer resends in a loop",
                evidence.duplicates,
                {"duplicates": account.minute_duplicates, "limit": limit},
            )

    def _minute(self, account: AccountState, minute: int, use: MinuteUse, evidence: Evidence, limits: RuleLimits) -> None:
        if minute < account.minute:
            # Late usage says nothing about how the tenant behaves now.
            return
        if minute > account.minute:
            if account.minute:
                _close_minute(account)
                for _ in range(min(minute - account.minute - 1, IDLE_MINUTES_MAX)):
                    _close_idle_minute(account)
            account.minute = minute
            account.minute_tokens = account.minute_requests = account.minute_prompt_tokens = 0
            account.minute_cost_pico = account.minute_cancelled = account.minute_refused = 0
        account.minute_tokens = min(account.minute_tokens + use.tokens, MINUTE_TOKENS_MAX)
        account.minute_prompt_tokens = min(account.minute_prompt_tokens + use.prompt_tokens, MINUTE_TOKENS_MAX)
        account.minute_requests += use.requests
        account.minute_cost_pico = min(account.minute_cost_pico + use.cost_pico, MINUTE_COST_PICO_MAX)
        account.minute_cancelled += use.cancelled
        account.minute_refused += use.refused
        if account.baseline_minutes >= BASELINE_MINUTES_MIN:
            self._bursts(account, evidence, limits)
            if limits.burn_horizon_minutes and account.plan.billing_mode == BILLING_MODE_PREPAID:
                self._burn(account, evidence, limits)
        if use.cancelled or use.refused:
            self._unfinished(account, use, evidence, limits)

    def _bursts(self, account: AccountState, evidence: Evidence, limits: RuleLimits) -> None:
        plan = account.plan
        if (
            plan.burst_factor
            and account.minute_tokens > plan.burst_tokens_floor
            and account.minute_tokens * 256 > plan.burst_factor * account.baseline_tokens_x256
        ):
            baseline = account.baseline_tokens_x256 // 256
            self._find(
                account,
                ALERT_RULE_TOKEN_BURST,
                SEVERITY_WARNING,
                f"tenant {account.tenant_id} used {account.minute_tokens} tokens in a minute; its baseline is {baseline}",
                evidence.request_ids,
                {
                    "minute_tokens": account.minute_tokens,
                    "baseline": baseline,
                    "factor": plan.burst_factor,
                    "floor": plan.burst_tokens_floor,
                    "minute_ms": account.minute * MINUTE_MS,
                },
            )
        factor = limits.burst_requests_factor
        if (
            factor
            and account.minute_requests > limits.burst_requests_floor
            and account.minute_requests * 256 > factor * account.baseline_requests_x256
        ):
            baseline = account.baseline_requests_x256 // 256
            self._find(
                account,
                ALERT_RULE_REQUEST_BURST,
                SEVERITY_WARNING,
                f"tenant {account.tenant_id} sent {account.minute_requests} requests in a minute; its baseline is {baseline}",
                evidence.request_ids,
                {
                    "minute_requests": account.minute_requests,
                    "baseline": baseline,
                    "factor": factor,
                    "floor": limits.burst_requests_floor,
                    "minute_ms": account.minute * MINUTE_MS,
                },
            )

    def _burn(self, account: AccountState, evidence: Evidence, limits: RuleLimits) -> None:
        # The present minute counts as an eighth, as it will when it is over.
        rate_pico = (account.baseline_cost_pico * 7 + account.minute_cost_pico) // 8
        balance_pico = account.balance_pico
        if balance_pico <= 0 or rate_pico * min(limits.burn_horizon_minutes, _MONTH_MINUTES_MAX) < balance_pico:
            return
        _, end_ms = period_at(account.calendar, account.minute * MINUTE_MS)
        minutes_left = balance_pico // rate_pico
        if minutes_left >= end_ms // MINUTE_MS - account.minute:
            return
        days, rest = divmod(minutes_left, 24 * 60)
        self._find(
            account,
            ALERT_RULE_BURN_RATE,
            SEVERITY_CRITICAL if minutes_left < _BURN_CRITICAL_MINUTES else SEVERITY_WARNING,
            f"at its present rate the balance of tenant {account.tenant_id} ends in {days} d {rest // 60} h {rest % 60} min, "
            "before its period does",
            evidence.request_ids,
            {
                # In millionths of the currency: an int64 of pico ends at nine million units.
                "balance_micros": min(balance_pico // 1_000_000, _FIGURE_MAX),
                "hour_cost_micros": min(rate_pico * 60 // 1_000_000, _FIGURE_MAX),
                "baseline_hour_cost_micros": account.baseline_cost_pico * 60 // 1_000_000,
                "minutes_left": minutes_left,
                "period_end_ms": end_ms,
            },
            {"currency": account.currency},
        )

    def _unfinished(self, account: AccountState, use: MinuteUse, evidence: Evidence, limits: RuleLimits) -> None:
        cancelled, requests = account.minute_cancelled, account.minute_requests
        enough = 0 < limits.cancelled_requests <= cancelled
        if use.cancelled and enough and cancelled * 100 >= limits.cancelled_percent * requests:
            self._find(
                account,
                ALERT_RULE_CANCELLATIONS,
                SEVERITY_WARNING,
                f"tenant {account.tenant_id} cancelled {cancelled} of {requests} requests in a minute before they had ended; "
                "it pays for what was made until then",
                evidence.cancelled,
                {
                    "cancelled": cancelled,
                    "requests": requests,
                    "limit": limits.cancelled_requests,
                    "limit_percent": limits.cancelled_percent,
                    "minute_ms": account.minute * MINUTE_MS,
                },
            )
        if use.refused and 0 < limits.refused_requests <= account.minute_refused:
            self._find(
                account,
                ALERT_RULE_REFUSALS,
                SEVERITY_WARNING,
                f"{account.minute_refused} requests of tenant {account.tenant_id} were refused in a minute; it does not hear "
                "its limits, or somebody tries them",
                evidence.refused,
                {
                    "refused": account.minute_refused,
                    "requests": requests,
                    "limit": limits.refused_requests,
                    "minute_ms": account.minute * MINUTE_MS,
                },
            )

    def _find(
        self,
        account: AccountState,
        rule: AlertRule.ValueType,
        severity: Severity.ValueType,
        summary: str,
        request_ids: Sequence[str],
        figures: Mapping[str, int],
        labels: Mapping[str, str] | None = None,
        subject: str = "",
    ) -> None:
        if len(self.found) >= ALERTS_MAX:
            return
        if not self._alerts.wants(rule, account.tenant_id, subject, severity, self._log_time_ms, self._cooldown_ms):
            return
        self.found.append(
            Alert(
                rule=rule,
                severity=severity,
                tenant_id=account.tenant_id,
                subject=subject,
                summary=summary,
                request_ids=name_request_ids(request_ids, ALERT_REQUEST_IDS_MAX),
                figures=figures,
                labels=labels or {},
            )
        )


def _close_minute(account: AccountState) -> None:
    """Move the baselines an eighth of the way to the minute that is over."""
    requests = account.minute_requests
    account.baseline_tokens_x256 += (account.minute_tokens * 256 - account.baseline_tokens_x256) // 8
    account.baseline_requests_x256 += (requests * 256 - account.baseline_requests_x256) // 8
    account.baseline_cost_pico += (account.minute_cost_pico - account.baseline_cost_pico) // 8
    if requests:
        mean_x256 = account.minute_prompt_tokens * 256 // requests
        known = account.baseline_prompt_x256
        # The first minute is all that is known of it.
        account.baseline_prompt_x256 = known + (mean_x256 - known) // 8 if known else mean_x256
    account.baseline_minutes = min(account.baseline_minutes + 1, 1_000_000)


def _close_idle_minute(account: AccountState) -> None:
    account.baseline_tokens_x256 += -account.baseline_tokens_x256 // 8
    account.baseline_requests_x256 += -account.baseline_requests_x256 // 8
    account.baseline_cost_pico += -account.baseline_cost_pico // 8
    account.baseline_minutes = min(account.baseline_minutes + 1, 1_000_000)
