"""From a back end that counts wrong to the alert that says so: gateway, broker, ledger and publisher are the real ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc.aio as triton_aio

from billing.drift import SAMPLES_MIN
from billing.v1.alert_pb2 import ALERT_RULE_COUNTING_DRIFT, ALERT_STATE_RAISED, Alert
from producers.publisher import PublisherSettings
from serving.gateway.count_audit import AuditSettings
from taximeter.embedded.broker import TansuBroker
from tests.serving.gateway_support import (
    PARTITIONS,
    answers,
    gateway_settings,
    running,
    scripted_back_end,
    text_inputs,
    vllm_response,
)
from tests.stream_processors.harness import Ledger

RIGHT, WRONG = "smollm2-unary", "smollm2"
TEXT, TEXT_TOKENS = "The capital of France is Paris.", 7


@pytest.fixture
def ledger(tansu: TansuBroker, tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tansu.bootstrap, tmp_path, PARTITIONS, quick_sessions=True)
    made.found()
    made.worker()
    yield made
    made.stop()


def drifts(ledger: Ledger) -> list[Alert]:
    """What the alert stream has of them; whoever publishes may say the same again."""
    topic = ledger.names.alerts
    values = {value for number in range(PARTITIONS) for value in ledger.read(topic, number)}
    return [alert for alert in map(Alert.FromString, values) if alert.rule == ALERT_RULE_COUNTING_DRIFT]


async def test_a_back_end_that_counts_wrong_is_in_the_alert_stream_and_one_that_counts_right_is_not(
    tmp_path: Path, ledger: Ledger
) -> None:
    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        factor = 2 if request.model_name == WRONG else 1
        yield vllm_response(TEXT, input_tokens=3, new_tokens=TEXT_TOKENS * factor, final=True)

    names = ledger.names
    publisher = PublisherSettings(
        ledger.bootstrap, PARTITIONS, topic=names.events, progress_topic=names.progress, heartbeat_s=0.2, progress_wait_s=0.1
    )
    async with scripted_back_end(script) as address:
        settings = gateway_settings(tmp_path, address, publisher=publisher, audit=AuditSettings(one_in=1))
        async with running(settings) as server, triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            for model in (RIGHT, WRONG):
                for _ in range(SAMPLES_MIN):
                    await answers(client, {"model_name": model, "inputs": text_inputs("hello", stream=True)})
                    # No more than four are counted again at the same time.
                    await server.gateway.drain(120)
            assert {model: drift.sampled for model, drift in server.gateway.audit.models().items()} == {
                RIGHT: SAMPLES_MIN,
                WRONG: SAMPLES_MIN,
            }
            # Told again with every heartbeat, of both, until the ledger is there to hear it.
            await asyncio.to_thread(ledger.wait, lambda: bool(drifts(ledger)), "an alert")
            producer_id = server.meter.journal.producer_id
    [alert] = await asyncio.to_thread(drifts, ledger)
    assert alert.state == ALERT_STATE_RAISED
    assert dict(alert.labels) == {"model": WRONG, "producer_id": producer_id}
    told = alert.figures["backend_tokens"], alert.figures["tokenizer_tokens"]
    assert told == (2 * TEXT_TOKENS * SAMPLES_MIN, TEXT_TOKENS * SAMPLES_MIN)
