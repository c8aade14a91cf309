"""The server engine over TLS: a certificate that it trusts, one that it does not, a name that is not the certificate's."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sinks.engines.server import ServerEngine, ServerSettings
from sinks.errors import EngineUnavailable
from taximeter.embedded.process import free_port
from tests.services import require
from tests.services.clickhouse import ClickHouseServer

pytestmark = pytest.mark.clickhouse_server

_TLS = """    <tcp_port_secure>{port}</tcp_port_secure>
    <openSSL><server>
        <certificateFile>{folder}/server.pem</certificateFile>
        <privateKeyFile>{folder}/server.key</privateKeyFile>
        <verificationMode>none</verificationMode>
        <cacheSessions>true</cacheSessions>
        <disableProtocols>sslv2,sslv3</disableProtocols>
    </server></openSSL>
</yandex>
"""


def make_certificate(folder: Path, name: str, subject: str) -> Path:
    """A key and a certificate signed with it, for `subject` alone; returns the certificate."""
    certificate = folder / f"{name}.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=taximeter-test",
         "-addext", f"subjectAltName={subject}", "-keyout", folder / f"{name}.key", "-out", certificate],
        check=True,
        capture_output=True,
        timeout=30,
    )  # fmt: skip
    return certificate


@pytest.fixture(scope="module")
def secure(clickhouse_server: ClickHouseServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerSettings]:
    """A server that also speaks TLS, and how to reach it so. (The session's own one tells that this machine has any.)"""
    require(shutil.which("openssl"), "there is no openssl on this machine to make a certificate with")
    folder = tmp_path_factory.mktemp("secure")
    certificate = make_certificate(folder, "server", "IP:127.0.0.1")
    server = ClickHouseServer(folder)
    port = free_port()
    config = folder / "config.xml"
    config.write_text(config.read_text().replace("</yandex>\n", _TLS.format(port=port, folder=folder)))
    server.start()
    yield ServerSettings(
        server.host,
        port,
        "default",
        server.user,
        server.password,
        secure=True,
        ca_file=str(certificate),
        connect_timeout_s=5.0,
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
    stranger = make_certificate(tmp_path, "stranger", "IP:127.0.0.1")
    with pytest.raises(EngineUnavailable, match=r"(?i)certificate"):
        ServerEngine(changed(secure, ca_file=str(stranger))).query("SELECT 1")


def test_another_host_s_name_is_refused(secure: ServerSettings) -> None:
    with pytest.raises(EngineUnavailable, match=r"(?i)certificate|hostname"):
        ServerEngine(changed(secure, host="localhost")).query("SELECT 1")


def test_a_server_without_tls_is_not_spoken_to_in_the_clear(
    secure: ServerSettings, clickhouse_server: ClickHouseServer
) -> None:
    with pytest.raises(EngineUnavailable):
        ServerEngine(changed(secure, port=clickhouse_server.port)).query("SELECT 1", timeout_s=2.0)
