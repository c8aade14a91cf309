"""The sections of the configuration of what serves: the gateway and its models, the billing API, the notifier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

from billing.v1.alert_pb2 import AlertRule, Severity
from taximeter.config_section import MetricsAddress, OtlpEndpoint, Port, Section, is_local, nearest_name

__all__ = [
    "ApiConfig",
    "GatewayConfig",
    "ModelProfileConfig",
    "ModelsConfig",
    "NotifierConfig",
    "NotifierEndpointConfig",
]

_COUNTLESS_BACKENDS: Final = frozenset({"generic", "embeddings", "classification", "speech_to_text", "text_to_image"})
_ENDPOINTS_MAX: Final = 32


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
    # Inferences at the same time, and as many streams that are open: in all, and of one tenant.
    requests_max: Annotated[int, Field(ge=1)] = 1_000
    tenant_requests_max: Annotated[int, Field(ge=1)] = 250
    # HOST:PORT where Prometheus asks; empty: nowhere. So in [ledger] for a worker, in [clickhouse] for the sink, in [api] and
    # [notifier] for these.
    metrics_address: MetricsAddress = ""
    # A trace begins for requests that bring none; one that a client brings is always taken up.
    trace: bool = False
    # http://HOST:PORT, or https://, of an OpenTelemetry collector that is told spans and metrics over OTLP/gRPC; empty: none.
    # The rest is said by OpenTelemetry's own variables, such as OTEL_EXPORTER_OTLP_HEADERS.
    otlp_endpoint: OtlpEndpoint = ""
    # How a back end is asked, before its model is served, whether the tokenizer here is the one that it has. metadata: by what
    # it states of the model; probe: where that settles nothing, by its count of one short prompt, for an answer of one token.
    check_tokenizers: Literal["probe", "metadata", "off"] = "probe"
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
        if not is_local(self.host) and self.tls_key_file is None:
            raise ValueError(
                f"host {self.host} takes keys from other machines and there is no TLS: set tls_certificate_file and "
                "tls_key_file, or allow_plaintext = true where the network is trusted"
            )
        if not is_local(self.upstream) and self.upstream_ca_file is None:
            raise ValueError(
                f"upstream {self.upstream} is on another machine and there is no TLS: set upstream_ca_file, or "
                "allow_plaintext = true where the network is trusted"
            )
        if self.otlp_endpoint.startswith("http://") and not is_local(self.otlp_endpoint):
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
        if not (is_local(self.host) or self.tls_key_file or self.allow_plaintext):
            raise ValueError(
                f"host {self.host} takes keys from other machines and there is no TLS: set tls_certificate_file and "
                "tls_key_file, or allow_plaintext = true where the network is trusted"
            )
        return self


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
    # What the back end gives a request that states no max_tokens; 0: not known, so a request with a limit is told that.
    output_tokens_default: Annotated[int, Field(ge=0)] | None = None
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
    """Models by name, and tokenizers by name: the path of a tokenizer.json, a GGUF file, or a folder; or their name on the
    Hugging Face hub, OWNER/NAME or OWNER/NAME@REVISION, whose files must lie in this machine's cache.
    """

    profiles: dict[str, ModelProfileConfig] = Field(default_factory=dict)
    tokenizers: dict[str, Path] = Field(default_factory=dict)
    # Of tokenizers, as `taximeter models check` shows them: a gateway does not start with another one.
    fingerprints: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _tokenizers_are_there(self) -> ModelsConfig:
        for name, profile in self.profiles.items():
            if profile.tokenizer and profile.tokenizer not in self.tokenizers:
                raise ValueError(f"profiles.{name} counts with tokenizer {profile.tokenizer!r}: add it to [models.tokenizers]")
        for name in self.fingerprints.keys() - self.tokenizers.keys():
            raise ValueError(f"fingerprints.{name} is of no tokenizer: add it to [models.tokenizers], or take it out")
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
                    raise ValueError(f"{key} has {name[:40]!r}, which is none: the nearest is {nearest_name(name, names)}")
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
