"""The dashboard's first view and its updates with 20 million events of 1,000 tenants, while usage goes on.

chDB holds the minute totals and accounts of a month, as `benchmarks.month_to_date` makes them. The API serves them over HTTP in
this process, and clients watch as pages do: one an operator's, the others of large and small tenants. A first view is from the
question to the event with all of its figures. Then usage comes to the tables, as a sink writes it, and an update is from the
moment at which it can be read until the event with it has come, for whoever it concerns. Where there is a Chromium, it loads
the page, signed in, and is asked when the figures stood there.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import httpx
from playwright.async_api import async_playwright

from benchmarks import month_to_date as month
from benchmarks.measure import Measurement
from billing import replay
from billing.founding import LedgerSettings, found
from billing.state import LedgerState, MemorySeenKeys
from billing.step import LedgerKeys, TickInput, step
from billing.v1.account_pb2 import KEY_SCOPE_READ, ApiKey
from serving.api import ApiServer, ApiSettings, KeySource
from serving.api.keys import Keys
from serving.gateway.credentials import hash_secret
from sinks.columns import version_of
from sinks.engine import Reader, Rows
from sinks.engines.chdb import ChdbEngine
from sinks.follow import feed
from sinks.migrate import migrate
from sinks.parameters import Parameter

PEPPER: Final = b"p" * 32
OPERATOR: Final = "the operator"
WATCHED: Final = ("tenant-0", "tenant-1", "tenant-2", "tenant-500", "tenant-999")
FIRST_VIEWS: Final = 40
UPDATES: Final = 30
# As often as a sink writes while usage comes.
PAUSE_S: Final = 0.7
TIMEOUT_S: Final = 120.0
NOW_S: Final = month.MONTH_START_S + month.DAYS * 86_400 - 1
# A window of each tenant that is watched, its account, and, last, how far the database is.
_USAGE = """
INSERT INTO usage_totals (tenant_id, minute, project_id, model, operation, service_class, generation, opened_sequence,
    price_version, events, uncached_input_tokens, output_tokens, cost, currency, sequence, version)
SELECT arrayJoin({tenants}), toDateTime({minute}, 'UTC'), 'project-0', 'model-0', 'chat', 'standard', 'live', {version},
    1, 1, 100, 10, toDecimal128('0.0001', 12), 'USD', {version}, {version}
"""
_ACCOUNTS = """
INSERT INTO accounts (tenant_id, status, currency, credit, spend, events, version)
SELECT tenant_id, status, currency, credit, spend + toDecimal128('0.0001', 12), events + 1, {version} FROM accounts FINAL
WHERE tenant_id IN {tenants}
"""
SEAL: Final = b"s" * 32


class _Ledger:
    """One partition that says nothing but that time goes on; the sink's own way into the database."""

    def __init__(self, engine: ChdbEngine) -> None:
        self._engine = engine
        # Of another run, where the folder was kept.
        for table in ("ledger_records", "sink_positions", "producer_marks"):
            engine.execute(f"TRUNCATE TABLE {table}")
        settings = LedgerSettings(partitions=1, dedupe_key=b"k" * 32)
        record, self._last = found(settings, 0, b"g" * 16, NOW_S * 1_000, SEAL, "bench")
        self._state = LedgerState(MemorySeenKeys())
        replay.apply(self._state, record, self._last)
        feed(engine, [self._last], SEAL)
        self.sequence = 0

    def tick(self) -> None:
        self.sequence += 1
        keys = LedgerKeys(seal_key=SEAL, command_key=b"c" * 32)
        result = step(self._state, TickInput(), NOW_S * 1_000 + self.sequence, keys=keys, writer="bench")
        feed(self._engine, [self._last, result.stored], SEAL)
        self._last = result.stored


def run() -> list[Measurement]:
    """Measure."""
    with tempfile.TemporaryDirectory(prefix="dashboard-") as folder:
        # A folder that is kept between runs, for whoever works on what is measured.
        kept = os.environ.get("TAXIMETER_BENCH_DATABASE")
        engine = ChdbEngine(Path(kept or folder), "bench")
        try:
            migrate(engine)
            if not engine.query("SELECT count() FROM accounts").rows[0][0]:
                month.build(engine)
            return asyncio.run(_measure(engine, _Ledger(engine)))
        finally:
            engine.close()


class _Shared:
    """A reader of the engine that this process owns."""

    def __init__(self, engine: ChdbEngine) -> None:
        self._engine = engine

    def query(self, sql: str, parameters: dict[str, Parameter] | None = None, *, timeout_s: float = 30.0) -> Rows:
        return self._engine.query(sql, parameters, timeout_s=timeout_s)

    def close(self) -> None:
        """The engine goes on."""


@asynccontextmanager
async def _served(engine: ChdbEngine) -> AsyncIterator[str]:
    """The address of an API that nobody has asked yet. The secret of a key is its tenant's name."""
    keys = Keys(1)
    for name in (OPERATOR, *(f"tenant-{number}" for number in range(month.TENANTS))):
        tenant_id = "" if name == OPERATOR else name
        key = ApiKey(key_id=name, tenant_id=tenant_id, secret_hash=hash_secret(PEPPER, _secret(name)), scopes=[KEY_SCOPE_READ])
        keys.take(key.key_id.encode(), key.SerializeToString(), 0)
    keys.ready = True

    def open_reader() -> Reader:
        return _Shared(engine)  # type: ignore[return-value]  # mappings and dicts

    server = ApiServer(ApiSettings(KeySource("nowhere:1", PEPPER, 1), open_reader), keys)
    await server.start()
    try:
        yield f"http://127.0.0.1:{server.http_port}"
    finally:
        await server.stop()


def _secret(name: str) -> str:
    return name.replace(" ", "-")


class _Watcher:
    """Watches as a page does; knows what it was told last, and when."""

    def __init__(self, client: httpx.AsyncClient, name: str) -> None:
        self.name = name
        self.asked_s = time.perf_counter()
        self.first_s = 0.0
        self.requests = 0
        self.told = asyncio.Condition()
        self._task = asyncio.ensure_future(self._watch(client))

    async def _watch(self, client: httpx.AsyncClient) -> None:
        headers = {"authorization": f"Bearer {_secret(self.name)}"}
        async with client.stream("GET", "/v1/overview/watch", headers=headers) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    await self._take(json.loads(line.removeprefix("data: ")))

    async def _take(self, data: dict[str, Any]) -> None:
        async with self.told:
            self.first_s = self.first_s or time.perf_counter() - self.asked_s
            if "tenant" in data:
                self.requests = sum(int(row["requests"]) for row in data["tenant"]["period"])
            elif "installation" in data:
                self.requests = sum(int(row["requests"]) for row in data["installation"]["days"])
            self.told.notify_all()

    async def until(self, requests: int) -> None:
        """Until it was told so many; fails where the watch does."""
        async with asyncio.timeout(TIMEOUT_S), self.told:
            while self.requests < requests:
                assert not self._task.done(), f"the watch of {self.name} ended"
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.told.wait(), 5.0)

    async def close(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


async def _first_view_ms(client: httpx.AsyncClient, name: str) -> float:
    watcher = _Watcher(client, name)
    await watcher.until(1)
    await watcher.close()
    return watcher.first_s * 1_000


async def _measure(engine: ChdbEngine, ledger: _Ledger) -> list[Measurement]:
    async with _served(engine) as url, httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        cold_ms = await _first_view_ms(client, OPERATOR)
        again_ms = [await _first_view_ms(client, OPERATOR) for _ in range(FIRST_VIEWS)]
        asked = random.Random(2).sample([f"tenant-{number}" for number in range(month.TENANTS)], FIRST_VIEWS)
        tenants_ms = [await _first_view_ms(client, name) for name in (*WATCHED, *asked)]
        updates_ms = await _updates_ms(engine, ledger, client)
        pages_ms = await _pages_ms(url)
    return [
        Measurement("dashboard: operator's first view of a new process", cold_ms, "ms", target="< 500"),
        _p99("operator's first view", again_ms, "< 500"),
        _p99("tenant's first view, each the first of its tenant", tenants_ms, "< 500"),
        Measurement("dashboard: update, median", statistics.median(updates_ms), "ms"),
        _p99("update", updates_ms, "< 1000"),
        *(Measurement(f"dashboard: page in Chromium, {name}", ms, "ms", target="< 500") for name, ms in pages_ms.items()),
    ]


def _p99(name: str, times_ms: list[float], target: str) -> Measurement:
    return Measurement(
        f"dashboard: {name}, p99", statistics.quantiles(times_ms, n=100, method="inclusive")[98], "ms", target=target
    )


async def _updates_ms(engine: ChdbEngine, ledger: _Ledger, client: httpx.AsyncClient) -> list[float]:
    """Of each update, for each who watches: from when it can be read until it was told."""
    watchers = [_Watcher(client, name) for name in (OPERATOR, *WATCHED)]
    for watcher in watchers:
        await watcher.until(1)
    times_ms: list[float] = []
    for number in range(UPDATES):
        expected = [watcher.requests + (len(WATCHED) if watcher.name == OPERATOR else 1) for watcher in watchers]
        stated = {"tenants": list(WATCHED), "version": version_of(1, number + 1), "minute": NOW_S // 60 * 60}
        for sql in (_USAGE, _ACCOUNTS):
            await asyncio.to_thread(engine.execute, sql.format(**stated))
        await asyncio.to_thread(ledger.tick)
        readable_s = time.perf_counter()

        async def told_ms(watcher: _Watcher, requests: int, since_s: float = readable_s) -> float:
            await watcher.until(requests)
            return (time.perf_counter() - since_s) * 1_000

        times_ms += await asyncio.gather(*map(told_ms, watchers, expected))
        # Not in step with whoever looks.
        await asyncio.sleep(PAUSE_S * (0.5 + number / UPDATES))
    for watcher in watchers:
        await watcher.close()
    return times_ms


async def _pages_ms(url: str) -> dict[str, float]:
    """By whose it is: from the navigation until the figures stand in the page, the median of some. Nothing without Chromium."""
    path = shutil.which("chromium")
    if path is None:
        return {}
    medians: dict[str, float] = {}
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        for name in (OPERATOR, "tenant-1"):
            times_ms = []
            for _ in range(5):
                context = await browser.new_context()
                await context.add_init_script(f"sessionStorage.setItem('taximeter.key', '{_secret(name)}')")
                page = await context.new_page()
                await page.goto(f"{url}/dashboard/", wait_until="commit")
                await page.wait_for_selector(".view .tile data", timeout=TIMEOUT_S * 1_000)
                times_ms.append(await page.evaluate("performance.now()"))
                await context.close()
            medians[name] = statistics.median(times_ms)
        await browser.close()
    return medians
