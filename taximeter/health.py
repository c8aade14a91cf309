"""Whether each part is well, and what to do where it is not: `taximeter doctor`.

Promise: every check is bounded in time and changes nothing. A check that could not be made because of an earlier one
says so instead of failing a second time. Each finding that is not well names the mend.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from serving.addresses import authority, bare_host
from sinks import migrate, queries
from sinks.completeness import completeness
from taximeter import compose
from taximeter.completeness_report import mend_silent
from taximeter.errors import TaximeterError
from taximeter.failures import explain
from taximeter.kafka_trouble import kafka_trouble
from taximeter.times import now_ms, show_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from serving.gateway.tokenizer_checks import Finding
    from taximeter.config import Config
    from taximeter.serving_config import GatewayConfig

__all__ = ["Check", "State", "examine"]

_KAFKA_TIMEOUT_S: Final = 5.0
_GRPC_TIMEOUT_S: Final = 10.0
_STALE_S: Final = 15.0
_LAG_MESSAGES: Final = 1_000
_DISK_FREE_BYTES: Final = 1_000_000_000
_SAMPLE_S: Final = 1.0


class State(StrEnum):
    """What a check came to."""

    WELL = "well"
    ILL = "ill"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Check:
    """One look at one thing."""

    name: str
    state: State
    detail: str
    mend: str = ""


def examine(config: Config) -> Iterator[Check]:
    """Every check, in the order in which parts stand on each other."""
    yield _guard("secrets", lambda: _secrets(config))
    topics = _guard("Kafka", lambda: _kafka(config))
    yield topics
    if topics.state is State.WELL:
        yield _guard("ledger", lambda: _ledger(config))
        yield _guard("ledger's lag", lambda: _lag(config))
    else:
        yield Check("ledger", State.SKIPPED, "Kafka is not well")
    database = _guard("ClickHouse", lambda: _clickhouse(config))
    yield database
    if database.state is State.WELL:
        yield _guard("freshness", lambda: _freshness(config))
        yield _guard("producers", lambda: _producers(config))
    else:
        yield Check("freshness", State.SKIPPED, "ClickHouse is not well")
    yield _guard("gateway", lambda: _gateway(config))
    yield _guard("tokenizers", lambda: _tokenizers(config))
    yield _guard("gateway's journal", lambda: _journal(config))
    yield _guard("disk", lambda: _disk(config))


def _guard(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except TaximeterError as error:
        return Check(name, State.ILL, str(error))
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        return Check(name, State.ILL, known)


def _secrets(config: Config) -> Check:
    compose.ledger_keys(config)
    if config.clickhouse.engine == "chdb":
        with compose.open_reader(config):
            pass
    return Check("secrets", State.WELL, "the keys of the ledger can be read")


def _kafka(config: Config) -> Check:
    name = "Kafka"
    try:
        metadata = AdminClient({**compose.kafka_settings(config).client(), "log_level": 0}).list_topics(
            timeout=_KAFKA_TIMEOUT_S
        )
    except KafkaException as error:
        trouble = kafka_trouble(config.kafka)
        return Check(name, State.ILL, f"{config.kafka.bootstrap}: {explain(error)}", trouble or "look again: it answers now")
    names = compose.topic_names(config)
    wanted = [names.events, names.commands, names.ledger, names.accounts, names.keys]
    wanted += [names.progress, names.alerts, names.rejected]
    missing = [topic for topic in wanted if topic not in metadata.topics]
    if missing:
        return Check(name, State.ILL, f"missing topics: {', '.join(missing)}", "run `taximeter topics apply`")
    partitions = config.ledger.partitions
    odd = [topic for topic in wanted if len(metadata.topics[topic].partitions) != partitions]
    if odd:
        detail = f"not {partitions} partitions: {', '.join(odd)}"
        return Check(name, State.ILL, detail, "set ledger.partitions to what the ledger was founded with")
    return Check(name, State.WELL, f"{config.kafka.bootstrap}, {len(wanted)} topics of {partitions} partitions")


def _ends(config: Config, topic: str) -> dict[int, tuple[int, int]]:
    import asyncio

    from stream_processors.kafka_ports import KafkaLogReader

    async def read() -> dict[int, tuple[int, int]]:
        reader = KafkaLogReader(compose.kafka_settings(config))
        return {number: await reader.bounds(topic, number) for number in range(config.ledger.partitions)}

    return asyncio.run(read())


def _ledger(config: Config) -> Check:
    """Founded, and written to: an idle ledger ticks."""
    topic = compose.topic_names(config).ledger
    before = _ends(config, topic)
    unfounded = [str(number) for number, (_, end) in before.items() if end == 0]
    if unfounded:
        return Check("ledger", State.ILL, f"partitions {', '.join(unfounded)} are not founded", "run `taximeter topics apply`")
    deadline_s = time.monotonic() + 4 * _SAMPLE_S
    quiet = set(before)
    while quiet and time.monotonic() < deadline_s:
        time.sleep(_SAMPLE_S)
        quiet -= {number for number, (_, end) in _ends(config, topic).items() if end > before[number][1]}
    if quiet:
        detail = f"nothing was written to partitions {', '.join(map(str, sorted(quiet)))} for {4 * _SAMPLE_S:g} s"
        return Check("ledger", State.ILL, detail, "start a worker, or see its log: `taximeter worker`")
    return Check("ledger", State.WELL, f"{len(before)} partitions are founded and written to")


def _lag(config: Config) -> Check:
    """How many messages the ledger has not taken: input positions stand in the ledger's last records, and in the group."""
    from confluent_kafka import Consumer, TopicPartition

    names = compose.topic_names(config)
    settings: dict[str, str | int | float | bool] = {
        **compose.kafka_settings(config).client(),
        "group.id": config.ledger.consumer_group,
        "enable.auto.commit": False,
    }
    consumer = Consumer(settings)
    try:
        places = [
            TopicPartition(topic, number)
            for topic in (names.events, names.commands)
            for number in range(config.ledger.partitions)
        ]
        committed = consumer.committed(places, timeout=_KAFKA_TIMEOUT_S)
    finally:
        consumer.close()
    waiting = 0
    for topic in (names.events, names.commands):
        ends = _ends(config, topic)
        waiting += sum(ends[place.partition][1] - max(0, place.offset) for place in committed if place.topic == topic)
    detail = f"about {max(0, waiting):,} messages wait (by committed offsets, which follow)"
    if waiting > _LAG_MESSAGES:
        return Check("ledger's lag", State.ILL, detail, "start more workers, at most one a partition")
    return Check("ledger's lag", State.WELL, detail)


def _clickhouse(config: Config) -> Check:
    where = "chDB" if config.clickhouse.engine == "chdb" else f"{config.clickhouse.host}:{config.clickhouse.port}"
    with compose.open_reader(config) as reader:
        left = migrate.pending(reader)
        version = reader.query("SELECT version()").rows[0][0]
    if left:
        return Check("ClickHouse", State.ILL, f"{where}: {len(left)} migrations are pending", "run `taximeter migrate`")
    return Check("ClickHouse", State.WELL, f"{where}, version {version}, schema of this version")


def _freshness(config: Config) -> Check:
    with compose.open_reader(config) as reader:
        rows = queries.freshness(reader)
    if len(rows) < config.ledger.partitions:
        detail = f"{len(rows)} of {config.ledger.partitions} partitions have been written"
        return Check("freshness", State.ILL, detail, "start the sink: `taximeter sink`")
    age_s = (now_ms() - min(row.log_time_ms for row in rows)) / 1_000
    detail = f"the database knows everything up to {age_s:.1f} s ago"
    if age_s > _STALE_S:
        return Check("freshness", State.ILL, detail, "see that worker and sink run, and their logs")
    return Check("freshness", State.WELL, detail)


def _producers(config: Config) -> Check:
    with compose.open_reader(config) as reader:
        report = completeness(reader)
    if report.incomplete:
        detail = ", ".join(
            f"{state.producer_id} partition {state.partition}: {state.missing} missing" for state in report.incomplete[:5]
        )
        mend = "start that producer on its journal again; `taximeter audit --completeness` shows what came around the holes"
        return Check("producers", State.ILL, detail, mend)
    if report.silent:
        detail = ", ".join(f"{state.producer_id} is silent since {show_time(state.seen_ms)}" for state in report.silent[:5])
        return Check("producers", State.ILL, detail, mend_silent(report.silent[0].producer_id))
    return Check("producers", State.WELL, f"{report.producers} producers, nothing is missing")


def _gateway(config: Config) -> Check:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    gateway = config.gateway
    address = authority(gateway.host, gateway.port)
    if not config.models.profiles:
        return Check("gateway", State.SKIPPED, "no models are configured")
    if gateway.tls_certificate_file is None:
        channel = grpc.insecure_channel(address)
    else:
        try:
            name = _name_shown(gateway, gateway.tls_certificate_file)
        except OSError as error:
            mend = "start it: `taximeter gateway`; start it again where gateway.tls_certificate_file was changed"
            return Check("gateway", State.ILL, f"{address} over TLS: {error}", mend)
        if gateway.tls_client_ca_file is not None:
            detail = f"{address} shows its certificate and asks clients for theirs; /health/ready of its metrics says the rest"
            return Check("gateway", State.WELL, detail)
        credentials = grpc.ssl_channel_credentials(gateway.tls_certificate_file.read_bytes())
        channel = grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", name)])
    with channel:
        try:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            ready = stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=_GRPC_TIMEOUT_S).ready
        except grpc.RpcError as error:
            detail = f"{address}: {error.code().name}: {error.details()}"
            return Check("gateway", State.ILL, detail, "start it: `taximeter gateway`; behind it the model server must run")
    if not ready:
        return Check("gateway", State.ILL, f"{address} answers and is not ready", "see that the model server is ready")
    return Check("gateway", State.WELL, f"{address} is ready")


def _tokenizers(config: Config) -> Check:
    """What a gateway finds at its start, now."""
    name, asking = "tokenizers", config.gateway.check_tokenizers
    profiles = {model: each for model, each in config.models.profiles.items() if each.tokenizer}
    if not profiles:
        return Check(name, State.WELL, "no model has one here: what back ends count is taken")
    if asking == "off":
        return Check(name, State.SKIPPED, "gateway.check_tokenizers is off")
    import asyncio

    from serving.gateway.settings import LimitSettings
    from serving.gateway.tokenizer_checks import Agreement, compare
    from serving.gateway.tokens import TokenCounts, make_registry
    from serving.gateway.upstream import Upstream
    from taximeter import compose_serving

    models, limits = [compose_serving.model_profile(*each) for each in profiles.items()], LimitSettings()

    async def look() -> dict[str, Finding]:
        tokens = TokenCounts(make_registry(config.models.tokenizers, config.models.fingerprints, limits.requests_max))
        upstream = Upstream(config.gateway.upstream, compose_serving.upstream_tls(config), limits)
        try:
            asked = (compare(model, tokens, upstream, asking, _GRPC_TIMEOUT_S) for model in models)
            found = await asyncio.gather(*asked)
        finally:
            await upstream.close()
            tokens.close()
        return {model.model: finding for model, finding in zip(models, found, strict=True)}

    findings = asyncio.run(look())
    told = {
        agreement: "; ".join(f"{model}: {each.detail}" for model, each in findings.items() if each.agreement is agreement)
        for agreement in Agreement
    }
    if told[Agreement.DIFFERS]:
        mend = "set the tokenizers that the models have in [models.tokenizers]; `taximeter models check MODEL` tries one"
        return Check(name, State.ILL, told[Agreement.DIFFERS], mend)
    if told[Agreement.AWAY]:
        return Check(name, State.SKIPPED, f"the back end does not say now which it has: {told[Agreement.AWAY]}")
    if told[Agreement.UNASKABLE]:
        return Check(name, State.WELL, f"the back end cannot be asked, so they are taken on trust: {told[Agreement.UNASKABLE]}")
    return Check(name, State.WELL, f"those of {', '.join(findings)} are the back end's")


def _name_shown(gateway: GatewayConfig, certificate: Path) -> str:
    """Whom the gateway's certificate is for, from the gateway itself. OSError if it does not answer, or shows another one.

    That certificate itself is what is trusted, and not its name: it is for clients, who call the gateway otherwise.
    """
    import socket
    import ssl

    trusting = ssl.create_default_context(cafile=certificate)
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    trusting.check_hostname = False
    with (
        socket.create_connection((bare_host(gateway.host), gateway.port), timeout=_GRPC_TIMEOUT_S) as raw,
        trusting.wrap_socket(raw) as connection,
    ):
        shown: dict[str, Any] = connection.getpeercert() or {}
    names = [str(name) for _, name in shown.get("subjectAltName", ())]
    return names[0].replace("*", "gateway") if names else gateway.host


def _journal(config: Config) -> Check:
    path = config.gateway.journal_path
    if not path.exists():
        return Check("gateway's journal", State.SKIPPED, f"{path} is not on this machine")
    size = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
    share = size / config.producer.journal_bytes_max
    detail = f"{size:,} bytes on disk, {share:.1%} of producer.journal_bytes_max"
    if share > 0.8:
        return Check("gateway's journal", State.ILL, detail, "see that Kafka and the ledger take usage: a full journal refuses")
    return Check("gateway's journal", State.WELL, detail)


def _disk(config: Config) -> Check:
    paths = [config.ledger.state_dir, config.gateway.journal_path.parent]
    if config.clickhouse.engine == "chdb":
        paths.append(config.clickhouse.chdb_path)
    free = {path: shutil.disk_usage(_existing(path)).free for path in paths}
    path, least = min(free.items(), key=lambda item: item[1])
    detail = f"{least / 1e9:.1f} GB are free under {path}"
    if least < _DISK_FREE_BYTES:
        return Check("disk", State.ILL, detail, "make room: a full disk stops the journal, and with it the gateway")
    return Check("disk", State.WELL, detail)


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
