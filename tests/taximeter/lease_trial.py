"""Several gateway processes, one balance, and two of them killed: a trial of any size, and what it saw.

`python -m tests.taximeter.lease_trial` runs the full one: 8 gateways, $10.00, 2,000 requests at once.

Before anything else the broker stands still while as many come from clients that are connected: each gateway passes what it
holds, and no more.

Checked against the ledger's own records: at no record is more leased than there is, the spend ends within the credit, what
gateways delivered while the broker stood still was leased to them before, and nobody was refused where, for all the time that a
request waits, the ledger had enough free for its longest answer.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from billing.amounts import PICO, from_amount, parse_decimal_to_pico
from billing.v1.command_pb2 import Command
from billing.v1.ledger_pb2 import LedgerRecord
from sinks.engine import decimal_to_pico
from taximeter.compose import open_reader
from taximeter.config import load
from tests.services.ports import free_port
from tests.serving.gateway_support import trace_inputs
from tests.taximeter.support import ROOT, STOP_GRACE_S, Up, environment, until

__all__ = ["Seen", "Trial", "run"]

TENANT: Final = "t"
OUTPUT_TOKENS_MAX: Final = 100
PRICES: Final = """
version = 2
currency = "USD"
effective = "2020-01-01T00:00:00Z"

[[prices]]
model = "*"
output = "{dollars}"
"""


@dataclass(frozen=True, slots=True)
class Trial:
    """How large. The longest answer costs a hundred tokens, input is free; each answer is half as long."""

    gateways: int
    credit: str
    # Of a million output tokens.
    dollars: int
    requests: int
    at_once: int
    lease_wait_ms: int = 1_500
    ready_timeout_s: float = 300.0
    spend_timeout_s: float = 400.0

    @property
    def worst_pico(self) -> int:
        """The longest answer's cost."""
        return OUTPUT_TOKENS_MAX * self.dollars * PICO // 1_000_000


@dataclass(slots=True)
class Seen:
    """What came of it."""

    ended: Counter[str] = field(default_factory=Counter)
    spend_pico: int = 0
    # The least that nobody held, over all records of the ledger.
    least_free_pico: int = 0
    records: int = 0
    # Refusals for the money, and those of them before which enough was free for all the time that a request waits.
    refused_for_balance: int = 0
    refused_too_early: int = 0
    # Of the latter, those in whose wait the ledger came to no question of their gateway within half of that time.
    refused_unanswered: int = 0
    # While the broker stood still: how requests ended, and by gateway what was delivered cost and what it held when that began.
    ended_away: Counter[str] = field(default_factory=Counter)
    delivered_away_pico: Counter[str] = field(default_factory=Counter)
    held_away_pico: Counter[str] = field(default_factory=Counter)
    # From when a gateway asked for a lease to when the ledger answered, sorted, but for while the broker stood still: how slow
    # the machine was.
    asked_ms: list[int] = field(default_factory=list)
    findings: list[Any] = field(default_factory=list)


class Away(NamedTuple):
    """When the broker stood still, until when, and when every gateway was granted something again."""

    began_ms: int
    resumed_ms: int
    granted_ms: int


class Gateways:
    """More gateways of one installation, each with a journal of its own."""

    def __init__(self, up: Up, stack: ExitStack, trial: Trial) -> None:
        self._up = up
        self._stack = stack
        self._folder = up.data_dir.path
        self._timeout_s = trial.ready_timeout_s
        self.ports = [free_port("127.0.0.1") for _ in range(trial.gateways)]
        self.processes: list[subprocess.Popen[bytes]] = []
        for number in range(trial.gateways):
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
        self.processes[number].wait(60)

    def restart(self, number: int) -> None:
        self.processes[number] = self._start(number)

    def await_ready(self) -> None:
        for port in self.ports:
            until(partial(ready, port), self._timeout_s, what=f"gateway {port}")

    def _stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(STOP_GRACE_S)


async def infer(client: Any, headers: dict[str, str], output_tokens: int) -> str:
    """How it ended: "ok", or the status."""
    try:
        await client.infer("trace-unary", trace_inputs(1, output_tokens, stream=False), headers=headers, client_timeout=120)
    except InferenceServerException as error:
        return str(error.status()).removeprefix("StatusCode.")
    return "ok"


@asynccontextmanager
async def connected(ports: list[int]) -> AsyncIterator[list[Any]]:
    """A client of each gateway."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(triton_aio.InferenceServerClient(f"127.0.0.1:{port}")) for port in ports]


async def send(clients: list[Any], headers: dict[str, str], requests: int, at_once: int) -> Counter[str]:
    """Send requests to all gateways in turn, `at_once` at a time, each half as long as it may be; how they ended."""
    slots = asyncio.Semaphore(at_once)

    async def one(number: int) -> str:
        async with slots:
            return await infer(clients[number % len(clients)], headers, OUTPUT_TOKENS_MAX // 2)

    return Counter(await asyncio.gather(*(one(number) for number in range(requests))))


async def spend(ports: list[int], headers: dict[str, str], requests: int, at_once: int, seen: Seen) -> None:
    """The same over new connections."""
    async with connected(ports) as clients:
        seen.ended += await send(clients, headers, requests, at_once)


def ready(port: int) -> bool:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        try:
            return bool(client.is_server_ready())
        except InferenceServerException:
            return False


def spent_pico(up: Up) -> int:
    [row] = up.json("balance", TENANT)
    return parse_decimal_to_pico(row["spend"])


def _without_kafka(up: Up, ports: list[int], headers: dict[str, str], trial: Trial, seen: Seen) -> Away:
    """Requests while the broker stands still."""
    broker = up.pids()["broker"]

    async def stand_still() -> tuple[int, int]:
        async with connected(ports) as clients:
            # Each gateway holds something by then, and each client is connected: leases do not wait for clients.
            async with asyncio.timeout(trial.ready_timeout_s):
                for client in clients:
                    while not (ended := await send([client], headers, 2, 1))["ok"]:
                        seen.ended += ended
                    seen.ended += ended
            os.kill(broker, signal.SIGSTOP)
            # Behind it: whatever was granted by now may be what a gateway holds, however long this process was stopped before.
            began_ms = _now_ms()
            try:
                seen.ended_away = await send(clients, headers, trial.requests, trial.at_once)
                return began_ms, _now_ms()
            finally:
                os.kill(broker, signal.SIGCONT)

    began_ms, resumed_ms = asyncio.run(stand_still())

    def granted_again() -> bool:
        probe = Seen()
        asyncio.run(spend(ports, headers, len(ports), len(ports), probe))
        seen.ended += probe.ended
        return probe.ended["ok"] == len(ports)

    until(granted_again, trial.ready_timeout_s, what="a lease for every gateway")
    return Away(began_ms, resumed_ms, _now_ms())


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def run(trial: Trial, folder: Path) -> Seen:
    """Spend all of the credit through the gateways, two of which are killed on the way."""
    prices, seen = folder / "prices.toml", Seen()
    prices.write_text(PRICES.format(dollars=trial.dollars))
    flags = [f"gateway.output_tokens_default={OUTPUT_TOKENS_MAX}"]
    flags += [f"gateway.lease_wait_ms={trial.lease_wait_ms}", f"gateway.requests_max={2 * trial.at_once}"]
    flags += [f"gateway.tenant_requests_max={2 * trial.at_once}"]
    credit_pico = parse_decimal_to_pico(trial.credit)
    with ExitStack() as stack:
        up = stack.enter_context(Up(folder / "data", *flags, gateway=True))
        # The database has it behind the book of the founding, which the next one follows.
        up.run("tenant", "create", TENANT)
        up.run("prices", "apply", prices)
        up.run("credit", "grant", TENANT, trial.credit)
        headers = {"authorization": f"Bearer {up.json('key', 'create', TENANT)['secret']}"}
        gateways = Gateways(up, stack, trial)
        gateways.await_ready()

        away = _without_kafka(up, gateways.ports, headers, trial, seen)

        # Two gateways die with leases and requests in their hands.
        async def with_kills() -> None:
            running = asyncio.create_task(spend(gateways.ports, headers, trial.requests, trial.at_once, seen))
            await asyncio.sleep(0.5)
            for number in (0, 1):
                gateways.kill9(number)
            await running

        asyncio.run(with_kills())
        for number in (0, 1):
            gateways.restart(number)
        gateways.await_ready()

        # What they held comes back with them: then everything can be spent, but for what does not pay for the longest answer.
        def used_up() -> bool:
            asyncio.run(spend(gateways.ports, headers, trial.requests // 2, min(trial.at_once, 40), seen))
            seen.spend_pico = spent_pico(up)
            return credit_pico - seen.spend_pico < trial.worst_pico

        until(used_up, trial.spend_timeout_s, what="the end of the money")
        _look_at_the_ledger(up, trial, away, seen)
        seen.findings = up.json("audit")["findings"]
    return seen


def _look_at_the_ledger(up: Up, trial: Trial, away: Away, seen: Seen) -> None:
    """What nobody held, record by record; whom it would have paid for; and what was delivered while the broker stood still."""
    at_ms: list[int] = []
    free_pico: list[int] = []
    with open_reader(load(up.data_dir.config_path)) as reader:
        stored = reader.query(
            "SELECT hex(record) FROM ledger_records FINAL ORDER BY ledger_partition, generation_ordinal, sequence",
            timeout_s=120.0,
        ).rows
        # When a gateway decided, by its own clock: what a client waits for on a busy machine is no part of it.
        refused = reader.query(
            "SELECT toUnixTimestamp64Milli(ended), producer_id FROM usage_events FINAL WHERE refusal_reason = 'balance'",
            timeout_s=120.0,
        ).rows
        costs = reader.query(
            "SELECT toUnixTimestamp64Milli(ended), producer_id, cost FROM usage_events FINAL", timeout_s=120.0
        ).rows
    held_pico: dict[tuple[str, int], int] = {}
    asked: dict[str, list[tuple[int, int]]] = {}
    for (text,) in stored:
        record = LedgerRecord.FromString(bytes.fromhex(str(text)))
        command = Command.FromString(record.command.command)
        if command.HasField("lease_request") and not away.began_ms <= command.issued_ms < away.granted_ms:
            asked.setdefault(command.lease_request.holder_id, []).append((command.issued_ms, record.log_time_ms))
        if record.log_time_ms <= away.began_ms:
            for lease in record.leases:
                left_pico = 0 if lease.gone else from_amount(lease.granted) - from_amount(lease.charged)
                held_pico[lease.holder_id, lease.epoch] = max(left_pico, 0)
        for account in record.accounts:
            if account.tenant_id == TENANT and account.credit.low:
                at_ms.append(record.log_time_ms)
                free_pico.append(from_amount(account.credit) - from_amount(account.spend) - from_amount(account.leased))
    for (holder_id, _), left_pico in held_pico.items():
        seen.held_away_pico[holder_id] += left_pico
    seen.asked_ms = sorted(answered - issued for questions in asked.values() for issued, answered in questions)
    seen.records = len(at_ms)
    seen.least_free_pico = min(free_pico)
    seen.refused_for_balance = len(refused)
    for ended, producer_id, cost in costs:
        assert isinstance(cost, Decimal)
        if away.began_ms <= int(str(ended)) < away.resumed_ms:
            seen.delivered_away_pico[str(producer_id)] += decimal_to_pico(cost)
    for decided, producer_id in refused:
        decided_ms = int(str(decided))
        if away.began_ms <= decided_ms < away.granted_ms + trial.lease_wait_ms:
            continue
        # The ledger's word when the wait began, and each one until it was over.
        first = max(bisect_right(at_ms, decided_ms - trial.lease_wait_ms) - 1, 0)
        last = bisect_right(at_ms, decided_ms)
        if min(free_pico[first:last]) >= trial.worst_pico:
            seen.refused_too_early += 1
            seen.refused_unanswered += not any(
                decided_ms - trial.lease_wait_ms <= issued and answered <= min(issued + trial.lease_wait_ms // 2, decided_ms)
                for issued, answered in asked.get(str(producer_id), [])
            )


_SHARES = (("p50", 0.5), ("p99", 0.99), ("at most", 0.999999))


def main() -> int:
    """The full size."""
    parser = argparse.ArgumentParser(prog="tests.taximeter.lease_trial", description=__doc__)
    parser.add_argument("--gateways", type=int, default=8)
    parser.add_argument("--credit", default="10.00")
    parser.add_argument("--dollars", type=int, default=100, help="of a million output tokens: the longest answer costs a cent")
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--at-once", type=int, default=2_000)
    parser.add_argument("--lease-wait-ms", type=int, default=1_500)
    said = parser.parse_args()
    trial = Trial(said.gateways, said.credit, said.dollars, said.requests, said.at_once, said.lease_wait_ms, 600.0, 900.0)
    with tempfile.TemporaryDirectory(prefix="taximeter-leases-") as folder:
        seen = run(trial, Path(folder))
    print(f"requests: {dict(seen.ended)}")
    print(f"spend: {seen.spend_pico / PICO:.6f} of {trial.credit}; audit: {len(seen.findings)} findings")
    print(f"while the broker stood still: {dict(seen.ended_away)}; by gateway, delivered of what it held:")
    for holder_id, held_pico in sorted(seen.held_away_pico.items()):
        print(f"  {seen.delivered_away_pico[holder_id] / PICO:.6f} of {held_pico / PICO:.6f}")
    print(f"least that nobody held, over {seen.records} records: {seen.least_free_pico / PICO:.6f}")
    print(
        f"refused for the balance: {seen.refused_for_balance}; of them, though enough was free for {trial.lease_wait_ms} ms: "
        f"{seen.refused_too_early}, {seen.refused_unanswered} of those without an answer of the ledger in half of that"
    )
    slowest = ", ".join(f"{name} {seen.asked_ms[int(len(seen.asked_ms) * share)]} ms" for name, share in _SHARES)
    print(f"from a gateway's question to the ledger's answer: {slowest}")
    holds = seen.spend_pico <= parse_decimal_to_pico(trial.credit) and seen.least_free_pico >= 0 and not seen.findings
    holds = holds and seen.delivered_away_pico <= seen.held_away_pico and min(seen.delivered_away_pico.values(), default=0) > 0
    return int(not holds or seen.refused_too_early > 0)


if __name__ == "__main__":
    sys.exit(main())
