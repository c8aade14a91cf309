"""The abuse rules: deterministic, in event time and log time, integers only. Each alert has evidence and a cool-down.

A rule sees what one record adds to one tenant, and what the account remembers. After an alert a rule is silent about that
tenant for the ledger's `alert_cooldown_ms`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from billing.accounts import AccountState
from billing.limits import ALERT_REQUEST_IDS_MAX, ALERTS_MAX, MINUTE_TOKENS_MAX
from billing.v1.account_pb2 import ACCOUNT_STATUS_UNKNOWN
from billing.v1.alert_pb2 import (
    ALERT_RULE_CONFLICT,
    ALERT_RULE_DUPLICATE_FLOOD,
    ALERT_RULE_FUTURE_USAGE,
    ALERT_RULE_PROMPT_OVER_LIMIT,
    ALERT_RULE_TOKEN_BURST,
    ALERT_RULE_UNKNOWN_MODEL,
    ALERT_RULE_UNKNOWN_TENANT,
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


@dataclass(slots=True)
class Evidence:
    """What one record adds to one tenant, as the step collected it."""

    # Of the batch's last window, by index; `request_ids` names a few of them, for rules that speak of all usage.
    last_indexes: Sequence[int] = ()
    request_ids: Sequence[str] = ()
    # What the batch costs the tenant.
    cost_pico: int = 0
    # Event-time minute to the tokens added in it.
    minute_tokens: dict[int, int] = field(default_factory=dict)
    duplicates: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    # Request ID, prompt tokens.
    oversized: list[tuple[str, int]] = field(default_factory=list)
    # Request ID, how many milliseconds ahead of log time.
    future: list[tuple[str, int]] = field(default_factory=list)
    # Model to the requests that nothing prices.
    unrated: dict[str, list[str]] = field(default_factory=dict)


class Rules:
    """Applies the rules for one record; `alerts` is what they raised."""

    def __init__(self, log_time_ms: int, cooldown_ms: int) -> None:
        self.alerts: list[Alert] = []
        self._log_time_ms = log_time_ms
        self._cooldown_ms = cooldown_ms

    def look(self, account: AccountState, evidence: Evidence, limit_tokens: int) -> None:
        """Judge what `evidence` adds to `account`, and move what the account remembers. `limit_tokens` 0: no limit."""
        if account.status == ACCOUNT_STATUS_UNKNOWN and evidence.request_ids:
            self._raise(
                account,
                ALERT_RULE_UNKNOWN_TENANT,
                SEVERITY_CRITICAL,
                f"usage of tenant {account.tenant_id}, which nobody has created; it is kept and rated at the default plan",
                evidence.request_ids,
                {"events": account.events},
            )
        if evidence.oversized:
            worst = max(tokens for _, tokens in evidence.oversized)
            self._raise(
                account,
                ALERT_RULE_PROMPT_OVER_LIMIT,
                SEVERITY_WARNING,
                f"{len(evidence.oversized)} prompt(s) of tenant {account.tenant_id} over the limit; the largest has "
                f"{worst} tokens" + (f", {limit_tokens} are allowed" if limit_tokens else ""),
                [request_id for request_id, _ in evidence.oversized],
                {"prompt_tokens": worst, "limit": limit_tokens, "requests": len(evidence.oversized)},
            )
        for model, request_ids in sorted(evidence.unrated.items()):
            self._raise(
                account,
                ALERT_RULE_UNKNOWN_MODEL,
                SEVERITY_CRITICAL,
                f"usage of model {model}, which no price book prices in {account.currency}; it is kept unrated",
                request_ids,
                {"requests": len(request_ids)},
                {"model": model},
            )
        if evidence.future:
            ahead_ms = max(ms for _, ms in evidence.future)
            self._raise(
                account,
                ALERT_RULE_FUTURE_USAGE,
                SEVERITY_WARNING,
                f"usage of tenant {account.tenant_id} ends {ahead_ms // 1000} s in the future; check the clock of its server",
                [request_id for request_id, _ in evidence.future],
                {"ahead_ms": ahead_ms, "requests": len(evidence.future)},
            )
        if evidence.conflicts:
            self._raise(
                account,
                ALERT_RULE_CONFLICT,
                SEVERITY_CRITICAL,
                f"{len(evidence.conflicts)} request ID(s) of tenant {account.tenant_id} came again with another payload; "
                "the first stays charged, the second is kept beside it",
                evidence.conflicts,
                {"requests": len(evidence.conflicts), "conflicts": account.conflicts},
            )
        self._duplicates(account, evidence.duplicates)
        for minute, tokens in sorted(evidence.minute_tokens.items()):
            self._burst(account, minute, tokens, evidence.request_ids)

    def _duplicates(self, account: AccountState, request_ids: Sequence[str]) -> None:
        if not request_ids:
            return
        minute = self._log_time_ms // MINUTE_MS
        if account.duplicate_minute != minute:
            account.duplicate_minute = minute
            account.minute_duplicates = 0
        account.minute_duplicates += len(request_ids)
        limit = account.plan.duplicate_flood_events
        if limit and account.minute_duplicates > limit:
            self._raise(
                account,
                ALERT_RULE_DUPLICATE_FLOOD,
                SEVERITY_WARNING,
                f"{account.minute_duplicates} events of tenant {account.tenant_id} came again within a minute; none is charged "
                "twice, but a producer resends in a loop",
                request_ids,
                {"duplicates": account.minute_duplicates, "limit": limit},
            )

    def _burst(self, account: AccountState, minute: int, tokens: int, request_ids: Sequence[str]) -> None:
        if minute < account.minute:
            # Late usage says nothing about how the tenant behaves now.
            return
        if minute > account.minute:
            if account.minute:
                _close_minute(account, account.minute_tokens)
                for _ in range(min(minute - account.minute - 1, IDLE_MINUTES_MAX)):
                    _close_minute(account, 0)
            account.minute = minute
            account.minute_tokens = 0
        account.minute_tokens = min(account.minute_tokens + tokens, MINUTE_TOKENS_MAX)
        plan = account.plan
        if (
            plan.burst_factor
            and account.baseline_minutes >= BASELINE_MINUTES_MIN
            and account.minute_tokens > plan.burst_tokens_floor
            and account.minute_tokens * 256 > plan.burst_factor * account.baseline_tokens_x256
        ):
            baseline = account.baseline_tokens_x256 // 256
            self._raise(
                account,
                ALERT_RULE_TOKEN_BURST,
                SEVERITY_WARNING,
                f"tenant {account.tenant_id} used {account.minute_tokens} tokens in a minute; its baseline is {baseline}",
                request_ids,
                {
                    "minute_tokens": account.minute_tokens,
                    "baseline": baseline,
                    "factor": plan.burst_factor,
                    "floor": plan.burst_tokens_floor,
                    "minute_ms": minute * MINUTE_MS,
                },
            )

    def _raise(
        self,
        account: AccountState,
        rule: AlertRule.ValueType,
        severity: Severity.ValueType,
        summary: str,
        request_ids: Sequence[str],
        figures: Mapping[str, int],
        labels: Mapping[str, str] | None = None,
    ) -> None:
        raised_ms = account.raised_ms.get(rule)
        if len(self.alerts) >= ALERTS_MAX:
            return
        if raised_ms is not None and self._log_time_ms < raised_ms + self._cooldown_ms:
            return
        account.raised_ms[rule] = self._log_time_ms
        self.alerts.append(
            Alert(
                rule=rule,
                severity=severity,
                tenant_id=account.tenant_id,
                raised_ms=self._log_time_ms,
                summary=summary,
                request_ids=list(request_ids[:ALERT_REQUEST_IDS_MAX]),
                figures=figures,
                labels=labels or {},
            )
        )


def _close_minute(account: AccountState, tokens: int) -> None:
    """Move the baseline an eighth of the way to a minute that is over."""
    account.baseline_tokens_x256 += (tokens * 256 - account.baseline_tokens_x256) // 8
    account.baseline_minutes = min(account.baseline_minutes + 1, 1_000_000)
