"""Several gateway processes, one balance: never overspent, all of it usable, and what a killed gateway held comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from billing.amounts import PICO, parse_decimal_to_pico
from taximeter.embedded.process import free_port
from tests.serving.gateway_support import trace_inputs
from tests.taximeter.support import ROOT, Up, environment, until

pytestmark = [pytest.mark.timeout(300)]

GATEWAYS: Final = 3
OUTPUT_TOKENS_MAX: Final = 100
# $10 per million output tokens, input free: the longest answer costs a tenth of a cent.
WORST_PICO: Final = OUTPUT_TOKENS_MAX * 10 * PICO // 1_000_000
CREDIT: Final = "0.15"
PRICES: Final = """
version = 2
currency = "USD"
effective = "2020-01-01T00:00:00Z"

[[prices]]
model = "*"
output = "10.00"
"""


class Gateways:
    """More gateways of one installation, each with a journal of its own."""

    def __init__(self, up: Up, stack: ExitStack) -> None:
        self._up = up
        self._stack = stack
        self._folder = up.data_dir.path
        self.ports = [free_port("127.0.0.1") for _ in range(GATEWAYS)]
        self.processes: list[subprocess.Popen[bytes]] = []
        for number in range(GATEWAYS):
            self.processes.append(self._start(number))
        stack.callback(self._stop)

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        flags = (f"gateway.port={self.ports[number]}", f"gateway.journal_path={self._folder}/gateway-{number}/journal.sqlite")
        settings = [part for flag in flags for part in ("--set", flag)]
        command = [sys.executable, "-m", "taximeter", "gateway", "--config", str(self._up.data_dir.config_path), *settings]
        with (self._folder / f"gateway-{number}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)

    def kill9(self, number: int) -> None:
        os.kill(self.processes[number].pid, signal.SIGKILL)
        self.processes[number].wait(10)

    def restart(self, number: int) -> None:
        self.processes[number] = self._start(number)

    def await_ready(self) -> None:
        for port in self.ports:
            until(partial(ready, port), what=f"gateway {port}")

    def _stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(30)


async def infer(client: Any, headers: dict[str, str], output_tokens: int) -> str:
    """How it ended: "ok", or the status."""
    try:
        await client.infer("trace-unary", trace_inputs(1, output_tokens, stream=False), headers=headers, client_timeout=60)
    except InferenceServerException as error:
        return str(error.status()).removeprefix("StatusCode.")
    return "ok"


async def spend(ports: list[int], headers: dict[str, str], requests: int, at_once: int) -> Counter[str]:
    """Send requests to all gateways in turn, `at_once` at a time: how each ended. Each answer is half as long as it may be."""
    found: Counter[str] = Counter()
    clients = [triton_aio.InferenceServerClient(f"127.0.0.1:{port}") for port in ports]
    slots = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with slots:
            found[await infer(clients[number % len(clients)], headers, OUTPUT_TOKENS_MAX // 2)] += 1

    await asyncio.gather(*(one(number) for number in range(requests)))
    for client in clients:
        await client.close()
    return found


def ready(port: int) -> bool:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        try:
            return bool(client.is_server_ready())
        except InferenceServerException:
            return False


def spent_pico(up: Up) -> int:
    balance = up.json("balance", "t")
    row = balance[0] if isinstance(balance, list) else balance
    return parse_decimal_to_pico(str(row["spend"]).replace(",", "").split()[0])


def test_many_gateways_never_overspend_one_balance(tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(PRICES)
    flags = (f"gateway.output_tokens_default={OUTPUT_TOKENS_MAX}", "gateway.lease_seconds=5", "gateway.lease_wait_ms=1500")
    credit_pico = parse_decimal_to_pico(CREDIT)
    with ExitStack() as stack:
        up = stack.enter_context(Up(tmp_path / "data", *flags, gateway=True))
        up.run("prices", "apply", prices)
        up.run("tenant", "create", "t")
        up.run("credit", "grant", "t", CREDIT)
        headers = {"authorization": f"Bearer {up.json('key', 'create', 't')['secret']}"}
        gateways = Gateways(up, stack)
        gateways.await_ready()

        # Two gateways die with leases and requests in their hands.
        async def with_kills() -> Counter[str]:
            running = asyncio.create_task(spend(gateways.ports, headers, 200, 30))
            await asyncio.sleep(0.5)
            for number in (0, 1):
                gateways.kill9(number)
            return await running

        found = asyncio.run(with_kills())
        for number in (0, 1):
            gateways.restart(number)
        gateways.await_ready()

        # What they held comes back with them: then everything can be spent, but for what does not pay for the longest answer.
        def used_up() -> bool:
            found.update(asyncio.run(spend(gateways.ports, headers, 100, 40)))
            assert spent_pico(up) <= credit_pico
            return credit_pico - spent_pico(up) < WORST_PICO

        until(used_up, 120.0, what="the end of the money")
        assert found["RESOURCE_EXHAUSTED"], "who comes too late is refused"
        # Whoever got an answer paid for it; a killed gateway may have billed some that got none.
        assert found["ok"] * WORST_PICO // 2 <= spent_pico(up) <= credit_pico
        assert up.json("audit")["findings"] == []
