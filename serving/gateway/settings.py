"""What a gateway is told at start. Every bound has a default; every refusal of a value names the setting and the mend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from billing.key_ring import Keys
from serving.connections import ConnectionLimits
from serving.gateway.count_audit import AuditSettings
from serving.kserve import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from producers.meter import MeterSettings
    from producers.publisher import PublisherSettings
    from serving.gateway.profiles import ModelProfile
    from serving.gateway.tokenizer_checks import Asking

__all__ = [
    "AdmissionSettings",
    "DirectorySettings",
    "GatewaySettings",
    "LeaseSettings",
    "LimitSettings",
    "TlsSettings",
    "UpstreamTls",
]


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name}: {value}: must be at least {least}")


@dataclass(frozen=True, slots=True)
class DirectorySettings:
    """Where keys and accounts are followed, and under which pepper the secrets of keys are hashed."""

    bootstrap: str
    pepper: bytes = field(repr=False)
    partitions: int
    accounts_topic: str = "billing.accounts"
    keys_topic: str = "billing.keys"
    security: Mapping[str, str] = field(default_factory=dict, repr=False)
    """librdkafka's settings for TLS and SASL."""
    ready_timeout_s: float = 30.0
    """How long a start may take to read both topics to their ends."""

    def __post_init__(self) -> None:
        _at_least("pepper", len(self.pepper), 16)
        _at_least("partitions", self.partitions, 1)
        _at_least("ready_timeout_s", self.ready_timeout_s, 0)


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    """When a gateway that does not know enough lets a request through."""

    state_age_max_ms: int = 60_000
    """Accounts are stale when the ledger of their partition has said nothing for so long."""
    fail_open: bool = False
    """True admits on stale state: what is then spent beyond the balance is bounded only by the limits on concurrency."""

    def __post_init__(self) -> None:
        _at_least("state_age_max_ms", self.state_age_max_ms, 1)


@dataclass(frozen=True, slots=True)
class LeaseSettings:
    """How the gateway holds parts of tenants' balances."""

    bootstrap: str
    key: Keys = field(repr=False)
    """Signs lease requests, and nothing else: `billing.commands.lease_key`."""
    commands_topic: str = "billing.commands"
    prices_topic: str = "billing.prices"
    security: Mapping[str, str] = field(default_factory=dict, repr=False)
    wait_ms: int = 1_000
    """How long a request waits for the ledger before it is refused."""
    duration_ms: int = 30_000
    guard_ms: int = 2_000
    """A lease is left unused for so long before it may expire: clocks do not run alike."""
    output_tokens_default: int = 4_096
    """Set aside for requests that state no maximum, where the plan has none either."""
    clamp_output: bool = True
    """When less is left than the worst case costs: let the answer be as long as the money reaches, instead of refusing."""

    def __post_init__(self) -> None:
        _at_least("wait_ms", self.wait_ms, 0)
        _at_least("guard_ms", self.guard_ms, 0)
        _at_least("duration_ms", self.duration_ms, 2 * self.guard_ms + 1)
        _at_least("output_tokens_default", self.output_tokens_default, 1)


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """The bounds of one gateway process."""

    message_bytes_max: int = MAX_MESSAGE_BYTES
    requests_max: int = 1_000
    """Inferences at the same time, and as many streams that are open; more are refused."""
    tenant_requests_max: int = 250
    """The same of one tenant."""
    stream_requests_max: int = 64
    """Of one client stream; it is read no further beyond, so nothing is refused for it."""
    request_chunks_max: int = 64
    """Read ahead of the client; the back end is read no further beyond."""
    prompt_tokens_max: int = 0
    """For models and plans that state none; 0: no limit."""
    upstream_attempts: int = 2
    """How often a request is sent where the back end is not there, or is gone before its first response. It is billed once."""
    upstream_timeout_s: float = 3_600.0
    """For requests without a deadline of their own."""
    stop_timeout_s: float = 5.0
    """How long a back end that stops on request may take to end the answer of a client that is gone, before its call is
    cancelled. It is given a client's deadline with so much added."""
    control_timeout_s: float = 30.0
    durable_timeout_s: float = 30.0
    """How long a request waits for the journal before it fails."""
    shutdown_grace_s: float = 10.0
    replicas: int = 1
    """Gateways that share the limits of keys, tenants and models: each lets its part through."""
    keepalive_ms: int = 60_000
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)

    def __post_init__(self) -> None:
        for name in (
            "requests_max",
            "tenant_requests_max",
            "stream_requests_max",
            "request_chunks_max",
            "upstream_attempts",
            "message_bytes_max",
            "keepalive_ms",
            "replicas",
        ):
            _at_least(name, getattr(self, name), 1)
        _at_least("prompt_tokens_max", self.prompt_tokens_max, 0)
        _at_least("shutdown_grace_s", self.shutdown_grace_s, 0)
        for name in ("upstream_timeout_s", "stop_timeout_s", "control_timeout_s", "durable_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)}: must be more than 0")
        if self.message_bytes_max > MAX_MESSAGE_BYTES:
            raise ValueError(f"message_bytes_max: {self.message_bytes_max}: gRPC carries at most {MAX_MESSAGE_BYTES}")


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """The certificate with which a gateway serves. `client_ca` set: clients must show one that it has signed."""

    certificate: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None = None


@dataclass(frozen=True, slots=True)
class UpstreamTls:
    """TLS to the back end: what its certificate is verified against, and what is shown to a back end that asks."""

    root_certificates: bytes
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """One gateway process."""

    meter: MeterSettings
    directory: DirectorySettings
    models: Mapping[str, ModelProfile]
    """By model name; a model that is not here is not served."""
    tokenizers: Mapping[str, Path] = field(default_factory=dict)
    """By the name that profiles use; all are loaded before the first request."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """What tokenizers must be, by their names; one that is another stops the start."""
    check_tokenizers: Asking = "off"
    """How back ends are asked whether these are the tokenizers that their models have."""
    publisher: PublisherSettings | None = None
    """None: another process sends the journal."""
    host: str = "127.0.0.1"
    port: int = 8001
    """0 lets the system choose."""
    upstream: str = "127.0.0.1:8101"
    upstream_tls: UpstreamTls | None = None
    """None: the back end speaks no TLS."""
    tls: TlsSettings | None = None
    server_id: str = ""
    region: str = ""
    hold_back_last_chunk: bool = True
    """A stream's usage rides on its last response. Where that may be one that the client has not asked to see (an empty
    final one), the newest chunk waits until the next has come, so that the last that the client sees can carry it. False:
    chunks leave at once, and such clients are not told their usage in band."""
    bill_partial_answers: bool = True
    """A back end's error after part of the answer was delivered: bill that part, or record it at price 0."""
    leases: LeaseSettings | None = None
    """None: a request is admitted while the balance is above zero, and requests at the same time may pass it."""
    trace: bool = False
    """Begin a trace for requests that bring none; one that a client brings is always taken up."""
    observe: bool = False
    """Keep histograms of requests, for whoever asks for metrics."""
    otlp_endpoint: str = ""
    """`http://HOST:PORT` or `https://` of an OpenTelemetry collector, which is told spans and histograms; empty: none."""
    audit: AuditSettings = field(default_factory=AuditSettings)
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port: {self.port}: must be between 0 and 65535")
        for name, profile in self.models.items():
            if profile.model != name:
                raise ValueError(f"models: {name!r} has the profile of {profile.model!r}: give it one of its own")
            if profile.tokenizer is not None and profile.tokenizer not in self.tokenizers:
                raise ValueError(f"models: {name!r} counts with tokenizer {profile.tokenizer!r}: add it to tokenizers")
