"""What it costs to pay for a request from a warm lease: its limit of output read, its worst case priced, reserved, settled.

One request of vLLM's form after another through the gateway's own `Spending`, on an event loop, with a price book of 200 models
and a lease that never runs dry: no request to the ledger falls into it. The baseline is the same request when nothing is set
aside: only its limit of output is read. Tokenising is not in it, the journal is not in it.
"""

from __future__ import annotations

import asyncio
import json
import time

from tritonclient.grpc import service_pb2

from benchmarks.measure import Measurement
from billing.amounts import PICO, to_amount
from billing.v1.account_pb2 import ACCOUNT_STATUS_ACTIVE, BILLING_MODE_PREPAID, Lease
from billing.v1.command_pb2 import LeaseRequest, Price, PriceBook
from billing.v1.usage_pb2 import UsageEvent
from serving import kserve
from serving.gateway.directory import AccountView
from serving.gateway.leases import LeaseKeeper
from serving.gateway.output_limits import read_output_asked
from serving.gateway.profiles import ModelProfile, vllm
from serving.gateway.settings import LeaseSettings
from serving.gateway.spending import Spending
from serving.gateway.worth import Worth

REQUESTS = 20_000
TARGET_US = 50
_TENANT = "tenant"
_UNTIL_MS = 3_600_000


def _spending() -> Spending:
    prices = [Price(model=f"model-{number}", uncached_input_pico=500_000, output_pico=1_500_000) for number in range(200)]
    requests: list[LeaseRequest] = []
    keeper = LeaseKeeper(LeaseSettings(bootstrap="", key=b"k" * 32), "gateway", 1, 4, lambda _: 0, requests.append)
    waiting = asyncio.ensure_future(keeper.reserve(_TENANT, 1))

    def answer() -> None:
        """As the ledger would: more than all requests can use."""
        request = requests[-1]
        granted = to_amount(10**9 * PICO)
        keeper.on_lease(
            Lease(tenant_id=_TENANT, holder_id="gateway", epoch=1, request_number=request.request_number, granted=granted)
        )

    asyncio.get_running_loop().call_soon(answer)
    waiting.add_done_callback(lambda done: done.result() is None)
    return Spending(
        LeaseSettings(bootstrap="", key=b"k" * 32), keeper, Worth([PriceBook(version=1, currency="USD", prices=prices)])
    )


def _request() -> kserve.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="model-7")
    kserve.add_bytes_input(request, "text_input", [b"What does it cost? " * 20])
    kserve.add_bytes_input(request, "sampling_parameters", [json.dumps({"max_tokens": 256, "temperature": 0.7}).encode()])
    return request


async def _measure() -> tuple[list[int], list[int]]:
    spending = _spending()
    await asyncio.sleep(0.01)
    account = AccountView(_TENANT, ACCOUNT_STATUS_ACTIVE, BILLING_MODE_PREPAID, "USD", PICO, 0)
    profile: ModelProfile = vllm("model-7")
    request = _request()
    paid: list[int] = []
    bare: list[int] = []
    for number in range(REQUESTS):
        event = UsageEvent(request_id=str(number), tenant_id=_TENANT, model="model-7", started_ms=1_000)
        begun = time.thread_time_ns()
        money = await spending.set_aside(request, event, account, profile, 95, _UNTIL_MS)
        assert money is not None, "the lease never runs dry"
        event.uncached_input_tokens, event.output_tokens, event.ended_ms = 90, 200, 2_000
        money.settle(event)
        paid.append(time.thread_time_ns() - begun)
        begun = time.thread_time_ns()
        read_output_asked(request, profile.output_limit)
        bare.append(time.thread_time_ns() - begun)
    return sorted(paid), sorted(bare)


def run() -> list[Measurement]:
    """The median and the 99th percentile of the CPU time, in microseconds."""
    paid, bare = asyncio.run(_measure())

    def us(sample: list[int], share: float) -> float:
        return sample[int(len(sample) * share)] / 1_000

    baseline = "the same request, nothing set aside"
    return [
        Measurement("admission: paid from a warm lease, p50", us(paid, 0.5), "µs", baseline, us(paid, 0.5) / us(bare, 0.5)),
        Measurement(
            "admission: paid from a warm lease, p99",
            us(paid, 0.99),
            "µs",
            baseline,
            us(paid, 0.99) / us(bare, 0.99),
            f"< {TARGET_US}",
        ),
    ]
