"""Backups of the ledger, which is the state: taken while everything runs, proved, and made a ledger again elsewhere."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from billing.key_ring import Keys
from billing.v1.backup_pb2 import BackupManifest
from billing.v1.ledger_pb2 import LedgerRecord
from sinks.anchors import Anchor, read_anchors
from taximeter import compose
from taximeter.commands.common import Context, JsonOption, command
from taximeter.commands.operations import DryRunOption, print_changes
from taximeter.errors import MisuseError, TaximeterError
from taximeter.times import now_ms

__all__ = ["restore", "take", "verify"]

_FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", file_okay=False, help="The backup's folder.")]
_AnchorsOption = Annotated[
    Path | None, typer.Option("--anchors", help="Chain heads that the ledger must have (default: ledger.anchor_file).")
]


@command
def take(context: Context, folder: _FolderArgument, anchors: _AnchorsOption = None, json: JsonOption = False) -> None:
    """Copy the ledger into a folder while everything runs, each record proved on the way; again, it adds what has come since.
    Keys and secrets are not in it."""
    from stream_processors.kafka_ports import KafkaLogReader
    from stream_processors.ledger_backup import take as take_backup

    _refuse_embedded(context)
    config = context.config()
    seal_key = compose.key_ring(config, "seal_key", needed_for="proving a backup")
    anchored = _Anchored.read(anchors or config.ledger.anchor_file, seal_key)
    with context.output.progress("ledger records copied", None) as advance:

        def on_record(record: LedgerRecord, record_hash: bytes) -> None:
            anchored.compare(record, record_hash)
            advance(1)

        reader = KafkaLogReader(compose.kafka_settings(config))
        topic, partitions = compose.topic_names(config).ledger, config.ledger.partitions
        manifest = asyncio.run(take_backup(reader, topic, partitions, seal_key, folder, now_ms(), on_record=on_record))
    _print(context, f"Backup in {folder}", manifest, anchored, as_json=json)


@command
def verify(context: Context, folder: _FolderArgument, anchors: _AnchorsOption = None, json: JsonOption = False) -> None:
    """Prove a backup: its files, the chain of every partition, and the anchored heads. Asks nothing but the folder; exit code
    1 if something is not as it was written."""
    from stream_processors.ledger_backup import read_manifest, read_messages

    config = context.config()
    seal_key = compose.key_ring(config, "seal_key", needed_for="proving a backup")
    anchored = _Anchored.read(anchors or config.ledger.anchor_file, seal_key)
    manifest = read_manifest(folder)
    with context.output.progress("ledger records proved", None) as advance:
        for partition in manifest.partitions:
            for message in read_messages(folder, partition, manifest.ledger_topic, seal_key):
                if message.record is not None:
                    anchored.compare(message.record, message.record_hash)
                    advance(1)
    anchored.check_all_met(manifest)
    _print(context, f"Backup in {folder}: everything agrees", manifest, anchored, as_json=json)


@command
def restore(
    context: Context,
    folder: _FolderArgument,
    inputs_kept: Annotated[
        bool,
        typer.Option(
            "--inputs-kept",
            help="The topics of usage and commands are still there, and are read on from where the backup stands.",
        ),
    ] = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Make a backup the ledger of a cluster that has none, and found it again behind its last record. It may be interrupted
    and run again."""
    from stream_processors import ledger_restore

    _refuse_embedded(context)
    config = context.config()
    settings = compose.apply_settings(config, embedded=False)
    with context.output.progress("ledger records proved", None) as advance:
        work = ledger_restore.plan if dry_run else ledger_restore.restore
        changes = asyncio.run(work(settings, folder, inputs_kept=inputs_kept, on_record=lambda *_: advance(1)))
    print_changes(context, changes, dry_run=dry_run, as_json=json)
    if not dry_run:
        context.output.note(
            "Now, before workers and sink start: workers get empty disks and no snapshots of before (empty the place of "
            "ledger.snapshot_url), the sink an empty database. See docs/operating.md, Restoring."
        )


def _refuse_embedded(context: Context) -> None:
    if context.running is not None:
        raise MisuseError(
            f"{context.data_dir.path} is run by `taximeter up`, whose broker keeps nothing: stop it, and copy that folder whole"
        )


class _Anchored:
    """The anchored heads, each held against the record that comes by."""

    def __init__(self, anchors: list[Anchor]) -> None:
        self._left = {(anchor.partition, anchor.generation, anchor.sequence): anchor for anchor in anchors}
        self.met = 0

    @classmethod
    def read(cls, path: Path | None, seal_key: Keys) -> "_Anchored":
        return cls([] if path is None else read_anchors(path, seal_key))

    def compare(self, record: LedgerRecord, record_hash: bytes) -> None:
        anchor = self._left.pop((record.partition, record.generation.hex(), record.sequence), None)
        if anchor is None:
            return
        if anchor.record_hash != record_hash.hex():
            raise TaximeterError(
                f"partition {record.partition}, sequence {record.sequence} has the hash {record_hash.hex()}, and "
                f"{anchor.record_hash} was anchored: the ledger was written anew by somebody who has its key; see "
                "docs/threat-model.md"
            )
        self.met += 1

    def check_all_met(self, manifest: BackupManifest) -> None:
        heads = {each.head.partition: each.head.position for each in manifest.partitions}
        for anchor in self._left.values():
            head = heads.get(anchor.partition)
            is_later = head is not None and head.generation.hex() == anchor.generation and head.sequence < anchor.sequence
            if not is_later and anchor.anchored_ms <= manifest.taken_ms:
                raise TaximeterError(
                    f"partition {anchor.partition}, sequence {anchor.sequence} of generation {anchor.generation[:12]} was "
                    "anchored before the backup was taken, and is not in it: the ledger was made anew, or this is the backup "
                    "of another one"
                )


def _print(context: Context, title: str, manifest: BackupManifest, anchored: _Anchored, *, as_json: bool) -> None:
    partitions = [
        {
            "partition": each.head.partition,
            "generation": each.head.position.generation.hex(),
            "sequence": each.head.position.sequence,
            "record_hash": each.head.record_hash.hex(),
            "records": each.records,
            "ignored": each.ignored,
            "bytes": sum(segment.size_bytes for segment in each.segments),
        }
        for each in manifest.partitions
    ]
    if as_json:
        context.output.json({"taken_ms": manifest.taken_ms, "anchors": anchored.met, "partitions": partitions})
        return
    columns = ["partition", "generation", "sequence ", "records ", "not of the chain ", "bytes "]
    rows = [
        [str(p["partition"]), str(p["generation"])[:12], p["sequence"], p["records"], p["ignored"], p["bytes"]]
        for p in partitions
    ]
    context.output.table(f"{title} (anchored heads met: {anchored.met})", columns, rows)
