"""A ClickHouse server over the native protocol: clickhouse-driver, columns as they are, LZ4, TLS where it is set.

Promise: every call ends within its time. What the network broke is tried again on a new connection, `attempts` times in all,
for everything that is sent through here may happen twice (reads, inserts by key and version, DDL that says IF NOT EXISTS); then
EngineUnavailable. What the server refused is not tried again. Inserted rows are durable when the server says so: the tables
ask it to sync them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Context, Decimal
from typing import Any, TypeVar

from clickhouse_driver import Client
from clickhouse_driver.errors import Error, NetworkError, ServerException, SocketTimeoutError

from sinks.engine import PICO_LIMIT, Columns, Kind, Parameter, Rows, Table, row_count
from sinks.errors import DISK_FULL, EngineError, EngineUnavailable
from sinks.parameters import bind

__all__ = ["ServerEngine", "ServerSettings"]

_ROWS_MAX = 1_000_000
_EXACT = Context(prec=60)
# TIMEOUT_EXCEEDED, TOO_MANY_SIMULTANEOUS_QUERIES, NO_FREE_CONNECTION, SOCKET_TIMEOUT, NETWORK_ERROR, MEMORY_LIMIT_EXCEEDED,
# TABLE_IS_READ_ONLY, NOT_ENOUGH_SPACE, TOO_MANY_PARTS, TOO_FEW_LIVE_REPLICAS, UNKNOWN_STATUS_OF_INSERT, QUERY_WAS_CANCELLED,
# KEEPER_EXCEPTION.
_PASSING = frozenset({159, 202, 203, 209, 210, 241, 242, 243, 252, 285, 319, 394, 999})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where the server is and how to speak to it."""

    host: str
    port: int = 9000
    database: str = "taximeter"
    user: str = "default"
    password: str = field(default="", repr=False)
    secure: bool = False
    # Files in PEM: whom to trust (empty: what the system trusts), and who we are.
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = field(default="", repr=False)
    compression: str = "lz4"
    connect_timeout_s: float = 5.0
    insert_timeout_s: float = 60.0
    attempts: int = 3

    def __post_init__(self) -> None:
        if self.compression not in ("", "lz4", "zstd"):
            raise EngineError(f"compression: {self.compression!r}; write lz4, zstd, or nothing")
        if self.attempts < 1:
            raise EngineError(f"attempts: {self.attempts}; at least one is needed")


class ServerEngine:
    """The engine behind `settings`. Calls from several threads wait for one another; open one engine for each that must not."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._closed = False

    def execute(self, sql: str) -> None:
        self._attempt(lambda client: client.execute(sql), self.settings.insert_timeout_s)

    def insert(self, table: Table, columns: Columns) -> int:
        rows = row_count(table, columns)
        if rows == 0:
            return 0
        names = list(table.columns)
        quoted = ", ".join(f"`{name}`" for name in names)

        def send(client: Client) -> None:
            # Made for every attempt: the driver writes into the lists that it is given.
            data = [_native(table.columns[name], columns[name]) for name in names]
            client.execute(f"INSERT INTO {table.name} ({quoted}) VALUES", data, columnar=True)

        self._attempt(send, self.settings.insert_timeout_s)
        return rows

    def query(self, sql: str, parameters: Mapping[str, Parameter] | None = None, *, timeout_s: float = 30.0) -> Rows:
        bound = bind(sql, parameters)
        bounds = {
            "readonly": 2,
            "max_execution_time": math.ceil(timeout_s),
            "max_result_rows": _ROWS_MAX,
            "result_overflow_mode": "throw",
        }
        rows, columns = self._attempt(lambda client: client.execute(bound, settings=bounds, with_column_types=True), timeout_s)
        return Rows(tuple(name for name, _ in columns), [tuple(row) for row in rows])

    def create_database(self) -> None:
        """Make the database of the settings, where there is none."""
        name = self.settings.database
        if not name.isidentifier() or not name.isascii():
            raise EngineError(f"database: {name!r} is not a plain name; use letters, digits and _")
        client = self._connect("default")
        try:
            _translated(lambda: client.execute(f"CREATE DATABASE IF NOT EXISTS {name}"), self._where)
        finally:
            client.disconnect()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._disconnect()

    @property
    def _where(self) -> str:
        return f"{self.settings.host}:{self.settings.port}"

    def _attempt(self, call: Callable[[Client], T], timeout_s: float) -> T:
        with self._lock:
            if self._closed:
                raise EngineError("this ClickHouse engine is closed")
            for attempt in range(1, self.settings.attempts + 1):
                if self._client is None:
                    self._client = self._connect(self.settings.database)
                client = self._client
                client.connection.send_receive_timeout = timeout_s
                if client.connection.socket is not None:
                    client.connection.socket.settimeout(timeout_s)
                try:
                    return _translated(lambda client=client: call(client), self._where)  # type: ignore[misc]
                except EngineUnavailable as error:
                    self._disconnect()
                    if isinstance(error.__cause__, ServerException) or attempt == self.settings.attempts:
                        raise
                except BaseException:
                    # Half-way through an answer the connection is of no more use.
                    self._disconnect()
                    raise
        raise AssertionError("attempts are at least one")

    def _connect(self, database: str) -> Client:
        settings = self.settings
        options: dict[str, Any] = {}
        if settings.secure:
            options = {
                "secure": True,
                "verify": True,
                "server_hostname": settings.host,
                "ca_certs": settings.ca_file or None,
                "certfile": settings.certificate_file or None,
                "keyfile": settings.key_file or None,
            }
        return Client(
            host=settings.host,
            port=settings.port,
            database=database,
            user=settings.user,
            password=settings.password,
            client_name="taximeter",
            compression=settings.compression or False,
            connect_timeout=settings.connect_timeout_s,
            send_receive_timeout=settings.insert_timeout_s,
            sync_request_timeout=settings.connect_timeout_s,
            tcp_keepalive=True,
            **{name: value for name, value in options.items() if value is not None},
        )

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.disconnect()
            self._client = None


def _translated(call: Callable[[], T], where: str) -> T:
    """`call()`, with the driver's errors as ours."""
    try:
        return call()
    except ServerException as error:
        kind = EngineUnavailable if error.code in _PASSING or DISK_FULL in error.message else EngineError
        raise kind(f"ClickHouse at {where}, code {error.code}: {error.message}") from error
    except (NetworkError, SocketTimeoutError, EOFError, OSError) as error:
        raise EngineUnavailable(f"ClickHouse at {where} does not answer: {error or type(error).__name__}") from error
    except Error as error:
        raise EngineError(f"ClickHouse at {where}: {error}") from error


def _native(kind: Kind, values: Any) -> list[Any]:
    """What the driver takes for a column: lists of its own, amounts as Decimal."""
    if kind is Kind.PICO:
        if max(values) >= PICO_LIMIT or min(values) <= -PICO_LIMIT:
            raise EngineError(f"an amount of {max(values, key=abs)} pico does not fit in Decimal(38, 12)")
        return [Decimal(value).scaleb(-12, _EXACT) for value in values]
    return list(values)
