"""The dashboard's first view and its updates with 20 million events of 1,000 tenants, while usage goes on.

chDB holds the minute totals and accounts of a month, as `benchmarks.month_to_date` makes them, all minutes merged into one
part: only their order can leave any of them unread. The API serves them over HTTP in this process, and clients watch as pages
do: one an operator's, the others of large and small tenants. A first view is from the question to the event with all of its
figures. Then usage comes to the tables, as a sink writes it, and an update is from the moment at which it can be read until
the event with it has come, for whoever it concerns. Where there is a Chromium, it loads the page, signed in, and is asked
when the first figures had been painted; what it takes for a page of nothing is the baseline. What the database reads is
counted, too: that does not depend on what else the machine does.

TAXIMETER_BENCH_DATABASE names a folder for the database, which is made there if it is not there yet, and kept.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import httpx
from playwright.async_api import Page, async_playwright

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
from sinks.columns import SEQUENCE_BITS, version_of
from sinks.engine import Reader, Rows
from sinks.engines.chdb import ChdbEngine
from sinks.engines.json_rows import decode_rows
from sinks.follow import feed
from sinks.migrate import migrate
from sinks.parameters import Parameter, bind

PEPPER: Final = b"p" * 32
OPERATOR: Final = "the operator"
WATCHED: Final = ("tenant-0", "tenant-1", "tenant-2", "tenant-500", "tenant-999")
FIRST_VIEWS: Final = 40
PAGES: Final = 9
FLOOR: Final = "nothing but a line of text"
UPDATES: Final = 30
# As often as a sink writes while usage comes.
PAUSE_S: Final = 0.7
TIMEOUT_S: Final = 120.0
NOW_S: Final = month.MONTH_START_S + month.DAYS * 86_400 - 1
# A window of each tenant that is watched, its account, and, last, how far the database is.
_USAGE = """
INSERT INTO usage_totals (tenant_id, minute, project_id, model, operation, service_class, generation, opened_sequence,
    price_version, events, uncached_input_tokens, output_tokens, cost, currency, sequence, version)
SELECT arrayJoin({tenants}), toDateTime({minute}, 'UTC'), 'project-0', 'model-0', 'chat', 'standard', '{run}', {version},
    1, 1, 100, 10, toDecimal128('0.0001', 12), 'USD', {version}, {version}
"""
_STATED = """
INSERT INTO usage_days_stated SELECT arrayJoin({tenants}), toStartOfDay(toDateTime({minute}, 'UTC')), 0, {version}
"""
_ACCOUNTS = """
INSERT INTO accounts (tenant_id, status, currency, credit, spend, events, version)
SELECT tenant_id, status, currency, credit, spend + toDecimal128('0.0001', 12), events + 1, {version} FROM accounts FINAL
WHERE tenant_id IN {tenants}
"""
SEAL: Final = b"s" * 32
_ROWS_READ: Final = re.compile(rb'"rows_read": (\d+)')


class _Ledger:
    """One partition, whose records say nothing but that time goes on, by the sink's own way; usage comes beside it."""

    def __init__(self, engine: ChdbEngine) -> None:
        self._engine = engine
        # Of another run, where the folder was kept.
        for table in ("ledger_records", "sink_positions", "producer_marks"):
            engine.execute(f"TRUNCATE TABLE {table}")
        # Behind that of every run before: what a run states is not what another one stated.
        [[version]] = engine.query("SELECT max(version) FROM accounts").rows
        assert isinstance(version, int)
        self._ordinal = (version >> SEQUENCE_BITS) + 1
        settings = LedgerSettings(partitions=1, dedupe_key=b"k" * 32)
        record, self._last = found(settings, 0, b"g" * 16, NOW_S * 1_000, SEAL, "bench")
        self._state = LedgerState(MemorySeenKeys())
        replay.apply(self._state, record, self._last)
        feed(engine, [self._last], SEAL)
        self._sequence = 0

    def state(self) -> None:
        """Usage of each tenant that is watched, as a sink writes it; readable when this returns."""
        self._sequence += 1
        version = version_of(self._ordinal, self._sequence)
        stated = {"tenants": list(WATCHED), "version": version, "minute": NOW_S // 60 * 60, "run": f"run {self._ordinal}"}
        for sql in (_STATED, _USAGE, _ACCOUNTS):
            self._engine.execute(sql.format(**stated))
        keys = LedgerKeys(seal_key=SEAL, command_key=b"c" * 32)
        result = step(self._state, TickInput(), NOW_S * 1_000 + self._sequence, keys=keys, writer="bench")
        feed(self._engine, [self._last, result.stored], SEAL)
        self._last = result.stored


def run() -> list[Measurement]:
    """Measure."""
    with tempfile.TemporaryDirectory(prefix="dashboard-") as folder:
        kept = os.environ.get("TAXIMETER_BENCH_DATABASE")
        engine = ChdbEngine(Path(kept or folder), "bench")
        try:
            migrate(engine)
            make(engine)
            return asyncio.run(_measure(engine, _Ledger(engine)))
        finally:
            engine.close()


def make(engine: ChdbEngine) -> None:
    """Fill the database, if it is not."""
    # Late usage is made last: what has none was not made to its end.
    [[late]] = engine.query(f"SELECT count() FROM usage_days_stated WHERE version = {month.DAYS + 1}").rows
    if not late:
        month.build(engine)
        for table in ("usage_totals", "usage_by_minute"):
            engine.execute(f"OPTIMIZE TABLE {table} FINAL")


class _Counting:
    """A reader of the engine that this process owns; knows how many rows were read for its answers."""

    def __init__(self, engine: ChdbEngine) -> None:
        self._engine = engine
        self._guard = threading.Lock()
        self.rows_read = 0

    def query(self, sql: str, parameters: Mapping[str, Parameter] | None = None, *, timeout_s: float = 30.0) -> Rows:
        answer = self._engine.query_json(bind(sql, parameters), timeout_s=timeout_s)
        [rows_read] = _ROWS_READ.findall(answer[answer.rindex(b'"statistics"') :])
        with self._guard:
            self.rows_read += int(rows_read)
        return decode_rows(answer)

    def close(self) -> None:
        """The engine goes on."""


@asynccontextmanager
async def _served(reader: Reader) -> AsyncIterator[str]:
    """The address of an API that nobody has asked yet. The secret of a key is its tenant's name."""
    keys = Keys(1)
    for name in (OPERATOR, *(f"tenant-{number}" for number in range(month.TENANTS))):
        tenant_id = "" if name == OPERATOR else name
        key = ApiKey(key_id=name, tenant_id=tenant_id, secret_hash=hash_secret(PEPPER, _secret(name)), scopes=[KEY_SCOPE_READ])
        keys.take(key.key_id.encode(), key.SerializeToString(), 0)
    keys.ready = True

    server = ApiServer(ApiSettings(KeySource("nowhere:1", PEPPER, 1), lambda: reader), keys)
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
    reader = _Counting(engine)
    began_s = time.perf_counter()
    async with _served(reader) as url, httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        start_ms = (time.perf_counter() - began_s) * 1_000
        start_rows, reader.rows_read = reader.rows_read, 0
        cold_ms = await _first_view_ms(client, OPERATOR)
        again_ms = [await _first_view_ms(client, OPERATOR) for _ in range(FIRST_VIEWS)]
        asked = random.Random(2).sample([f"tenant-{number}" for number in range(month.TENANTS)], FIRST_VIEWS)
        tenants_ms = [await _first_view_ms(client, name) for name in (*WATCHED, *asked)]
        update_rows = await _update_rows(ledger, reader, client)
        updates_ms = await _updates_ms(ledger, client)
        pages_ms = await _pages_ms(url)
    return [
        Measurement("dashboard: the API's start, with its first overview", start_ms, "ms"),
        Measurement("dashboard: read for it", start_rows, "rows"),
        Measurement("dashboard: operator's first view of a new process", cold_ms, "ms", target="< 500"),
        _p99("operator's first view", again_ms, "< 500"),
        _p99("tenant's first view, each the first of its tenant", tenants_ms, "< 500"),
        Measurement("dashboard: read for an update of the operator's", update_rows, "rows"),
        Measurement("dashboard: update, median", statistics.median(updates_ms), "ms"),
        _p99("update", updates_ms, "< 1000"),
        *_of_pages(pages_ms),
    ]


def _of_pages(pages_ms: Mapping[str, float]) -> list[Measurement]:
    """What the browser takes for a page of nothing is the baseline."""
    found = []
    for name, ms in pages_ms.items():
        floor_ms = pages_ms[f"{FLOOR}, {name.rpartition(', ')[2]}"]
        against = ("", None, "") if name.startswith(FLOOR) else (f"{FLOOR}: {floor_ms:.0f} ms", ms / floor_ms, "< 500")
        found.append(Measurement(f"dashboard: page in Chromium, {name}", ms, "ms", *against))
    return found


def _p99(name: str, times_ms: list[float], target: str) -> Measurement:
    return Measurement(
        f"dashboard: {name}, p99", statistics.quantiles(times_ms, n=100, method="inclusive")[98], "ms", target=target
    )


async def _update_rows(ledger: _Ledger, reader: _Counting, client: httpx.AsyncClient) -> int:
    """How many rows are read for one operator from one update to the next, with what looks for news; the least of some."""
    watcher = _Watcher(client, OPERATOR)
    await watcher.until(1)
    rows: list[int] = []
    for _ in range(5):
        expected = watcher.requests + len(WATCHED)
        before = reader.rows_read
        await asyncio.to_thread(ledger.state)
        await watcher.until(expected)
        rows.append(reader.rows_read - before)
    await watcher.close()
    return min(rows)


async def _updates_ms(ledger: _Ledger, client: httpx.AsyncClient) -> list[float]:
    """Of each update, for each who watches: from when it can be read until it was told."""
    watchers = [_Watcher(client, name) for name in (OPERATOR, *WATCHED)]
    for watcher in watchers:
        await watcher.until(1)
    times_ms: list[float] = []
    for number in range(UPDATES):
        expected = [watcher.requests + (len(WATCHED) if watcher.name == OPERATOR else 1) for watcher in watchers]
        await asyncio.to_thread(ledger.state)
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


# When the first figures had been painted: the frame that has them is over when the message comes.
_PAINTED = """() => {
  const tell = () => requestAnimationFrame(() => {
    const frame = new MessageChannel();
    frame.port1.onmessage = () => { window.paintedMs = performance.now(); };
    frame.port2.postMessage(null);
  });
  const look = () => document.querySelector('.view .tile data') && (tell(), true);
  const watching = new MutationObserver(() => look() && watching.disconnect());
  look() || watching.observe(document, { childList: true, subtree: true });
}"""
_READ = "() => window.paintedMs"
_READ_ANYTHING = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


async def _read(page: Page, expression: str) -> float:
    """What it comes to, once it does. Asked from here, as nothing may wait in a page whose policy lets no script run."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while (found := await page.evaluate(expression)) is None:
        assert time.monotonic() < deadline_s, f"{page.url}: nothing was painted in {TIMEOUT_S:.0f} s"
        await asyncio.sleep(0.05)
    return float(found)


async def _pages_ms(url: str) -> dict[str, float]:
    """By what is opened: from the navigation until the first figures were painted, the median of some. A first visit, and one
    by a browser that has been there; and, beside them, what the browser takes for an answer of a few letters from the same
    server. Nothing without Chromium."""
    path = shutil.which("chromium")
    if path is None:
        return {}
    medians: dict[str, float] = {}
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        for name, place in ((FLOOR, "/healthz"), (OPERATOR, "/dashboard/"), ("tenant-1", "/dashboard/")):
            first_ms: list[float] = []
            again_ms: list[float] = []
            for _ in range(PAGES):
                context = await browser.new_context()
                await context.add_init_script(f"sessionStorage.setItem('taximeter.key', '{_secret(name)}'); ({_PAINTED})()")
                for times_ms in (first_ms, again_ms):
                    page = await context.new_page()
                    await page.goto(url + place, wait_until="commit")
                    times_ms.append(await _read(page, _READ_ANYTHING if name == FLOOR else _READ))
                    await page.close()
                await context.close()
            medians[f"{name}, first visit"], medians[f"{name}, again"] = map(statistics.median, (first_ms, again_ms))
        await browser.close()
    return medians
