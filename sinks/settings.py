"""What a sink needs to know to follow a ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from billing.key_ring import Keys

__all__ = ["SinkSettings"]


@dataclass(frozen=True, slots=True)
class SinkSettings:
    """Kafka's side of a sink; the engine is handed over beside it."""

    bootstrap: str
    ledger_topic: str = "usage.ledger"
    progress_topic: str = "usage.progress"
    usage_topic: str = "usage.events"
    # None: all of the topic's.
    partitions: tuple[int, ...] | None = None
    # None: links are checked, seals are not.
    seal_key: Keys | None = field(default=None, repr=False)
    # Names this reader in usage.progress: reader/<name>/<partition>.
    name: str = "sink/clickhouse"
    # librdkafka's own names (security.protocol, sasl.*, ssl.*).
    security: Mapping[str, str] = field(default_factory=dict, repr=False)
    # A batch is written when nothing more came for `linger_ms`, when it is `collect_ms` old, or when it is this large; larger
    # ones fall out of the processor's cache and are slower.
    linger_ms: int = 100
    collect_ms: int = 1_000
    batch_bytes: int = 8_000_000
    # Balances are shown after this, before the batch that they are of.
    preview_ms: int = 50
    retry_ms_max: int = 10_000
    accept_gap: bool = False

    def __post_init__(self) -> None:
        for name in ("linger_ms", "collect_ms", "preview_ms"):
            if not 0 <= getattr(self, name) <= 60_000:
                raise ValueError(f"{name}: {getattr(self, name)}; between 0 and 60,000")
        if not 100_000 <= self.batch_bytes <= 256_000_000:
            raise ValueError(f"batch_bytes: {self.batch_bytes}; between 100,000 and 256,000,000")
        if self.retry_ms_max < 100:
            raise ValueError(f"retry_ms_max: {self.retry_ms_max}; at least 100")
