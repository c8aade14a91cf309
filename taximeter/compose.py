"""From the one configuration to the settings of each part. Nothing is decided here: a part's bounds are the part's."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from producers.meter import MeterSettings
from producers.publisher import PublisherSettings
from taximeter.config import Config, KafkaConfig, read_secret
from taximeter.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from serving.gateway.settings import GatewaySettings
    from serving.model_server.settings import ServerSettings
    from sinks.engine import Reader
from stream_processors.settings import TopicNames

__all__ = [
    "gateway_settings",
    "kafka_security",
    "meter_settings",
    "model_server_settings",
    "open_reader",
    "publisher_settings",
    "topic_names",
]


def topic_names(config: Config) -> TopicNames:
    """Every topic, with the prefix of this installation."""
    return TopicNames(prefix=config.kafka.topic_prefix)


def kafka_security(kafka: KafkaConfig) -> dict[str, str]:
    """librdkafka's settings for TLS and SASL."""
    security: dict[str, str] = {"security.protocol": kafka.security_protocol}
    if kafka.sasl_mechanism:
        security |= {
            "sasl.mechanism": kafka.sasl_mechanism,
            "sasl.username": kafka.sasl_username,
            "sasl.password": read_secret(kafka, "sasl_password", needed_for="SASL").decode(),
        }
    for name, path in (
        ("ssl.ca.location", kafka.ssl_ca_file),
        ("ssl.certificate.location", kafka.ssl_certificate_file),
        ("ssl.key.location", kafka.ssl_key_file),
    ):
        if path is not None:
            security[name] = str(path)
    return security


def meter_settings(config: Config, journal_path: Path) -> MeterSettings:
    """A metering point with its journal there."""
    return MeterSettings(
        journal_path=journal_path,
        partitions=config.ledger.partitions,
        journal_bytes_max=config.producer.journal_bytes_max,
    )


def publisher_settings(config: Config) -> PublisherSettings:
    """What sends a journal to this installation's Kafka."""
    names = topic_names(config)
    return PublisherSettings(
        bootstrap=config.kafka.bootstrap,
        partitions=config.ledger.partitions,
        topic=names.events,
        progress_topic=names.progress,
        linger_ms=config.producer.linger_ms,
        batch_events=config.producer.batch_events,
        batch_bytes=config.producer.batch_bytes,
        security=kafka_security(config.kafka),
    )


@contextmanager
def open_reader(config: Config) -> Iterator[Reader]:
    """What answers queries: the process that owns chDB, or the server."""
    clickhouse = config.clickhouse
    reader: Reader
    if clickhouse.engine == "chdb":
        from sinks.engines.loopback import LoopbackEngine

        token = read_secret(clickhouse, "loopback_token", needed_for="asking the sink").decode()
        reader = LoopbackEngine(f"http://127.0.0.1:{clickhouse.loopback_port}", token)
    else:
        raise ConfigError("clickhouse.engine")
    try:
        yield reader
    finally:
        reader.close()


def gateway_settings(config: Config) -> GatewaySettings:
    """The metering gateway."""
    from serving.gateway import profiles
    from serving.gateway.settings import (
        AdmissionSettings,
        DirectorySettings,
        GatewaySettings,
        LimitSettings,
        TlsSettings,
    )

    gateway, names = config.gateway, topic_names(config)
    makers = {"vllm": profiles.vllm, "tensorrt_llm": profiles.tensorrt_llm, "generic": profiles.generic}
    if not config.models.profiles:
        raise ConfigError("models.profiles is empty, so the gateway serves nothing: add [models.profiles.NAME]")
    tls = None
    if gateway.tls_certificate_file is not None and gateway.tls_key_file is not None:
        tls = TlsSettings(
            _read("gateway.tls_certificate_file", gateway.tls_certificate_file),
            _read("gateway.tls_key_file", gateway.tls_key_file),
        )
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
        models={
            name: makers[profile.backend](
                name,
                tokenizer=profile.tokenizer or None,  # type: ignore[arg-type]  # generic has one, its validator says
                decoupled=profile.decoupled,
                prompt_tokens_max=profile.prompt_tokens_max,
            )
            for name, profile in config.models.profiles.items()
        },
        tokenizers=config.models.tokenizers,
        host=gateway.host,
        port=gateway.port,
        upstream=gateway.upstream,
        upstream_root_certificates=(
            None if gateway.upstream_ca_file is None else _read("gateway.upstream_ca_file", gateway.upstream_ca_file)
        ),
        tls=tls,
        server_id=gateway.server_id,
        region=gateway.region,
        admission=AdmissionSettings(state_age_max_ms=int(gateway.accounts_age_max_s * 1_000), fail_open=gateway.fail_open),
        limits=LimitSettings(
            requests_max=gateway.requests_max,
            tenant_requests_max=gateway.tenant_requests_max,
            prompt_tokens_max=gateway.prompt_tokens_max,
            durable_timeout_s=config.producer.durable_timeout_s,
        ),
    )


def model_server_settings(config: Config) -> ServerSettings:
    """The small model server that `up` runs."""
    from serving.model_server.settings import ServerSettings

    embedded = config.embedded
    if not embedded.model_server_port:
        raise ConfigError("embedded.model_server_port is 0: name a port, or let `taximeter up` choose one")
    return ServerSettings(host=embedded.host, port=embedded.model_server_port)


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} {path} cannot be read ({error.strerror}): correct the path") from None
