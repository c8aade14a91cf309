"""Targets around files: what a person wrote, and what a disk gave back."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import zlib
from functools import cache
from pathlib import Path

from producers.errors import JournalError
from producers.journal import Journal, JournalSettings
from serving.tokenizers.errors import TokenizerLoadError
from serving.tokenizers.gguf import load_gguf_tokenizer
from stream_processors.errors import LocalStoreError
from stream_processors.local_store import LocalStore
from stream_processors.seen_runs import DamagedRunError, Query, open_run, rows_from_entries, write_run
from taximeter.config import load
from taximeter.errors import ConfigError, InputFileError
from taximeter.price_files import read_price_book
from taximeter.traces import read_trace
from taximeter.usage_lines import read_lines
from tests.fuzz.target import Reader, Target, scratch
from tests.producers.support import usage_event

__all__ = ["TARGETS"]

PATCHES_MAX = 16
_RUN_HEADER_BYTES = 64


def _written(name: str, data: bytes) -> Path:
    path = scratch() / name
    path.write_bytes(data)
    return path


# --- what people write ---


def read_usage_lines(data: bytes) -> None:
    for line in read_lines(_written("usage.jsonl", data)):
        assert (line.event is None) == bool(line.problem.encode())


def _usage_lines() -> list[bytes]:
    good = {
        "request_id": "r-1",
        "tenant_id": "acme",
        "model": "m",
        "ended_at": "2026-01-31T12:00:00Z",
        "output_tokens": 64,
        "units": {"requests": 1},
        "attributes": {"team": "search"},
        "outcome": "completed",
        "latency_ms": 3,
        "backfill": True,
    }
    return [
        json.dumps(good).encode() + b"\n",
        b'{"request_id": "r", "tenant_id": "t", "model": "m", "started_ms": 5, "ended_ms": 1760000000000}\n\n[]\n',
        b'{"output_tokens": ' + b"9" * 5_000 + b"}",
        b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}",
    ]


def _traces() -> list[bytes]:
    head = b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
    return [
        head + b"2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
        b"\xef\xbb\xbf" + head + b'"2023-11-16 18:15:46",1,2\n',
        head + b"2023-11-16 18:15:46," + b"9" * 5_000 + b",1\n",
        head + b'"' + b"x" * 140_000 + b'",1,2\n',
    ]


def _price_books() -> list[bytes]:
    return [
        b'version = 1\ncurrency = "USD"\neffective = "2026-01-01T00:00:00Z"\n[[prices]]\nmodel = "smollm2*"\ninput = "0.10"\n',
        b'version = 1\ncurrency = "USD"\n[[prices]]\nmodel = "m"\noutput = "0.40"\nunits = { audio_ms = "1" }\n',
        b'version = 2\ncurrency = "EUR"\neffective = 2026-01-01T00:00:00Z\n[[prices]]\nmodel = "m"\nservice_class = "batch"\n',
        b"version = " + b"[" * 2_000,
    ]


def read_json_prices(data: bytes) -> None:
    read_price_book(_written("prices.json", data))


def _json_prices() -> list[bytes]:
    book = {
        "version": 1,
        "currency": "USD",
        "effective": "always",
        "prices": [{"model": "m", "input": "1", "units": {"u": "2"}}],
    }
    return [json.dumps(book).encode(), b'{"currency": "\\ud800", "prices": [{"model": "\\udfff"}]}', b"[" * 100_000]


def _configurations() -> list[bytes]:
    return [
        b'[kafka]\nbootstrap = "a:1"\nsecurity_protocol = "PLAINTEXT"\n[ledger]\npartitions = 4\nseal_key = "s"\n',
        b'[gateway]\nport = 1\n[models.profiles.m]\nkind = "vllm"\n[embedded]\n',
        b"[kafka]\nbootstrap = " + b"[" * 2_000,
    ]


# --- what disks give back ---


def read_gguf(data: bytes) -> None:
    loaded = load_gguf_tokenizer(_written("model.gguf", data))
    loaded.tokenizer.encode("a b", add_special_tokens=True)


def _gguf(**changes: tuple[int, bytes] | None) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def array(kind: int, items: list[bytes]) -> tuple[int, bytes]:
        return 9, struct.pack("<IQ", kind, len(items)) + b"".join(items)

    tokens = ["<s>", "a", "b", "ab", "Ġ"]
    entries: dict[str, tuple[int, bytes] | None] = {
        "tokenizer.ggml.model": (8, text("gpt2")),
        "tokenizer.ggml.pre": (8, text("smollm")),
        "tokenizer.ggml.tokens": array(8, [text(token) for token in tokens]),
        "tokenizer.ggml.token_type": array(5, [struct.pack("<i", 3 if token == "<s>" else 1) for token in tokens]),
        "tokenizer.ggml.merges": array(8, [text("a b")]),
        "tokenizer.ggml.bos_token_id": (4, struct.pack("<I", 0)),
        "tokenizer.ggml.add_bos_token": (7, b"\x01"),
        "tokenizer.chat_template": (8, text("{{ messages }}")),
    }
    entries.update({name.replace("__", "."): value for name, value in changes.items()})
    pairs = [(key, value) for key, value in entries.items() if value is not None]
    body = b"".join(text(key) + struct.pack("<I", value[0]) + value[1] for key, value in pairs)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + body


def _ggufs() -> list[bytes]:
    number = (4, struct.pack("<I", 7))
    return [
        _gguf(),
        _gguf(tokenizer__ggml__model=number),
        _gguf(tokenizer__ggml__tokens=(9, struct.pack("<IQI", 4, 1, 7))),
        _gguf(tokenizer__ggml__bos_token_id=(8, struct.pack("<Q", 1) + b"x")),
        _gguf(tokenizer__chat_template=number),
    ]


def open_seen_run(data: bytes) -> None:
    """A run that opens has the columns that its checksum is of; what was written is found in it."""
    run = open_run(_written("run", data))
    found: list[bytes | None] = [None] * 3
    run.find(Query([entry[:16] for entry in _ENTRIES]), 0, found)
    columns = data[_RUN_HEADER_BYTES:]
    # A fuzzer that sees the comparison can make a checksum fit: that is no disk's doing.
    assert zlib.crc32(columns) == int.from_bytes(data[20:24], "little")
    assert columns != _seen_run()[_RUN_HEADER_BYTES:] or found == [entry[16:] for entry in _ENTRIES]


_ENTRIES = [bytes((number,)) * 16 + bytes((number + 100,)) * 8 for number in range(3)]


@cache
def _seen_run() -> bytes:
    rows = rows_from_entries([(20_000, b"".join(_ENTRIES))])
    write_run(scratch() / "pristine", rows)
    return (scratch() / "pristine").read_bytes()


def _patched(pristine: Path, data: bytes) -> Path:
    """A copy of a folder in which some bytes are others, and perhaps a file is cut."""
    copy = scratch() / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(pristine, copy)
    files = [path for path in sorted(copy.rglob("*")) if path.is_file() and path.suffix not in (".lock", ".reserve")]
    reader = Reader(data)
    for _ in range(PATCHES_MAX):
        if not reader.more:
            break
        path = files[reader.number() % len(files)]
        content = bytearray(path.read_bytes())
        at = reader.number(4) % (len(content) + 1)
        piece = reader.take(reader.number() % 32)
        if piece:
            content[at : at + len(piece)] = piece
        else:
            del content[at:]
        path.write_bytes(content)
    return copy


def open_journal(data: bytes) -> None:
    """A journal on a damaged disk: it opens and gives what it has, or says that it cannot be read."""
    folder = _patched(_journal(), data)
    journal = Journal(folder / "journal", JournalSettings(2, producer_id="p"))
    try:
        for partition in range(2):
            after = journal.freed_sequence(partition)
            for _ in range(50):
                page = journal.read(partition, after, 7, 100_000)
                if not page.events:
                    break
                assert page.first_sequence > after
                after = page.first_sequence + len(page.events) - 1
            journal.free(partition, 2)
        for row in journal.left_open():
            journal.close_request(row.slot, row.partition, row.event).durable(10)
        journal.append(0, usage_event(99).SerializeToString()).durable(10)
        journal.oldest_unacknowledged_ms(0)
    finally:
        with contextlib.suppress(JournalError):
            journal.close()


@cache
def _journal() -> Path:
    """A journal as a kill leaves it: its log not moved into the file."""
    folder = scratch() / "journal"
    folder.mkdir()
    journal = Journal(folder / "journal", JournalSettings(2, producer_id="p"))
    for number in range(6):
        journal.append(number % 2, usage_event(number).SerializeToString()).durable()
    journal.free(0, 1)
    journal.open(1, usage_event(7).SerializeToString())[1].durable()
    pristine = scratch() / "journal-pristine"
    shutil.copytree(folder, pristine)
    journal.close()
    shutil.rmtree(folder)
    (pristine / "journal.reserve").unlink(missing_ok=True)
    return pristine


def open_local_store(data: bytes) -> None:
    """A local store on a damaged disk: it opens and loads, or says that it must be deleted."""
    store = LocalStore(_patched(_store(), data), 0)
    try:
        state = store.load()
        assert state is None or state.founded
    finally:
        store.close()


@cache
def _store() -> Path:
    from tests.stream_processors.test_local_store import _written as fill

    pristine = scratch() / "store-pristine"
    store = LocalStore(pristine, 0)
    fill(store, 3)
    store.close()
    return pristine


def _patches() -> list[bytes]:
    return [
        b"",
        *(bytes((file,)) + (at).to_bytes(4, "little") + b"\x04\xff\x00\xff\x01" for file in range(4) for at in (0, 4_100)),
    ]


TARGETS = {
    "usage-lines": Target(read_usage_lines, _usage_lines, (InputFileError,)),
    "trace": Target(lambda data: read_trace(_written("trace.csv", data)), _traces, (InputFileError,)),
    "prices-toml": Target(lambda data: read_price_book(_written("prices.toml", data)), _price_books, (InputFileError,)),
    "prices-json": Target(read_json_prices, _json_prices, (InputFileError,)),
    "configuration": Target(lambda data: load(_written("taximeter.toml", data)), _configurations, (ConfigError,)),
    "gguf": Target(read_gguf, _ggufs, (TokenizerLoadError,)),
    "seen-run": Target(open_seen_run, lambda: [_seen_run()], (DamagedRunError,)),
    "journal": Target(open_journal, _patches, (JournalError,), mutations=60),
    "local-store": Target(open_local_store, _patches, (LocalStoreError,), mutations=40),
}
