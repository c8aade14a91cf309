"""Files that commands write: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from taximeter.errors import MisuseError

__all__ = ["new_file", "write_whole"]


@contextmanager
def new_file(option: str, path: Path) -> Iterator[IO[bytes]]:
    """A file that is at `path` once the block has ended well; until then, and if it fails, what was there stays."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise MisuseError(f"{option} {path} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def write_whole(option: str, path: Path, content: bytes) -> None:
    """Put `content` at `path`."""
    with new_file(option, path) as file:
        file.write(content)
