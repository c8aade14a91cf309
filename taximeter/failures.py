"""Which failures of parts and libraries are expected, and how each is told in one sentence with its mend.

Every part's errors are known here. They are loaded when something failed: a command that does its work needs a few of them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from confluent_kafka import KafkaException

    from taximeter.config import Config

__all__ = ["explain"]


def explain(error: BaseException, config: Callable[[], Config] | None = None) -> str | None:
    """One sentence, or None: then it is a bug and keeps its traceback. Of what Kafka refused `config` says more."""
    from confluent_kafka import KafkaException

    from taximeter.kafka_trouble import kafka_trouble

    known = _known(error)
    if known is not None and config is not None and isinstance(error.__cause__ or error, KafkaException):
        trouble = kafka_trouble(config().kafka)
        return f"{known}: {trouble}" if trouble else known
    return known


def _known(error: BaseException) -> str | None:
    from confluent_kafka import KafkaException

    from billing.chain import UnreadableRecord
    from producers.errors import ProducerError
    from serving.commanding import CommandError
    from serving.notifier.errors import NotifierError
    from sinks.errors import SinkError
    from stream_processors.errors import WorkerError
    from taximeter.embedded.process import ChildError

    if isinstance(error, KafkaException):
        return _kafka(error)
    if isinstance(
        error, ProducerError | SinkError | WorkerError | UnreadableRecord | ChildError | CommandError | NotifierError
    ):
        return str(error)
    # Not every part has what tokenizers are made of; who raised such an error has.
    tokenizers = sys.modules.get("serving.tokenizers.errors")
    if tokenizers is not None and isinstance(error, tokenizers.TokenizerError):
        return str(error)
    return None


def _kafka(error: KafkaException) -> str:
    from confluent_kafka import KafkaError

    detail = error.args[0] if error.args else error
    if isinstance(detail, KafkaError):
        return f"Kafka answers {detail.name()} ({detail.str()})"
    return f"Kafka: {detail}"
