"""Backups: what is in one is the log, message for message; a crash, a damaged file or another log never makes a wrong one."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from billing.founding import found_again
from billing.v1.backup_pb2 import BackupManifest
from stream_processors import ledger_backup
from stream_processors.errors import BackupError
from stream_processors.ledger_backup import read_manifest, read_messages, take
from tests.billing.ledgers import NOW_MS, SEAL_KEY
from tests.stream_processors.ledger_port import TOPIC, LedgerPort


def back_up(log: LedgerPort, folder: Path, *, segment_bytes: int = 1 << 20, seal_key: bytes = SEAL_KEY) -> BackupManifest:
    return asyncio.run(take(log, TOPIC, 2, seal_key, folder, NOW_MS, segment_bytes=segment_bytes))


def content(folder: Path, *, unfinished: bool = False) -> list[list[bytes]]:
    """Every message of every partition, proved; `unfinished`: the first run did not come to all of them."""
    found: list[list[bytes]] = []
    for partition in read_manifest(folder).partitions:
        if unfinished and not partition.segments:
            with pytest.raises(BackupError, match="the first run was not finished"):
                next(read_messages(folder, partition, TOPIC, SEAL_KEY))
            found.append([])
        else:
            found.append([message.value for message in read_messages(folder, partition, TOPIC, SEAL_KEY)])
    return found


@pytest.mark.parametrize("segment_bytes", [1, 1_000, 1 << 20])
def test_a_backup_is_the_log_and_gains_what_comes(tmp_path: Path, segment_bytes: int) -> None:
    log = LedgerPort()
    back_up(log, tmp_path, segment_bytes=segment_bytes)
    assert content(tmp_path) == log.stored
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.messages")}
    log.more(2)
    manifest = back_up(log, tmp_path, segment_bytes=segment_bytes)
    assert content(tmp_path) == log.stored
    assert {path: path.read_bytes() for path in before} == before, "what is there never changes"
    for partition, ledger in zip(manifest.partitions, log.ledgers, strict=True):
        assert (partition.head.position.sequence, partition.head.record_hash) == (
            ledger.state.sequence,
            ledger.state.record_hash,
        )
        assert (partition.records, partition.ignored) == (len(ledger.stored), 0)
    assert back_up(log, tmp_path).partitions == manifest.partitions, "nothing has come"
    assert {path.stat().st_mode & 0o077 for path in tmp_path.rglob("*.messages")} == {0}


def test_what_somebody_else_wrote_stays_at_its_offset_and_counts_as_no_record(tmp_path: Path) -> None:
    log = LedgerPort()
    log.forge()
    manifest = back_up(log, tmp_path)
    log.forge()
    manifest = back_up(log, tmp_path)
    assert content(tmp_path) == log.stored
    assert manifest.partitions[0].ignored == 2
    assert manifest.partitions[0].records == len(log.ledgers[0].stored) - 2


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_that_is_killed_anywhere_leaves_a_backup_that_the_next_one_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Before and after each sync and each rename; half of what was being written is there, and half is not."""
    log = LedgerPort()
    base = tmp_path / "base"
    known: list[list[bytes]] = [[], []]
    if begun:
        back_up(log, base)
        known = content(base)
    log.more(3)
    calls = ("fsync", "replace")
    real = {name: getattr(os, name) for name in calls}
    left = [0]

    def failing(name: str):  # type: ignore[no-untyped-def]
        def call(*arguments: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            result = real[name](*arguments)
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return result

        return call

    for name in calls:
        monkeypatch.setattr(os, name, failing(name))
    kills = 0
    for point in range(1, 1_000):
        folder = tmp_path / f"run-{point}"
        for path in base.rglob("*"):
            if path.is_file():
                (folder / path.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
                (folder / path.relative_to(base)).write_bytes(path.read_bytes())
        left[0] = point
        try:
            back_up(log, folder, segment_bytes=1_000)
        except Killed:
            kills += 1
        else:
            break
        left[0] = 0
        for partial in folder.rglob("*.partial"):
            partial.write_bytes(partial.read_bytes()[: partial.stat().st_size // 2])
        is_there = begun or (folder / "manifest.json").exists()
        there = content(folder, unfinished=True) if is_there else known
        assert all(found[: len(before)] == before for found, before in zip(there, known, strict=True)), point
        assert all(whole[: len(found)] == found for found, whole in zip(there, log.stored, strict=True)), point
        back_up(log, folder)
        assert content(folder) == log.stored, point
    assert kills >= 20


@pytest.mark.parametrize("what", ["first byte", "last byte", "cut", "longer", "gone", "another's", "manifest", "head"])
def test_a_damaged_backup_is_named_and_nothing_is_made_of_it(tmp_path: Path, what: str) -> None:
    log = LedgerPort()
    back_up(log, tmp_path, segment_bytes=1_000)
    one, other, *_ = sorted(tmp_path.glob("partition-1/*.messages"))
    value = one.read_bytes()
    manifest = tmp_path / "manifest.json"
    match what:
        case "first byte":
            one.write_bytes(bytes([value[0] ^ 1]) + value[1:])
        case "last byte":
            one.write_bytes(value[:-1] + bytes([value[-1] ^ 1]))
        case "cut":
            one.write_bytes(value[:-1])
        case "longer":
            one.write_bytes(value + b"\0")
        case "gone":
            one.unlink()
        case "another's":
            one.write_bytes(other.read_bytes())
        case "manifest":
            manifest.write_text(manifest.read_text()[:-10])
        case "head":
            said = read_manifest(tmp_path)
            said.partitions[1].segments.pop()
            ledger_backup._write_manifest(tmp_path, said)
    with pytest.raises(BackupError, match=r"damaged|no ledger record|ledger key's"):
        content(tmp_path)


@pytest.mark.parametrize("offset", range(6))
def test_every_bit_of_a_message_counts(tmp_path: Path, offset: int) -> None:
    """Whichever message it is: the chain, its seal or the file's hash tells."""
    log = LedgerPort()
    log.forge()
    back_up(log, tmp_path)
    [path] = tmp_path.glob("partition-0/*.messages")
    value = bytearray(path.read_bytes())
    start = sum(4 + len(message) for message in log.ledgers[0].stored[:offset]) + 4
    value[start + 7 * offset] ^= 1 << offset
    path.write_bytes(value)
    with pytest.raises(BackupError):
        content(tmp_path)


def test_a_log_that_is_not_the_backups_is_refused_and_the_backup_stays(tmp_path: Path) -> None:
    log = LedgerPort()
    log.more(3)
    folder = tmp_path / "backup"
    back_up(log, folder)
    whole = content(folder)
    cut = LedgerPort()
    with pytest.raises(BackupError, match="the log lost its end"):
        back_up(cut, folder)
    other = LedgerPort()
    other.more(9)
    other.ledgers[1].stored[4:] = other.ledgers[1].stored[5:]
    with pytest.raises(BackupError, match=r"usage.ledger\[1\]"):
        back_up(other, folder)
    log.first = len(log.ledgers[0].stored) + 1
    with pytest.raises(BackupError, match="deleted before it was copied"):
        back_up(log, folder)
    log.first = 3
    with pytest.raises(BackupError, match="begins at offset 3"):
        back_up(log, tmp_path / "new")
    assert content(folder) == whole


def test_a_hole_in_the_log_is_refused(tmp_path: Path) -> None:
    log = LedgerPort()
    log.hole = 4
    with pytest.raises(BackupError, match="offset 5 came and 4 was due"):
        back_up(log, tmp_path / "one")
    log.hole = len(log.ledgers[0].stored) - 1
    with pytest.raises(BackupError, match=rf"nothing came from {log.hole} on"):
        back_up(log, tmp_path / "two")


def test_a_log_whose_memory_of_charges_is_elsewhere_is_refused(tmp_path: Path) -> None:
    log = LedgerPort()
    for ledger in log.ledgers:
        _, founding = found_again(ledger.state, b"h" * 16, NOW_MS, SEAL_KEY, "test")
        ledger.stored = [founding]
    with pytest.raises(BackupError, match="on the workers' disks alone"):
        back_up(log, tmp_path)


def test_another_key_is_told_from_a_forgery(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="give this process the installation's"):
        back_up(LedgerPort(), tmp_path, seal_key=b"x" * 32)


def test_two_at_a_time_a_foreign_folder_and_another_ledgers_are_refused(tmp_path: Path) -> None:
    log = LedgerPort()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letters.txt").touch()
    with pytest.raises(BackupError, match=r"holds letters.txt and no backup"):
        back_up(log, tmp_path / "foreign")
    folder = tmp_path / "backup"
    back_up(log, folder)
    with pytest.raises(BackupError, match=r"2 partitions, and this ledger is usage.ledger with 3"):
        asyncio.run(take(log, TOPIC, 3, SEAL_KEY, folder, NOW_MS))
    with ledger_backup._held(folder), pytest.raises(BackupError, match="by another process"):
        back_up(log, folder)
    with pytest.raises(BackupError, match="holds no backup"):
        read_manifest(tmp_path / "foreign")
