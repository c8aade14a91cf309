"""Each day's chain heads, written where Kafka and ClickHouse are not: what proves that a ledger was not written anew.

Promise: a line says that at that time, the database's chain of that partition ended with that record. Lines are only ever
appended, each is sealed with a key made from the ledger's and names the hash of the line before, so one that was edited,
removed or moved is found when the file is read. Lines cut from the end of the file are not: keep it where nobody can (a mount
that can only be appended to), or copy it elsewhere. `audit` holds the archive against them: a ledger that ends earlier, or has
another record there, sealed or not, is not the one that was anchored.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from billing.key_ring import Keys, as_ring, derived
from sinks.engine import Reader
from sinks.errors import AnchorError, SinkError
from sinks.queries import freshness

__all__ = ["Anchor", "Anchoring", "append_heads", "by_place", "read_anchors"]

_LOG = logging.getLogger(__name__)
_DAY_MS = 86_400_000
# A line has under 600; a file of a hundred partitions over ten years under 200 MB.
_LINE_BYTES_MAX = 10_000
_FILE_BYTES_MAX = 1 << 30
_LOOK_S = 60.0


@dataclass(frozen=True, slots=True)
class Anchor:
    """The head of one partition's chain as it was. Hashes and the generation in hexadecimal."""

    anchored_ms: int
    partition: int
    generation: str
    sequence: int
    record_hash: str


def read_anchors(path: Path, seal_key: Keys) -> list[Anchor]:
    """Every anchor of the file, which need not be there. Raises AnchorError naming the line that is not as it was written."""
    return [anchor for anchor, _ in _read(path, seal_key)]


def append_heads(path: Path, reader: Reader, seal_key: Keys, now_ms: int, *, daily: bool = False) -> list[Anchor]:
    """Append the heads of partitions that have moved since their last anchor; `daily`: only those without one of this day.

    They are on disk when it returns. Raises AnchorError, also where the file has anchors that are not its own.
    """
    known = _read(path, seal_key)
    last = {anchor.partition: anchor for anchor, _ in known}
    previous = known[-1][1] if known else ""
    made: list[Anchor] = []
    lines = b""
    for head in freshness(reader):
        before = last.get(head.partition)
        if before is not None and (before.generation, before.sequence) == (head.generation, head.sequence):
            continue
        if daily and before is not None and before.anchored_ms // _DAY_MS >= now_ms // _DAY_MS:
            continue
        anchor = Anchor(now_ms, head.partition, head.generation, head.sequence, head.record_hash)
        line = _line(anchor, previous, seal_key)
        previous = hashlib.sha256(line).hexdigest()
        lines += line + b"\n"
        made.append(anchor)
    if lines:
        try:
            _append(path, lines)
        except OSError as error:
            raise AnchorError(
                f"{path} cannot be written ({error.strerror}): anchors need a place that can be appended to"
            ) from None
    return made


def _line(anchor: Anchor, previous: str, seal_key: Keys) -> bytes:
    key_id, key = as_ring(derived(seal_key, b"taximeter anchors")).signing
    said = {**asdict(anchor), "previous": previous, "key_id": key_id}
    return json.dumps({**said, "seal": _seal(said, key)}, sort_keys=True).encode()


def _seal(said: dict[str, object], key: bytes) -> str:
    return hmac.new(key, json.dumps(said, sort_keys=True).encode(), "sha256").hexdigest()


def _read(path: Path, seal_key: Keys) -> list[tuple[Anchor, str]]:
    """The anchors, and beside each the hash of its line."""
    keys = as_ring(derived(seal_key, b"taximeter anchors"))
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise AnchorError(f"{path} has over {_FILE_BYTES_MAX} bytes: is it the right file?")
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise AnchorError(f"{path} cannot be read ({error.strerror})") from None
    found: list[tuple[Anchor, str]] = []
    previous = ""
    for number, line in enumerate(lines, start=1):
        anchor = _parse(line, previous, keys.keys.get)
        if anchor is None:
            raise AnchorError(
                f"{path} line {number} is not as it was written: it was edited, or the line before was removed or moved, or "
                "the seal key is not this installation's; compare the file with a copy"
            )
        previous = hashlib.sha256(line).hexdigest()
        found.append((anchor, previous))
    return found


def _parse(line: bytes, previous: str, key_of: Callable[[str], bytes | None]) -> Anchor | None:
    if len(line) > _LINE_BYTES_MAX:
        return None
    try:
        said = json.loads(line)
        seal = str(said.pop("seal"))
        key = key_of(str(said["key_id"]))
        if key is None or said["previous"] != previous or not hmac.compare_digest(seal.encode(), _seal(said, key).encode()):
            return None
        return Anchor(**{name: said[name] for name in Anchor.__dataclass_fields__})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _append(path: Path, lines: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        while lines:
            lines = lines[os.write(descriptor, lines) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Anchoring:
    """A thread beside the sink that anchors each partition's head once a day, and the first one soon after the start."""

    def __init__(self, path: Path, reader: Reader, seal_key: Keys, clock_ms: Callable[[], int]) -> None:
        self._path, self._reader, self._seal_key, self._clock_ms = path, reader, seal_key, clock_ms
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="anchors", daemon=True)

    def start(self) -> Anchoring:
        """Raises AnchorError where the file is not as it was written: whoever changed it must not be followed by more lines."""
        read_anchors(self._path, self._seal_key)
        self._thread.start()
        return self

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_S):
            try:
                append_heads(self._path, self._reader, self._seal_key, self._clock_ms(), daily=True)
            except SinkError as error:
                _LOG.error("no anchor was written: %s", error)


def by_place(anchors: Sequence[Anchor], partition: int) -> dict[tuple[str, int], Anchor]:
    """Those of one partition, by generation and sequence."""
    return {(anchor.generation, anchor.sequence): anchor for anchor in anchors if anchor.partition == partition}
