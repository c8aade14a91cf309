"""From the one configuration to the settings of each part. Nothing is decided here: a part's bounds are the part's."""

from __future__ import annotations

import inspect
import secrets
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal

from billing import key_ring as key_rings
from billing.commands import lease_key
from billing.founding import DEDUPE_KEY_BYTES, LedgerSettings
from billing.rule_limits import RULE_LIMIT_NAMES, rule_limits
from billing.step import LedgerKeys
from producers.meter import MeterSettings
from producers.publisher import PublisherSettings
from sinks.settings import SinkSettings
from stream_processors.settings import KafkaSettings, SnapshotSettings, TopicNames, TopicSettings, WorkerSettings
from taximeter.collectors import require_otlp
from taximeter.config import Config, read_secret
from taximeter.errors import ConfigError, MisuseError
from taximeter.platform_config import KafkaConfig
from taximeter.rule_options import parse_actions
from taximeter.serving_config import ModelProfileConfig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from billing.key_ring import Keys
    from billing.v1.account_pb2 import RuleLimits
    from serving.api import ApiSettings
    from serving.gateway.profiles import ModelProfile
    from serving.gateway.settings import GatewaySettings, LeaseSettings, UpstreamTls
    from serving.model_server.settings import ServerSettings
    from serving.notifier.settings import NotifierSettings
    from sinks.embedded import JsonReader
    from sinks.engine import Engine, Reader
    from stream_processors.topics import ApplySettings
    from taximeter.rules_config import RulesConfig

__all__ = [
    "api_settings",
    "apply_settings",
    "as_json_reader",
    "gateway_settings",
    "kafka_security",
    "kafka_settings",
    "key_ring",
    "ledger_keys",
    "make_reader",
    "meter_settings",
    "model_profile",
    "model_server_settings",
    "notifier_settings",
    "open_engine",
    "open_reader",
    "publisher_settings",
    "sink_reader_name",
    "sink_settings",
    "snapshot_settings",
    "topic_names",
    "upstream_tls",
    "worker_settings",
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
        producer_id_prefix=config.producer.id_prefix,
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
        key=_producer_key(config),
    )


def _producer_key(config: Config) -> bytes:
    producer = config.producer
    if producer.key is None and producer.key_file is None:
        return b""
    text = read_secret(producer, "key", needed_for="signing usage")
    try:
        return bytes.fromhex(text.decode())
    except ValueError:
        raise ConfigError("producer.key is not what `taximeter producer register` shows: set it to that") from None


def make_reader(config: Config) -> Reader:
    """What answers queries: the process that owns chDB, or the server. To be closed."""
    clickhouse = config.clickhouse
    if clickhouse.engine == "chdb":
        from sinks.engines.loopback import LoopbackEngine

        token = read_secret(clickhouse, "loopback_token", needed_for="asking the sink").decode()
        return LoopbackEngine(f"http://127.0.0.1:{clickhouse.loopback_port}", token)
    return _server_engine(config)


@contextmanager
def open_reader(config: Config) -> Iterator[Reader]:
    """The same, closed at the end."""
    reader = make_reader(config)
    try:
        yield reader
    finally:
        reader.close()


@contextmanager
def open_engine(config: Config) -> Iterator[Engine]:
    """What rows are written to: chDB, which then belongs to this process, or the server."""
    engine: Engine
    if config.clickhouse.engine == "chdb":
        from sinks.engines.chdb import ChdbEngine

        config.clickhouse.chdb_path.mkdir(parents=True, exist_ok=True)
        engine = ChdbEngine(config.clickhouse.chdb_path, config.clickhouse.database)
    else:
        engine = _server_engine(config)
    try:
        yield engine
    finally:
        engine.close()


def as_json_reader(engine: Engine) -> JsonReader:
    """chDB, as the loopback server asks it."""
    from sinks.engines.chdb import ChdbEngine

    assert isinstance(engine, ChdbEngine), "only the owner of chDB answers others"
    return engine


def _server_engine(config: Config) -> Engine:
    from sinks.engines.server import ServerEngine, ServerSettings

    clickhouse = config.clickhouse
    password = b""
    if clickhouse.password is not None or clickhouse.password_file is not None:
        password = read_secret(clickhouse, "password", needed_for="ClickHouse")
    return ServerEngine(
        ServerSettings(
            host=clickhouse.host,
            port=clickhouse.port,
            database=clickhouse.database,
            user=clickhouse.user,
            password=password.decode(),
            secure=clickhouse.tls,
            ca_file="" if clickhouse.ca_file is None else str(clickhouse.ca_file),
        )
    )


def kafka_settings(config: Config) -> KafkaSettings:
    """For those who read and write the ledger."""
    return KafkaSettings(
        bootstrap=config.kafka.bootstrap,
        security=kafka_security(config.kafka),
        request_timeout_ms=int(config.kafka.request_timeout_s * 1_000),
    )


def key_ring(config: Config, field: Literal["seal_key", "command_key"], *, needed_for: str) -> Keys:
    """A key of the ledger, or several with their IDs."""
    try:
        return key_rings.parse(read_secret(config.ledger, field, needed_for=needed_for))
    except ValueError as error:
        raise ConfigError(f"ledger.{field} {error}") from None


def ledger_keys(config: Config) -> LedgerKeys:
    """The keys with which a worker seals records and checks commands."""
    return LedgerKeys(
        seal_key=key_ring(config, "seal_key", needed_for="the ledger"),
        command_key=key_ring(config, "command_key", needed_for="the ledger"),
    )


def snapshot_settings(config: Config) -> SnapshotSettings | None:
    """Where snapshots go; None: they are not taken."""
    ledger = config.ledger
    if not ledger.snapshot_url:
        return None
    return SnapshotSettings(
        url=ledger.snapshot_url,
        interval_s=ledger.snapshot_interval_minutes * 60,
        log_bytes=ledger.snapshot_log_bytes,
        kept=ledger.snapshots_kept,
    )


def worker_settings(config: Config) -> WorkerSettings:
    """One ledger worker. Where the sink is embedded, so is the broker, and it keeps nothing: hold records for the sink."""
    snapshots = snapshot_settings(config)
    if snapshots is not None and config.clickhouse.engine == "chdb":
        raise ConfigError(
            f"ledger.snapshot_url is {snapshots.url!r} beside clickhouse.engine 'chdb': snapshots are for a broker that keeps "
            "its log, and the embedded one does not: leave it empty, or use a ClickHouse server"
        )
    return WorkerSettings(
        kafka=kafka_settings(config),
        state_folder=config.ledger.state_dir,
        keys=ledger_keys(config),
        topics=topic_names(config),
        group=config.ledger.consumer_group,
        keep_unconfirmed_for=sink_reader_name(config) if config.clickhouse.engine == "chdb" else "",
        session_timeout_s=config.ledger.session_timeout_s,
        snapshots=snapshots,
    )


def sink_settings(config: Config) -> SinkSettings:
    """The sink's side of Kafka."""
    names = topic_names(config)
    return SinkSettings(
        bootstrap=config.kafka.bootstrap,
        ledger_topic=names.ledger,
        progress_topic=names.progress,
        usage_topic=names.events,
        seal_key=key_ring(config, "seal_key", needed_for="the sink"),
        name=sink_reader_name(config),
        security=kafka_security(config.kafka),
    )


def sink_reader_name(config: Config) -> str:
    """As the sink calls itself on `usage.progress`."""
    return f"sink/{config.clickhouse.sink_name}"


def apply_settings(config: Config, *, embedded: bool, found_again_on: Path | None = None) -> ApplySettings:
    """What `topics apply` makes; `embedded`: on the local state, where the broker may have forgotten the ledger.
    `found_again_on`: on the local stores that an operator has gathered there.
    """
    from stream_processors.topics import ApplySettings

    ledger, day_ms, minute_ms = config.ledger, 86_400_000, 60_000
    return ApplySettings(
        kafka=kafka_settings(config),
        topics=TopicSettings(
            partitions=ledger.partitions,
            replication=config.kafka.replication_factor,
            ledger_retention_ms=config.kafka.ledger_retention_days * day_ms,
        ),
        ledger=LedgerSettings(
            partitions=ledger.partitions,
            dedupe_key=secrets.token_bytes(DEDUPE_KEY_BYTES),
            dedupe_horizon_ms=ledger.dedupe_horizon_days * day_ms,
            window_lateness_ms=ledger.window_lateness_minutes * minute_ms,
            future_alert_ms=ledger.future_alert_minutes * minute_ms,
            future_reject_ms=ledger.future_reject_minutes * minute_ms,
            alert_cooldown_ms=ledger.alert_cooldown_minutes * minute_ms,
            missing_grace_ms=ledger.missing_grace_seconds * 1_000,
            silence_ms=ledger.producer_silence_seconds * 1_000,
            alert_resolve_ms=ledger.rules.resolve_minutes * minute_ms,
            drift_millionths=round(ledger.rules.counting_drift_percent * 10_000),
            default_currency=ledger.currency,
            default_burst_tokens_floor=ledger.rules.burst_tokens_floor,
            default_burst_factor=ledger.rules.burst_factor,
            default_duplicate_flood_events=ledger.rules.duplicate_flood_events,
            default_rules=_founding_rules(ledger.rules),
            registered_producers_only=ledger.registered_producers_only,
        ),
        seal_key=key_ring(config, "seal_key", needed_for="founding a ledger"),
        names=topic_names(config),
        state_folder=ledger.state_dir if embedded else found_again_on,
    )


def _founding_rules(rules: RulesConfig) -> RuleLimits:
    values = {name: getattr(rules, name) for name in RULE_LIMIT_NAMES}
    try:
        return rule_limits(values, parse_actions("ledger.rules.actions", rules.actions))
    except MisuseError as error:
        raise ConfigError(str(error)) from None


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
