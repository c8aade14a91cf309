"""From the one configuration to the settings of what serves: gateway, billing API, notifier and model server. As `compose`, it
decides nothing: a part's bounds are the part's.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING

from billing import key_ring as key_rings
from billing.commands import lease_key
from stream_processors.settings import TopicSettings
from taximeter.collectors import require_otlp
from taximeter.compose import kafka_security, key_ring, make_reader, meter_settings, publisher_settings, topic_names
from taximeter.config import Config, read_secret
from taximeter.errors import ConfigError
from taximeter.serving_config import ModelProfileConfig

if TYPE_CHECKING:
    from pathlib import Path

    from billing.key_ring import Keys
    from serving.api import ApiSettings
    from serving.gateway.profiles import ModelProfile
    from serving.gateway.settings import GatewaySettings, LeaseSettings, UpstreamTls
    from serving.model_server.settings import ServerSettings
    from serving.notifier.settings import NotifierSettings

__all__ = [
    "api_settings",
    "gateway_settings",
    "model_profile",
    "model_server_settings",
    "notifier_settings",
    "upstream_tls",
]


def model_profile(name: str, profile: ModelProfileConfig) -> ModelProfile:
    """How the gateway meters a model. Raises ConfigError for what its kind of back end does not have."""
    from serving.gateway.profiles import KINDS

    kind = KINDS[profile.backend]
    options = profile.model_dump(exclude_none=True, exclude={"backend"})
    if not options["tokenizer"]:
        del options["tokenizer"]
    if "text_inputs" in options:
        options["text_inputs"] = tuple(options["text_inputs"])
    for option in options.keys() - inspect.signature(kind).parameters.keys():
        raise ConfigError(f"models.profiles.{name}.{option}: backend {profile.backend} has no such thing: leave it out")
    return kind(name, **options)


def upstream_tls(config: Config) -> UpstreamTls | None:
    """How the back end's certificate is verified, and what is shown to it; None: it speaks no TLS."""
    from serving.gateway.settings import UpstreamTls

    gateway = config.gateway
    if gateway.upstream_ca_file is None:
        return None
    return UpstreamTls(
        _read("gateway.upstream_ca_file", gateway.upstream_ca_file),
        _read_if_set("gateway.upstream_certificate_file", gateway.upstream_certificate_file),
        _read_if_set("gateway.upstream_key_file", gateway.upstream_key_file),
    )


def gateway_settings(config: Config) -> GatewaySettings:
    """The metering gateway."""
    from serving.gateway.count_audit import AuditSettings
    from serving.gateway.settings import (
        AdmissionSettings,
        DirectorySettings,
        GatewaySettings,
        LimitSettings,
        TlsSettings,
    )

    gateway, names = config.gateway, topic_names(config)
    if not config.models.profiles:
        raise ConfigError("models.profiles is empty, so the gateway serves nothing: add [models.profiles.NAME]")
    tls = None
    if gateway.tls_certificate_file is not None and gateway.tls_key_file is not None:
        tls = TlsSettings(
            _read("gateway.tls_certificate_file", gateway.tls_certificate_file),
            _read("gateway.tls_key_file", gateway.tls_key_file),
            _read_if_set("gateway.tls_client_ca_file", gateway.tls_client_ca_file),
        )
    if gateway.otlp_endpoint:
        require_otlp("gateway", "serving.gateway.otlp")
    return GatewaySettings(
        meter=meter_settings(config, gateway.journal_path),
        publisher=publisher_settings(config),
        directory=DirectorySettings(
            bootstrap=config.kafka.bootstrap,
            pepper=read_secret(gateway, "key_pepper", needed_for="the gateway"),
            partitions=config.ledger.partitions,
            accounts_topic=names.accounts,
            keys_topic=names.keys,
            security=kafka_security(config.kafka),
        ),
        models={name: model_profile(name, profile) for name, profile in config.models.profiles.items()},
        tokenizers=config.models.tokenizers,
        fingerprints=config.models.fingerprints,
        check_tokenizers=gateway.check_tokenizers,
        host=gateway.host,
        port=gateway.port,
        upstream=gateway.upstream,
        upstream_tls=upstream_tls(config),
        tls=tls,
        server_id=gateway.server_id,
        region=gateway.region,
        trace=gateway.trace,
        observe=bool(gateway.metrics_address),
        otlp_endpoint=gateway.otlp_endpoint,
        audit=AuditSettings(one_in=gateway.audit_one_in, drift_max=gateway.audit_drift_max),
        admission=AdmissionSettings(state_age_max_ms=int(gateway.accounts_age_max_s * 1_000), fail_open=gateway.fail_open),
        leases=_lease_settings(config) if gateway.leases else None,
        limits=LimitSettings(
            requests_max=gateway.requests_max,
            tenant_requests_max=gateway.tenant_requests_max,
            replicas=gateway.replicas,
            prompt_tokens_max=gateway.prompt_tokens_max,
            message_bytes_max=gateway.message_bytes_max,
            upstream_attempts=gateway.upstream_attempts,
            durable_timeout_s=config.producer.durable_timeout_s,
        ),
    )


def api_settings(config: Config) -> ApiSettings:
    """The billing API. Without the command key it answers, and changes nothing."""
    from serving.api import AlertSource, ApiLimits, ApiSettings, KeySource, TlsFiles
    from taximeter.commanding import Commander

    api, ledger = config.api, config.ledger
    tls = None
    if api.tls_certificate_file is not None and api.tls_key_file is not None:
        tls = TlsFiles(api.tls_certificate_file, api.tls_key_file)
    return ApiSettings(
        keys=KeySource(
            bootstrap=config.kafka.bootstrap,
            pepper=read_secret(config.gateway, "key_pepper", needed_for="the billing API"),
            partitions=ledger.partitions,
            topic=topic_names(config).keys,
            security=kafka_security(config.kafka),
        ),
        alerts=AlertSource(
            bootstrap=config.kafka.bootstrap,
            topic=topic_names(config).alerts,
            retention_ms=TopicSettings(partitions=ledger.partitions).notice_retention_ms,
            security=kafka_security(config.kafka),
        ),
        open_reader=partial(make_reader, config),
        open_commander=partial(Commander, config) if ledger.command_key or ledger.command_key_file else None,
        host=api.host,
        grpc_port=api.grpc_port,
        http_port=api.http_port,
        tls=tls,
        limits=ApiLimits(call_timeout_s=api.call_timeout_s, calls_max=api.calls_max, tenant_calls_max=api.tenant_calls_max),
    )


def notifier_settings(config: Config) -> NotifierSettings:
    """The notifier."""
    from serving.notifier.settings import NotifierLimits, NotifierSettings
    from taximeter.endpoints import endpoint_of

    notifier = config.notifier
    if not notifier.endpoints:
        raise ConfigError("notifier.endpoints is empty, so nobody is told anything: add [notifier.endpoints.NAME]")
    return NotifierSettings(
        bootstrap=config.kafka.bootstrap,
        journal_path=notifier.journal_path,
        endpoints=tuple(endpoint_of(name, endpoint) for name, endpoint in notifier.endpoints.items()),
        topic=topic_names(config).alerts,
        security=kafka_security(config.kafka),
        limits=NotifierLimits(
            attempt_timeout_s=notifier.timeout_s,
            horizon_s=notifier.retry_hours * 3_600,
            queue_max=notifier.queue_max,
            dead_max=notifier.dead_max,
        ),
    )


def _lease_settings(config: Config) -> LeaseSettings:
    from serving.gateway.settings import LeaseSettings

    gateway, names = config.gateway, topic_names(config)
    return LeaseSettings(
        bootstrap=config.kafka.bootstrap,
        key=_lease_key(config),
        commands_topic=names.commands,
        prices_topic=names.prices,
        security=kafka_security(config.kafka),
        wait_ms=gateway.lease_wait_ms,
        duration_ms=gateway.lease_seconds * 1_000,
        output_tokens_default=gateway.output_tokens_default,
        clamp_output=gateway.clamp_output,
    )


def _lease_key(config: Config) -> Keys:
    """The gateway's own, else what the command key makes of it, where one machine runs everything."""
    gateway, ledger = config.gateway, config.ledger
    if gateway.lease_key is None and gateway.lease_key_file is None and (ledger.command_key or ledger.command_key_file):
        return lease_key(key_ring(config, "command_key", needed_for="the gateway's leases"))
    text = read_secret(gateway, "lease_key", needed_for="the gateway's leases (`taximeter lease key` shows it)")
    try:
        return key_rings.from_hex(text)
    except ValueError:
        raise ConfigError("gateway.lease_key is not what `taximeter lease key` shows: set it to that") from None


def model_server_settings(config: Config) -> ServerSettings:
    """The small model server that `up` runs."""
    from serving.model_server.settings import ServerSettings

    embedded = config.embedded
    if not embedded.model_server_port:
        raise ConfigError("embedded.model_server_port is 0: name a port, or let `taximeter up` choose one")
    return ServerSettings(host=embedded.host, port=embedded.model_server_port, models=tuple(embedded.models.split(",")))


def _read_if_set(key: str, path: Path | None) -> bytes | None:
    return None if path is None else _read(key, path)


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} {path} cannot be read ({error.strerror}): correct the path") from None
