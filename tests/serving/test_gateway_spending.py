"""A request spends what is set aside for it: clamped where less is left, stopped where a stream reaches the money's end."""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2

from billing.amounts import from_amount, to_amount
from billing.v1.account_pb2 import ACCOUNT_STATUS_ACTIVE, BILLING_MODE_PREPAID, Lease
from billing.v1.command_pb2 import LeaseRequest, Price, PriceBook
from billing.v1.usage_pb2 import OUTCOME_BALANCE_EXHAUSTED, OUTCOME_COMPLETED, UsageEvent
from serving import kserve
from serving.gateway import hash_secret, unary
from serving.gateway.calls import Caller
from serving.gateway.directory import AccountView
from serving.gateway.leases import LeaseKeeper
from serving.gateway.metering import MeterParts
from serving.gateway.output_limits import OutputLimit, read_output_asked, set_output_limit
from serving.gateway.policy import POLICIES
from serving.gateway.profiles import vllm
from serving.gateway.settings import LeaseSettings
from serving.gateway.spending import Spending
from serving.gateway.worth import Worth
from serving.kserve import ModelInferRequest
from tests.serving.gateway_support import (
    PARTITIONS,
    PEPPER,
    SECRET,
    answers,
    gateway_settings,
    journalled,
    profiles,
    running,
    settled,
    trace_inputs,
)

TOKEN_PICO = 1_000_000
BOOK = PriceBook(version=1, currency="USD", prices=[Price(model="*", uncached_input_pico=1_000, output_pico=TOKEN_PICO)])
SETTINGS = LeaseSettings(bootstrap="", key=b"k" * 32, wait_ms=20, output_tokens_default=10)
NEVER_CLAMPED = replace(SETTINGS, clamp_output=False)
ACCOUNT = AccountView("tenant-a", ACCOUNT_STATUS_ACTIVE, BILLING_MODE_PREPAID, "USD", 1, 0)


def spending_of(balance_pico: int, settings: LeaseSettings = SETTINGS) -> Spending:
    """A gateway's spending where the ledger grants up to `balance_pico` in all."""

    def send(request: LeaseRequest) -> None:
        granted = to_amount(min(balance_pico, from_amount(request.wanted)))
        lease = Lease(
            tenant_id=request.tenant_id,
            holder_id="gw",
            epoch=1,
            request_number=request.request_number,
            granted=granted,
        )
        asyncio.get_running_loop().call_soon(keeper.on_lease, lease)

    # Nothing is in the ledger yet, whatever the journal has numbered.
    keeper = LeaseKeeper(settings, "gw", 1, PARTITIONS, lambda _: 1, send)
    return Spending(settings, keeper, Worth([BOOK]))


def vllm_request(**sampling: object) -> ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="m")
    kserve.add_bytes_input(request, "text_input", [b"hello"])
    kserve.add_bytes_input(request, "sampling_parameters", [json.dumps(sampling).encode()])
    return request


def tensor_request(tokens: int) -> ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="m")
    kserve.add_bytes_input(request, "text_input", [b"hello"])
    kserve.add_integer_input(request, "max_tokens", tokens, dtype="INT32", shape=(1, 1))
    return request


def parameter_request(tokens: int) -> ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="m")
    kserve.set_parameter(request, "max_tokens", tokens)
    return request


@pytest.mark.parametrize(
    ("request_", "where"),
    [
        (vllm_request(max_tokens=256, temperature=0.5), OutputLimit.SAMPLING_PARAMETERS),
        (vllm_request(max_tokens="256"), OutputLimit.SAMPLING_PARAMETERS),
        (parameter_request(256), OutputLimit.SAMPLING_PARAMETERS),
        (tensor_request(256), OutputLimit.TENSOR),
    ],
)
def test_a_limit_of_output_is_read_and_made_shorter(request_: ModelInferRequest, where: OutputLimit) -> None:
    assert read_output_asked(request_, where).tokens == 256
    set_output_limit(request_, where, 7)
    assert read_output_asked(request_, where).tokens == 7
    assert kserve.read_text_input(request_, "text_input") in ("hello", None)


def test_other_sampling_parameters_stay_and_the_tensor_keeps_its_type() -> None:
    request = vllm_request(max_tokens=256, temperature=0.5)
    set_output_limit(request, OutputLimit.SAMPLING_PARAMETERS, 7)
    text = kserve.read_text_input(request, "sampling_parameters")
    assert text is not None
    assert json.loads(text) == {"max_tokens": 7, "temperature": 0.5}
    tensor = tensor_request(256)
    set_output_limit(tensor, OutputLimit.TENSOR, 7)
    found = kserve.find_input(tensor, "max_tokens")
    assert found is not None
    assert (found.datatype, list(found.shape)) == ("INT32", [1, 1])


@pytest.mark.parametrize(
    "request_",
    [
        vllm_request(),
        vllm_request(max_tokens=-1),
        vllm_request(max_tokens=True),
        vllm_request(max_tokens="many"),
        vllm_request(max_tokens=math.inf),
        vllm_request(max_tokens=[256]),
        vllm_request(max_tokens=None),
        service_pb2.ModelInferRequest(),
    ],
)
def test_what_states_no_limit_has_none(request_: ModelInferRequest) -> None:
    assert read_output_asked(request_, OutputLimit.SAMPLING_PARAMETERS).tokens is None
    assert read_output_asked(request_, OutputLimit.NOWHERE).tokens is None


def request_with_parameters(**parameters: int | str) -> ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="m")
    for name, value in parameters.items():
        kserve.set_parameter(request, name, value)
    return request


@pytest.mark.parametrize(
    "request_",
    [
        vllm_request(max_tokens=256, n="8"),
        vllm_request(max_tokens="256", n=8.9),
        vllm_request(max_tokens=" 2_56 ", best_of=" 8"),
        vllm_request(max_tokens=256.9, n=8),
        request_with_parameters(max_tokens=256, n=8),
        request_with_parameters(max_tokens="256", n="8"),
    ],
)
def test_length_and_number_of_texts_are_what_the_back_end_makes_of_them(request_: ModelInferRequest) -> None:
    """It says `int(...)` to whatever stands there: what is set aside must be for what it does."""
    assert read_output_asked(request_, OutputLimit.SAMPLING_PARAMETERS)[:2] == (256, 8)


async def test_an_answer_longer_than_any_that_there_is_breaks_nothing() -> None:
    """A worst case that no amount can hold would end the task that renews the leases of all tenants."""
    spending = spending_of(31 * TOKEN_PICO)
    money = await spending.set_aside(vllm_request(max_tokens=10**40), event_of(), ACCOUNT, vllm("m"), 1_000, 2_000)
    assert money is not None
    assert money.clamped_tokens == 30
    money.release()
    spending.keeper.look()
    assert await spending.set_aside(vllm_request(max_tokens=5), event_of(), ACCOUNT, vllm("m"), 0, 2_000) is not None


def event_of() -> UsageEvent:
    return UsageEvent(tenant_id="tenant-a", model="m", started_ms=1_000, ended_ms=1_000)


async def test_the_worst_case_is_set_aside_and_the_rest_comes_back() -> None:
    spending = spending_of(100 * TOKEN_PICO, NEVER_CLAMPED)
    money = await spending.set_aside(vllm_request(max_tokens=60), event_of(), ACCOUNT, vllm("m"), 1_000, 2_000)
    assert money is not None
    assert money.reservation.pico == 61 * TOKEN_PICO
    # The rest does not pay for the same again.
    assert await spending.set_aside(vllm_request(max_tokens=60), event_of(), ACCOUNT, vllm("m"), 0, 2_000) is None
    event = event_of()
    event.output_tokens = 5
    event.outcome = 1  # type: ignore[assignment]
    money.settle(event)
    assert await spending.set_aside(vllm_request(max_tokens=60), event_of(), ACCOUNT, vllm("m"), 1_000, 2_000) is not None


async def test_an_answer_is_clamped_to_what_is_left() -> None:
    request = vllm_request(max_tokens=500)
    spending = spending_of(31 * TOKEN_PICO)
    money = await spending.set_aside(request, event_of(), ACCOUNT, vllm("m"), 1_000, 2_000)
    assert money is not None
    assert money.clamped_tokens == 30
    assert read_output_asked(request, OutputLimit.SAMPLING_PARAMETERS).tokens == 30
    assert money.reservation.pico == 31 * TOKEN_PICO


async def test_what_cannot_be_clamped_is_refused() -> None:
    unstated = vllm_request()
    assert await spending_of(5 * TOKEN_PICO).set_aside(unstated, event_of(), ACCOUNT, vllm("m"), 0, 2_000) is None
    # The prompt alone costs more than there is.
    stated = vllm_request(max_tokens=500)
    assert await spending_of(TOKEN_PICO).set_aside(stated, event_of(), ACCOUNT, vllm("m"), 2_000, 2_000) is None
    assert await spending_of(5 * TOKEN_PICO, NEVER_CLAMPED).set_aside(stated, event_of(), ACCOUNT, vllm("m"), 0, 2_000) is None
    assert read_output_asked(stated, OutputLimit.SAMPLING_PARAMETERS).tokens == 500


@pytest.mark.parametrize("chunk_delay_ms", [5, 0], ids=["one chunk at a time", "many chunks at once"])
async def test_a_stream_that_reaches_the_end_of_the_money_ends_there_and_says_so(
    tmp_path: Path, back_end: str, chunk_delay_ms: int
) -> None:
    models = {name: profile for name, profile in profiles().items() if name.startswith("trace")}
    settings = gateway_settings(tmp_path, back_end, tokenizers={}, models=models)
    async with running(settings) as server:
        # Ten tokens are set aside for an answer of a hundred; the balance pays for thirty.
        server.gateway.spending = spending_of(30 * TOKEN_PICO)
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            inputs = trace_inputs(1, 100, chunk_tokens=1, chunk_delay_ms=chunk_delay_ms)
            found = await answers(client, {"model_name": "trace", "inputs": inputs, "request_id": "mine"})
        assert "balance: is used up" in str(found[-1][1])
        [event] = journalled(server.meter)
        assert event.outcome == OUTCOME_BALANCE_EXHAUSTED
        delivered = sum(1 for response, _ in found if response is not None)
        # What was delivered is billed, and paid for; of what came at once, as much as the money pays for.
        assert 10 <= delivered == event.output_tokens <= 30
        assert server.gateway.spending.keeper.at_hand_pico("tenant-a") >= 0


async def test_an_answer_whose_last_part_is_not_paid_for_is_not_counted_as_completed(tmp_path: Path, back_end: str) -> None:
    models = {name: profile for name, profile in profiles().items() if name.startswith("trace")}
    settings = gateway_settings(tmp_path, back_end, tokenizers={}, models=models)
    async with running(settings) as server:
        server.gateway.spending = spending_of(30 * TOKEN_PICO)
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            # All of it in one chunk, which is the last.
            inputs = trace_inputs(1, 100, chunk_tokens=100)
            found = await answers(client, {"model_name": "trace", "inputs": inputs, "request_id": "mine"})
        assert "balance: is used up" in str(found[-1][1])
        [event] = journalled(server.meter)
        assert (event.outcome, event.output_tokens) == (OUTCOME_BALANCE_EXHAUSTED, 0)
        assert server.gateway.metrics["requests_completed"] == 0


async def test_what_was_set_aside_is_free_again_when_nobody_waited_for_the_bill(tmp_path: Path, back_end: str) -> None:
    """Every third client goes while its bill is written, and every third bill takes longer than the gateway waits. Whether that
    hits a single request depends on how fast the disk is."""
    models = {"trace-unary": vllm("trace-unary", decoupled=False)}
    caller = Caller(hash_secret(PEPPER, SECRET), (), None, wants_status=False)
    async with running(gateway_settings(tmp_path, back_end, tokenizers={}, models=models)) as server:
        gateway = server.gateway
        hurried = MeterParts(server.meter, server.tokens, "gateway-1", "here", durable_timeout_s=1e-9)
        gateway.spending = spending_of(1_000 * TOKEN_PICO)
        for number in range(30):
            request = vllm_request(max_tokens=40)
            request.model_name = "trace-unary"
            with patch.object(gateway, "_parts", hurried) if number % 3 == 1 else nullcontext():
                admitted = await gateway.begin(request, caller, POLICIES[unary.METHOD], stream=False)
            admitted.meter.forwarded()
            closing = asyncio.create_task(admitted.meter.close(OUTCOME_COMPLETED))
            await asyncio.sleep(0)
            if number % 3 == 0:
                closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)
            gateway.end(admitted, caller)
        await gateway.drain(180)
        events = await settled(server, 30)
        assert {event.outcome for event in events} == {OUTCOME_COMPLETED}
        assert await gateway.spending.keeper.reserve("tenant-a", 1_000 * TOKEN_PICO) is not None
