"""A real ClickHouse server as a plain process with its own folder and ports on loopback.

Promise: `ClickHouseServer(folder)` runs the machine's `clickhouse-server` (or `clickhouse server`) without touching
/etc or /var. `kill9` and `start` again keep its folder and its port, so a client meets the same server after a crash.

Debian's package is ClickHouse 18.16, of December 2018. It speaks the native protocol of today's clients, which is
what the tests of the server path are for. All SQL of the product runs on chDB, which is as new as the servers that
people run.

What 18.16 lacks, found by trying each: DateTime64, Date32, Int128 and wider, Bool, Map, JSON, IPv6,
SimpleAggregateFunction, LowCardinality unless allowed (the profile here allows it); codecs, TTL, skip indexes,
constraints, table comments; a second argument or a tuple as ReplacingMergeTree's version;
`non_replicated_deduplication_window`, `fsync_after_insert`, `async_insert`, `final` as a setting; CREATE OR REPLACE,
DROP VIEW, ADD COLUMN IF NOT EXISTS, DELETE FROM, EXCHANGE; CTEs (a scalar WITH works), window functions, `::`,
`{name:Type}` parameters, UNION DISTINCT, ILIKE, EXISTS; toStartOfInterval, fromUnixTimestamp64*, toUInt128,
JSONExtract*. What it has: Decimal(38, S), UUID, Nullable, arrays, FixedString, DateTime('UTC'), ReplacingMergeTree,
FINAL, argMax, LIMIT BY, joins, views, ALTER ... DELETE, PREWHERE, PARTITION BY, and LZ4 and ZSTD on the wire.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from xml.sax.saxutils import escape

from clickhouse_driver import Client
from clickhouse_driver.errors import Error as ClickHouseError

from taximeter.embedded.process import Child, accepts_connections
from tests.services.certificates import Issued
from tests.services.ports import free_port

__all__ = ["MISSING_MESSAGE", "ClickHouseServer", "server_command"]

_HOST = "127.0.0.1"
_START_TIMEOUT_S = 180.0
_STOP_GRACE_S = 10.0

MISSING_MESSAGE = "there is no clickhouse-server on this machine; on Debian: apt-get install clickhouse-server"

_CONFIG = """<?xml version="1.0"?>
<yandex>
    <logger><level>warning</level><console>1</console></logger>
    <listen_host>{host}</listen_host>
    <tcp_port>{tcp_port}</tcp_port>
    <http_port>{http_port}</http_port>
    <max_connections>64</max_connections>
    <max_concurrent_queries>32</max_concurrent_queries>
    <mark_cache_size>67108864</mark_cache_size>
    <path>{folder}/data/</path>
    <tmp_path>{folder}/tmp/</tmp_path>
    <user_files_path>{folder}/user_files/</user_files_path>
    <format_schema_path>{folder}/format_schemas/</format_schema_path>
    <users_config>{folder}/users.xml</users_config>
    <default_profile>default</default_profile>
    <default_database>default</default_database>
    <timezone>UTC</timezone>
    <mlock_executable>false</mlock_executable>
</yandex>
"""

# What is shown to clients, who are asked for none.
_TLS = """    <tcp_port_secure>{port}</tcp_port_secure>
    <openSSL><server>
        <certificateFile>{certificate}</certificateFile>
        <privateKeyFile>{key}</privateKeyFile>
        <verificationMode>none</verificationMode>
        <cacheSessions>true</cacheSessions>
        <disableProtocols>sslv2,sslv3</disableProtocols>
    </server></openSSL>
</yandex>
"""

_USERS = """<?xml version="1.0"?>
<yandex>
    <profiles>
        <default>
            <max_memory_usage>1000000000</max_memory_usage>
            <allow_experimental_low_cardinality_type>1</allow_experimental_low_cardinality_type>
        </default>
    </profiles>
    <users>
        <default>
            <password></password>
            <networks><ip>127.0.0.1</ip></networks>
            <profile>default</profile>
            <quota>default</quota>
        </default>
        <taximeter>
            <password>{password}</password>
            <networks><ip>127.0.0.1</ip></networks>
            <profile>default</profile>
            <quota>default</quota>
        </taximeter>
    </users>
    <quotas><default/></quotas>
</yandex>
"""


def server_command() -> list[str] | None:
    """How this machine runs a ClickHouse server, or None. Some packages have one program for everything."""
    for command in (["clickhouse-server"], ["clickhouse", "server"]):
        # A daemon's folder is not on every user's path.
        found = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
        if found is not None:
            return [found, *command[1:]]
    return None


class ClickHouseServer:
    """One server. User "taximeter" has the password `password`, user "default" has none; both come from loopback. With a
    certificate it speaks TLS too, on `secure_port`.
    """

    user = "taximeter"

    def __init__(self, folder: Path, *, password: str = "p&ss<word>", shows: Issued | None = None) -> None:
        command = server_command()
        if command is None:
            raise RuntimeError(MISSING_MESSAGE)
        self.host = _HOST
        self.port = free_port()
        self.password = password
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.xml"
        text = _CONFIG.format(host=_HOST, tcp_port=self.port, http_port=free_port(), folder=escape(str(folder)))
        self.secure_port = 0
        if shows is not None:
            self.secure_port = free_port()
            own = {"certificate": escape(str(shows.certificate)), "key": escape(str(shows.key))}
            text = text.replace("</yandex>\n", _TLS.format(port=self.secure_port, **own))
        config.write_text(text)
        (folder / "users.xml").write_text(_USERS.format(password=escape(password)))
        self.process = Child(
            "clickhouse-server",
            [*command, f"--config-file={config}"],
            log_path=folder / "server.log",
            cwd=folder,
        )

    def start(self) -> None:
        """Start, and return when it answers a query."""
        self.process.start()
        self.process.wait_until(self._answers, _START_TIMEOUT_S)

    def stop(self) -> None:
        self.process.stop(_STOP_GRACE_S)

    def kill9(self) -> None:
        self.process.kill9()

    def client(self, **settings: object) -> Client:
        """A native client as user "taximeter", compressed with LZ4 unless told otherwise. The caller disconnects it."""
        defaults = {
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "password": self.password,
            "compression": "lz4",
            "connect_timeout": 30,
            "send_receive_timeout": 120,
        }
        return Client(**{**defaults, **settings})

    def _answers(self) -> bool:
        if not accepts_connections(self.host, self.port):
            return False
        client = self.client()
        try:
            return bool(client.execute("SELECT 1") == [(1,)])
        except (ClickHouseError, OSError):
            return False
        finally:
            client.disconnect()
