"""Says on usage.progress how far this sink is: best effort, after the fact, never in the way of writing.

A progress that is lost is made good by the next one; nobody's money depends on it.
"""

from __future__ import annotations

import logging

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from billing.v1.account_pb2 import LedgerPosition, Progress
from sinks.settings import SinkSettings
from sinks.writer import Position

__all__ = ["ProgressPublisher"]

_LOG = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S = 2.0


class ProgressPublisher:
    """Publishes positions, to the partition of the same number, under the key reader/<name>/<partition>."""

    def __init__(self, settings: SinkSettings) -> None:
        self._topic = settings.progress_topic
        self._name = settings.name
        self._producer = Producer(
            {
                "bootstrap.servers": settings.bootstrap,
                # An idempotent producer is told UNKNOWN_PRODUCER_ID for ever by a broker that forgot it (the embedded one).
                # With one request at a time a retry cannot put an older progress behind a newer one either.
                "max.in.flight.requests.per.connection": 1,
                "acks": "all",
                # The embedded broker makes a topic for whoever asks about it, with as many partitions as it likes: after it has
                # forgotten all, that one would stand in the way of the right one.
                "allow.auto.create.topics": False,
                "linger.ms": 5,
                "message.timeout.ms": 10_000,
                "queue.buffering.max.messages": 10_000,
                **settings.security,
            },
            logger=_LOG,
        )

    def publish(self, position: Position) -> None:
        """Queue it; it is sent in the background."""
        progress = Progress(
            partition=position.partition,
            reader=self._name,
            position=LedgerPosition(generation=position.generation, sequence=position.sequence),
            record_hash=position.record_hash,
            ledger_offset=position.ledger_offset,
        )
        try:
            self._producer.produce(
                self._topic,
                progress.SerializeToString(),
                f"reader/{self._name}/{position.partition}".encode(),
                partition=position.partition,
                on_delivery=_delivered,
            )
        except (BufferError, KafkaException) as error:
            _LOG.warning("progress not published: %s", error)
        self.serve()

    def serve(self) -> None:
        """Let the client call back."""
        self._producer.poll(0)

    def close(self) -> None:
        """Wait a little for what is on its way."""
        self._producer.flush(_CLOSE_TIMEOUT_S)


def _delivered(error: KafkaError | None, _message: Message) -> None:
    if error is not None:
        _LOG.warning("progress not published: %s", error.str())
