"""A small installation in this process for the API: the ledger's own step, the sink's own rows in chDB, keys as on their topic.

What Kafka does between them is a function call here: a command is signed, stepped, fed and followed when it is sent.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from billing.commands import sign
from billing.v1.account_pb2 import KEY_SCOPE_ADMIN, KEY_SCOPE_METER, KEY_SCOPE_PRICES, KEY_SCOPE_READ, ApiKey
from billing.v1.command_pb2 import Command
from producers.commands import CommandSender, CommandSettings
from serving.api.calls import Calls
from serving.api.http_server import make_http_app
from serving.api.keys import Keys
from serving.api.service import HANDLERS, WATCHERS
from serving.api.settings import ApiLimits, ApiSettings, KeySource
from serving.commanding import Commander
from serving.gateway.credentials import hash_secret
from sinks.engine import Parameter, Reader, Rows
from sinks.engines.chdb import ChdbEngine
from sinks.errors import EngineUnavailable
from sinks.follow import feed
from tests.billing.ledgers import KEYS, PARTITIONS, Ledger

PEPPER = b"p" * 32
SCOPES = {"read": KEY_SCOPE_READ, "admin": KEY_SCOPE_ADMIN, "prices": KEY_SCOPE_PRICES, "meter": KEY_SCOPE_METER}


class LedgerSender(CommandSender):
    """Sends to a ledger in this process, and returns when everybody who follows it has what it says."""

    def __init__(self, world: World) -> None:
        super().__init__(CommandSettings("nowhere:1", PARTITIONS), KEYS.command_key)
        self._world = world

    def send(self, command: Command, timeout_s: float = 30.0) -> dict[int, int]:
        # A command's time is the wall clock's, and the ledger refuses one that is far from its own.
        result = self._world.ledger.raw_command(sign(command, KEYS.command_key), command.issued_ms)
        self._world.publish()
        return {result.record.partition: result.record.sequence}


class KeysOnly:
    """An API that knows keys and has no database: a query says that it is away."""

    scopes = SCOPES

    def __init__(self, limits: ApiLimits | None = None) -> None:
        self.keys = Keys(PARTITIONS)
        self.keys.ready = True
        self._on_query: list[Callable[[], None]] = []
        self._key_ids: dict[str, ApiKey] = {}
        settings = ApiSettings(
            keys=KeySource("nowhere:1", PEPPER, PARTITIONS),
            open_reader=self.open_reader,
            open_commander=self.commander,
            limits=limits or ApiLimits(tenant_calls_max=1),
        )
        self.calls = Calls(settings, self.keys, HANDLERS, WATCHERS)
        self.app = make_http_app(self.calls)

    def open_reader(self) -> Reader:
        return _Away(self._on_query)

    def commander(self, issuer: str) -> Commander:
        return Commander(CommandSettings("nowhere:1", PARTITIONS), KEYS.command_key, lambda: PEPPER, issuer)

    def key(self, tenant_id: str, *scopes: str, **fields: Any) -> str:
        """A key as the ledger would state it; the secret."""
        secret = f"tm-{tenant_id or 'operator'}-{'-'.join(scopes)}-{json.dumps(fields, sort_keys=True)}"
        if secret in self._key_ids:
            return secret
        key = ApiKey(
            key_id=f"key-{len(self._key_ids)}",
            tenant_id=tenant_id,
            secret_hash=hash_secret(PEPPER, secret),
            scopes=[SCOPES[name] for name in scopes],
            **fields,
        )
        self._key_ids[secret] = key
        self.keys.take(key.key_id.encode(), key.SerializeToString(), 0)
        return secret

    def revoke(self, secret: str) -> None:
        key = self._key_ids[secret]
        key.revoked = True
        self.keys.take(key.key_id.encode(), key.SerializeToString(), 0)

    def block(self, on_query: Callable[[], None]) -> Callable[[], None]:
        """Queries tell that they began, and wait until the function that this returns is called."""
        released = threading.Event()
        self._on_query += [on_query, lambda: _wait(released)]
        return released.set

    def client(self, secret: str | None) -> httpx.AsyncClient:
        """An HTTP client with that key."""
        headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://api", headers=headers)


def _wait(released: threading.Event) -> None:
    assert released.wait(60)


class _Away:
    """A reader whose database is away."""

    def __init__(self, on_query: list[Callable[[], None]]) -> None:
        self._on_query = on_query

    def query(self, sql: str, parameters: Mapping[str, Parameter] | None = None, *, timeout_s: float = 30.0) -> Rows:
        for act in self._on_query:
            act()
        raise EngineUnavailable("there is no database")

    def close(self) -> None:
        """Nothing is open."""


class World(KeysOnly):
    """A ledger partition, its rows, and an API on top."""

    def __init__(self, engine: ChdbEngine, ledger: Ledger, limits: ApiLimits | None = None) -> None:
        self.engine = engine
        self.ledger = ledger
        self._published = 0
        super().__init__(limits or ApiLimits())
        self.calls.alerts.is_fed = True
        self.publish()

    def open_reader(self) -> Reader:
        return _Shared(self.engine)

    def commander(self, issuer: str) -> Commander:
        commander = super().commander(issuer)
        commander._sender = LedgerSender(self)
        # What concerns every partition concerns the only one that there is.
        commander._partitions = 1
        return commander

    def publish(self) -> None:
        """Everybody who follows the ledger has what it said since the last time."""
        feed(self.engine, self.ledger.stored[max(0, self._published - 1) :], KEYS.seal_key)
        for record in self.ledger.records()[self._published :]:
            for key in record.keys:
                self.keys.take(key.key_id.encode(), key.SerializeToString(), record.partition)
            for alert in record.alerts:
                self.calls.alerts.take(b"", alert.SerializeToString(), record.partition)
        self._published = len(self.ledger.stored)


class _Shared:
    """A reader of a database that others use after it."""

    def __init__(self, engine: ChdbEngine) -> None:
        self._engine = engine
        self.query = engine.query

    def close(self) -> None:
        """The engine goes on."""


async def get(client: httpx.AsyncClient, path: str, **query: Any) -> Any:
    """What a route answers, which must be well."""
    answer = await client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()
