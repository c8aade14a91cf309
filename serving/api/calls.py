"""Runs a call: who calls, whether it fits, within its time, on a thread, and how what goes wrong is told.

Promise: no more calls run at the same time than the limits say, in all and of one tenant; who comes too much is told to come
again and waits for nothing. A call's deadline bounds every query that it makes. What nobody expected is logged with its
traceback and told as an internal error, without a word of it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import Message

from billing.v1.billing_service_pb2 import GetOverviewRequest
from producers.errors import ProducerError
from serving.api.access import POLICIES, Policy, Principal, authenticate, check_complete
from serving.api.alert_feed import AlertFeed
from serving.api.errors import ApiError
from serving.api.fields import check
from serving.api.paging import PageTokens
from serving.api.sharing import Shared
from serving.api.traffic import Traffic
from serving.commanding import CommandPending, CommandRefused
from serving.gateway.credentials import SecretHasher
from sinks.errors import EngineUnavailable, ParameterError, SinkError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serving.api.keys import Keys
    from serving.api.settings import ApiSettings
    from serving.commanding import Commander
    from sinks.engine import Reader, Rows
    from sinks.parameters import Parameter

__all__ = ["Call", "Calls", "Handler", "Watcher"]

_LOG = logging.getLogger(__name__)

# Until a database that is not there yet is asked again.
_RETRY_S = 0.25


class _TimedReader:
    """Asks `reader`, and lets no query run beyond the call's end."""

    def __init__(self, reader: Reader, deadline_s: float) -> None:
        self._reader = reader
        self._deadline_s = deadline_s

    def query(self, sql: str, parameters: Mapping[str, Parameter] | None = None, *, timeout_s: float = 30.0) -> Rows:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise ApiError(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's time is over: ask for less, or give it more time")
        return self._reader.query(sql, parameters, timeout_s=min(timeout_s, left_s))

    def close(self) -> None:
        """The thread's reader stays open for its next call."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler may use."""

    principal: Principal
    reader: Reader
    tokens: PageTokens
    keys: Keys
    alerts: AlertFeed
    partitions: int
    now_ms: int
    # On the monotonic clock.
    deadline_s: float
    open_commander: Callable[[str], Commander] | None
    # Of all calls: nothing goes in under a key that does not name whose it is.
    shared: Shared

    @property
    def left_s(self) -> float:
        return max(0.0, self.deadline_s - time.monotonic())


Handler = Callable[[Call, Any], Message]
# Takes the call of a look and where the last one stopped; gives what is new, and where it stopped.
Watcher = Callable[[Call, Any, Any], tuple[Sequence[Message], Any]]


class Calls:
    """Everything that gRPC and HTTP share."""

    def __init__(
        self, settings: ApiSettings, keys: Keys, handlers: Mapping[str, Handler], watchers: Mapping[str, Watcher]
    ) -> None:
        check_complete({*handlers, *watchers})
        self.settings = settings
        self.keys = keys
        self.alerts = AlertFeed()
        self.traffic = Traffic()
        self._handlers, self._watchers = handlers, watchers
        self._tokens = PageTokens(settings.keys.pepper)
        self._hash_secret = SecretHasher(settings.keys.pepper)
        self._shared = Shared()
        self.is_warming = False
        self._closing = threading.Event()
        self._local = threading.local()
        self._readers: list[Reader] = []
        limits = settings.limits
        # What waits for the ledger holds up nobody who reads.
        self._reading = ThreadPoolExecutor(limits.threads, "api-read")
        self._writing = ThreadPoolExecutor(limits.threads, "api-write")
        self._running: Counter[str] = Counter()
        self._watching: Counter[str] = Counter()

    @property
    def waiting_for(self) -> str:
        """What it waits for before it is ready; empty: it is."""
        if not self.keys.ready:
            return "keys are still being read"
        return "the first overview is still being made" if self.is_warming else ""

    @property
    def running(self) -> int:
        """Calls that run now. May be asked from any thread."""
        return self._running.total()

    @property
    def watching(self) -> int:
        """Watches that are open now. May be asked from any thread."""
        return self._watching.total()

    def close(self) -> None:
        """No call runs any more."""
        self._closing.set()
        for pool in (self._reading, self._writing):
            pool.shutdown(wait=True, cancel_futures=True)
        for reader in self._readers:
            reader.close()

    def authenticate(self, name: str, secret: str | None) -> Principal:
        """Who calls RPC `name`. Raises ApiError."""
        if not self.keys.ready:
            raise ApiError(grpc.StatusCode.UNAVAILABLE, "keys are still being read: try again in a moment")
        secret_hash = None if secret is None else self._hash_secret(secret)
        return authenticate(self.keys.directory, secret_hash, POLICIES[name], _now_ms())

    async def call(self, name: str, request: Message, secret: str | None, timeout_s: float | None = None) -> Message:
        """The answer of a unary RPC. Raises ApiError."""
        principal = self.authenticate(name, secret)
        check(request)
        deadline_s = time.monotonic() + self._timeout_s(POLICIES[name], timeout_s)
        limits = self.settings.limits
        with _counted(self._running, principal, limits.calls_max, limits.tenant_calls_max, "calls"):
            answer: Message = await self._run(name, lambda call: self._handlers[name](call, request), principal, deadline_s)
            return answer

    async def watch(self, name: str, request: Message, secret: str | None) -> AsyncGenerator[Message, None]:
        """The answers of a streaming RPC as they come, until the key opens it no more. Raises ApiError."""
        principal = self.authenticate(name, secret)
        check(request)
        limits, place, watcher = self.settings.limits, None, self._watchers[name]
        with _counted(self._watching, principal, limits.watches_max, limits.tenant_watches_max, "watches"):
            while True:
                look = _Look(watcher, request, place)
                deadline_s = time.monotonic() + limits.call_timeout_s
                answers, place = await self._run(name, look, principal, deadline_s)
                for answer in answers:
                    yield answer
                await asyncio.sleep(limits.watch_interval_s)
                principal = self.authenticate(name, secret)

    async def warm_up(self, timeout_s: float) -> None:
        """Ask once what an operator's page asks first: what a process and its database do once is done when a page comes. A
        database that is not there yet is asked again in that time. What fails is logged, and will fail whoever asks for it."""
        self.is_warming = True
        principal, began_s = Principal("", ""), time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                await self._run("GetOverview", self._first_overview, principal, began_s + timeout_s)
            _LOG.info("the overview is there after %.1f s", time.monotonic() - began_s)
        except (ApiError, TimeoutError) as error:
            _LOG.warning("no overview yet, the first page will wait for it: %s", str(error) or "no answer in time")
        finally:
            self.is_warming = False

    def _first_overview(self, call: Call) -> Message:
        while True:
            try:
                return self._handlers["GetOverview"](call, GetOverviewRequest())
            except EngineUnavailable:
                if call.left_s < _RETRY_S or self._closing.wait(_RETRY_S):
                    raise

    def _timeout_s(self, policy: Policy, asked_s: float | None) -> float:
        limits = self.settings.limits
        most_s = limits.command_timeout_s if policy.writes else limits.call_timeout_s
        return most_s if asked_s is None else min(asked_s, most_s)

    async def _run(self, name: str, work: Callable[[Call], Any], principal: Principal, deadline_s: float) -> Any:
        pool = self._writing if POLICIES[name].writes else self._reading

        def run() -> Any:
            with _told(name, deadline_s):
                call = Call(
                    principal,
                    _TimedReader(self._reader(), deadline_s),
                    self._tokens,
                    self.keys,
                    self.alerts,
                    self.settings.keys.partitions,
                    _now_ms(),
                    deadline_s,
                    self.settings.open_commander,
                    self._shared,
                )
                return work(call)

        return await asyncio.get_running_loop().run_in_executor(pool, run)

    def _reader(self) -> Reader:
        reader: Reader | None = getattr(self._local, "reader", None)
        if reader is None:
            reader = self._local.reader = self.settings.open_reader()
            self._readers.append(reader)
        return reader


@dataclass(frozen=True, slots=True)
class _Look:
    watcher: Watcher
    request: Message
    place: Any

    def __call__(self, call: Call) -> tuple[Sequence[Message], Any]:
        return self.watcher(call, self.request, self.place)


@contextmanager
def _counted(running: Counter[str], principal: Principal, most: int, most_of_tenant: int, what: str) -> Iterator[None]:
    """A place among those that run. Raises ApiError where there is none; nobody waits."""
    tenant_id = principal.tenant_id
    if running.total() >= most:
        raise ApiError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{most} {what} run already: try again in a moment")
    if tenant_id and running[tenant_id] >= most_of_tenant:
        raise ApiError(
            grpc.StatusCode.RESOURCE_EXHAUSTED, f"{most_of_tenant} {what} of this tenant run already: wait for one of them"
        )
    running[tenant_id] += 1
    try:
        yield
    finally:
        running[tenant_id] -= 1
        if not running[tenant_id]:
            del running[tenant_id]


@contextmanager
def _told(name: str, deadline_s: float) -> Iterator[None]:
    """Whatever goes wrong, as an ApiError."""
    try:
        yield
    except ApiError:
        raise
    except ParameterError as error:
        raise ApiError.unacceptable(str(error)) from error
    except CommandRefused as error:
        raise ApiError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from error
    except (EngineUnavailable, CommandPending, ProducerError) as error:
        if time.monotonic() >= deadline_s and isinstance(error, EngineUnavailable):
            raise ApiError(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's time is over: ask for less") from error
        _LOG.warning("%s: %s", name, error)
        raise ApiError(grpc.StatusCode.UNAVAILABLE, _unavailable(error)) from error
    except SinkError as error:
        _LOG.exception("%s", name)
        raise ApiError(grpc.StatusCode.INTERNAL, "the answer could not be made; the API's log says why") from error
    except Exception as error:
        _LOG.exception("%s", name)
        raise ApiError(grpc.StatusCode.INTERNAL, "the call failed; the API's log says why") from error


def _unavailable(error: Exception) -> str:
    if isinstance(error, CommandPending):
        return "the ledger has not answered in time: send the same again under the same idempotency key"
    what = "the database" if isinstance(error, EngineUnavailable) else "the ledger"
    return f"{what} does not answer: try again in a moment"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
