"""The receivers of alerts, from the configuration: their secrets are read here, and kept out of every log."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Final

from serving.notifier.settings import Endpoint
from taximeter.errors import ConfigError
from taximeter.logs import keep_out

if TYPE_CHECKING:
    from pathlib import Path

    from taximeter.serving_config import NotifierEndpointConfig

__all__ = ["endpoint_of"]

_PREFIX: Final = "whsec_"
_SECRETS_MAX: Final = 2
# As Standard Webhooks has it.
_SECRET_BYTES: Final = range(24, 65)
_FILE_BYTES_MAX: Final = 64 * 1024


def endpoint_of(name: str, config: NotifierEndpointConfig) -> Endpoint:
    """The endpoint with its secrets. Raises ConfigError."""
    where = f"notifier.endpoints.{name}"
    return Endpoint(
        name=name,
        url=config.url,
        format=config.format,
        secrets=() if config.secret_file is None else _secrets(f"{where}.secret_file", config.secret_file),
        bearer="" if config.bearer_file is None else _bearer(f"{where}.bearer_file", config.bearer_file),
        rules=frozenset(config.rules),
        severities=frozenset(config.severities),
        tenants=frozenset(config.tenants),
        allow_private=config.allow_private,
        ca_file=config.ca_file,
    )


def _secrets(key: str, path: Path) -> tuple[bytes, ...]:
    lines = _lines(key, path)
    if not 1 <= len(lines) <= _SECRETS_MAX:
        raise ConfigError(f"{key} {path} has {len(lines)} lines: put a secret on each of one or two")
    secrets = []
    for line in lines:
        keep_out(line.encode())
        try:
            secret = base64.b64decode(line.removeprefix(_PREFIX), validate=True)
        except binascii.Error:
            secret = b""
        if len(secret) not in _SECRET_BYTES:
            raise ConfigError(f"{key} {path}: a line is not base64 of 24 to 64 bytes: make one by `openssl rand -base64 32`")
        secrets.append(secret)
    return tuple(secrets)


def _bearer(key: str, path: Path) -> str:
    lines = _lines(key, path)
    if len(lines) != 1 or not (lines[0].isascii() and lines[0].isprintable()):
        raise ConfigError(f"{key} {path} is not one line of plain characters: put the token alone in it")
    keep_out(lines[0].encode())
    return lines[0]


def _lines(key: str, path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            text = file.read(_FILE_BYTES_MAX).decode()
    except OSError as error:
        raise ConfigError(f"{key} {path} cannot be read ({error.strerror}): correct the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{key} {path} is no text: is it the right file?") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
