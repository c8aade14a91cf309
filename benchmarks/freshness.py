"""From durable at the metering point to visible in a balance query, through the embedded set-up at 5,000 events/s.

A meter records 50 events every 10 ms and notes when each group is durable. Another thread asks for all balances again and again
and notes how many events the answer counts. An event's freshness is the time from its group's durability to the end of the
first query that counts it: so the query itself, and the pause between two queries, are in the figure.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

from benchmarks.measure import Measurement
from billing.v1.usage_pb2 import OPERATION_GENERATE, OUTCOME_COMPLETED, SERVICE_CLASS_STANDARD, UsageEvent
from producers.meter import UsageMeter
from producers.publisher import Publisher
from sinks import queries
from taximeter.compose import meter_settings, open_reader, publisher_settings
from taximeter.config import Config, load
from taximeter.embedded.state import DataDir

EVENTS_PER_S = 5_000
GROUP = 50
SECONDS = 20
WARM_UP_S = 4
TENANTS = 50
POLL_PAUSE_S = 0.02
READY_TIMEOUT_S = 90
DRAIN_TIMEOUT_S = 30


def run() -> list[Measurement]:
    """Start the embedded set-up, load it, measure, stop it."""
    with tempfile.TemporaryDirectory(prefix="taximeter-bench-") as folder:
        data_dir = DataDir(Path(folder))
        command = [sys.executable, "-m", "taximeter", "up", "--quiet", "--data-dir", folder]
        command += ["--set", "embedded.model_server=false", "--set", "embedded.gateway=false"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            state = await_up(data_dir, process)
            delays_s, fresh_queries_ms = _measure(load(state), Path(folder) / "bench")
        finally:
            process.terminate()
            process.wait(60)
    delays_s.sort()
    name = f"freshness at {EVENTS_PER_S:,} events/s"
    return [
        Measurement(f"{name}, p50", quantile(delays_s, 0.50) * 1_000, "ms"),
        Measurement(f"{name}, p99", quantile(delays_s, 0.99) * 1_000, "ms", target="< 1000"),
        Measurement("balance query meanwhile, median", statistics.median(fresh_queries_ms), "ms"),
    ]


def await_up(data_dir: DataDir, process: subprocess.Popen[bytes]) -> Path:
    """The configuration of the `up` that runs in `data_dir`, once it is ready."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        state = data_dir.running()
        if state is not None:
            return state.config_path
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"taximeter up did not start; see {data_dir.logs}")


def _measure(config: Config, folder: Path) -> tuple[list[float], list[float]]:
    durable: list[tuple[float, int]] = []
    visible: list[tuple[float, int]] = []
    query_ms: list[float] = []
    ended = threading.Event()

    def ask() -> None:
        with open_reader(config) as reader:
            while not ended.is_set():
                began = time.monotonic()
                counted = sum(balance.events for balance in queries.balances(reader))
                answered = time.monotonic()
                visible.append((answered, counted))
                query_ms.append((answered - began) * 1_000)
                ended.wait(POLL_PAUSE_S)

    asker = threading.Thread(target=ask)
    meter = UsageMeter(meter_settings(config, folder / "journal.sqlite"))
    publisher = Publisher(meter.journal, publisher_settings(config))
    publisher.start()
    asker.start()
    try:
        _record(meter, durable)
        total = durable[-1][1]
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while visible[-1][1] < total and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        ended.set()
        asker.join()
        publisher.close(10)
        meter.close(10)
    if visible[-1][1] != total:
        raise RuntimeError(f"{visible[-1][1]:,} of {total:,} events are visible after {DRAIN_TIMEOUT_S} s")
    return _delays(durable, visible), query_ms


def _record(meter: UsageMeter, durable: list[tuple[float, int]]) -> None:
    began = time.monotonic()
    recorded = 0
    while recorded < EVENTS_PER_S * SECONDS:
        pause_s = began + recorded / EVENTS_PER_S - time.monotonic()
        if pause_s > 0:
            time.sleep(pause_s)
        receipt = None
        for number in range(recorded, recorded + GROUP):
            receipt = meter.record(usage_event(number))
        recorded += GROUP
        assert receipt is not None
        receipt.durable(10)
        durable.append((time.monotonic(), recorded))


def usage_event(number: int) -> UsageEvent:
    """A request of one of the tenants that ended now."""
    now_ms = time.time_ns() // 1_000_000
    return UsageEvent(
        request_id=uuid.uuid4().hex,
        tenant_id=f"tenant-{number % TENANTS}",
        project_id="default",
        model="smollm2",
        operation=OPERATION_GENERATE,
        service_class=SERVICE_CLASS_STANDARD,
        outcome=OUTCOME_COMPLETED,
        started_ms=now_ms - 100,
        ended_ms=now_ms,
        uncached_input_tokens=374,
        output_tokens=44,
        latency_ms=100,
    )


def _delays(durable: list[tuple[float, int]], visible: list[tuple[float, int]]) -> list[float]:
    """The delay of each group after the warm-up: to the first answer that counts all of it."""
    delays = []
    place = 0
    first = durable[0][0] + WARM_UP_S
    for at, recorded in durable:
        while visible[place][1] < recorded:
            place += 1
        if at >= first:
            delays.append(max(0.0, visible[place][0] - at))
    return delays


def quantile(ordered: list[float], share: float) -> float:
    """Of sorted values."""
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]
