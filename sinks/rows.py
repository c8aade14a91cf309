"""What the queries answer with: plain rows, money in whole pico."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from billing.v1.account_pb2 import Calendar

__all__ = ["AlertRow", "Balance", "EventRow", "Freshness", "Quantities", "RejectedRow", "Totals", "UsageRow"]


@dataclass(frozen=True, slots=True)
class Balance:
    """One account."""

    tenant_id: str
    display_name: str
    status: str
    currency: str
    credit_pico: int
    spend_pico: int
    events: int
    duplicates: int
    conflicts: int
    unrated_events: int
    plan_id: str
    billing_mode: str
    log_time_ms: int
    # 0: none is set.
    credit_limit_pico: int = 0
    # What gateways hold of the balance.
    leased_pico: int = 0
    # Of its billing periods.
    calendar: Calendar = field(default_factory=Calendar)

    @property
    def balance_pico(self) -> int:
        """What is left."""
        return self.credit_pico - self.spend_pico

    @property
    def free_pico(self) -> int:
        """What nobody holds."""
        return self.balance_pico + self.credit_limit_pico - self.leased_pico


@dataclass(frozen=True, slots=True)
class Quantities:
    """What was used: the disjoint classes of tokens, and named units."""

    uncached_input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    image_input_tokens: int
    audio_input_tokens: int
    audio_output_tokens: int
    units: Mapping[str, int]

    @property
    def input_tokens(self) -> int:
        """All classes of input."""
        return (
            self.uncached_input_tokens
            + self.cache_read_tokens
            + self.cache_write_tokens
            + self.image_input_tokens
            + self.audio_input_tokens
        )

    @property
    def all_output_tokens(self) -> int:
        """All classes of output."""
        return self.output_tokens + self.reasoning_tokens + self.audio_output_tokens


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Usage of one group; `group` has a text for each name in `by`, in that order."""

    group: tuple[str, ...]
    events: int
    refused_events: int
    unrated_events: int
    quantities: Quantities
    cost_pico: int
    currency: str


@dataclass(frozen=True, slots=True)
class Totals:
    """Everything there is, from the window totals (`events` and what they used) and the accounts (the rest)."""

    events: int
    refused_events: int
    unrated_events: int
    duplicates: int
    conflicts: int
    quantities: Quantities
    # By currency.
    cost_pico: Mapping[str, int]
    credit_pico: Mapping[str, int]
    spend_pico: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class AlertRow:
    """One alert."""

    alert_id: str
    tenant_id: str
    rule: str
    severity: str
    raised_ms: int
    summary: str
    request_ids: tuple[str, ...]
    figures: Mapping[str, int]
    labels: Mapping[str, str]
    partition: int
    subject: str
    # raised, updated, acknowledged, resolved
    state: str
    updated_ms: int
    acknowledged_by: str
    note: str
    action: str
    # Of the ledger record that told of it last, comparable over generations: give it to `alerts(after=...)`.
    version: int


@dataclass(frozen=True, slots=True)
class EventRow:
    """One accepted event."""

    tenant_id: str
    request_id: str
    project_id: str
    user_id: str
    api_key_id: str
    model: str
    operation: str
    service_class: str
    outcome: str
    count_source: str
    started_ms: int
    ended_ms: int
    quantities: Quantities
    cost_pico: int
    currency: str
    price_version: int
    context_tokens: int
    latency_ms: int
    client_request_id: str
    refusal_reason: str
    accepted_ms: int
    partition: int
    generation: str
    sequence: int
    record_index: int


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """Something that was not charged, and why."""

    partition: int
    generation: str
    sequence: int
    record_index: int
    tenant_id: str
    request_id: str
    reason: str
    detail: str
    would_have_cost_pico: int
    payload: bytes
    payload_bytes: int
    topic: str
    offset: int
    rejected_ms: int


@dataclass(frozen=True, slots=True)
class Freshness:
    """How far the database is in one partition of the ledger."""

    partition: int
    generation: str
    sequence: int
    record_hash: str
    ledger_offset: int
    log_time_ms: int
    written_ms: int
