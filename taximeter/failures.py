"""Which failures of parts and libraries are expected, and how each is told in one sentence with its mend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException

from billing.chain import UnreadableRecord
from producers.errors import ProducerError
from serving.commanding import CommandError
from serving.notifier.errors import NotifierError
from sinks.errors import SinkError
from stream_processors.errors import WorkerError
from taximeter.embedded.process import ChildError
from taximeter.kafka_trouble import kafka_trouble

if TYPE_CHECKING:
    from collections.abc import Callable

    from taximeter.config import Config

__all__ = ["explain"]


def explain(error: BaseException, config: Callable[[], Config] | None = None) -> str | None:
    """One sentence, or None: then it is a bug and keeps its traceback. Of what Kafka refused `config` says more."""
    known = _known(error)
    if known is not None and config is not None and isinstance(error.__cause__ or error, KafkaException):
        trouble = kafka_trouble(config().kafka)
        return f"{known}: {trouble}" if trouble else known
    return known


def _known(error: BaseException) -> str | None:
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
        return f"Kafka answers {detail.name()} ({detail.str()})"
    return f"Kafka: {detail}"
