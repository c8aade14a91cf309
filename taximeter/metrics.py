"""Prometheus metrics of gateway, worker, sink, billing API and notifier, and whether each is well: one small HTTP endpoint a
part, at the address that is set; off without one.

    /metrics        for Prometheus
    /health/live    200 while the process answers
    /health/ready   200, or 503 with what it waits for

Promise: a scrape reads what the part counts anyway, and changes nothing. Every metric stands in `taximeter.metric_names`. The
number of series is bounded: by the names in the code, the partitions of the ledger, and the models, operations and outcomes of
the gateway, the API's methods, and the notifier's endpoints. No tenant, key, request or text of a client is ever a label.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import make_wsgi_app

from billing import completeness
from billing.v1.usage_pb2 import RefusalReason
from taximeter.errors import ConfigError
from taximeter.metric_names import GATEWAY_NUMBERS, METRICS, Part

if TYPE_CHECKING:
    from serving.api import ApiServer
    from serving.gateway import GatewayServer
    from serving.gateway.genai import Histogram
    from serving.notifier.notifier import Notifier
    from sinks.status import SinkStatus
    from stream_processors.ledger_app import LedgerApp
    from stream_processors.ledger_host import LedgerHost
    from stream_processors.publisher_app import PublisherApp

__all__ = ["api_metrics", "gateway_metrics", "notifier_metrics", "serve_metrics", "sink_metrics", "worker_metrics"]

_LOG = logging.getLogger(__name__)
_REQUEST_TIMEOUT_S: Final = 10.0
# How soon it sees that it is to end.
_POLL_S: Final = 0.1
# Of what changes meanwhile.
_READINGS_MAX: Final = 10

Source = Callable[[], Iterable[Metric]]
# What a part waits for before it is ready; empty: it is.
Readiness = Callable[[], str]
_FAMILIES: Final[dict[str, Any]] = {
    "gauge": GaugeMetricFamily,
    "counter": CounterMetricFamily,
    "histogram": HistogramMetricFamily,
}
_REASONS: Final = tuple(name.removeprefix("REFUSAL_REASON_").lower() for name in RefusalReason.keys())  # noqa: SIM118  protobuf's
_REFUSED: Final = {"refused_": "taximeter_gateway_refusals", "shadow_": "taximeter_gateway_shadow_refusals"}


class _Collector:
    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        for _ in range(_READINGS_MAX):
            try:
                return list(self._source())
            except RuntimeError:
                # A dictionary that grew under the scrape: the next reading finds it.
                _LOG.debug("metrics could not be read", exc_info=True)
        return []


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_address = True


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_TIMEOUT_S

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  its name is the library's
        """Scrapes are no news."""


def serve_metrics(setting: str, address: str, source: Source, ready: Readiness = lambda: "") -> Callable[[], None]:
    """Answer scrapes and probes at `address` (HOST:PORT) until what is returned is called. ConfigError where it is taken."""
    host, _, port = address.rpartition(":")
    registry = CollectorRegistry()
    registry.register(_Collector(source))
    ProcessCollector(registry=registry)
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                scraped: Iterable[bytes] = metrics(environ, start_response)
                return scraped
            case "/health/live":
                status, text = "200 OK", "it answers"
            case "/health/ready":
                waits_for = ready()
                status, text = ("503 Service Unavailable", waits_for) if waits_for else ("200 OK", "ready")
            case _:
                status, text = "404 Not Found", "there is /metrics, /health/live and /health/ready"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]

    try:
        server = make_server(host, int(port), answer, _Server, _Handler)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{setting} {address!r} cannot be listened on ({why}): name a free one") from None
    thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join(5)

    return close


class _Families:
    """All metrics of a part, also those of which there is nothing to say yet."""

    def __init__(self, part: Part) -> None:
        self._made: dict[str, Any] = {
            each.name: _FAMILIES[each.kind](each.name, each.text, labels=each.labels) for each in METRICS if each.part == part
        }

    def add(self, name: str, value: float, *labels: str) -> None:
        self._made[name].add_metric(labels, value)

    def add_histogram(self, name: str, bounds: Iterable[float], counts: Iterable[int], total: float, *labels: str) -> None:
        buckets, so_far = [], 0
        for bound, count in zip([*map(str, bounds), "+Inf"], counts, strict=True):
            so_far += count
            buckets.append((bound, so_far))
        self._made[name].add_metric(labels, buckets, total)

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._made.values())


def gateway_metrics(server: GatewayServer) -> Source:
    """What a gateway counts, its requests as OpenTelemetry names them, and how its counts and the tokenizers' agree."""

    def source() -> Iterable[Metric]:
        families = _Families("gateway")
        _add_gateway_numbers(families, server.metrics())
        if server.genai is not None:
            for histogram in server.genai.histograms():
                _add_histogram(families, histogram)
        for model, state in list(server.gateway.audit.models().items()):
            families.add("taximeter_count_drift_ratio", state.ratio, model)
            families.add("taximeter_count_drift_alarm", state.alarmed, model)
            families.add("taximeter_counts_audited", state.sampled, model)
        return families

    return source


def _add_gateway_numbers(families: _Families, values: Mapping[str, int]) -> None:
    # What has not happened yet is 0: the first time would else be no increase.
    for name in GATEWAY_NUMBERS:
        families.add(f"taximeter_gateway_{name}", values.get(name, 0))
    for prefix, name in _REFUSED.items():
        for reason in _REASONS:
            families.add(name, values.get(f"{prefix}{reason}", 0), reason)


def _add_histogram(families: _Families, histogram: Histogram) -> None:
    """OpenTelemetry's names as Prometheus writes them: dots become underscores, the unit stands last."""
    name = "_".join(filter(None, (histogram.name.replace(".", "_"), histogram.unit)))
    for labels, series in list(histogram.series.items()):
        families.add_histogram(name, histogram.bounds, list(series.counts), series.total, *labels)


def worker_metrics(ledger: LedgerApp | None, publisher: PublisherApp | None) -> Source:
    """How far each partition's ledger and its publication are, and what this process has done with them."""

    def source() -> Iterable[Metric]:
        families = _Families("worker")
        if ledger is not None:
            _add_tally(families, ledger)
            for partition, host in list(ledger.hosts.items()):
                _add_partition(families, ledger, partition, host)
        if publisher is not None:
            families.add("taximeter_publisher_records", publisher.published_records)
            for partition, (sequence, log_time_ms) in list(publisher.published.items()):
                families.add("taximeter_publisher_sequence", sequence, str(partition))
                families.add("taximeter_publisher_log_time_seconds", log_time_ms / 1_000, str(partition))
        return families

    return source


def _add_tally(families: _Families, ledger: LedgerApp) -> None:
    from stream_processors.tally import COMMAND_ACTIONS, COMMAND_OUTCOMES, STEP_BOUNDS_S

    tally = ledger.tally
    for result, count in list(tally.events.items()):
        families.add("taximeter_ledger_events", count, result)
    for action in COMMAND_ACTIONS:
        for outcome in COMMAND_OUTCOMES:
            families.add("taximeter_ledger_commands", tally.commands[action, outcome], action, outcome)
    for names, count in list(tally.alerts.items()):
        families.add("taximeter_ledger_alerts", count, *names)
    families.add_histogram("taximeter_ledger_step_seconds", STEP_BOUNDS_S, list(tally.steps), tally.steps_s)


def _add_partition(families: _Families, ledger: LedgerApp, partition: int, host: LedgerHost) -> None:
    label, state = str(partition), host.state
    producers = list(state.producers.values())
    # By log time, as the alerts go by it: a ledger that stands still has lost nothing by that.
    now_ms, settings = state.log_time_ms, state.settings
    lost = (hole for each in producers for hole in completeness.lost(each, settings, state.resumed_ms, now_ms))
    silent = (completeness.is_silent(each, settings, partition, state.resumed_ms, now_ms) for each in producers)
    values: dict[str, float] = {
        "owned": host.owned,
        "sequence": host.store.place.position.sequence,
        "log_time_seconds": state.log_time_ms / 1_000,
        "in_flight": host.in_flight,
        "missing_events": sum(hole.numbers for hole in lost),
        "silent_producers": sum(silent),
        "open_windows": len(state.windows),
        "accounts": len(state.accounts),
        "unconfirmed_bytes": host.store.unconfirmed_bytes,
        "acknowledged_records": host.acknowledged_records,
        "replayed_records": host.replayed_records,
        "ignored_records": host.ignored_records,
        "refused_records": host.refused_records,
        "logged_bytes": host.logged_bytes,
    }
    for name, value in values.items():
        families.add(f"taximeter_ledger_{name}", value, label)
    for topic, messages in ledger.waiting(partition).items():
        families.add("taximeter_ledger_lag_messages", messages, topic, label)
    if (snapshot_ms := ledger.snapshot_log_time_ms(partition)) is not None:
        families.add("taximeter_ledger_snapshot_log_time_seconds", snapshot_ms / 1_000, label)


def sink_metrics(status: SinkStatus) -> Source:
    """How far the database is, and whether the sink waits for something."""

    def source() -> Iterable[Metric]:
        found: dict[str, Any] = status.snapshot()
        families = _Families("sink")
        for partition, position in found["positions"].items():
            families.add("taximeter_sink_sequence", position["sequence"], partition)
            # Not known until the first batch of this start is written.
            if position["log_time_ms"]:
                families.add("taximeter_sink_log_time_seconds", position["log_time_ms"] / 1_000, partition)
        for partition, count in found["ignored_records"].items():
            families.add("taximeter_sink_ignored_records", count, partition)
        for partition, count in found["refused_records"].items():
            families.add("taximeter_sink_refused_records", count, partition)
        families.add("taximeter_sink_waiting", bool(found["waiting_for"]))
        families.add("taximeter_sink_stored_records", found["stored_records"])
        families.add("taximeter_sink_stored_batches", found["stored_batches"])
        families.add("taximeter_sink_storing_seconds", found["storing_s"])
        return families

    return source


def api_metrics(server: ApiServer) -> Source:
    """What was asked and how it ended, how full it is, and how far it follows keys and alerts."""

    def source() -> Iterable[Metric]:
        families, calls = _Families("api"), server.calls
        for labels, count in calls.traffic.counts():
            families.add("taximeter_api_requests", count, *labels)
        _add_histogram(families, calls.traffic.durations)
        limits = calls.settings.limits
        families.add("taximeter_api_running_calls", calls.running)
        families.add("taximeter_api_running_calls_max", limits.calls_max)
        families.add("taximeter_api_open_watches", calls.watching)
        families.add("taximeter_api_open_watches_max", limits.watches_max)
        for topic, behind_s in server.behind_s().items():
            families.add("taximeter_api_behind_seconds", behind_s, topic)
        return families

    return source


def notifier_metrics(notifier: Notifier) -> Source:
    """How far it follows the alerts, and how it stands with each endpoint."""
    from serving.notifier.errors import OUTCOMES

    def source() -> Iterable[Metric]:
        families = _Families("notifier")
        families.add("taximeter_notifier_alerts", notifier.taken)
        families.add("taximeter_notifier_dead_letters_dropped", notifier.dropped)
        families.add("taximeter_notifier_behind_seconds", notifier.behind_s())
        for each in notifier.status():
            values = {
                "gave_up": each.given_up,
                "waiting": each.waiting,
                "retrying": each.retrying,
                "oldest_waiting_seconds": each.oldest_s,
                "dead_letters": each.dead,
                "endpoint_gone": each.gone,
            }
            for name, value in values.items():
                families.add(f"taximeter_notifier_{name}", value, each.name)
            for outcome in OUTCOMES:
                families.add("taximeter_notifier_attempts", each.outcomes[outcome], each.name, outcome)
        return families

    return source
