"""What can be set of the notifier, and its bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from billing.alerts import rule_name
from billing.v1.alert_pb2 import Severity

if TYPE_CHECKING:
    from billing.v1.alert_pb2 import Alert

__all__ = ["Endpoint", "Format", "NotifierLimits", "NotifierSettings", "severity_name"]

Format = Literal["standard", "alertmanager"]


def severity_name(severity: int) -> str:
    """As people read it: "critical"."""
    return Severity.Name(severity).removeprefix("SEVERITY_").lower()  # type: ignore[arg-type]  # a plain number names it too


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One receiver. Filters that are empty let everything through."""

    name: str
    url: str = field(repr=False)
    format: Format = "standard"
    # Raw keys; every one signs, so that a receiver may know either while they are changed.
    secrets: tuple[bytes, ...] = field(default=(), repr=False)
    # Sent as `Authorization: Bearer`, where a proxy in front of the receiver asks for it.
    bearer: str = field(default="", repr=False)
    rules: frozenset[str] = frozenset()
    severities: frozenset[str] = frozenset()
    tenants: frozenset[str] = frozenset()
    # Addresses that the Internet does not route: of this machine, of private networks, of a cloud's metadata service.
    allow_private: bool = False
    # In PEM: whom its certificate is checked against, instead of the public authorities.
    ca_file: Path | None = None

    def wants(self, alert: Alert) -> bool:
        """Whether the filters let the alert through."""
        return (
            (not self.rules or rule_name(alert.rule) in self.rules)
            and (not self.severities or severity_name(alert.severity) in self.severities)
            and (not self.tenants or alert.tenant_id in self.tenants)
        )


@dataclass(frozen=True, slots=True)
class NotifierLimits:
    """Bounds of each endpoint."""

    # Of one attempt: address, connection, request and answer together.
    attempt_timeout_s: float = 10.0
    # At the same time; one of an alert at most, so that its states arrive in order.
    attempts_at_once: int = 8
    # Alerts that are under way, most of them between two attempts.
    alerts_at_once: int = 500
    # From the first attempt; then it is a dead letter.
    horizon_s: float = 24 * 3_600.0
    wait_initial_s: float = 0.5
    wait_max_s: float = 300.0
    # Added at random, so that what failed together does not come together again.
    wait_jitter_s: float = 5.0
    # The longest time that a receiver's Retry-After is taken at its word.
    retry_after_max_s: float = 3_600.0
    # Deliveries that wait; what comes beyond is a dead letter at once.
    queue_max: int = 10_000
    # Dead letters that are kept, the newest ones.
    dead_max: int = 10_000
    answer_bytes_max: int = 64 * 1024


@dataclass(frozen=True, slots=True)
class NotifierSettings:
    """One process."""

    bootstrap: str
    journal_path: Path
    endpoints: tuple[Endpoint, ...]
    topic: str = "billing.alerts"
    # librdkafka's settings for TLS and SASL.
    security: Mapping[str, str] = field(default_factory=dict, repr=False)
    limits: NotifierLimits = field(default_factory=NotifierLimits)
