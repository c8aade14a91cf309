"""What worker and sink tell an OpenTelemetry collector, made of the configuration; nothing where it names none."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from stream_processors.settings import TopicNames
from taximeter.config_section import is_local
from taximeter.errors import ConfigError

if TYPE_CHECKING:
    from taximeter.config import Config
    from taximeter.ledger_spans import LedgerSpans

__all__ = ["require_otlp", "sink_spans", "worker_spans"]


def worker_spans(config: Config) -> LedgerSpans | None:
    """Who tells a collector of what the ledger has; None: nobody. Raises ConfigError."""
    return _spans(config, "ledger", config.ledger.otlp_endpoint, part="worker", topic=_topics(config).events)


def sink_spans(config: Config) -> LedgerSpans | None:
    """The same of what the database has."""
    return _spans(config, "clickhouse", config.clickhouse.otlp_endpoint, part="sink", topic=_topics(config).ledger)


def _topics(config: Config) -> TopicNames:
    return TopicNames(prefix=config.kafka.topic_prefix)


def _spans(config: Config, section: str, endpoint: str, *, part: str, topic: str) -> LedgerSpans | None:
    if not endpoint:
        return None
    if endpoint.startswith("http://") and not (is_local(endpoint) or config.kafka.allow_plaintext):
        raise ConfigError(
            f"{section}.otlp_endpoint: {endpoint} is on another machine and there is no TLS: write https://, or set "
            "kafka.allow_plaintext = true where the network is trusted"
        )
    require_otlp(section, "taximeter.ledger_spans")
    from taximeter.ledger_spans import LedgerSpans

    return LedgerSpans(endpoint, part=part, topic=topic)


def require_otlp(section: str, module: str) -> None:
    """Raises ConfigError where the extra is not installed that the section's `otlp_endpoint` needs."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{section}.otlp_endpoint is set and {error.name} is not installed: install taximeter[otlp], or unset it"
        ) from None
