"""Taking a person out of ledger records: who is meant, what stands in their place, and what is left of a record.

A `UserErasure` names a person by a keyed digest and gives a random pseudonym. Who has the key (made from the seal key) knows
the person again, in records that come later too. Who has not can test no guess, for nothing that is left was made from the
user's ID without a key: a record that somebody was taken out of loses its seal, its producer's signature and the fingerprints
of its events. Its hash stays as it was, so the chain does; `Chain.accept_redacted` says who vouches for the rest.

Promise: every number stays: totals, costs, accounts and invoices of a redacted record are those of the record. What goes, of a
person's events, is the user's ID, the client's own ID and the attributes; of keys, budgets, alerts and commands the user's ID,
and where the person's keys were used from.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable

from google.protobuf.message import DecodeError

from billing.commands import CommandRefused
from billing.key_ring import Keys, as_ring, derived
from billing.limits import ERASED_KEYS_MAX
from billing.state import LedgerState
from billing.v1.account_pb2 import ApiKey, BudgetState
from billing.v1.alert_pb2 import Alert
from billing.v1.command_pb2 import BudgetUpsert, Command, UserErasure
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import UsageBatch

__all__ = ["DIGEST_BYTES", "Erasures", "erase_user", "erasure_of", "user_digests"]

DIGEST_BYTES = 32
_PSEUDONYM = re.compile(r"erased-[0-9a-f]{32}")
# An entry of RememberedKeys: a keyed digest, then the fingerprint of the event's bytes.
_ENTRY_BYTES, _FINGERPRINT_BYTES = 24, 8
# Users whose digest is known, of tenants of which somebody was erased; then all are forgotten and asked again.
_KNOWN_MAX = 100_000


def user_digests(seal_keys: Keys, tenant_id: str, user_id: str) -> list[bytes]:
    """What stands for the user in an erasure: the first for a new one, the others for those made under earlier seal keys."""
    tenant = tenant_id.encode()
    named = len(tenant).to_bytes(4, "big") + tenant + user_id.encode()
    return [hmac.digest(key, named, "sha256") for key in as_ring(derived(seal_keys, b"taximeter erasures")).all()]


def erase_user(state: LedgerState, said: UserErasure, record: LedgerRecord) -> str:
    """What the ledger itself holds of the person: its keys become the pseudonym's. The caller has found the tenant here.

    Returns what came of it. Raises CommandRefused.
    """
    if len(said.user_digest) != DIGEST_BYTES:
        raise CommandRefused(f"user_digest: {len(said.user_digest)} bytes; give an HMAC-SHA256, never the user's ID")
    if _PSEUDONYM.fullmatch(said.pseudonym) is None:
        raise CommandRefused(f"pseudonym: {said.pseudonym[:64]!r}; write erased- and 32 hexadecimal digits, drawn at random")
    if len(said.key_ids) > ERASED_KEYS_MAX:
        raise CommandRefused(f"key_ids: {len(said.key_ids)}; name at most {ERASED_KEYS_MAX}, and the others in another command")
    for key_id in said.key_ids:
        known = state.keys.get(key_id)
        if known is None or known.tenant_id != said.tenant_id:
            raise CommandRefused(f"key_ids: {key_id[:64]!r} is no key of tenant {said.tenant_id}; leave it out")
    for key_id in sorted(set(said.key_ids)):
        key = state.keys[key_id]
        key.user_id = said.pseudonym
        key.version.generation, key.version.sequence = state.generation, record.sequence
        record.keys.append(key)
    return f"{len(set(said.key_ids))} key(s) are the pseudonym's now"


def erasure_of(record: LedgerRecord) -> UserErasure | None:
    """The erasure that the record applies, if it does."""
    if record.WhichOneof("source") != "command" or not record.command.applied:
        return None
    command = Command.FromString(record.command.command)
    return command.user_erasure if command.WhichOneof("action") == "user_erasure" else None


class Erasures:
    """Who was erased, as a reader of records needs to know it."""

    def __init__(self, seal_keys: Keys) -> None:
        self._seal_keys = seal_keys
        # By tenant, digest to pseudonym; and by tenant and key ID, whose key it was.
        self._of: dict[str, dict[bytes, str]] = {}
        self._of_key: dict[tuple[str, str], str] = {}
        self._tenants: list[bytes] = []
        self._known: dict[tuple[str, str], str | None] = {}

    def __bool__(self) -> bool:
        """Whether anybody was."""
        return bool(self._of)

    def add(self, tenant_id: str, user_digest: bytes, pseudonym: str, key_ids: Iterable[str]) -> None:
        """One more, or the same again."""
        if tenant_id not in self._of:
            self._of[tenant_id] = {}
            self._tenants.append(tenant_id.encode())
        self._of[tenant_id][user_digest] = pseudonym
        self._of_key |= {(tenant_id, key_id): pseudonym for key_id in key_ids}
        self._known.clear()

    def take(self, record: LedgerRecord) -> bool:
        """Add the erasure that the record applies, if it does."""
        said = erasure_of(record)
        if said is None:
            return False
        self.add(said.tenant_id, said.user_digest, said.pseudonym, said.key_ids)
        return True

    def pseudonym_of(self, tenant_id: str, user_id: str) -> str | None:
        """What stands in the user's place; None: nobody erased that one."""
        of_tenant = self._of.get(tenant_id)
        if not of_tenant or not user_id:
            return None
        name = tenant_id, user_id
        if name not in self._known:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            digests = user_digests(self._seal_keys, tenant_id, user_id)
            self._known[name] = next((of_tenant[digest] for digest in digests if digest in of_tenant), None)
        return self._known[name]

    def keys_of(self, tenant_id: str) -> list[str]:
        """Keys of the tenant that somebody held who was erased."""
        return sorted(key_id for tenant, key_id in self._of_key if tenant == tenant_id)

    def redact(self, stored: bytes) -> LedgerRecord | None:
        """A stored record, or what was left of it, without those who were erased; None: it has none of them."""
        if not any(tenant in stored for tenant in self._tenants):
            return None
        record = LedgerRecord.FromString(stored)
        found: set[str] = set()
        match record.WhichOneof("source"):
            case "usage":
                found |= self._redact_usage(record)
            case "command":
                found |= self._redact_command(record)
            case "rejected":
                found |= self._redact_rejected(record)
        named: list[ApiKey | BudgetState] = [*record.keys, *record.budgets]
        for stated in named:
            if pseudonym := self.pseudonym_of(stated.tenant_id, stated.user_id):
                stated.user_id = pseudonym
                found.add(pseudonym)
        for alert in (*record.alerts, *record.alert_states):
            found |= self._redact_alert(alert)
        for places in record.key_places:
            if (pseudonym := self._of_key.get((places.tenant_id, places.key_id))) and places.places:
                places.ClearField("places")
                found.add(pseudonym)
        if not found:
            return None
        record.erased[:] = sorted({*record.erased, *found})
        record.ClearField("seal")
        return record

    def _redact_usage(self, record: LedgerRecord) -> set[str]:
        batch = UsageBatch.FromString(record.usage.batch)
        found = self._redact_batch(batch)
        if found:
            batch.ClearField("signature")
            record.usage.batch = batch.SerializeToString(deterministic=True)
            for remembered in record.usage.remembered:
                entries = bytearray(remembered.entries)
                for end in range(_ENTRY_BYTES, len(entries) + 1, _ENTRY_BYTES):
                    entries[end - _FINGERPRINT_BYTES : end] = bytes(_FINGERPRINT_BYTES)
                remembered.entries = bytes(entries)
        return found

    def _redact_batch(self, batch: UsageBatch) -> set[str]:
        found: set[str] = set()
        for event in batch.events:
            if pseudonym := self.pseudonym_of(event.tenant_id, event.user_id):
                event.user_id = pseudonym
                event.ClearField("client_request_id")
                event.ClearField("attributes")
                found.add(pseudonym)
        return found

    def _redact_command(self, record: LedgerRecord) -> set[str]:
        try:
            command = Command.FromString(record.command.command)
        except DecodeError:
            return set()
        meant: ApiKey | BudgetUpsert
        match command.WhichOneof("action"):
            case "key_upsert":
                meant = command.key_upsert.key
            case "budget_upsert":
                meant = command.budget_upsert
            case _:
                return set()
        pseudonym = self.pseudonym_of(meant.tenant_id, meant.user_id)
        if pseudonym is None:
            return set()
        meant.user_id = pseudonym
        record.command.command = command.SerializeToString(deterministic=True)
        record.command.ClearField("signature")
        return {pseudonym}

    def _redact_rejected(self, record: LedgerRecord) -> set[str]:
        try:
            batch = UsageBatch.FromString(record.rejected.payload)
        except DecodeError:
            return set()
        found = self._redact_batch(batch)
        if found:
            # Nothing was taken from it, so nothing needs it; and it may hold what this version cannot read.
            record.rejected.ClearField("payload")
            record.rejected.ClearField("payload_hash")
        return found

    def _redact_alert(self, alert: Alert) -> set[str]:
        found: set[str] = set()
        user_id = alert.labels.get("user_id", "")
        if pseudonym := self.pseudonym_of(alert.tenant_id, user_id):
            alert.labels["user_id"] = pseudonym
            alert.subject = alert.subject.replace(f"user {user_id}", f"user {pseudonym}")
            alert.summary = alert.summary.replace(f"user {user_id}", f"user {pseudonym}")
            found.add(pseudonym)
        pseudonym = self._of_key.get((alert.tenant_id, alert.labels.get("key_id", "")))
        if pseudonym and alert.labels.get("places"):
            alert.labels["places"] = ""
            found.add(pseudonym)
        return found
