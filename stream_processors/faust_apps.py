"""What both Faust apps share: how an app is made, and where its input resumes.

Faust is used for membership of the group, assignment, flow control and agents. No claim of correctness rests on its tables, its
acknowledgements, its producer or its committed offsets: `perform_seek` is replaced, so that the positions which the ledger (or
the publisher's own progress) records decide where input resumes. Acknowledging is only a lag metric.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import aiokafka
import faust
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Transport
from faust.types import TP
from mode import CrashingSupervisor

from stream_processors.errors import RefusedToStart, WorkerError
from stream_processors.kafka_ports import MESSAGE_BYTES_MAX
from stream_processors.settings import WorkerSettings

__all__ = ["Failure", "Positions", "make_app", "raw_agent"]

# A worker that has more peers than there are partitions fetches nothing; it must not be thrown out of the group for it.
_IDLE_POLL_S = 86_400.0 * 7
# aiokafka has one fetch on its way to each broker. While messages of one topic wait in its buffer it asks for the others alone,
# and when those are empty the broker keeps that fetch for as long as it may: input that is there waits for input that is not.
# Faust asks for 1.5 s; less than a buffer takes to work off costs nothing.
_FETCH_WAIT_MS = 40
# Of a consumer to which nothing came for a while. Kafka answers a fetch that waits as soon as there is something; the embedded
# broker looks a few times while it waits, and every fetch costs it and this process a millisecond.
_FETCH_WAIT_IDLE_MS = 120
_IDLE_S = 0.5

Positions = Callable[[], Mapping[TP, int]]


class Failure:
    """The first reason why this process has to end."""

    def __init__(self) -> None:
        self.reason: WorkerError | None = None
        self._happened = asyncio.Event()

    def set(self, error: BaseException) -> None:
        """Note it; later ones are consequences."""
        if self.reason is None:
            self.reason = error if isinstance(error, WorkerError) else WorkerError(f"{type(error).__name__}: {error}")
            self.reason.__cause__ = None if self.reason is error else error
        self._happened.set()

    async def wait(self) -> None:
        await self._happened.wait()


class _QuickThread(AIOKafkaConsumerThread):
    def _create_worker_consumer(self, transport: Transport) -> aiokafka.AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        # Faust has no setting for it. It is read when the consumer starts, which comes after this.
        consumer._fetch_max_wait_ms = _FETCH_WAIT_MS
        return consumer

    async def _fetch_records(
        self,
        consumer: aiokafka.AIOKafkaConsumer,
        active_partitions: set[TP],
        timeout: float | None = None,
        max_records: int | None = None,
    ) -> Any:
        records = await super()._fetch_records(consumer, active_partitions, min(timeout or _IDLE_S, _IDLE_S), max_records)
        # Read anew for each fetch.
        consumer._fetcher._fetch_max_wait_ms = _FETCH_WAIT_MS if records else _FETCH_WAIT_IDLE_MS
        return records


class _SeekingConsumer(Consumer):
    """Resumes where `app.taximeter_positions` says. A partition that is not named there is left where it is, paused."""

    def _new_consumer_thread(self) -> AIOKafkaConsumerThread:
        return _QuickThread(self, loop=self.loop, beacon=self.beacon)

    async def perform_seek(self) -> None:
        positions: Mapping[TP, int] = self.app.taximeter_positions()  # type: ignore[attr-defined]
        for tp in self.assignment():
            offset = positions.get(tp)
            if offset is not None:
                await self.seek(tp, offset)
                self._committed_offset[tp] = offset or None


class _SeekingTransport(Transport):
    Consumer = _SeekingConsumer


def make_app(settings: WorkerSettings, group: str, positions: Positions) -> faust.App:
    """An app that declares no topic, keeps no table and answers no web request. To be called on the running event loop."""
    app = faust.App(
        group,
        broker=[f"kafka://{address}" for address in settings.kafka.bootstrap.split(",")],
        broker_credentials=_credentials(settings.kafka.security),
        value_serializer="raw",
        key_serializer="raw",
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        store="memory://",
        datadir=str(settings.state_folder / "faust"),
        broker_session_timeout=settings.session_timeout_s,
        broker_heartbeat_interval=settings.heartbeat_interval_s,
        broker_request_timeout=max(settings.kafka.request_timeout_ms / 1000, settings.session_timeout_s * 2),
        broker_max_poll_interval=_IDLE_POLL_S,
        broker_commit_interval=2.0,
        consumer_auto_offset_reset="earliest",
        consumer_max_fetch_size=4 << 20,
        stream_buffer_maxsize=16,
        stream_wait_empty=False,
        producer_max_request_size=MESSAGE_BYTES_MAX,
    )
    app.taximeter_positions = positions  # type: ignore[attr-defined]
    app.transport = _SeekingTransport(app.conf.broker, app, loop=asyncio.get_running_loop())
    return app


def raw_agent(app: faust.App, topic: str, name: str, body: Callable[[Any], Any]) -> None:
    """Run `body(stream)` as an agent on the topic's bytes; an exception in it ends the app, so that nothing is skipped."""
    channel = app.topic(topic, value_serializer="raw", key_serializer="raw", value_type=bytes, key_type=bytes)
    app.agent(channel, name=name, concurrency=1, supervisor_strategy=CrashingSupervisor)(body)


def _credentials(security: Mapping[str, str]) -> Any:
    """aiokafka's form of librdkafka's security settings; what it has no form for is refused, not left out."""
    protocol = security.get("security.protocol", "plaintext").lower()
    if protocol == "plaintext":
        return None
    known = {
        "security.protocol",
        "sasl.mechanism",
        "sasl.mechanisms",
        "sasl.username",
        "sasl.password",
        "ssl.ca.location",
        "ssl.certificate.location",
        "ssl.key.location",
        "ssl.key.password",
    }
    unknown = sorted(set(security) - known)
    if unknown:
        raise RefusedToStart(f"kafka security setting {unknown[0]}: the worker's consumer has no such setting; leave it out")
    context = None
    if "ssl" in protocol:
        import ssl

        context = ssl.create_default_context(cafile=security.get("ssl.ca.location"))
        if certificate := security.get("ssl.certificate.location"):
            context.load_cert_chain(certificate, security.get("ssl.key.location"), security.get("ssl.key.password"))
    if protocol == "ssl":
        return faust.SSLCredentials(context)
    return faust.SASLCredentials(
        username=security.get("sasl.username"),
        password=security.get("sasl.password"),
        mechanism=security.get("sasl.mechanism") or security.get("sasl.mechanisms") or "PLAIN",
        ssl_context=context,
    )
