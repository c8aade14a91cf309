"""What the writer has to know of people who were erased: their rows, and records without them.

Promise: from the batch that brings an erasure on, nothing is written that names the user, archived records included. What was
written before is `erasing`'s matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from billing.chain import redaction
from billing.erasures import Erasures, erasure_of
from billing.key_ring import Keys
from sinks.engine import Reader
from sinks.errors import LedgerError

if TYPE_CHECKING:
    from sinks.columns import Accepted

__all__ = ["Erased", "erasure_rows", "known_erasures", "redacted"]


def erasure_rows(batch: Sequence[Accepted]) -> Iterable[tuple[object, ...]]:
    """Of the table erasures."""
    for accepted in batch:
        said = erasure_of(accepted.record)
        if said is not None:
            record = accepted.record
            yield (
                said.tenant_id,
                said.pseudonym,
                said.user_digest.hex(),
                list(said.key_ids),
                record.log_time_ms,
                record.partition,
                record.generation.hex(),
                record.sequence,
                accepted.version,
            )


def known_erasures(reader: Reader, seal_keys: Keys) -> Erasures:
    """Everybody who was erased, as the database knows it."""
    erasures = Erasures(seal_keys)
    rows = reader.query(
        "SELECT tenant_id, user_digest, pseudonym, key_ids FROM erasures FINAL ORDER BY tenant_id, pseudonym, version"
    ).rows
    for tenant_id, digest, pseudonym, key_ids in rows:
        erasures.add(str(tenant_id), bytes.fromhex(str(digest)), str(pseudonym), cast("list[str]", key_ids))
    return erasures


def redacted(accepted: Accepted, erasures: Erasures, seal_keys: Keys) -> Accepted | None:
    """The record without those who were erased; None: it has none of them."""
    record = erasures.redact(accepted.stored)
    if record is None:
        return None
    stored = record.SerializeToString()
    return replace(accepted, record=record, stored=stored, redaction=redaction(accepted.record_hash, stored, seal_keys))


class Erased:
    """Takes people out of batches, in the order in which these are prepared."""

    def __init__(self, seal_keys: Keys | None) -> None:
        self._seal_keys = seal_keys
        self._erasures: Erasures | None = None

    def load(self, reader: Reader) -> bool:
        """Begin where the database stands; whether anybody was erased there."""
        known = known_erasures(reader, self._seal_keys) if self._seal_keys is not None else None
        self._erasures = known or None
        return bool(known)

    def take(self, batch: Sequence[Accepted]) -> tuple[Sequence[Accepted], bool]:
        """The batch without those who were erased, by it or before; and whether it erases any."""
        erasing = [accepted.record for accepted in batch if erasure_of(accepted.record) is not None]
        if not erasing and self._erasures is None:
            return batch, False
        if self._seal_keys is None:
            raise LedgerError("the ledger erases a user, and this sink was not given the seal key: give it ledger.seal_key")
        if self._erasures is None:
            self._erasures = Erasures(self._seal_keys)
        for record in erasing:
            self._erasures.take(record)
        return [redacted(accepted, self._erasures, self._seal_keys) or accepted for accepted in batch], bool(erasing)
