"""Certificates made on the spot: an authority of the test's own, and what it signs for loopback."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import grpc

from tests.services import require

__all__ = ["Authority", "Issued"]

_TIMEOUT_S = 60


@dataclass(frozen=True)
class Issued:
    """The files of a certificate and of its key."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates, good for servers and for clients. Everything lies in `folder`."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        require(shutil.which("openssl"), "there is no openssl on this machine to make certificates with")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._issued = self._make(name, ["-addext", "basicConstraints=critical,CA:TRUE"])

    @property
    def certificate(self) -> Path:
        return self._issued.certificate

    def issue(self, name: str, hosts: str = "IP:127.0.0.1,DNS:localhost") -> Issued:
        signed = ["-CA", str(self._issued.certificate), "-CAkey", str(self._issued.key)]
        return self._make(name, [*signed, "-addext", f"subjectAltName={hosts}"])

    def trusting(self) -> ssl.SSLContext:
        """A client that trusts this authority alone."""
        return ssl.create_default_context(cafile=self.certificate)

    def credentials(self, own: Issued | None = None) -> grpc.ChannelCredentials:
        """A gRPC client that trusts this authority, and shows a certificate or none."""
        shown = (None, None) if own is None else (own.key.read_bytes(), own.certificate.read_bytes())
        return grpc.ssl_channel_credentials(self.certificate.read_bytes(), *shown)

    def _make(self, name: str, more: list[str]) -> Issued:
        made = Issued(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
             "-subj", f"/CN={name}", *more, "-keyout", made.key, "-out", made.certificate],
            check=True,
            capture_output=True,
            timeout=_TIMEOUT_S,
        )  # fmt: skip
        return made
