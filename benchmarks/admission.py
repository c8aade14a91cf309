"""What it costs to pay for a request from a warm lease: its limit of output read, its worst case priced, reserved, settled.

One request of vLLM's form after another through the gateway's own `Spending`, on an event loop, with a price book of 200 models
and a lease that never runs dry: no request to the ledger falls into it. Tokenising is not in it, the journal is not in it.

Method: the thread's CPU time (time.thread_time_ns) before and after each request. Two things are measured beside it, in turn
with it: the same request when nothing is set aside (only its limit of output is read), and a control, a loop of additions that
takes as long at the median. What the control's p99 is above its median is the machine's: interrupts, and caches that others
have used. And since the requests are the same in each of several passes, the least that each one took shows the tail that the
code has by itself: the collector of garbage, tables that grow.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from typing import NamedTuple

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

REQUESTS, PASSES = 5_000, 4
WARM_UP = 500
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


class _Samples(NamedTuple):
    paid_ns: list[int]
    bare_ns: list[int]
    control_ns: list[int]
    # Of each request, over the passes.
    least_ns: list[int]


def _control(additions: int) -> None:
    total = 0
    for number in range(additions):
        total += number


def _additions(length_ns: float) -> int:
    """So many take so long."""
    times = []
    for _ in range(200):
        begun = time.thread_time_ns()
        _control(1_000)
        times.append(time.thread_time_ns() - begun)
    return max(1, round(1_000 * length_ns / statistics.median(times)))


async def _measure() -> _Samples:
    spending = _spending()
    await asyncio.sleep(0.01)
    account = AccountView(_TENANT, ACCOUNT_STATUS_ACTIVE, BILLING_MODE_PREPAID, "USD", PICO, 0)
    profile: ModelProfile = vllm("model-7")
    request = _request()

    async def pay(number: int) -> int:
        event = UsageEvent(request_id=str(number), tenant_id=_TENANT, model="model-7", started_ms=1_000)
        begun = time.thread_time_ns()
        money = await spending.set_aside(request, event, account, profile, 95, _UNTIL_MS)
        assert money is not None, "the lease never runs dry"
        event.uncached_input_tokens, event.output_tokens, event.ended_ms = 90, 200, 2_000
        money.settle(event)
        return time.thread_time_ns() - begun

    additions = _additions(statistics.median([await pay(number) for number in range(WARM_UP)]))
    samples = _Samples([], [], [], [])
    for _ in range(PASSES):
        for number in range(REQUESTS):
            samples.paid_ns.append(await pay(number))
            begun = time.thread_time_ns()
            read_output_asked(request, profile.output_limit)
            samples.bare_ns.append(time.thread_time_ns() - begun)
            begun = time.thread_time_ns()
            _control(additions)
            samples.control_ns.append(time.thread_time_ns() - begun)
    samples.least_ns.extend(min(samples.paid_ns[number::REQUESTS]) for number in range(REQUESTS))
    return samples


def run() -> list[Measurement]:
    """The median and the 99th percentile of the CPU time, in microseconds."""
    samples = asyncio.run(_measure())

    def us(sample_ns: list[int], percentile: int) -> float:
        return statistics.quantiles(sample_ns, n=100)[percentile - 1] / 1_000

    def row(name: str, value: float, baseline: str, base: float, target: str = "") -> Measurement:
        return Measurement(f"admission: {name}", value, "µs", baseline, value / base, target)

    paid, bare, control, least = samples
    nothing, additions = "the same request, nothing set aside", "a loop of additions as long at the median"
    return [
        row("paid from a warm lease, p50", us(paid, 50), nothing, us(bare, 50)),
        row("paid from a warm lease, p99", us(paid, 99), additions, us(control, 99), f"< {TARGET_US}"),
        row("that loop of additions, p99", us(control, 99), "its p50", us(control, 50)),
        row(f"paid, the least of {PASSES} passes of each, p99", us(least, 99), "their p50", us(least, 50)),
    ]
