"""What can be set of the billing API, and its bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from serving.connections import ConnectionLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from serving.commanding import Commander
    from sinks.engine import Reader

__all__ = ["AlertSource", "ApiLimits", "ApiSettings", "KeySource", "TlsFiles"]


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where API keys are followed, and under which pepper their secrets are hashed."""

    bootstrap: str
    pepper: bytes = field(repr=False)
    partitions: int
    topic: str = "billing.keys"
    # librdkafka's settings for TLS and SASL.
    security: Mapping[str, str] = field(default_factory=dict, repr=False)
    # How long a start may take to read the topic to its end.
    ready_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class AlertSource:
    """Where alerts are followed, for those who watch them."""

    bootstrap: str
    topic: str = "billing.alerts"
    # How long the topic keeps them.
    retention_ms: int = 90 * 86_400_000
    # librdkafka's settings for TLS and SASL.
    security: Mapping[str, str] = field(default_factory=dict, repr=False)
    # How long a start waits for the topic's end; watches wait for it in any case.
    ready_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """In PEM. Both servers show this certificate."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """Bounds of what is taken and of what runs at the same time."""

    request_bytes_max: int = 256 * 1024
    response_bytes_max: int = 32 * 1024 * 1024
    # Of a query and of everything that a call asks; a client's own deadline, where it is shorter, holds.
    call_timeout_s: float = 30.0
    # What changes something waits for the ledger.
    command_timeout_s: float = 30.0
    # How long a start waits for the overview that it asks for, so that the first page need not.
    warm_up_timeout_s: float = 10.0
    threads: int = 8
    calls_max: int = 64
    tenant_calls_max: int = 16
    # Watches of alerts hold no thread between looks.
    watches_max: int = 256
    tenant_watches_max: int = 16
    watch_interval_s: float = 0.25
    shutdown_grace_s: float = 5.0
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """One process of the API. Ports of 0: any free one."""

    keys: KeySource
    # Each thread opens a reader of its own.
    open_reader: Callable[[], Reader]
    # None: alerts cannot be watched.
    alerts: AlertSource | None = None
    # Gives commands in the name of the issuer that it is called with; None: nothing can be changed through here.
    open_commander: Callable[[str], Commander] | None = None
    host: str = "127.0.0.1"
    grpc_port: int = 0
    http_port: int = 0
    tls: TlsFiles | None = None
    limits: ApiLimits = field(default_factory=ApiLimits)
