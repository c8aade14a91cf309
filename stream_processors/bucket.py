"""Where snapshots lie: a folder or an object store, named by a URL (`file:///…`, `s3://…`, `gs://…`, `az://…`, `memory:///`).

Promise: what `put` returned from is there as a whole, under its name, after a power loss too; what it did not return from is
not there under that name. In a folder that takes a sync of the file before it gets its name, and of the folders after; object
stores do it by themselves. Every call has a time limit; what goes wrong is a `BucketError`, except for what is not there.

Credentials come from the environment, as the object store's own tools take them (AWS_ACCESS_KEY_ID, …), never from the URL.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from stream_processors.errors import BucketError
from stream_processors.seen_runs import sync_folder

if TYPE_CHECKING:
    from obstore.store import ObjectStore

__all__ = ["Bucket", "Listed"]

_CHUNK_BYTES = 16 << 20
_REQUEST_TIMEOUT_S = 60
_RETRIES_TIMEOUT_S = 180
_DRAFT_AGE_S_MAX = 3_600
_LISTED_MAX = 100_000
# Names that end like this are not listed: they are the library's own for what is being written.
_DRAFT = "#0"


@dataclass(frozen=True, slots=True)
class Listed:
    """An object: its name, its size, and when it was written by the bucket's own clock."""

    name: str
    size_bytes: int
    written_s: float


class Bucket:
    """Objects by name. Its calls block; they are for threads."""

    def __init__(self, url: str) -> None:
        # Only a worker with snapshots needs it.
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        self.url = url
        self._errors: tuple[type[Exception], ...] = (BaseError, OSError, ValueError)
        scheme = urlsplit(url).scheme
        self._folder = Path(unquote(urlsplit(url).path)) if scheme == "file" else None
        options: dict[str, Any] = {}
        if scheme == "file":
            options = {"mkdir": True}
        elif scheme != "memory":
            options = {
                "client_options": {"timeout": timedelta(seconds=_REQUEST_TIMEOUT_S), "connect_timeout": timedelta(seconds=5)},
                "retry_config": {"max_retries": 5, "retry_timeout": timedelta(seconds=_RETRIES_TIMEOUT_S)},
            }
        with self._told("opened"):
            self._store: ObjectStore = from_url(url, **options)

    def put(self, name: str, content: Path | bytes) -> None:
        """Write an object, a file's content or these bytes."""
        import obstore

        with self._told(f"written to ({name})"):
            if self._folder is None:
                obstore.put(self._store, name, content)
            else:
                _put_file(self._folder, name, content)

    def read(self, name: str, size_bytes: int) -> Iterator[bytes]:
        """The first `size_bytes` of an object, in pieces; FileNotFoundError when it is not there."""
        import obstore

        with self._told(f"read from ({name})"):
            for start in range(0, size_bytes, _CHUNK_BYTES):
                end = min(start + _CHUNK_BYTES, size_bytes)
                yield bytes(obstore.get_range(self._store, name, start=start, end=end))

    def list(self, prefix: str) -> list[Listed]:
        """What is there under a prefix, by name."""
        import obstore

        found = []
        with self._told(f"listed ({prefix})"):
            for chunk in obstore.list(self._store, prefix=prefix):
                found += [Listed(each["path"], each["size"], each["last_modified"].timestamp()) for each in chunk]
                if len(found) > _LISTED_MAX:
                    raise BucketError(f"{self.url}: over {_LISTED_MAX} objects under {prefix}; is it the right place?")
        return sorted(found, key=lambda each: each.name)

    def delete(self, names: Sequence[str]) -> None:
        """Let go of objects; one that is not there is gone already."""
        import obstore

        with self._told("deleted from"):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    obstore.delete(self._store, name)

    def sweep(self, prefix: str) -> None:
        """Let go of what a killed process had begun to write."""
        if self._folder is None:
            return
        for path in (self._folder / prefix).rglob(f"*{_DRAFT}"):
            with self._told("swept"), contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _DRAFT_AGE_S_MAX:
                    path.unlink()

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except self._errors as error:
            # What follows the first line is how the library saw it.
            reason = str(error).strip().partition("\n")[0]
            raise BucketError(f"snapshots at {self.url} cannot be {what}: {reason}; see snapshot_url and its rights") from error


def _put_file(root: Path, name: str, content: Path | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}{_DRAFT}")
    with draft.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, file, _CHUNK_BYTES)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    for folder in (path.parent, *path.parent.parents):
        sync_folder(folder)
        if folder == root:
            break
