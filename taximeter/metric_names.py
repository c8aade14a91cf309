"""Every metric that a part answers Prometheus with: name, kind, labels and what it says.

Promise: `taximeter.metrics` exports these and nothing else beside the process's own (process_…), so that rules, dashboards and
docs/reference/metrics.md can be held against this table. Labels take values from the code, the contracts, partitions, topics,
the models that a gateway serves and the endpoints that a notifier has; never a tenant, a key or what a client sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["GATEWAY_NUMBERS", "METRICS", "MetricName", "Part"]

Part = Literal["gateway", "worker", "sink", "api", "notifier"]
Kind = Literal["gauge", "counter", "histogram"]
_MODEL: Final = ("gen_ai_operation_name", "gen_ai_request_model")


@dataclass(frozen=True, slots=True)
class MetricName:
    """One metric. A counter's series end in _total, a histogram's in _bucket, _sum and _count."""

    part: Part
    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """As queries name them."""
        endings = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        return tuple(f"{self.name}{ending}" for ending in endings[self.kind])


def _worker(name: str, kind: Kind, text: str, *labels: str) -> MetricName:
    return MetricName("worker", f"taximeter_{name}", kind, text, labels)


def _sink(name: str, kind: Kind, text: str, *labels: str) -> MetricName:
    return MetricName("sink", f"taximeter_sink_{name}", kind, text, labels)


def _api(name: str, kind: Kind, text: str, *labels: str) -> MetricName:
    return MetricName("api", f"taximeter_api_{name}", kind, text, labels)


def _notifier(name: str, kind: Kind, text: str, *labels: str) -> MetricName:
    return MetricName("notifier", f"taximeter_notifier_{name}", kind, text, labels)


# Of a gateway, by the names under which its parts count them.
GATEWAY_NUMBERS: Final[dict[str, tuple[Kind, str]]] = {
    "requests_admitted": ("counter", "Inferences that were forwarded."),
    "requests_completed": ("counter", "Inferences that ended well."),
    "requests_backend_error": ("counter", "Inferences that the back end failed."),
    "requests_cut_off": ("counter", "Answers that were ended before their end: a deadline, the money, a limit, a stop."),
    "requests_invalid": ("counter", "Requests that could not be read or counted."),
    "clients_gone": ("counter", "Answers whose client went away."),
    "cancels_confirmed": ("counter", "Answers that were cut off and whose back end said what it had produced."),
    "cancels_unconfirmed": ("counter", "Answers that were cut off and whose back end did not say so in time."),
    "stops_failed": ("counter", "Back ends that were asked to stop and did not take it."),
    "upstream_retries": ("counter", "Requests that were sent to the back end again."),
    "answers_over_limit": ("counter", "Answers in one piece that are longer than allowed: delivered, billed and flagged."),
    "answers_clamped": ("counter", "Answers whose length was clamped to what the balance pays for."),
    "admitted_without_money": ("counter", "Requests of tenants in shadow mode that no balance paid for."),
    "refusals_unrecorded": ("counter", "Refusals that could not be written to the journal."),
    "tokenizers_unchecked": ("gauge", "Models whose requests wait until the back end has said which tokenizer they have."),
    "audits_failed": ("counter", "Answers that could not be counted again."),
    "journal_full": ("counter", "Requests that were refused because the journal had no room."),
    "journal_errors": ("counter", "Bills that the journal did not take at once."),
    "directory_accounts": ("gauge", "Accounts that are known."),
    "directory_keys": ("gauge", "Keys that are known."),
    "directory_unreadable": ("counter", "Messages about accounts and keys that could not be read."),
    "recorded": ("counter", "Events handed to the journal."),
    "durable": ("counter", "Events that the journal made durable."),
    "refused": ("counter", "Events that the journal refused: it was full."),
    "failed": ("counter", "Events that the journal's disk refused."),
    "commits": ("counter", "Commits of the journal."),
    "open_requests": ("gauge", "Requests that are running."),
    "journal_bytes": ("gauge", "What the journal holds: usage that the ledger does not cover yet."),
    "journal_bytes_max": ("gauge", "What the journal may hold: producer.journal_bytes_max."),
    "pending_bytes": ("gauge", "Bytes that wait for the journal's next commit."),
    "oldest_unacknowledged_ms": ("gauge", "Age of the oldest event in the journal."),
    "lease_requests": ("counter", "Leases that were asked for."),
    "lease_waits": ("counter", "Requests that waited for a lease."),
    "lease_waits_in_vain": ("counter", "Requests that waited for a lease and did not get it in time."),
    "publisher_published": ("counter", "Events that Kafka acknowledged."),
    "publisher_covered": ("counter", "Events that the ledger covers."),
    "publisher_resent": ("counter", "Events that were sent again."),
    "publisher_batches": ("counter", "Batches that were sent."),
    "publisher_heartbeats": ("counter", "Heartbeats that were sent."),
    "publisher_delivery_failures": ("counter", "Batches that Kafka did not take."),
    "publisher_reconnects": ("counter", "Times that publishing began again."),
    "publisher_numbering_conflicts": ("counter", "Partitions in which the ledger knows higher numbers than the journal gave."),
    "publisher_faults": ("counter", "Errors in publishing that were not foreseen."),
    "publisher_in_flight_bytes": ("gauge", "Bytes that are on their way to Kafka."),
    "publisher_unsent": ("gauge", "Events that are durable here and not sent."),
    "publisher_uncovered": ("gauge", "Events that are durable here and not known to be in the ledger."),
    "publisher_oldest_unacknowledged_ms": ("gauge", "Age of the oldest event that the ledger does not cover."),
}

METRICS: Final = (
    *(MetricName("gateway", f"taximeter_gateway_{name}", kind, text) for name, (kind, text) in GATEWAY_NUMBERS.items()),
    MetricName("gateway", "taximeter_gateway_refusals", "counter", "Requests that were refused.", ("reason",)),
    MetricName(
        "gateway",
        "taximeter_gateway_shadow_refusals",
        "counter",
        "Requests of tenants in shadow mode that would have been refused.",
        ("reason",),
    ),
    MetricName(
        "gateway",
        "taximeter_count_drift_ratio",
        "gauge",
        "Back end's tokens beyond the tokenizer's, over the last samples.",
        ("model",),
    ),
    MetricName("gateway", "taximeter_count_drift_alarm", "gauge", "1: the drift is over its bound.", ("model",)),
    MetricName("gateway", "taximeter_counts_audited", "counter", "Answers that were counted again.", ("model",)),
    MetricName(
        "gateway",
        "gen_ai_client_token_usage",
        "histogram",
        "Tokens of prompts and answers, as they are billed.",
        (*_MODEL, "gen_ai_token_type"),
    ),
    MetricName(
        "gateway",
        "gen_ai_server_request_duration_seconds",
        "histogram",
        "From the request's admission to its bill.",
        (*_MODEL, "error_type"),
    ),
    MetricName("gateway", "gen_ai_server_time_to_first_token_seconds", "histogram", "To the first response.", _MODEL),
    MetricName(
        "gateway", "gen_ai_server_time_per_output_token_seconds", "histogram", "Between tokens, behind the first.", _MODEL
    ),
    _worker("ledger_owned", "gauge", "1: this process writes the partition's ledger.", "partition"),
    _worker("ledger_sequence", "gauge", "The last record of the partition that is applied here.", "partition"),
    _worker("ledger_log_time_seconds", "gauge", "Log time of that record, in Unix time: idle ledgers tick.", "partition"),
    _worker("ledger_lag_messages", "gauge", "Input that waits for the ledger.", "topic", "partition"),
    _worker("ledger_in_flight", "gauge", "Records that Kafka has not acknowledged.", "partition"),
    _worker(
        "ledger_missing_events", "gauge", "Events that producers numbered and the ledger lacks, after the grace.", "partition"
    ),
    _worker("ledger_silent_producers", "gauge", "Producers that stopped without a goodbye.", "partition"),
    _worker("ledger_open_windows", "gauge", "Windows of totals that are still open.", "partition"),
    _worker("ledger_accounts", "gauge", "Tenants of the partition.", "partition"),
    _worker("ledger_unconfirmed_bytes", "gauge", "Records kept for the sink, where the broker keeps nothing.", "partition"),
    _worker(
        "ledger_snapshot_log_time_seconds", "gauge", "Up to when the last snapshot has everything, in Unix time.", "partition"
    ),
    _worker("ledger_acknowledged_records", "counter", "Records written by this process.", "partition"),
    _worker("ledger_replayed_records", "counter", "Records replayed at a takeover.", "partition"),
    _worker("ledger_ignored_records", "counter", "Records that were passed over: repeats and zombies'.", "partition"),
    _worker(
        "ledger_refused_records",
        "counter",
        "Of those passed over, what the ledger's key did not seal: somebody else writes to the ledger topic.",
        "partition",
    ),
    _worker("ledger_logged_bytes", "counter", "Bytes of records replayed or written.", "partition"),
    _worker(
        "ledger_events",
        "counter",
        "What became of events; undecodable: whole messages.",
        "result",
    ),
    _worker(
        "ledger_commands",
        "counter",
        "Commands by what they asked for; refused: seen before, or with a reason.",
        "action",
        "outcome",
    ),
    _worker("ledger_alerts", "counter", "Alerts that were raised, updated or resolved.", "rule", "severity"),
    _worker("ledger_step_seconds", "histogram", "How long the step took for one input."),
    _worker("publisher_records", "counter", "Records that the publisher has taken."),
    _worker("publisher_sequence", "gauge", "The last record of which accounts, keys and alerts are published.", "partition"),
    _worker("publisher_log_time_seconds", "gauge", "Log time of that record, in Unix time.", "partition"),
    _sink("sequence", "gauge", "The last ledger record that is in the database.", "partition"),
    _sink("log_time_seconds", "gauge", "Log time of that record, in Unix time: the database knows all up to it.", "partition"),
    _sink("ignored_records", "counter", "Records that were passed over: repeats and zombies'.", "partition"),
    _sink("refused_records", "counter", "Of those passed over, what the ledger's key did not seal.", "partition"),
    _sink("waiting", "gauge", "1: it waits; its log says for what."),
    _sink("stored_records", "counter", "Records written to the database."),
    _sink("stored_batches", "counter", "Batches written to the database."),
    _sink("storing_seconds", "counter", "Time that writing them took, with repeats."),
    _api(
        "requests",
        "counter",
        "Requests that were answered and watches that ended; method other: the dashboard, the document, probes.",
        "protocol",
        "method",
        "status",
    ),
    _api(
        "request_duration_seconds",
        "histogram",
        "From a request to the end of its answer; watches, which end when somebody goes, are left out.",
        "protocol",
        "method",
    ),
    _api("running_calls", "gauge", "Calls that run."),
    _api("running_calls_max", "gauge", "How many may run: api.calls_max."),
    _api("open_watches", "gauge", "Watches that are open."),
    _api("open_watches_max", "gauge", "How many may be open."),
    _api(
        "behind_seconds",
        "gauge",
        "For how long it has not been at the end of the topic of keys or alerts; 0: it is. While no broker answers, it grows.",
        "topic",
    ),
    _notifier("alerts", "counter", "Alerts that were taken from the topic and written down."),
    _notifier(
        "behind_seconds",
        "gauge",
        "For how long it has not been at the end of the topic of alerts; 0: it is. While no broker answers, it grows.",
    ),
    _notifier(
        "attempts",
        "counter",
        "Attempts to deliver: taken, refused (4xx, a redirect, an address that may not be asked), failed (5xx), gone (410), "
        "timed_out, unreachable.",
        "endpoint",
        "outcome",
    ),
    _notifier("gave_up", "counter", "Deliveries that became dead letters after attempts.", "endpoint"),
    _notifier("waiting", "gauge", "Deliveries that wait or are under way.", "endpoint"),
    _notifier("retrying", "gauge", "Of them, those of which an attempt was not taken.", "endpoint"),
    _notifier("oldest_waiting_seconds", "gauge", "Age of the oldest of them.", "endpoint"),
    _notifier(
        "dead_letters", "gauge", "Deliveries that the endpoint did not take: `taximeter webhooks dead list`.", "endpoint"
    ),
    _notifier("endpoint_gone", "gauge", "1: it answered 410 Gone and is not asked any more.", "endpoint"),
    _notifier("dead_letters_dropped", "counter", "Dead letters that had to go because there were too many."),
)
