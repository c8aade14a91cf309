"""A whole installation: what is said of a key holds in every gateway within two seconds, a test key is free, a request's trace
reaches the database and a collector is told of it by each part on the way, and each part's metrics can be scraped."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import pytest
import tritonclient.grpc as triton
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from sinks import queries
from taximeter.api_keys import find_key
from taximeter.commanding import Commander
from taximeter.compose import open_reader
from taximeter.config import load
from taximeter.metric_names import METRICS
from tests.services.ports import free_port
from tests.serving.gateway_support import trace_inputs
from tests.serving.otlp_collector import Collector, values
from tests.taximeter.support import ROOT, STOP_GRACE_S, Up, environment, until

pytestmark = [pytest.mark.timeout(900)]

EFFECTIVE_S: Final = 2.0


def infer(port: int, secret: str, **more: str) -> str:
    """How it ended: "ok", or the status."""
    headers = {"authorization": f"Bearer {secret}", **more}
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        try:
            client.infer("trace-unary", trace_inputs(7, 3, stream=False), headers=headers, client_timeout=120)
        except InferenceServerException as error:
            return str(error.status()).removeprefix("StatusCode.")
    return "ok"


def ends(port: int, secret: str, status: str) -> bool:
    return infer(port, secret) == status


@contextmanager
def another_gateway(up: Up) -> Iterator[int]:
    port, folder = free_port("127.0.0.1"), up.data_dir.path
    flags = (f"gateway.port={port}", f"gateway.journal_path={folder}/gateway-2/journal.sqlite", "gateway.metrics_address=")
    settings = [part for flag in flags for part in ("--set", flag)]
    command = [sys.executable, "-m", "taximeter", "gateway", "--config", str(up.data_dir.config_path), *settings]
    with (folder / "gateway-2.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    try:
        yield port
    finally:
        process.terminate()
        process.wait(STOP_GRACE_S)


@pytest.fixture(scope="module")
def addresses() -> dict[str, str]:
    """Where each part's metrics are."""
    return {section: f"127.0.0.1:{free_port('127.0.0.1')}" for section in ("gateway", "ledger", "clickhouse", "api")}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """Who is told of spans."""
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, addresses: dict[str, str], collector: Collector) -> Iterator[Up]:
    flags = [f"{section}.metrics_address={address}" for section, address in addresses.items()]
    flags += [f"{section}.otlp_endpoint={collector.endpoint}" for section in ("gateway", "ledger", "clickhouse")]
    with Up(tmp_path_factory.mktemp("up"), *flags, gateway=True, api=True) as started:
        yield started


def test_a_key_is_made_rotated_and_revoked_in_all_gateways_within_two_seconds(up: Up) -> None:
    with another_gateway(up) as other:
        ports = [load(up.data_dir.config_path).gateway.port, other]
        up.run("tenant", "create", "acme", "--limit", "requests_per_minute=100000")
        made = up.json("key", "create", "acme", "--test", "--project", "search", "--limit", "concurrent_requests_max=9")
        first = made["secret"]
        for port in ports:
            # It has no balance, and needs none.
            until(partial(ends, port, first, "ok"), what=f"the key in gateway {port}")

        rotated = up.json("key", "rotate", made["key_id"], "--grace", "1")
        second = rotated["secret"]
        for port in ports:
            until(partial(ends, port, second, "ok"), what=f"the new key in gateway {port}")
            assert infer(port, first) == "ok", "it opens until its grace is over"

        config = load(up.data_dir.config_path)
        commander = Commander(config, "test")

        def took_s(key_id: str, secret: str) -> float:
            known = find_key(config, key_id)
            began = time.monotonic()
            commander.send([commander.changed_key(known, "measured", revoked=True)])
            for port in ports:
                until(partial(ends, port, secret, "UNAUTHENTICATED"), what="the revocation")
            return time.monotonic() - began

        took = [took_s(made["key_id"], first), took_s(rotated["key_id"], second)]
        # They may have met a machine that was busy with something else: then it is shown with another.
        while min(took) >= EFFECTIVE_S and len(took) < 12:
            more = up.json("key", "create", "acme", "--test", "--project", "search")
            for port in ports:
                until(partial(ends, port, more["secret"], "ok"), what="one more key")
            took.append(took_s(more["key_id"], more["secret"]))
        assert min(took) < EFFECTIVE_S, took

        listed = {row["key_id"]: row for row in up.json("key", "list", "acme")}
        assert {row["state"] for row in listed.values()} == {"revoked"}
        assert listed[rotated["key_id"]]["limits"] == {"concurrent_requests_max": 9}
        assert listed[rotated["key_id"]]["project"] == "search"
        assert "revoked already" in up.json("key", "revoke", made["key_id"], expected=1)["error"]

        with open_reader(config) as reader:
            until(lambda: next(iter(queries.balances(reader, "acme"))).events >= 4, what="the test key's usage")
            assert next(iter(queries.balances(reader, "acme"))).spend_pico == 0
            usage = "SELECT outcome, service_class, output_tokens FROM usage_events WHERE tenant_id = 'acme'"
            answered = ("completed", "test", 3)
            until(lambda: answered in map(tuple, reader.query(usage, {}).rows), what="its events")
            # What came with a key that was revoked is recorded too.
            assert {tuple(row) for row in reader.query(usage, {}).rows} <= {answered, ("rejected", "test", 0)}


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        return str(answer.read().decode())


def test_a_request_s_trace_reaches_the_database_and_each_part_can_be_scraped(
    up: Up, addresses: dict[str, str], collector: Collector
) -> None:
    config = load(up.data_dir.config_path)
    up.run("tenant", "create", "traced", "--shadow")
    secret = up.json("key", "create", "traced")["secret"]
    trace_id, span_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    until(
        lambda: infer(config.gateway.port, secret, traceparent=f"00-{trace_id}-{span_id}-01") == "ok", what="a traced request"
    )

    def traced() -> list[Any]:
        query = "SELECT attribute_values FROM usage_events WHERE tenant_id = 'traced' AND has(attribute_names, 'traceparent')"
        with open_reader(config) as reader:
            return [row[0] for row in reader.query(query, {}).rows]

    until(traced, what="its usage in the database")
    (value,) = traced()[0]
    assert value.startswith(f"00-{trace_id}-")
    assert span_id not in value, "the gateway is a span of its own"

    def hops() -> dict[str, Span]:
        # An attempt before the key was known has spans of its own.
        found: dict[str, dict[str, Span]] = defaultdict(dict)
        for span in [span for span in list(collector.spans) if span.trace_id.hex() == trace_id]:
            found[values(span.attributes)["gen_ai.response.id"]][collector.tellers[span.span_id]] = span
        return max(found.values(), key=len, default={})

    until(lambda: len(hops()) == 3, what="the request's spans from gateway to database")
    gateway_span, ledger_span, sink_span = (hops()[f"taximeter-{part}"] for part in ("gateway", "worker", "sink"))
    assert gateway_span.parent_span_id.hex() == span_id
    assert ledger_span.parent_span_id == sink_span.parent_span_id == gateway_span.span_id
    assert ledger_span.start_time_unix_nano == gateway_span.end_time_unix_nano

    gateway, ledger, sink, api = (scrape(addresses[section]) for section in ("gateway", "ledger", "clickhouse", "api"))
    assert "taximeter_gateway_requests_completed_total" in gateway
    labels = 'gen_ai_operation_name="generate",gen_ai_request_model="trace-unary"'
    assert f'gen_ai_client_token_usage_count{{{labels},gen_ai_token_type="output"}}' in gateway
    assert f'gen_ai_server_request_duration_seconds_bucket{{error_type="",{labels},le="0.01"}}' in gateway
    assert "traced" not in gateway, "no tenant is a label"
    assert 'taximeter_ledger_owned{partition="0"} 1.0' in ledger
    assert 'taximeter_publisher_log_time_seconds{partition="0"}' in ledger
    assert 'taximeter_ledger_commands_total{action="key_upsert",outcome="applied"}' in ledger
    # Whatever a part says stands in the table, and what the table has the part says.
    for part, text in (("gateway", gateway), ("worker", ledger), ("sink", sink), ("api", api)):
        said = {family.name for family in text_string_to_metric_families(text) if not family.name.startswith("process_")}
        assert said == {each.name for each in METRICS if each.part == part}
    assert 'taximeter_sink_sequence{partition="0"}' in sink
    assert "taximeter_api_running_calls 0.0" in api
    for topic in ("billing.keys", "billing.alerts"):
        read = f'taximeter_api_behind_seconds{{topic="{topic}"}} 0.0'
        until(lambda read=read: read in scrape(addresses["api"]), what=f"the end of {topic}")  # type: ignore[misc]
    # What is on its way waits for a moment, and a sink for a broker that does not answer at once.
    until(lambda: "taximeter_sink_waiting 0.0" in scrape(addresses["clickhouse"]), what="a sink that waits for nothing")
    none_waits = 'taximeter_ledger_lag_messages{partition="0",topic="usage.events"} 0.0'
    until(lambda: none_waits in scrape(addresses["ledger"]), what="an input without a backlog")
