"""Anchored heads: a ledger that was written anew or cut is found, though every seal and row fits; so is a changed file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from billing.key_ring import KeyRing
from sinks.anchors import append_heads, read_anchors
from sinks.audit import audit
from sinks.engines.chdb import ChdbEngine
from sinks.errors import AnchorError
from sinks.follow import feed
from tests.billing.ledgers import KEYS, NOW_MS, SEAL_KEY, Ledger, batch, tenants_in, usage
from tests.sinks.emptying import empty_tables

TENANT = tenants_in(1)[0]
DAY_MS = 86_400_000


def filled(name: str, requests: int = 3) -> Ledger:
    ledger = Ledger()
    ledger.tenant(TENANT)
    for number in range(requests):
        ledger.usage(batch([usage(f"{name}-{number}", TENANT)]))
    return ledger


def kinds(engine: ChdbEngine, path: Path | None) -> set[str]:
    anchors = [] if path is None else read_anchors(path, KEYS.seal_key)
    return {finding.kind for finding in audit(engine, KEYS.seal_key, anchors=anchors).findings}


def test_an_archive_has_what_was_anchored_and_heads_are_anchored_as_they_move(engine: ChdbEngine, tmp_path: Path) -> None:
    path, ledger = tmp_path / "away" / "anchors.jsonl", filled("real")
    feed(engine, ledger.stored[:3], KEYS.seal_key)
    [first] = append_heads(path, engine, KEYS.seal_key, NOW_MS)
    assert (first.sequence, path.stat().st_mode & 0o777) == (2, 0o600)
    assert append_heads(path, engine, KEYS.seal_key, NOW_MS + 1) == [], "it has not moved"
    feed(engine, ledger.stored, KEYS.seal_key)
    assert append_heads(path, engine, KEYS.seal_key, NOW_MS + 2, daily=True) == [], "this day has one"
    [second] = append_heads(path, engine, KEYS.seal_key, NOW_MS + DAY_MS, daily=True)
    assert second.record_hash == ledger.state.record_hash.hex()
    report = audit(engine, KEYS.seal_key, anchors=read_anchors(path, KEYS.seal_key))
    assert (report.findings, report.anchors) == ([], 2)


@pytest.mark.parametrize(("now", "kind"), [("written anew with the right key", "anchor_differs"), ("cut", "anchor_missing")])
def test_a_ledger_that_is_whole_in_itself_and_not_the_anchored_one_is_found(
    engine: ChdbEngine, tmp_path: Path, now: str, kind: str
) -> None:
    path, ledger = tmp_path / "anchors.jsonl", filled("real")
    feed(engine, ledger.stored, KEYS.seal_key)
    append_heads(path, engine, KEYS.seal_key, NOW_MS)
    empty_tables(engine)
    feed(engine, ledger.stored[:-1] if now == "cut" else filled("other").stored, KEYS.seal_key)
    # The negative control: by itself it is a ledger like any other.
    assert kinds(engine, None) == set()
    assert kinds(engine, path) == {kind}


def test_a_file_that_was_changed_is_refused_with_its_line(engine: ChdbEngine, tmp_path: Path) -> None:
    path, ledger = tmp_path / "anchors.jsonl", filled("real")
    for count in (2, 3, 4):
        feed(engine, ledger.stored[:count], KEYS.seal_key)
        append_heads(path, engine, KEYS.seal_key, NOW_MS)
    lines = path.read_text().splitlines(keepends=True)
    edited = json.loads(lines[1]) | {"sequence": 9}
    changes = {
        2: [lines[0], json.dumps(edited, sort_keys=True) + "\n", lines[2]],
        1: lines[1:],
        3: [*lines[:2], "{}\n"],
    }
    changes_beside = [(2, [lines[0], lines[2]]), (1, [lines[1], lines[0], lines[2]]), (1, ["[" * 5_000 + "\n"])]
    for number, changed in [*changes.items(), *changes_beside]:
        path.write_text("".join(changed))
        with pytest.raises(AnchorError, match=f"line {number} is not as it was written"):
            append_heads(path, engine, KEYS.seal_key, NOW_MS)
    path.write_text("".join(lines))
    assert len(read_anchors(path, KeyRing({"2": b"t" * 32, "": SEAL_KEY}))) == 3, "read by a ring that has the key"
    with pytest.raises(AnchorError, match="line 1"):
        read_anchors(path, b"x" * 32)
