"""What a worker is told: small frozen values, checked where they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from billing.step import LedgerKeys

__all__ = ["KafkaSettings", "SnapshotSettings", "TopicNames", "TopicSettings", "WorkerSettings"]

# Kafka's own limits of a group's session.
_SESSION_MS_MIN = 1_000


@dataclass(frozen=True, slots=True)
class TopicNames:
    """The topics, under a prefix that lets several ledgers share a cluster."""

    prefix: str = ""

    @property
    def events(self) -> str:
        return f"{self.prefix}usage.events"

    @property
    def commands(self) -> str:
        return f"{self.prefix}billing.commands"

    @property
    def ledger(self) -> str:
        return f"{self.prefix}usage.ledger"

    @property
    def accounts(self) -> str:
        return f"{self.prefix}billing.accounts"

    @property
    def keys(self) -> str:
        return f"{self.prefix}billing.keys"

    @property
    def prices(self) -> str:
        return f"{self.prefix}billing.prices"

    @property
    def progress(self) -> str:
        return f"{self.prefix}usage.progress"

    @property
    def alerts(self) -> str:
        return f"{self.prefix}billing.alerts"

    @property
    def rejected(self) -> str:
        return f"{self.prefix}usage.rejected"


@dataclass(frozen=True, slots=True)
class KafkaSettings:
    """Where Kafka is. `security` holds librdkafka's own settings (security.protocol, sasl.*, ssl.*), for every client here."""

    bootstrap: str
    security: Mapping[str, str] = field(default_factory=dict, repr=False)
    request_timeout_ms: int = 30_000
    delivery_timeout_ms: int = 60_000

    def client(self) -> dict[str, str | int | float | bool]:
        """What every librdkafka client is made with."""
        return {
            "bootstrap.servers": self.bootstrap,
            # Tansu creates a topic for whoever asks about it; only `taximeter topics apply` may.
            "allow.auto.create.topics": False,
            "socket.timeout.ms": self.request_timeout_ms,
            **self.security,
        }


@dataclass(frozen=True, slots=True)
class TopicSettings:
    """What `topics apply` makes. Replication 0: the broker's default."""

    partitions: int
    replication: int = 0
    # Input is kept long enough for a worker to be away; the ledger at least as long as dedupe keys live.
    input_retention_ms: int = 14 * 86_400_000
    ledger_retention_ms: int = 400 * 86_400_000
    notice_retention_ms: int = 90 * 86_400_000
    # How far the ledger's log time may be ahead of Kafka's clock.
    log_time_ahead_max_ms: int = 10 * 60_000

    def __post_init__(self) -> None:
        if not 1 <= self.partitions <= 10_000:
            raise ValueError(f"partitions: {self.partitions}; give 1 to 10,000")


@dataclass(frozen=True, slots=True)
class SnapshotSettings:
    """Where snapshots of local state go, and when one is taken: whichever of the two bounds is reached first.

    What lies behind the last snapshot must be replayed by whoever starts on a new disk, about 50 MB of records a second.
    """

    url: str
    interval_s: float = 900.0
    log_bytes: int = 1_000_000_000
    kept: int = 3

    def __post_init__(self) -> None:
        if "://" not in self.url or "@" in self.url:
            raise ValueError("url: give file:///folder, s3://bucket/prefix, gs://… or az://…, without a user or a password")
        if self.interval_s <= 0 or self.log_bytes < 1 or self.kept < 1:
            raise ValueError(
                f"interval_s: {self.interval_s}, log_bytes: {self.log_bytes}, kept: {self.kept}; give more than 0 of each"
            )


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """One worker process: the ledger agent, and the publisher unless `publish` says otherwise."""

    kafka: KafkaSettings
    state_folder: Path
    keys: LedgerKeys
    topics: TopicNames = field(default_factory=TopicNames)
    group: str = "taximeter-ledger"
    publish: bool = True
    ledger: bool = True
    # The broker keeps nothing (embedded): hold records until the sink named here has confirmed them.
    keep_unconfirmed_for: str = ""
    in_flight_max: int = 8
    tick_interval_s: float = 2.0
    session_timeout_s: float = 10.0
    heartbeat_interval_s: float = 2.0
    # Input waits and nothing was acknowledged for so long: the process ends, and a new one starts over from the log.
    stall_timeout_s: float = 60.0
    drain_timeout_s: float = 8.0
    snapshots: SnapshotSettings | None = None

    def __post_init__(self) -> None:
        if self.session_timeout_s * 1000 < _SESSION_MS_MIN or self.heartbeat_interval_s * 2 > self.session_timeout_s:
            raise ValueError(
                f"session_timeout_s: {self.session_timeout_s}, heartbeat_interval_s: {self.heartbeat_interval_s}; give a "
                "session of at least 1 s and a heartbeat of at most half of it"
            )
        if self.tick_interval_s <= 0 or self.stall_timeout_s <= 0 or self.drain_timeout_s <= 0:
            raise ValueError("tick_interval_s, stall_timeout_s, drain_timeout_s: give more than 0")
        if not (self.ledger or self.publish):
            raise ValueError("ledger, publish: one of them must be on")
        if self.snapshots is not None and self.keep_unconfirmed_for:
            raise ValueError("snapshots: they are for a broker that keeps its log; this worker is set up for one that does not")
