"""The sections of the configuration that every installation has: Kafka, the ledger, the database, producers, prices, and what
`up` starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, model_validator

from taximeter.config_section import MetricsAddress, OtlpEndpoint, Port, Section, is_local
from taximeter.rules_config import RulesConfig

__all__ = ["ClickHouseConfig", "EmbeddedConfig", "KafkaConfig", "LedgerConfig", "PricesConfig", "ProducerConfig"]

# 0: none; the embedded set-up chooses a free one.
_PortOrNone = Annotated[int, Field(ge=0, le=65_535)]


class KafkaConfig(Section):
    """Where Kafka is, how to speak to it, and how the topics are called."""

    bootstrap: str = "127.0.0.1:9092"
    topic_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$", max_length=100)] = ""
    # 0: the broker's default.
    replication_factor: Annotated[int, Field(ge=0, le=9)] = 0
    # Days that usage.ledger keeps records; at least the dedupe horizon, and some to replay behind it.
    ledger_retention_days: Annotated[int, Field(ge=1)] = 400
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = ""
    sasl_username: str = ""
    sasl_password: SecretStr | None = None
    sasl_password_file: Path | None = None
    ssl_ca_file: Path | None = None
    ssl_certificate_file: Path | None = None
    ssl_key_file: Path | None = None
    # Speak to other machines without TLS: who listens on the way reads usage and passwords, and may change them.
    allow_plaintext: bool = False
    request_timeout_s: Annotated[float, Field(gt=0, le=300)] = 15.0

    @model_validator(mode="after")
    def _sasl_is_whole(self) -> KafkaConfig:
        if self.security_protocol.startswith("SASL") and not (self.sasl_mechanism and self.sasl_username):
            raise ValueError(f"security_protocol {self.security_protocol} needs sasl_mechanism and sasl_username: set them")
        return self

    @model_validator(mode="after")
    def _is_encrypted(self) -> KafkaConfig:
        far = [address for address in self.bootstrap.split(",") if not is_local(address.strip())]
        if far and not self.security_protocol.endswith("SSL") and not self.allow_plaintext:
            raise ValueError(
                f"bootstrap {far[0].strip()} is on another machine and security_protocol {self.security_protocol} is not "
                "encrypted: set SSL or SASL_SSL, or allow_plaintext = true where the network is trusted"
            )
        return self


class LedgerConfig(Section):
    """The ledger: how many partitions it was founded with, where its local state lies, and the keys that seal it."""

    partitions: Annotated[int, Field(ge=1, le=1024)] = 4
    state_dir: Path = Path(".taximeter/ledger")
    consumer_group: Annotated[str, Field(min_length=1, max_length=100)] = "taximeter-ledger"
    session_timeout_s: Annotated[float, Field(ge=4, le=300)] = 10.0
    # What a tenant is billed in that nobody has created.
    currency: Annotated[str, Field(min_length=1, max_length=8)] = "USD"
    seal_key: SecretStr | None = None
    seal_key_file: Path | None = None
    # Where the sink writes each day's chain heads, and `audit` reads them: away from Kafka and ClickHouse; none: nowhere.
    anchor_file: Path | None = None
    command_key: SecretStr | None = None
    command_key_file: Path | None = None
    dedupe_horizon_days: Annotated[int, Field(ge=1, le=400)] = 35
    # A ledger is founded closed: usage of producers that are not registered is refused, and stays in their journals.
    registered_producers_only: bool = False
    window_lateness_minutes: Annotated[int, Field(ge=1, le=10_080)] = 10
    future_alert_minutes: Annotated[int, Field(ge=1)] = 5
    future_reject_minutes: Annotated[int, Field(ge=1)] = 1_440
    alert_cooldown_minutes: Annotated[int, Field(ge=0)] = 10
    metrics_address: MetricsAddress = ""
    # As in [gateway], of a worker: spans of traced requests whose usage the ledger has. Without TLS on this machine alone, or
    # with kafka.allow_plaintext.
    otlp_endpoint: OtlpEndpoint = ""
    missing_grace_seconds: Annotated[int, Field(ge=1)] = 120
    producer_silence_seconds: Annotated[int, Field(ge=1)] = 300
    rules: RulesConfig = Field(default_factory=RulesConfig)
    # Where workers put snapshots of their state, so that a new disk need not replay the whole ledger: file:///folder,
    # s3://bucket/prefix, gs://…, az://…; empty: nowhere. Credentials come from the environment, as the cloud's tools take them.
    snapshot_url: Annotated[str, Field(pattern=r"^$|^[a-z0-9]+://[^@]*$")] = ""
    # One is taken when either is reached: what was written since is what a new disk must replay.
    snapshot_interval_minutes: Annotated[float, Field(gt=0, le=10_080)] = 15.0
    snapshot_log_bytes: Annotated[int, Field(ge=1_000_000)] = 1_000_000_000
    snapshots_kept: Annotated[int, Field(ge=1, le=50)] = 3


class ClickHouseConfig(Section):
    """Where rows go: chDB, owned by the sink and asked over loopback, or a ClickHouse server over the native
    protocol.
    """

    engine: Literal["chdb", "server"] = "chdb"
    database: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)] = "taximeter"
    chdb_path: Path = Path(".taximeter/chdb")
    loopback_port: _PortOrNone = 8124
    loopback_token: SecretStr | None = None
    loopback_token_file: Path | None = None
    host: str = "127.0.0.1"
    port: Port = 9000
    user: str = "default"
    password: SecretStr | None = None
    password_file: Path | None = None
    tls: bool = False
    ca_file: Path | None = None
    # As in [kafka].
    allow_plaintext: bool = False
    sink_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=64)] = "clickhouse"
    metrics_address: MetricsAddress = ""
    # As in [ledger], of the sink: spans of those that the database has.
    otlp_endpoint: OtlpEndpoint = ""

    @model_validator(mode="after")
    def _is_encrypted(self) -> ClickHouseConfig:
        if self.engine == "server" and not (self.tls or is_local(self.host) or self.allow_plaintext):
            raise ValueError(
                f"host {self.host} is on another machine and tls is off: set tls = true (and ca_file), or allow_plaintext "
                "= true where the network is trusted"
            )
        return self


class ProducerConfig(Section):
    """What a metering point's journal and publisher may use, and as whom it is registered."""

    # How the IDs of its journals begin: by it the ledger finds the registration, `NAME*`.
    id_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$", max_length=100)] = ""
    # `taximeter producer register` shows it; without it, batches are not signed.
    key: SecretStr | None = None
    key_file: Path | None = None
    journal_bytes_max: Annotated[int, Field(ge=1_000_000)] = 2_000_000_000
    linger_ms: Annotated[int, Field(ge=0, le=10_000)] = 20
    batch_events: Annotated[int, Field(ge=1, le=1_000)] = 500
    batch_bytes: Annotated[int, Field(ge=1_000, le=1_000_000)] = 900_000
    durable_timeout_s: Annotated[float, Field(gt=0)] = 30.0


class PricesConfig(Section):
    """The price book that `up` applies when it founds a ledger; none: the one that comes with the package."""

    initial_book: Path | None = None


class EmbeddedConfig(Section):
    """What `up` starts on this machine."""

    host: Literal["127.0.0.1"] = "127.0.0.1"
    broker_port: _PortOrNone = 0
    gateway_port: _PortOrNone = 0
    model_server_port: _PortOrNone = 0
    loopback_port: _PortOrNone = 0
    api_http_port: _PortOrNone = 0
    api_grpc_port: _PortOrNone = 0
    model_server: bool = True
    # What the model server serves: a real small language model, and one that reports the counts that it is told.
    models: Literal["smollm2,trace", "smollm2", "trace"] = "smollm2,trace"
    gateway: bool = True
    api: bool = True
    workers: Annotated[int, Field(ge=1, le=16)] = 1
    ready_timeout_s: Annotated[float, Field(gt=0, le=600)] = 120.0
    stop_timeout_s: Annotated[float, Field(gt=0, le=600)] = 20.0
