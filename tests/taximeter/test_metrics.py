"""What is scraped: every number that is counted is in the table, what did not happen is 0, probes tell waiting from serving."""

from __future__ import annotations

import asyncio
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from billing.v1.command_pb2 import CreditGrant
from billing.v1.ledger_pb2 import LedgerRecord
from sinks.status import SinkStatus
from sinks.writer import Position
from stream_processors.tally import STEP_BOUNDS_S, Tally
from taximeter.errors import ConfigError
from taximeter.metric_names import GATEWAY_NUMBERS, METRICS
from taximeter.metrics import api_metrics, gateway_metrics, serve_metrics, sink_metrics
from tests.billing.ledgers import Ledger, batch, tenants_in, usage
from tests.serving.api.worlds import KeysOnly
from tests.taximeter.support import ROOT

COUNTED = re.compile(r'metrics\["(\w+)"\]')


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def serve(free_port: Callable[[], int]) -> Iterator[Callable[..., str]]:
    closing: list[Callable[[], None]] = []

    def start(source: Any, ready: Callable[[], str] = lambda: "") -> str:
        address = f"127.0.0.1:{free_port()}"
        closing.append(serve_metrics("gateway.metrics_address", address, source, ready))
        return address

    yield start
    for close in closing:
        close()


def test_names_say_their_unit_and_are_said_once() -> None:
    names = [each.name for each in METRICS]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"(taximeter|gen_ai)_[a-z_]+", name) and not name.endswith("_total") for name in names)
    assert all(each.text.endswith(".") for each in METRICS)


def test_no_label_takes_what_a_client_or_a_tenant_can_choose() -> None:
    """The product of labels' values is bounded by the configuration: each new label is looked at here."""
    from_the_code = {
        "action",
        "error_type",
        "gen_ai_operation_name",
        "gen_ai_token_type",
        "method",
        "outcome",
        "protocol",
        "reason",
        "result",
        "rule",
    }
    from_the_code |= {"severity", "status"}
    from_the_configuration = {"endpoint", "gen_ai_request_model", "model", "partition", "topic"}
    assert {label for each in METRICS for label in each.labels} == from_the_code | from_the_configuration


def test_every_number_that_a_gateway_counts_is_in_the_table() -> None:
    sources = (ROOT / "serving" / "gateway").glob("*.py")
    counted = {name for path in sources for name in COUNTED.findall(path.read_text())}
    assert len(counted) > 12
    assert counted <= set(GATEWAY_NUMBERS)


def test_what_has_not_happened_is_zero_and_refusals_are_told_by_reason(serve: Callable[..., str]) -> None:
    numbers = {"requests_completed": 3, "refused_balance": 2, "shadow_rate": 1, "journal_bytes": 77}
    gateway = SimpleNamespace(audit=SimpleNamespace(models=dict))
    server: Any = SimpleNamespace(metrics=lambda: numbers, genai=None, gateway=gateway)
    status, text = get(serve(gateway_metrics(server)), "/metrics")
    samples = {
        (sample.name, sample.labels.get("reason", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert status == 200
    assert samples["taximeter_gateway_requests_completed_total", ""] == 3
    assert samples["taximeter_gateway_requests_cut_off_total", ""] == 0
    assert samples["taximeter_gateway_journal_bytes", ""] == 77
    assert samples["taximeter_gateway_refusals_total", "balance"] == 2
    assert samples["taximeter_gateway_refusals_total", "key"] == 0
    assert samples["taximeter_gateway_shadow_refusals_total", "rate"] == 1


def test_probes_tell_waiting_from_serving(serve: Callable[..., str]) -> None:
    status = SinkStatus()
    address = serve(sink_metrics(status), lambda: status.waiting_for)
    assert get(address, "/health/ready") == (200, "ready\n")
    status.waiting("writing: ClickHouse is away")
    assert get(address, "/health/ready") == (503, "writing: ClickHouse is away\n")
    assert get(address, "/health/live")[0] == 200
    assert get(address, "/")[0] == 404
    status.waiting("")
    assert get(address, "/health/ready")[0] == 200


def test_a_sink_says_how_old_what_it_has_is(serve: Callable[..., str]) -> None:
    status = SinkStatus()
    status.at(2, Position(2, b"g", 1, 41, b"h", 50, 1_700_000_000_500))
    status.stored(30, 0.25)
    text = get(serve(sink_metrics(status)), "/metrics")[1]
    assert 'taximeter_sink_log_time_seconds{partition="2"} 1.7000000005e+09' in text
    assert "taximeter_sink_stored_records_total 30.0" in text
    assert "taximeter_sink_storing_seconds_total 0.25" in text


async def test_an_api_is_scraped_by_method_and_says_how_full_it_is(serve: Callable[..., str]) -> None:
    only = KeysOnly()
    server: Any = SimpleNamespace(calls=only.calls, behind_s=lambda: {"billing.keys": 7.5})
    async with only.client(only.key("", "read")) as client:
        assert (await client.get("/v1/pipeline")).status_code == 503
    status, text = await asyncio.to_thread(get, serve(api_metrics(server)), "/metrics")
    assert status == 200
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["taximeter_api_requests_total", "GetPipeline", "http", "503"] == 1
    assert samples["taximeter_api_requests_total", "GetBalance", "grpc", "INTERNAL"] == 0
    assert samples["taximeter_api_request_duration_seconds_count", "GetPipeline", "http"] == 1
    assert samples["taximeter_api_running_calls_max",] == 64
    assert samples["taximeter_api_open_watches",] == 0
    assert samples["taximeter_api_behind_seconds", "billing.keys"] == 7.5
    only.calls.close()


def test_a_port_that_there_is_not_is_named() -> None:
    with pytest.raises(ConfigError, match=r"ledger\.metrics_address '127\.0\.0\.1:99999' cannot be listened on .*65535"):
        serve_metrics("ledger.metrics_address", "127.0.0.1:99999", list)


def test_an_address_that_is_taken_is_named(serve: Callable[..., str]) -> None:
    address = serve(sink_metrics(SinkStatus()))
    with pytest.raises(ConfigError, match=rf"ledger\.metrics_address '{address}' cannot be listened on"):
        serve_metrics("ledger.metrics_address", address, sink_metrics(SinkStatus()))


def test_a_worker_s_tally_says_what_became_of_events_and_commands() -> None:
    [tenant_id, *_] = tenants_in(1)
    ledger, tally = Ledger(), Tally()
    ledger.price()
    ledger.tenant(tenant_id)
    ledger.command(credit_grant=CreditGrant(tenant_id=tenant_id, currency="XXX"))
    first = batch([usage("a", tenant_id), usage("b", tenant_id), usage("bad", tenant_id, model="")])
    ledger.usage(first)
    ledger.usage(batch([usage("a", tenant_id), usage("b", tenant_id, output_tokens=99)]))
    ledger.usage(b"\xff no batch")
    for stored in ledger.stored:
        tally.took(LedgerRecord.FromString(stored))
    counted = {result: count for result, count in tally.events.items() if count}
    assert counted == {"accepted": 2, "duplicate": 1, "conflict": 1, "invalid": 1, "undecodable": 1}
    assert tally.commands["credit_grant", "refused"] == 1
    assert tally.commands["tenant_upsert", "applied"] == 1
    assert {rule for rule, _ in tally.alerts} == {"conflict"}


def test_steps_are_counted_by_how_long_they_took() -> None:
    tally = Tally()
    for took_s in (0.0001, 0.003, 0.003, 9.0):
        tally.stepped(took_s)
    assert sum(tally.steps) == 4
    assert tally.steps[0] == 1
    assert tally.steps[STEP_BOUNDS_S.index(0.005)] == 2
    assert tally.steps[-1] == 1
    assert tally.steps_s == pytest.approx(9.0061)
