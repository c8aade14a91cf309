"""Backups by command: taken, proved, restored; what is refused is told in one line, and a backup holds no secret."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from billing.key_ring import parse
from sinks.anchors import Anchor, _line
from taximeter.cli import application
from taximeter.embedded.broker import TansuBroker, TansuSettings
from taximeter.embedded.state import DataDir, RunState

SEAL_KEY, COMMAND_KEY = "5e" * 32, "c0" * 32


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[list[str]]:
    """Two, with nothing."""
    brokers = [TansuBroker(TansuSettings(log_path=tmp_path / f"{name}.log")) for name in ("one", "two")]
    for broker in brokers:
        broker.start()
    yield [broker.bootstrap for broker in brokers]
    for broker in brokers:
        broker.stop()


def run(bootstrap: str, *words: str, seal_key: str = SEAL_KEY) -> Result:
    settings = (f"kafka.bootstrap={bootstrap}", f"ledger.seal_key={seal_key}", "ledger.partitions=2")
    flags = [part for setting in settings for part in ("--set", setting)]
    return CliRunner().invoke(application(), [*words, *flags, "--json"])


def said(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def error_of(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return str(json.loads(result.stdout)["error"])


def anchors(path: Path, heads: list[Anchor]) -> str:
    """As the sink writes them."""
    previous, lines = "", []
    for head in heads:
        lines.append(_line(head, previous, parse(SEAL_KEY.encode())))
        previous = hashlib.sha256(lines[-1]).hexdigest()
    path.write_bytes(b"\n".join(lines))
    return str(path)


def test_a_backup_is_taken_proved_and_restored(clusters: list[str], tmp_path: Path) -> None:
    one, two = clusters
    folder = str(tmp_path / "backup")
    assert "usage.ledger" in error_of(run(one, "backup", "take", folder))
    said(run(one, "topics", "apply"))
    taken = said(run(one, "backup", "take", folder))
    assert [(each["sequence"], each["records"], each["ignored"]) for each in taken["partitions"]] == [(0, 1, 0)] * 2
    assert said(run("127.0.0.1:1", "backup", "verify", folder)) == taken, "no broker is asked"

    planned = said(run(two, "backup", "restore", folder, "--dry-run"))
    done = said(run(two, "backup", "restore", folder))
    assert (planned["dry_run"], done["dry_run"]) == (True, False)
    assert [each["kind"] for each in done["changes"]].count("found ledger") == 2
    assert {each["name"] for each in done["changes"]} == {each["name"] for each in planned["changes"]}
    assert said(run(two, "backup", "restore", folder))["changes"] == []

    held = b"".join(path.read_bytes() for path in (tmp_path / "backup").rglob("*") if path.is_file())
    assert SEAL_KEY.encode() not in held
    assert "give this process the installation's" in error_of(run(one, "backup", "verify", folder, seal_key="11" * 32))


def test_a_backup_is_held_against_the_anchored_heads(clusters: list[str], tmp_path: Path) -> None:
    cluster, folder = clusters[0], str(tmp_path / "backup")
    said(run(cluster, "topics", "apply"))
    taken = said(run(cluster, "backup", "take", folder))
    heads = [
        Anchor(taken["taken_ms"] - 1, each["partition"], each["generation"], each["sequence"], each["record_hash"])
        for each in taken["partitions"]
    ]
    later = replace(heads[0], sequence=7)

    def verified(*given: Anchor) -> Result:
        return run(cluster, "backup", "verify", folder, "--anchors", anchors(tmp_path / "anchors", list(given)))

    assert said(verified(*heads, later))["anchors"] == 2
    assert "the ledger was written anew" in error_of(verified(heads[0], replace(heads[1], record_hash="00" * 32)))
    assert "is not in it" in error_of(verified(*heads, replace(heads[0], generation="ab" * 16)))
    wrong = anchors(tmp_path / "anchors", [replace(heads[0], record_hash="00" * 32)])
    assert "the ledger was written anew" in error_of(run(cluster, "backup", "take", str(tmp_path / "new"), "--anchors", wrong))
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_what_up_runs_is_copied_otherwise(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path / "data")
    with data_dir.lock():
        data_dir.write(RunState(1, data_dir.config_path))
        for words in (["backup", "take", "x"], ["backup", "restore", "x"]):
            result = CliRunner().invoke(application(), [*words, "--data-dir", str(data_dir.path)])
            assert result.exit_code == 2
            assert "stop it, and copy that folder whole" in result.stderr
