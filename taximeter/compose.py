"""From the one configuration to the settings of each part. Nothing is decided here: a part's bounds are the part's.

What a part's settings are made of is loaded when they are asked for: every command comes through here.
"""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from billing import key_ring as key_rings
from taximeter.config import Config, read_secret
from taximeter.errors import ConfigError, MisuseError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from billing.key_ring import Keys
    from billing.step import LedgerKeys
    from billing.v1.account_pb2 import RuleLimits
    from producers.meter import MeterSettings
    from producers.publisher import PublisherSettings
    from sinks.embedded import JsonReader
    from sinks.engine import Engine, Reader
    from sinks.settings import SinkSettings
    from stream_processors.settings import KafkaSettings, SnapshotSettings, TopicNames, WorkerSettings
    from stream_processors.topics import ApplySettings
    from taximeter.platform_config import KafkaConfig
    from taximeter.rules_config import RulesConfig

__all__ = [
    "apply_settings",
    "as_json_reader",
    "kafka_security",
    "kafka_settings",
    "key_ring",
    "ledger_keys",
    "make_reader",
    "meter_settings",
    "open_engine",
    "open_reader",
    "publisher_settings",
    "sink_reader_name",
    "sink_settings",
    "snapshot_settings",
    "topic_names",
    "worker_settings",
]


def topic_names(config: Config) -> TopicNames:
    """Every topic, with the prefix of this installation."""
    from stream_processors.settings import TopicNames

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
    from producers.meter import MeterSettings

    return MeterSettings(
        journal_path=journal_path,
        partitions=config.ledger.partitions,
        producer_id_prefix=config.producer.id_prefix,
        journal_bytes_max=config.producer.journal_bytes_max,
    )


def publisher_settings(config: Config) -> PublisherSettings:
    """What sends a journal to this installation's Kafka."""
    from producers.publisher import PublisherSettings

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
    from stream_processors.settings import KafkaSettings

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
    from billing.step import LedgerKeys

    return LedgerKeys(
        seal_key=key_ring(config, "seal_key", needed_for="the ledger"),
        command_key=key_ring(config, "command_key", needed_for="the ledger"),
    )


def snapshot_settings(config: Config) -> SnapshotSettings | None:
    """Where snapshots go; None: they are not taken."""
    from stream_processors.settings import SnapshotSettings

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
    from stream_processors.settings import WorkerSettings

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
    from sinks.settings import SinkSettings

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
    from billing.founding import DEDUPE_KEY_BYTES, LedgerSettings
    from stream_processors.settings import TopicSettings
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
    from billing.rule_limits import RULE_LIMIT_NAMES, rule_limits
    from taximeter.rule_options import parse_actions

    values = {name: getattr(rules, name) for name in RULE_LIMIT_NAMES}
    try:
        return rule_limits(values, parse_actions("ledger.rules.actions", rules.actions))
    except MisuseError as error:
        raise ConfigError(str(error)) from None
