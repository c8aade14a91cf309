"""Which failures of parts and libraries are expected, and how each is told in one sentence with its mend."""

from __future__ import annotations

from confluent_kafka import KafkaError, KafkaException

from billing.chain import UnreadableRecord
from producers.errors import ProducerError
from serving.commanding import CommandError
from serving.notifier.errors import NotifierError
from sinks.errors import SinkError
from stream_processors.errors import WorkerError
from taximeter.embedded.process import ChildError

__all__ = ["explain"]


def explain(error: BaseException) -> str | None:
    """One sentence, or None: then it is a bug and keeps its traceback."""
    if isinstance(error, KafkaException):
        return _kafka(error)
    if isinstance(
        error, ProducerError | SinkError | WorkerError | UnreadableRecord | ChildError | CommandError | NotifierError
    ):
        return str(error)
    return None


def _kafka(error: KafkaException) -> str:
    detail = error.args[0] if error.args else error
    if isinstance(detail, KafkaError):
        return f"Kafka answers {detail.name()} ({detail.str()}): see that kafka.bootstrap is right and the broker runs"
    return f"Kafka: {detail}"
