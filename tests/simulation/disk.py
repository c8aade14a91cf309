"""A disk in memory under the real `LocalStore`: RocksDB's contract, with its crashes.

Promise: a batch happens as a whole or not at all; a kill of the process loses nothing that was written; a power loss loses the
last batches as a whole, in order. A test holds `MemoryDb` against the real RocksDB. Runs of the dedupe memory are real files in
a folder of tmpfs; the threads that write them are replaced by work that is done when somebody looks, or not yet.
"""

from __future__ import annotations

import random
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from billing.v1.account_pb2 import Progress
from tests.simulation.loop import PROCESS, Killed, Process

__all__ = ["Disks", "LazyThreads", "MemoryBatch", "MemoryDb"]

_UNDO_BATCHES_MAX = 24


@dataclass
class _Content:
    """What is in one database's folder."""

    data: dict[bytes, bytes] = field(default_factory=dict)
    # For each of the last batches, what its keys were before.
    undo: deque[dict[bytes, bytes | None]] = field(default_factory=lambda: deque(maxlen=_UNDO_BATCHES_MAX))
    owner: Process | None = None


@dataclass
class Snapshot:
    """A copy of a store's folder, as a backup or a cloned disk holds it."""

    data: dict[bytes, bytes]
    files: dict[str, bytes]


class Disks:
    """All databases of a run, by path; `on_place` hears of each place that a store writes, before it is there."""

    def __init__(self, choices: random.Random, on_place: Callable[[Progress], None]) -> None:
        self.choices = choices
        self.on_place = on_place
        self._contents: dict[str, _Content] = {}

    def content(self, path: str) -> _Content:
        return self._contents.setdefault(path, _Content())

    def place(self, folder: Path) -> Progress:
        """Where the store in `folder` stands."""
        return Progress.FromString(self.content(str(folder / "state")).data.get(b"m", b""))

    def snapshot(self, folder: Path) -> Snapshot:
        seen = folder / "seen"
        files = {path.name: path.read_bytes() for path in sorted(seen.iterdir())} if seen.exists() else {}
        return Snapshot(dict(self.content(str(folder / "state")).data), files)

    def restore(self, folder: Path, snapshot: Snapshot) -> None:
        self.lose(folder)
        self.content(str(folder / "state")).data.update(snapshot.data)
        (folder / "seen").mkdir(parents=True, exist_ok=True)
        for name, data in snapshot.files.items():
            (folder / "seen" / name).write_bytes(data)

    def lose(self, folder: Path) -> None:
        """A new, empty disk."""
        self._contents.pop(str(folder / "state"), None)
        shutil.rmtree(folder, ignore_errors=True)

    def cut_power(self, folder: Path, batches: int) -> None:
        """Lose the last batches that the operating system had not written back."""
        content = self.content(str(folder / "state"))
        for _ in range(min(batches, len(content.undo))):
            for key, value in content.undo.pop().items():
                if value is None:
                    content.data.pop(key, None)
                else:
                    content.data[key] = value


class MemoryBatch:
    """`rocksdict.WriteBatch`: what is put and deleted, in order."""

    def __init__(self, raw_mode: bool = True) -> None:
        self.calls: list[tuple[bytes, bytes, bytes | None]] = []

    def put(self, key: bytes, value: bytes) -> None:
        self.calls.append((key, b"", value))

    def delete(self, key: bytes) -> None:
        self.calls.append((key, b"", None))

    def delete_range(self, begin: bytes, end: bytes) -> None:
        self.calls.append((begin, end, None))


class MemoryDb:
    """What `LocalStore` uses of `rocksdict.Rdict`."""

    disks: Disks

    def __init__(self, path: str, options: object = None) -> None:
        self._content = self.disks.content(path)
        owner = PROCESS.get()
        before = self._content.owner
        if before is not None and before.alive:
            raise RuntimeError(f"IO error: lock hold by {before.name}: {path}/LOCK")
        self._content.owner = owner
        self._owner = owner

    def get(self, key: bytes) -> bytes | None:
        return self._content.data.get(key)

    def __setitem__(self, key: bytes, value: bytes) -> None:
        batch = MemoryBatch()
        batch.put(key, value)
        self.write(batch)

    def delete_range(self, begin: bytes, end: bytes) -> None:
        batch = MemoryBatch()
        batch.delete_range(begin, end)
        self.write(batch)

    def items(self, from_key: bytes) -> Iterator[tuple[bytes, bytes]]:
        data = self._content.data
        yield from [(key, data[key]) for key in sorted(data) if key >= from_key]

    def write(self, batch: MemoryBatch) -> None:
        if self._owner is not None and not self._owner.write_to_disk():
            return
        data, undo = self._content.data, dict[bytes, bytes | None]()
        for key, end, value in batch.calls:
            for each in [k for k in data if key <= k < end] if end else [key]:
                undo.setdefault(each, data.get(each))
                if value is None:
                    data.pop(each, None)
                else:
                    data[each] = value
        self._content.undo.append(undo)
        if b"m" in undo and b"m" in data:
            self.disks.on_place(Progress.FromString(data[b"m"]))
        if self._owner is not None and self._owner.disk_fuse == 0 and self.disks.choices.random() < 0.5:
            # After the write, before anything that follows it.
            self._owner.die()

    def flush_wal(self, sync: bool = True) -> None:
        """What was written so far outlives a power loss.

        The dead do nothing that follows, such as to remove files: a kill is an exception here, and what cleans up comes by.
        """
        if self._owner is not None and not self._owner.alive:
            raise Killed(self._owner.name)
        self._content.undo.clear()

    def close(self) -> None:
        if self._content.owner is self._owner:
            self._content.owner = None


class _LazyFuture(Future[Any]):
    """Done when somebody waits for it, or at one of the times that somebody looks."""

    def __init__(self, choices: random.Random, work: Callable[[], Any]) -> None:
        super().__init__()
        self._choices = choices
        self._work = work

    def _do(self) -> None:
        if super().done():
            return
        try:
            self.set_result(self._work())
        except Exception as error:  # noqa: BLE001  as an executor does
            self.set_exception(error)

    def done(self) -> bool:
        if not super().done() and self._choices.random() < 0.3:
            self._do()
        return super().done()

    def result(self, timeout: float | None = None) -> Any:
        self._do()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._do()
        return super().exception(timeout)


class LazyThreads:
    """`ThreadPoolExecutor` without threads."""

    choices: random.Random

    def __init__(self, max_workers: int = 0, thread_name_prefix: str = "") -> None:
        self._futures: list[_LazyFuture] = []

    def submit(self, work: Callable[..., Any], *arguments: Any) -> _LazyFuture:
        future = _LazyFuture(self.choices, lambda: work(*arguments))
        self._futures.append(future)
        return future

    def shutdown(self, wait: bool = True) -> None:
        process = PROCESS.get()
        if process is None or process.alive:
            for future in self._futures:
                future._do()
