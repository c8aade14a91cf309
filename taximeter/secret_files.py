"""The secrets that an embedded installation makes for itself, each in a file that only its owner can read.

Promise: a secret is made once, from the system's random source, and never changes afterwards: the seal and command keys
belong to the ledger, the pepper to every API key that was ever handed out. A file that others may read is refused.
"""

from __future__ import annotations

import os
import secrets
import stat
from typing import TYPE_CHECKING, Final

from taximeter.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SECRET_NAMES", "ensure_secrets"]

SECRET_NAMES: Final = ("command_key", "seal_key", "key_pepper", "loopback_token")
_SECRET_BYTES: Final = 32


def ensure_secrets(folder: Path) -> dict[str, Path]:
    """The files of all secrets, made where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return {name: _ensure(folder / name) for name in SECRET_NAMES}


def _ensure(path: Path) -> Path:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise ConfigError(f"secret file {path} has mode {mode:04o}, so others can read it: chmod 600 it") from None
        if not path.read_bytes().strip():
            raise ConfigError(
                f"secret file {path} is empty: restore it from a backup, or start with a new data directory"
            ) from None
        return path
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_hex(_SECRET_BYTES).encode())
        file.flush()
        os.fsync(file.fileno())
    return path
