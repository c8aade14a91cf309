"""ClickHouse in this process, on disk: chDB.

Promise: a row that `insert` returned for survives kill -9 of the process, and a power cut as far as the disk keeps what it was
told to sync. One folder belongs to one process at a time, kept by a lock file; everyone else asks it (`sinks.embedded`).
Reads run beside the writer on connections of their own, as many at a time as `readers`; who waits longer than the
query's own time for one gets EngineUnavailable.
"""

from __future__ import annotations

import fcntl
import os
import queue
import re
import sys
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from importlib.abc import MetaPathFinder
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import chdb
import pyarrow as pa

from sinks.coded import Coded
from sinks.engine import PICO_LIMIT, Columns, Kind, Parameter, Rows, Table, row_count
from sinks.engines.json_rows import decode_rows
from sinks.errors import DISK_FULL, EngineError, EngineUnavailable
from sinks.parameters import bind

__all__ = ["ChdbEngine"]

# Its own types are partial, and differ with the order in which its two wheels were installed.
_chdb: Any = chdb
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_CODE = re.compile(r"Code: (\d+)\.")
# TIMEOUT_EXCEEDED, TOO_MANY_SIMULTANEOUS_QUERIES, NO_FREE_CONNECTION, MEMORY_LIMIT_EXCEEDED, NOT_ENOUGH_SPACE, TOO_MANY_PARTS.
_PASSING = frozenset({"159", "202", "203", "241", "243", "252"})
_ROWS_MAX = 1_000_000
_FOLDERS: dict[Path, tuple[IO[str], int]] = {}
_FOLDERS_GUARD = threading.Lock()
_ARROW: dict[Kind, pa.DataType] = {
    Kind.TEXT: pa.string(),
    Kind.BYTES: pa.binary(),
    Kind.UINT8: pa.uint8(),
    Kind.UINT32: pa.uint32(),
    Kind.UINT64: pa.uint64(),
    Kind.INT32: pa.int32(),
    Kind.INT64: pa.int64(),
    Kind.PICO: pa.decimal128(38, 12),
    Kind.MILLIS: pa.timestamp("ms", "UTC"),
    Kind.SECONDS: pa.timestamp("s", "UTC"),
    Kind.TEXTS: pa.list_(pa.string()),
    Kind.UINT64S: pa.list_(pa.uint64()),
    Kind.INT64S: pa.list_(pa.int64()),
}


class ChdbEngine:
    """The engine on `folder`, in database `database`, which is made if it is not there.

    `threads` is how many work on one query, 0: one a core. Little data is read and written for less by one.
    """

    def __init__(self, folder: Path, database: str = "taximeter", *, readers: int = 2, threads: int = 0) -> None:
        if _NAME.fullmatch(database) is None:
            raise EngineError(f"database: {database!r} is not a plain name; use letters, digits and _")
        self._folder = folder.resolve()
        _take(self._folder)
        self._database = database
        self._threads = threads
        self._writing = threading.Lock()
        self._closed = False
        try:
            with closing(_chdb.connect(str(self._folder))) as first:
                self._run(first, f"CREATE DATABASE IF NOT EXISTS {database}")
            self._writer = self._connect()
            self._readers: queue.LifoQueue[Any] = queue.LifoQueue()
            self._reader_count = readers
            for _ in range(readers):
                self._readers.put(self._connect())
        except BaseException:
            _release(self._folder)
            raise

    def execute(self, sql: str) -> None:
        with self._writing:
            self._run(self._writer, sql)

    def insert(self, table: Table, columns: Columns) -> int:
        rows = row_count(table, columns)
        if rows == 0:
            return 0
        names = list(table.columns)
        batch = pa.record_batch([_arrow(table.columns[name], columns[name]) for name in names], names=names)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        quoted = ", ".join(f"`{name}`" for name in names)
        # Not through chDB's own streaming insert, which says nothing of what fails at its end, on a full disk say.
        with _as_file(sink.getvalue()) as path:
            # Rows of one key are left to merges and to FINAL, as between inserts: looking for them here costs a third more.
            settings = "SETTINGS optimize_on_insert = 0, async_insert = 0"
            self.execute(f"INSERT INTO {table.name} ({quoted}) FROM INFILE '{path}' {settings} FORMAT ArrowStream")
        return rows

    def query(self, sql: str, parameters: Mapping[str, Parameter] | None = None, *, timeout_s: float = 30.0) -> Rows:
        return decode_rows(self.query_json(bind(sql, parameters), timeout_s=timeout_s))

    def query_json(self, bound_sql: str, *, timeout_s: float) -> bytes:
        """The answer of one SELECT as ClickHouse writes it (JSONCompact). Read-only: anything else is refused by the engine."""
        bounded = (
            f"{bound_sql.rstrip().rstrip(';')}\nSETTINGS readonly = 2, max_execution_time = {timeout_s:.3f}, "
            f"max_result_rows = {_ROWS_MAX}, result_overflow_mode = 'throw', output_format_json_quote_decimals = 1, "
            "output_format_json_quote_64bit_integers = 0"
        )
        self._check_open()
        try:
            reader = self._readers.get(timeout=timeout_s)
        except queue.Empty:
            raise EngineUnavailable(
                f"no answer within {timeout_s:g} s: {self._reader_count} other queries are running; try again"
            ) from None
        try:
            return self._run(reader, bounded, "JSONCompact")
        except BaseException:
            # What a broken query has written already would stand before the next answer: chDB keeps it with the connection.
            reader.close()
            reader = self._connect()
            raise
        finally:
            self._readers.put(reader)

    def close(self) -> None:
        with self._writing:
            if self._closed:
                return
            self._closed = True
            for _ in range(self._reader_count):
                self._readers.get().close()
            self._writer.close()
            _release(self._folder)

    def _connect(self) -> Any:
        connection = _chdb.connect(str(self._folder))
        self._run(connection, f"USE {self._database}")
        if self._threads:
            self._run(connection, f"SET max_threads = {self._threads}")
        return connection

    def _run(self, connection: Any, sql: str, output_format: str = "CSV") -> bytes:
        self._check_open()
        with _translated():
            return cast("bytes", connection.query(sql, output_format).bytes())

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("this chDB engine is closed")


class _NoPandas(MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname, name=fullname)


def _keep_pandas_out() -> None:
    """pyarrow asks of the first list that it gets whether it is one of pandas, and loads pandas, which chDB brings, for it.
    That is half a second and 371 modules in every process that writes. It asks once, and takes no for an answer.
    """
    if "pandas" in sys.modules:
        return
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(finder)


_keep_pandas_out()


def _take(folder: Path) -> None:
    """Hold `folder` for this process; counted, for one process may open several databases in it."""
    with _FOLDERS_GUARD:
        held, count = _FOLDERS.get(folder, (None, 0))
        if held is None:
            folder.mkdir(parents=True, exist_ok=True)
            held = (folder / "taximeter.lock").open("a")
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                held.close()
                raise EngineUnavailable(
                    f"{folder}: another process has this ClickHouse folder open; chDB belongs to one process, ask that one"
                ) from error
        _FOLDERS[folder] = (held, count + 1)


def _release(folder: Path) -> None:
    with _FOLDERS_GUARD:
        held, count = _FOLDERS.pop(folder)
        if count > 1:
            _FOLDERS[folder] = (held, count - 1)
        else:
            held.close()


@contextmanager
def _as_file(content: pa.Buffer) -> Iterator[str]:
    """The path of a file with this content: in memory where the system has such, else where temporary files are."""
    try:
        with _open_file() as file:
            file.write(content)
            file.flush()
            yield file.name if isinstance(file.name, str) else f"/proc/self/fd/{file.name}"
    except OSError as error:
        raise EngineUnavailable(f"chDB: rows cannot be handed over: {error}") from error


def _open_file() -> Any:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("taximeter-insert"), "wb")
    return tempfile.NamedTemporaryFile()


@contextmanager
def _translated() -> Iterator[None]:
    """chDB's errors as ours. They are RuntimeErrors with ClickHouse's own text and code."""
    try:
        yield
    except RuntimeError as error:
        code = _CODE.search(str(error))
        passing = (code is not None and code[1] in _PASSING) or DISK_FULL in str(error)
        kind = EngineUnavailable if passing else EngineError
        raise kind(f"chDB: {error}") from error


def _arrow(kind: Kind, values: Sequence[object]) -> pa.Array:
    arrow = _ARROW[kind]
    if isinstance(values, Coded):
        return pa.DictionaryArray.from_arrays(_from_memory(pa.int32(), values.codes), pa.array(values.names, arrow))
    if isinstance(values, array) and values.itemsize * 8 == arrow.bit_width:
        return _from_memory(arrow, values)
    special = _SPECIAL.get(kind)
    return special(values) if special is not None else pa.array(values, arrow)


def _from_memory(arrow: pa.DataType, numbers: array[int]) -> pa.Array:
    return pa.Array.from_buffers(arrow, len(numbers), [None, pa.py_buffer(numbers)])


def _decimals(values: Sequence[object]) -> pa.Array:
    """128-bit numbers as they are in memory: no decimal is computed, so none is rounded."""
    pico = cast("Sequence[int]", values)
    try:
        low = array("Q", pico)
    except OverflowError:
        if max(pico) >= PICO_LIMIT or min(pico) <= -PICO_LIMIT:
            raise EngineError(f"an amount of {max(pico, key=abs)} pico does not fit in Decimal(38, 12)") from None
        words = None
    else:
        words = array("Q", bytes(16 * len(pico)))
        words[::2] = low
    if words is not None:
        content = pa.py_buffer(words)
    else:
        content = pa.py_buffer(b"".join([value.to_bytes(16, "little", signed=True) for value in pico]))
    return pa.Decimal128Array.from_buffers(_ARROW[Kind.PICO], len(pico), [None, content])


def _lists(kind: Kind) -> Callable[[Sequence[object]], pa.Array]:
    arrow = _ARROW[kind]

    def convert(values: Sequence[object]) -> pa.Array:
        lists = cast("Sequence[list[object]]", values)
        if any(lists):
            offsets = array("i", [0])
            total = 0
            for entry in lists:
                total += len(entry)
                offsets.append(total)
            content = pa.array(list(chain.from_iterable(lists)), arrow.value_type)
        else:
            offsets = array("i", bytes(4 * (len(lists) + 1)))
            content = pa.array([], arrow.value_type)
        return pa.ListArray.from_arrays(_from_memory(pa.int32(), offsets), content)

    return convert


_SPECIAL: dict[Kind, Callable[[Sequence[object]], pa.Array]] = {
    Kind.PICO: _decimals,
    Kind.TEXTS: _lists(Kind.TEXTS),
    Kind.UINT64S: _lists(Kind.UINT64S),
    Kind.INT64S: _lists(Kind.INT64S),
}
