"""Prometheus metrics of gateway, worker and sink: one small HTTP endpoint a part, at the address that is set; off without one.

Promise: a scrape reads what the part counts anyway, and changes nothing. The number of series is bounded: by the names in the
code, the partitions of the ledger, and the models, operations and outcomes of the gateway. No tenant, key, request or text of a
client is ever a label.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from taximeter.errors import ConfigError

if TYPE_CHECKING:
    from serving.gateway import GatewayServer
    from serving.gateway.genai import Histogram
    from sinks.status import SinkStatus
    from stream_processors.ledger_app import LedgerApp

__all__ = ["gateway_metrics", "serve_metrics", "sink_metrics", "worker_metrics"]

_LOG = logging.getLogger(__name__)

Source = Callable[[], Iterable[Metric]]
# Of the gateway's numbers, those that go up and down; the others count since the start.
_GAUGES: Final = frozenset(
    {
        "directory_accounts",
        "directory_keys",
        "journal_bytes",
        "journal_bytes_max",
        "oldest_unacknowledged_ms",
        "open_requests",
        "pending_bytes",
        "publisher_in_flight_bytes",
        "publisher_oldest_unacknowledged_ms",
        "publisher_uncovered",
        "publisher_unsent",
    }
)


class _Collector:
    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        try:
            return list(self._source())
        except RuntimeError:
            # A dictionary that grew under the scrape: the next one finds it.
            _LOG.debug("metrics could not be read", exc_info=True)
            return []


def serve_metrics(setting: str, address: str, source: Source) -> Callable[[], None]:
    """Answer scrapes at `address` (HOST:PORT) until what is returned is called. ConfigError where it cannot be had."""
    host, _, port = address.rpartition(":")
    registry = CollectorRegistry()
    registry.register(_Collector(source))
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(int(port), host, registry)
    except OSError as error:
        raise ConfigError(f"{setting} {address!r} cannot be listened on ({error.strerror}): name a free one") from None

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join(5)

    return close


def gateway_metrics(server: GatewayServer) -> Source:
    """What a gateway counts, its requests as OpenTelemetry names them, and how its counts and the tokenizers' agree."""

    def source() -> Iterable[Metric]:
        yield from _flat("gateway", server.metrics())
        if server.genai is not None:
            for histogram in server.genai.histograms():
                yield _histogram(histogram)
        drift = GaugeMetricFamily(
            "taximeter_count_drift_ratio", "Back end's tokens beyond the tokenizer's, over the last samples.", labels=["model"]
        )
        alarm = GaugeMetricFamily("taximeter_count_drift_alarm", "1: the drift is over its bound.", labels=["model"])
        sampled = CounterMetricFamily("taximeter_counts_audited", "Answers that were counted again.", labels=["model"])
        for model, state in list(server.gateway.audit.models().items()):
            drift.add_metric([model], state.ratio)
            alarm.add_metric([model], state.alarmed)
            sampled.add_metric([model], state.sampled)
        yield from (drift, alarm, sampled)

    return source


def worker_metrics(ledger: LedgerApp) -> Source:
    """How far each partition's ledger is, and what this process has done with it."""

    def source() -> Iterable[Metric]:
        gauges = {
            "ledger_sequence": "The last record of the partition that is applied here.",
            "ledger_in_flight": "Records that Kafka has not acknowledged.",
            "ledger_owned": "1: this process writes the partition's ledger.",
        }
        counters = {
            "ledger_acknowledged_records": "Records written by this process.",
            "ledger_replayed_records": "Records replayed at a takeover.",
            "ledger_ignored_records": "Records that were passed over: repeats and zombies'.",
            "ledger_refused_records": "Of those, what the ledger's key did not seal: somebody else writes to the ledger topic.",
            "ledger_logged_bytes": "Bytes of records replayed or written.",
        }
        families: dict[str, Any] = {
            **{name: GaugeMetricFamily(f"taximeter_{name}", text, labels=["partition"]) for name, text in gauges.items()},
            **{name: CounterMetricFamily(f"taximeter_{name}", text, labels=["partition"]) for name, text in counters.items()},
        }
        for partition, host in list(ledger.hosts.items()):
            values = {
                "ledger_sequence": host.store.place.position.sequence,
                "ledger_in_flight": host.in_flight,
                "ledger_owned": int(host.owned),
                "ledger_acknowledged_records": host.acknowledged_records,
                "ledger_replayed_records": host.replayed_records,
                "ledger_ignored_records": host.ignored_records,
                "ledger_refused_records": host.refused_records,
                "ledger_logged_bytes": host.logged_bytes,
            }
            for name, value in values.items():
                families[name].add_metric([str(partition)], value)
        return families.values()

    return source


def sink_metrics(status: SinkStatus) -> Source:
    """How far the database is, and whether the sink waits for something."""

    def source() -> Iterable[Metric]:
        found: dict[str, Any] = status.snapshot()
        sequence = GaugeMetricFamily(
            "taximeter_sink_sequence", "The last ledger record that is in the database.", labels=["partition"]
        )
        for partition, position in found["positions"].items():
            sequence.add_metric([partition], position["sequence"])
        ignored = CounterMetricFamily(
            "taximeter_sink_ignored_records", "Records that were passed over: repeats and zombies'.", labels=["partition"]
        )
        for partition, count in found["ignored_records"].items():
            ignored.add_metric([partition], count)
        refused = CounterMetricFamily(
            "taximeter_sink_refused_records", "Of those, what the ledger's key did not seal.", labels=["partition"]
        )
        for partition, count in found["refused_records"].items():
            refused.add_metric([partition], count)
        yield from (sequence, ignored, refused)
        yield GaugeMetricFamily("taximeter_sink_waiting", "1: it waits; its log says for what.", bool(found["waiting_for"]))

    return source


def _flat(part: str, values: Mapping[str, int]) -> Iterable[Metric]:
    for name, value in sorted(values.items()):
        family = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
        yield family(f"taximeter_{part}_{name}", name.replace("_", " "), value)


def _histogram(histogram: Histogram) -> Metric:
    """OpenTelemetry's names as Prometheus writes them: dots become underscores, the unit stands last."""
    name = "_".join(filter(None, (histogram.name.replace(".", "_"), histogram.unit)))
    labels = [label.replace(".", "_") for label in histogram.label_names]
    family = HistogramMetricFamily(name, histogram.text, labels=labels)
    for values, series in list(histogram.series.items()):
        counts, total = list(series.counts), series.total
        buckets, so_far = [], 0
        for bound, count in zip([*map(str, histogram.bounds), "+Inf"], counts, strict=True):
            so_far += count
            buckets.append((bound, so_far))
        family.add_metric(values, buckets, total)
    return family
