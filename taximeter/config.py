"""The one configuration: a TOML file, the environment and flags, in that order of growing weight.

Promise: `load` returns a frozen, complete `Config`, or raises `ConfigError` that names every wrong key, its value
(never a secret's) and the mend. A key that nobody knows is an error that names the nearest known one, wherever it
came from.

The file is `taximeter.toml`, or what `--config` or `TAXIMETER_CONFIG` names. The environment is
`TAXIMETER_SECTION__KEY`, such as `TAXIMETER_KAFKA__BOOTSTRAP`. A flag is `--set kafka.bootstrap=…`. A secret stands in
a file named by `…_file`, or in the environment; it is masked in every repr, error and dump.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from billing.v1.alert_pb2 import AlertRule, Severity
from taximeter.config_section import Section
from taximeter.errors import ConfigError
from taximeter.logs import keep_out
from taximeter.rules_config import RulesConfig

__all__ = [
    "ApiConfig",
    "ClickHouseConfig",
    "Config",
    "EmbeddedConfig",
    "GatewayConfig",
    "KafkaConfig",
    "LedgerConfig",
    "ModelProfileConfig",
    "ModelsConfig",
    "NotifierConfig",
    "NotifierEndpointConfig",
    "PricesConfig",
    "ProducerConfig",
    "RulesConfig",
    "is_anything_set",
    "load",
    "read_secret",
]

ENVIRONMENT_PREFIX: Final = "TAXIMETER_"
# Variables of the command line itself, which are no keys of the configuration.
_COMMAND_LINE_VARIABLES: Final = frozenset(
    {"TAXIMETER_CONFIG", "TAXIMETER_DATA_DIR", "TAXIMETER_LOG_FORMAT", "TAXIMETER_LOG_LEVEL"}
)
DEFAULT_FILE: Final = Path("taximeter.toml")
_FILE_BYTES_MAX: Final = 1_000_000
_ENDPOINTS_MAX: Final = 32

Port = Annotated[int, Field(ge=1, le=65_535)]
# 0: none; the embedded set-up chooses a free one.
PortOrNone = Annotated[int, Field(ge=0, le=65_535)]


_COUNTLESS_BACKENDS: Final = frozenset({"generic", "embeddings", "classification", "speech_to_text", "text_to_image"})


MetricsAddress = Annotated[str, Field(pattern=r"^$|^[^\s/]+:[0-9]{1,5}$")]


def _is_local(address: str) -> bool:
    """Whether an address, with its port or without, is of this machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition("/")[2]
    if host.count(":") == 1 or host.startswith("["):
        host = host.rpartition(":")[0].strip("[]") if not host.endswith("]") else host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
        far = [address for address in self.bootstrap.split(",") if not _is_local(address.strip())]
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
    loopback_port: PortOrNone = 8124
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
    query_timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    metrics_address: MetricsAddress = ""

    @model_validator(mode="after")
    def _is_encrypted(self) -> ClickHouseConfig:
        if self.engine == "server" and not (self.tls or _is_local(self.host) or self.allow_plaintext):
            raise ValueError(
                f"host {self.host} is on another machine and tls is off: set tls = true (and ca_file), or allow_plaintext "
                "= true where the network is trusted"
            )
        return self


class GatewayConfig(Section):
    """The metering gateway: where it listens, what stands behind it, and how it knows a key."""

    host: str = "127.0.0.1"
    port: Port = 8001
    upstream: str = "127.0.0.1:8101"
    # Set: TLS to the back end, verified against these certificates.
    upstream_ca_file: Path | None = None
    tls_certificate_file: Path | None = None
    tls_key_file: Path | None = None
    # Set: clients show a certificate that one of these has signed, beside their key.
    tls_client_ca_file: Path | None = None
    # Shown to a back end that asks for one.
    upstream_certificate_file: Path | None = None
    upstream_key_file: Path | None = None
    # As in [kafka]: for clients and for the back end. A proxy in front that ends TLS is a reason.
    allow_plaintext: bool = False
    journal_path: Path = Path(".taximeter/gateway/journal.sqlite")
    server_id: str = ""
    region: str = ""
    key_pepper: SecretStr | None = None
    key_pepper_file: Path | None = None
    requests_max: Annotated[int, Field(ge=1)] = 1_000
    tenant_requests_max: Annotated[int, Field(ge=1)] = 250
    # HOST:PORT where Prometheus asks; empty: nowhere. So in [ledger] for a worker, in [clickhouse] for the sink, in [api] and
    # [notifier] for these.
    metrics_address: MetricsAddress = ""
    # A trace begins for requests that bring none; one that a client brings is always taken up.
    trace: bool = False
    # http://HOST:PORT, or https://, of an OpenTelemetry collector that is told spans and metrics over OTLP/gRPC; empty: none.
    # The rest is said by OpenTelemetry's own variables, such as OTEL_EXPORTER_OTLP_HEADERS.
    otlp_endpoint: Annotated[str, Field(pattern=r"^$|^https?://[^\s/@]+:[0-9]{1,5}$")] = ""
    # One in so many answers is counted again by the tokenizer, to see that the back end's counts are right; 0: none.
    audit_one_in: Annotated[int, Field(ge=0)] = 100
    audit_drift_max: Annotated[float, Field(gt=0, le=1)] = 0.02
    # Gateways that share the limits of keys, tenants and models: each lets its part through.
    replicas: Annotated[int, Field(ge=1)] = 1
    # For models and plans that state none; 0: no limit.
    prompt_tokens_max: Annotated[int, Field(ge=0)] = 0
    # Of one request or response, on both sides; gRPC carries no more than the default.
    message_bytes_max: Annotated[int, Field(ge=1_024, le=2**31 - 1)] = 2**31 - 1
    # How often a request is sent where the back end is not there, or is gone before its first response.
    upstream_attempts: Annotated[int, Field(ge=1, le=10)] = 2
    # What is known of accounts is stale when their partition of the ledger has been silent for so long.
    accounts_age_max_s: Annotated[float, Field(gt=0)] = 60.0
    fail_open: bool = False
    # Requests are paid from leases on the tenants' balances, so that no balance is passed however many gateways there are.
    leases: bool = True
    # `taximeter lease key` shows it: what lease requests are signed with. Not needed where ledger.command_key is at hand.
    lease_key: SecretStr | None = None
    lease_key_file: Path | None = None
    # How long a request waits for the ledger where what the gateway holds does not suffice, before it is refused.
    lease_wait_ms: Annotated[int, Field(ge=0)] = 1_000
    lease_seconds: Annotated[int, Field(ge=5, le=3_600)] = 30
    # Set aside for requests that state no maximum of output, where the plan has none either.
    output_tokens_default: Annotated[int, Field(ge=1)] = 4_096
    # Answers are clamped to what is left, where a request's worst case costs more; else the request is refused.
    clamp_output: bool = True

    @model_validator(mode="after")
    def _tls_is_whole(self) -> GatewayConfig:
        if (self.tls_certificate_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_certificate_file and tls_key_file belong together: set both, or neither")
        if (self.upstream_certificate_file is None) != (self.upstream_key_file is None):
            raise ValueError("upstream_certificate_file and upstream_key_file belong together: set both, or neither")
        if self.tls_client_ca_file is not None and self.tls_key_file is None:
            raise ValueError("tls_client_ca_file asks for clients' certificates, which needs TLS: set tls_certificate_file too")
        if self.upstream_certificate_file is not None and self.upstream_ca_file is None:
            raise ValueError("upstream_certificate_file is shown over TLS: set upstream_ca_file too")
        return self

    @model_validator(mode="after")
    def _is_encrypted(self) -> GatewayConfig:
        if self.allow_plaintext:
            return self
        if not _is_local(self.host) and self.tls_key_file is None:
            raise ValueError(
                f"host {self.host} takes keys from other machines and there is no TLS: set tls_certificate_file and "
                "tls_key_file, or allow_plaintext = true where the network is trusted"
            )
        if not _is_local(self.upstream) and self.upstream_ca_file is None:
            raise ValueError(
                f"upstream {self.upstream} is on another machine and there is no TLS: set upstream_ca_file, or "
                "allow_plaintext = true where the network is trusted"
            )
        if self.otlp_endpoint.startswith("http://") and not _is_local(self.otlp_endpoint):
            raise ValueError(
                f"otlp_endpoint {self.otlp_endpoint} is on another machine and there is no TLS: write https://, or set "
                "allow_plaintext = true where the network is trusted"
            )
        return self


class ApiConfig(Section):
    """The billing API: where it listens. `gateway.key_pepper` lets it know keys, `ledger.command_key` change things."""

    host: str = "127.0.0.1"
    http_port: Port = 8003
    grpc_port: Port = 8004
    tls_certificate_file: Path | None = None
    tls_key_file: Path | None = None
    # As in [kafka]. A proxy in front that ends TLS is a reason.
    allow_plaintext: bool = False
    # Of one call and all that it asks of the database.
    call_timeout_s: Annotated[float, Field(gt=0, le=300)] = 30.0
    # At the same time, in all and of one tenant; who comes too much is told to come again.
    calls_max: Annotated[int, Field(ge=1, le=10_000)] = 64
    tenant_calls_max: Annotated[int, Field(ge=1, le=10_000)] = 16
    metrics_address: MetricsAddress = ""

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ApiConfig:
        if (self.tls_certificate_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_certificate_file and tls_key_file belong together: set both, or neither")
        if not (_is_local(self.host) or self.tls_key_file or self.allow_plaintext):
            raise ValueError(
                f"host {self.host} takes keys from other machines and there is no TLS: set tls_certificate_file and "
                "tls_key_file, or allow_plaintext = true where the network is trusted"
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


class ModelProfileConfig(Section):
    """One model behind the gateway: how its back end speaks, and which tokenizer counts when the back end does not. What is not
    set is as it is with this back end; what a back end does not have must not be set.
    """

    backend: Literal[
        "vllm",
        "vllm_embeddings",
        "tensorrt_llm",
        "tensorrt_llm_ids",
        "token_ids",
        "generic",
        "embeddings",
        "classification",
        "ocr",
        "speech_to_text",
        "text_to_image",
    ] = "vllm"
    # By its name in [models.tokenizers]; empty: the back end alone counts.
    tokenizer: str = ""
    decoupled: bool | None = None
    # For plans that state none; 0: the gateway's.
    prompt_tokens_max: Annotated[int, Field(ge=0)] | None = None
    # Names of tensors.
    text_inputs: Annotated[list[str], Field(min_length=1, max_length=8)] | None = None
    text_output: str | None = None
    ids_input: str | None = None
    lengths_input: str | None = None
    ids_output: str | None = None
    lengths_output: str | None = None
    audio_input: str | None = None
    audio_lengths_input: str | None = None
    steps_input: str | None = None
    images_input: str | None = None
    # What a request says that is none, but stops the one that has its ID.
    stop_input: Annotated[str, Field(min_length=1)] | None = None
    # TensorRT-LLM's parameter `exclude_input_in_output`, for requests that do not say.
    exclude_input_default: bool | None = None
    sample_rate_hz: Annotated[int, Field(ge=1)] | None = None
    # What the model does where a request states none.
    steps_default: Annotated[int, Field(ge=1)] | None = None
    images_default: Annotated[int, Field(ge=1)] | None = None
    # Set aside of a balance for an answer that is billed by the character.
    characters_reserved: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _can_count(self) -> ModelProfileConfig:
        if self.backend in _COUNTLESS_BACKENDS and not self.tokenizer:
            raise ValueError(f"backend {self.backend} reports no counts: name a tokenizer from [models.tokenizers]")
        return self


class ModelsConfig(Section):
    """Models by name, and tokenizers by name: the path of a tokenizer.json, a GGUF file, or a folder."""

    profiles: dict[str, ModelProfileConfig] = Field(default_factory=dict)
    tokenizers: dict[str, Path] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _tokenizers_are_there(self) -> ModelsConfig:
        for name, profile in self.profiles.items():
            if profile.tokenizer and profile.tokenizer not in self.tokenizers:
                raise ValueError(f"profiles.{name} counts with tokenizer {profile.tokenizer!r}: add it to [models.tokenizers]")
        return self


class NotifierEndpointConfig(Section):
    """One receiver of alerts over HTTP. Filters that are empty let everything through."""

    # Where alerts are posted; Alertmanager's is https://HOST/api/v2/alerts.
    url: Annotated[str, Field(min_length=1, max_length=2_000)]
    # Standard Webhooks, or Alertmanager's API v2.
    format: Literal["standard", "alertmanager"] = "standard"
    # A secret a line, `whsec_…` or base64 of 24 to 64 bytes; two while they are changed: both sign.
    secret_file: Path | None = None
    # Sent as `Authorization: Bearer`, where a proxy in front of the receiver asks for it.
    bearer_file: Path | None = None
    # Names of rules, such as token_burst.
    rules: list[str] = Field(default_factory=list)
    # info, warning, critical.
    severities: list[str] = Field(default_factory=list)
    tenants: list[str] = Field(default_factory=list)
    # As in [kafka]: http:// instead of https://.
    allow_plaintext: bool = False
    # The address may be of this machine, of a private network or of a cloud's metadata service.
    allow_private: bool = False
    # Whose certificates the receiver may show, instead of the public authorities'.
    ca_file: Path | None = None

    @model_validator(mode="after")
    def _can_be_asked(self) -> NotifierEndpointConfig:
        malformed = ValueError("url is not https://HOST[:PORT]/PATH without a user and a fragment: correct it")
        try:
            parts = urlsplit(self.url)
            is_whole = bool(parts.hostname) and parts.port != 0
        except ValueError:
            raise malformed from None
        if not is_whole or parts.scheme not in ("http", "https") or "@" in parts.netloc or parts.fragment:
            raise malformed
        if parts.scheme == "http" and not self.allow_plaintext:
            raise ValueError("url is not encrypted: write https://, or set allow_plaintext = true where the network is trusted")
        if self.format == "standard" and self.secret_file is None:
            raise ValueError("format standard is signed: set secret_file (a line of it: `openssl rand -base64 32`)")
        return self

    @model_validator(mode="after")
    def _filters_are_known(self) -> NotifierEndpointConfig:
        known = {
            "rules": [name.removeprefix("ALERT_RULE_").lower() for name in AlertRule.keys()[1:]],
            "severities": [name.removeprefix("SEVERITY_").lower() for name in Severity.keys()[1:]],
        }
        for key, names in known.items():
            for name in getattr(self, key):
                if name not in names:
                    raise ValueError(f"{key} has {name[:40]!r}, which is none: the nearest is {_nearest(name, names)}")
        return self


class NotifierConfig(Section):
    """The notifier: alerts to endpoints over HTTP."""

    # What is to be delivered, and how far the alert topic was followed: on a disk that survives the process.
    journal_path: Path = Path(".taximeter/notifier/journal.sqlite")
    metrics_address: MetricsAddress = ""
    # Of one attempt.
    timeout_s: Annotated[float, Field(gt=0, le=60)] = 10.0
    # From a delivery's first attempt to the dead-letter list.
    retry_hours: Annotated[float, Field(gt=0, le=720)] = 24.0
    # Of each endpoint: deliveries that wait (more are dead letters at once), and dead letters that are kept (the newest).
    queue_max: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    dead_max: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    endpoints: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=40)], NotifierEndpointConfig],
        Field(max_length=_ENDPOINTS_MAX),
    ] = Field(default_factory=dict)


class PricesConfig(Section):
    """The price book that `up` applies when it founds a ledger; none: the one that comes with the package."""

    initial_book: Path | None = None


class EmbeddedConfig(Section):
    """What `up` starts on this machine."""

    host: Literal["127.0.0.1"] = "127.0.0.1"
    broker_port: PortOrNone = 0
    gateway_port: PortOrNone = 0
    model_server_port: PortOrNone = 0
    loopback_port: PortOrNone = 0
    api_http_port: PortOrNone = 0
    api_grpc_port: PortOrNone = 0
    model_server: bool = True
    # What the model server serves: a real small language model, and one that reports the counts that it is told.
    models: Literal["smollm2,trace", "smollm2", "trace"] = "smollm2,trace"
    gateway: bool = True
    api: bool = True
    workers: Annotated[int, Field(ge=1, le=16)] = 1
    ready_timeout_s: Annotated[float, Field(gt=0, le=600)] = 120.0
    stop_timeout_s: Annotated[float, Field(gt=0, le=600)] = 20.0


class _FileSource(PydanticBaseSettingsSource):
    """The TOML file, already read: it was parsed by `load`, which says what is wrong with it."""

    def __init__(self, settings_cls: type[BaseSettings], values: Mapping[str, Any]) -> None:
        super().__init__(settings_cls)
        self._values = dict(values)

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


class Config(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    kafka: KafkaConfig = Field(default_factory=KafkaConfig)
    ledger: LedgerConfig = Field(default_factory=LedgerConfig)
    clickhouse: ClickHouseConfig = Field(default_factory=ClickHouseConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    api: ApiConfig = Field(default_factory=ApiConfig)
    producer: ProducerConfig = Field(default_factory=ProducerConfig)
    models: ModelsConfig = Field(default_factory=ModelsConfig)
    notifier: NotifierConfig = Field(default_factory=NotifierConfig)
    prices: PricesConfig = Field(default_factory=PricesConfig)
    embedded: EmbeddedConfig = Field(default_factory=EmbeddedConfig)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # Flags come as init values under one reserved name, so that they and the file stay apart.
        values: dict[str, Any] = getattr(init_settings, "init_kwargs", {})
        file_values = values.pop("_file_values", {})
        return init_settings, env_settings, _FileSource(settings_cls, file_values)


def load(
    path: Path | None = None,
    flags: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, object]] | None = None,
) -> Config:
    """The configuration.

    `path` None: `taximeter.toml` if it is there. `flags` are "section.key=value". `overrides` win over everything.
    """
    file_values = {} if path is None and not DEFAULT_FILE.is_file() else _read_toml(path or DEFAULT_FILE)
    origin = str(path or DEFAULT_FILE)
    values = _parse_flags(flags)
    for section, keys in (overrides or {}).items():
        values.setdefault(section, {}).update(keys)
    _check_environment()
    try:
        # pydantic-settings keeps names that begin with an underscore to itself, so the file's values ride in a dict.
        arguments: dict[str, Any] = {"_file_values": file_values, **values}
        return Config(**arguments)
    except ValidationError as error:
        raise ConfigError(_explain(error, file_values, values, origin)) from None


def is_anything_set() -> bool:
    """Whether there is a configuration to speak of, beyond the defaults: a file here, or something in the environment."""
    return DEFAULT_FILE.is_file() or any(
        name.upper().startswith(ENVIRONMENT_PREFIX) and name.upper() not in _COMMAND_LINE_VARIABLES for name in os.environ
    )


def read_secret(section: BaseModel, field: str, *, needed_for: str) -> bytes:
    """The secret `field` of a section: from `<field>_file` or the value itself; no log shows it from now on. ConfigError when
    neither is there.
    """
    section_name = _section_name(section)
    value: SecretStr | None = getattr(section, field)
    if value is not None:
        secret = value.get_secret_value().encode()
        keep_out(secret)
        return secret
    path: Path | None = getattr(section, f"{field}_file")
    variable = f"{ENVIRONMENT_PREFIX}{section_name.upper()}__{field.upper()}"
    if path is None:
        raise ConfigError(
            f"{section_name}.{field} is not set and {needed_for} needs it: set {section_name}.{field}_file, or {variable}"
        )
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{section_name}.{field}_file {path} cannot be read ({error.strerror}): correct the path") from None
    if not secret:
        raise ConfigError(f"{section_name}.{field}_file {path} is empty: put the secret in it")
    keep_out(secret)
    return secret


def _section_name(section: BaseModel) -> str:
    return next(name for name, info in Config.model_fields.items() if info.annotation is type(section))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise ConfigError(f"configuration file {path} has over {_FILE_BYTES_MAX} bytes: is it the right file?")
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read ({error.strerror}): correct --config") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"configuration file {path} is not TOML ({error}): correct that line") from None


def _parse_flags(flags: Sequence[str]) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for flag in flags:
        name, equals, text = flag.partition("=")
        parts = name.strip().split(".")
        if not equals or len(parts) < 2 or not all(parts):
            raise ConfigError(f"--set {flag!r} is not section.key=value: write e.g. --set kafka.bootstrap=127.0.0.1:9092")
        target: dict[str, Any] = values.setdefault(parts[0], {})
        for part in parts[1:-1]:
            target = target.setdefault(part, {})
        target[parts[-1]] = text
    return values


def _check_environment() -> None:
    """pydantic-settings ignores a variable whose section it does not know; we do not."""
    for variable in sorted(os.environ):
        if not variable.upper().startswith(ENVIRONMENT_PREFIX) or variable.upper() in _COMMAND_LINE_VARIABLES:
            continue
        section, separator, _ = variable[len(ENVIRONMENT_PREFIX) :].lower().partition("__")
        if section not in Config.model_fields or not separator:
            nearest = _nearest(section, list(Config.model_fields))
            mend = f"{ENVIRONMENT_PREFIX}{nearest.upper()}__KEY"
            raise ConfigError(f"environment variable {variable} names no key: write {mend}, or unset it")


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return close[0] if close else ""


def _model_at(location: Sequence[str | int]) -> type[BaseModel] | None:
    """The section's class that a path of keys leads to."""
    current: Any = Config
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(part))
            current = None if field is None else field.annotation
        elif getattr(current, "__origin__", None) is dict:
            current = current.__args__[1]
        else:
            return None
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _explain(error: ValidationError, file_values: Mapping[str, Any], flags: Mapping[str, Any], origin: str) -> str:
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        location = problem["loc"]
        key = ".".join(str(part) for part in location) or "configuration"
        source = _source_of(location, file_values, flags, origin)
        if problem["type"] == "extra_forbidden":
            model = _model_at(location[:-1])
            known = [] if model is None else list(model.model_fields)
            prefix = ".".join(str(part) for part in location[:-1])
            nearest = ".".join(part for part in (prefix, _nearest(str(location[-1]), known)) if part)
            lines.append(f"{key} ({source}) is no key: the nearest is {nearest}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{key} ({source}){_shown(location, file_values, flags)}: {message}")
    return "; ".join(lines)


def _look_up(location: Sequence[str | int], values: Mapping[str, Any]) -> Any:
    current: Any = values
    for part in location:
        if not isinstance(current, Mapping) or part not in current:
            return None
        current = current[part]
    return current


def _source_of(location: Sequence[str | int], file_values: Mapping[str, Any], flags: Mapping[str, Any], origin: str) -> str:
    if _look_up(location, flags) is not None:
        return "a flag"
    variable = ENVIRONMENT_PREFIX + "__".join(str(part).upper() for part in location)
    if any(name.upper() == variable for name in os.environ):
        return f"environment {variable}"
    return origin


def _shown(location: Sequence[str | int], file_values: Mapping[str, Any], flags: Mapping[str, Any]) -> str:
    """The wrong value, unless its key may hold a secret."""
    model = _model_at(location[:-1])
    field = None if model is None else model.model_fields.get(str(location[-1]))
    if field is None or "SecretStr" in str(field.annotation):
        return ""
    value = _look_up(location, flags)
    if value is None:
        variable = ENVIRONMENT_PREFIX + "__".join(str(part).upper() for part in location)
        value = next((text for name, text in os.environ.items() if name.upper() == variable), None)
    if value is None:
        value = _look_up(location, file_values)
    return "" if value is None or isinstance(value, Mapping) else f" is {value!r}"
