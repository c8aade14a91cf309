"""The server engine over TLS: a certificate that it trusts, one that it does not, a name that is not the certificate's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sinks.engines.server import ServerEngine, ServerSettings
from sinks.errors import EngineUnavailable
from tests.services.certificates import Authority
from tests.services.clickhouse import ClickHouseServer

pytestmark = pytest.mark.clickhouse_server


@pytest.fixture(scope="module")
def secure(clickhouse_server: ClickHouseServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerSettings]:
    """A server that also speaks TLS, and how to reach it so. (The session's own one tells that this machine has any.)"""
    folder = tmp_path_factory.mktemp("secure")
    authority = Authority(folder / "ca")
    server = ClickHouseServer(folder, shows=authority.issue("clickhouse", "IP:127.0.0.1"))
    server.start()
    yield ServerSettings(
        server.host,
        server.secure_port,
        "default",
        server.user,
        server.password,
        secure=True,
        ca_file=str(authority.certificate),
        connect_timeout_s=30.0,
        attempts=1,
    )
    server.stop()


def changed(settings: ServerSettings, **changes: object) -> ServerSettings:
    values = {name: getattr(settings, name) for name in ServerSettings.__dataclass_fields__}
    return ServerSettings(**(values | changes))


def test_a_trusted_certificate_is_taken(secure: ServerSettings) -> None:
    engine = ServerEngine(secure)
    assert engine.query("SELECT {t:String}, 1", {"t": "日本語"}).rows == [("日本語", 1)]
    engine.close()


def test_a_stranger_s_certificate_is_refused(secure: ServerSettings, tmp_path: Path) -> None:
    strangers = Authority(tmp_path, "stranger")
    with pytest.raises(EngineUnavailable, match=r"(?i)certificate"):
        ServerEngine(changed(secure, ca_file=str(strangers.certificate))).query("SELECT 1")


def test_another_host_s_name_is_refused(secure: ServerSettings) -> None:
    with pytest.raises(EngineUnavailable, match=r"(?i)certificate|hostname"):
        ServerEngine(changed(secure, host="localhost")).query("SELECT 1")


def test_a_server_without_tls_is_not_spoken_to_in_the_clear(
    secure: ServerSettings, clickhouse_server: ClickHouseServer
) -> None:
    with pytest.raises(EngineUnavailable):
        ServerEngine(changed(secure, port=clickhouse_server.port, connect_timeout_s=5.0)).query("SELECT 1", timeout_s=2.0)
