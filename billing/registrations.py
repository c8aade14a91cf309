"""Who may report usage, and of whom: registrations of producers, and the signatures of their batches.

Promise: a batch whose producer is registered is taken only if it carries that registration's signature and only for the
registration's tenants. Refused usage is not lost: its numbers are not marked as taken, so it stays in the producer's journal,
and comes again when the registration allows it. Usage of other tenants inside a batch is refused event by event, and kept.

A producer without a registration of its own has that of the longest name ending in "*" that fits. Where none fits, everybody's
usage is taken; "*" revoked shuts that door.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from billing.key_ring import Keys, as_ring, derived
from billing.limits import (
    ALERT_REQUEST_IDS_MAX,
    ID_CHARS_MAX,
    KEYS_MAX,
    REGISTRATIONS_BYTES_MAX,
    REGISTRATIONS_MAX,
)
from billing.v1.account_pb2 import LedgerPosition, ProducerRegistration
from billing.v1.alert_pb2 import ALERT_RULE_UNREGISTERED_PRODUCER, SEVERITY_CRITICAL, Alert
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import UsageBatch

EVERYONE = "*"
_TENANTS_NAMED = 5
# Field 15, length-delimited, 32 bytes long.
_SIGNATURE_TAG = bytes((15 << 3 | 2, 32))
SIGNATURE_BYTES = len(_SIGNATURE_TAG) + 32


class Registrations:
    """The registrations of one partition, by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, ProducerRegistration] = {}
        # What stands before the "*", the longest first.
        self._prefixes: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._by_name)

    def set(self, registration: ProducerRegistration) -> None:
        """Put it in the place of what had its name."""
        self._by_name[registration.producer_id] = registration
        self._prefixes = sorted((name[:-1] for name in self._by_name if name.endswith("*")), key=len, reverse=True)

    def get(self, name: str) -> ProducerRegistration | None:
        """The one of exactly this name."""
        return self._by_name.get(name)

    def find(self, producer_id: str) -> ProducerRegistration | None:
        """The one that holds for this producer; None: nothing is said of it, so it may report everybody's usage."""
        own = self._by_name.get(producer_id)
        if own is not None:
            return own
        return next((self._by_name[prefix + "*"] for prefix in self._prefixes if producer_id.startswith(prefix)), None)

    def all(self) -> list[ProducerRegistration]:
        """In the order of their names."""
        return [self._by_name[name] for name in sorted(self._by_name)]


def registration_problem(known: Registrations, said: ProducerRegistration) -> str:
    """Why `said` cannot be registered: field, value, mend; empty where it can."""
    name = said.producer_id
    if not 0 < len(name) <= ID_CHARS_MAX or "*" in name[:-1]:
        return f"producer_id: {name[:32]!r}; give 1 to {ID_CHARS_MAX} characters, a * at the end alone"
    for tenant_id in said.tenant_ids:
        if not 0 < len(tenant_id) <= ID_CHARS_MAX:
            return f"tenant_ids: {tenant_id[:32]!r}; give 1 to {ID_CHARS_MAX} characters"
    if not said.revoked and said.all_tenants == bool(said.tenant_ids):
        return "tenant_ids: say whom the producer may bill, either by name or all of them"
    others = [each for each in known.all() if each.producer_id != name]
    if len(others) >= REGISTRATIONS_MAX:
        return f"producer_id: {REGISTRATIONS_MAX} are registered; give several one name that ends in *"
    size = sum(each.ByteSize() for each in others) + said.ByteSize()
    if size > REGISTRATIONS_BYTES_MAX:
        return f"tenant_ids: all registrations would have {size} bytes, at most {REGISTRATIONS_BYTES_MAX}; name fewer tenants"
    return ""


# -- signatures ---------------------------------------------------------------------------------------------------------


def producer_key(command_key: Keys, name: str, key_number: int = 0) -> Keys:
    """What the producers of the registration `name` sign with: made from the command key, and good for nothing else."""
    return derived(command_key, b"taximeter producer\0%d\0%s" % (key_number, name.encode()))


def forward_key(seal_key: Keys) -> Keys:
    """What a ledger worker signs with what it sends on to another partition."""
    return derived(seal_key, b"taximeter forwarded usage")


def sign_batch(value: bytes, key: bytes) -> bytes:
    """The bytes of a UsageBatch, which has no signature yet, with one."""
    return value + _SIGNATURE_TAG + hmac.digest(key, hashlib.sha256(value).digest(), "sha256")


def is_signed(value: bytes, keys: Keys) -> bool:
    """Whether the bytes end with the signature of one of `keys`."""
    view = memoryview(value)
    digest = hashlib.sha256(view[:-SIGNATURE_BYTES]).digest()
    signature = view[-SIGNATURE_BYTES:]
    tries = [hmac.compare_digest(signature, _SIGNATURE_TAG + hmac.digest(key, digest, "sha256")) for key in as_ring(keys).all()]
    assert len(tries) <= KEYS_MAX
    return any(tries)


# -- what the step asks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Permission:
    """What holds for one batch. `refusal`: all of it is refused, and why."""

    registration: ProducerRegistration | None = None
    refusal: str = ""
    # Of a registration for some tenants; None: all.
    tenant_ids: frozenset[str] | None = field(default=None, repr=False)

    def foreign(self, tenant_ids: Iterable[str]) -> frozenset[str]:
        """Those of them that the producer may not bill."""
        return frozenset() if self.tenant_ids is None else frozenset(tenant_ids) - self.tenant_ids


_EVERYTHING = Permission()


def permission(known: Registrations, batch: UsageBatch, value: bytes, command_key: Keys, seal_key: Keys) -> Permission:
    """What the sender of `batch` (its bytes: `value`) may do."""
    if not known:
        return _EVERYTHING
    if batch.forwarded and is_signed(value, forward_key(seal_key)):
        # The worker that sends it on has looked.
        return _EVERYTHING
    found = known.find(batch.producer_id)
    if found is None:
        return _EVERYTHING
    name = batch.producer_id[:ID_CHARS_MAX]
    if found.revoked:
        if found.producer_id == EVERYONE:
            refusal = f"producer_id: {name!r} is not registered; register it, and its journal sends this again"
        else:
            refusal = f"producer_id: {name!r} is revoked (as {found.producer_id!r}); register it again if that is a mistake"
        return Permission(found, refusal)
    if not found.unsigned and not is_signed(value, producer_key(command_key, found.producer_id, found.key_number)):
        refusal = f"signature: of producer {name!r} is not that of its registration {found.producer_id!r}; give it that key"
        return Permission(found, refusal)
    return Permission(found, "", None if found.all_tenants else frozenset(found.tenant_ids))


def alert_refused(
    record: LedgerRecord,
    known: Registrations,
    permitted: Permission,
    producer_id: str,
    cooldown_ms: int,
    *,
    tenant_ids: Sequence[str] = (),
    request_ids: Sequence[str] = (),
    events: int,
) -> None:
    """Say in `record` that usage was refused, unless that was said of the registration a moment ago, and note that it was."""
    before = permitted.registration
    assert before is not None, "only what a registration says refuses"
    if before.alerted_ms and record.log_time_ms < before.alerted_ms + cooldown_ms:
        return
    noted = ProducerRegistration()
    noted.CopyFrom(before)
    noted.alerted_ms = record.log_time_ms
    known.set(noted)
    record.registrations.append(noted)
    name = producer_id[:ID_CHARS_MAX]
    what = permitted.refusal or (
        f"producer {name!r} reported usage of {len(tenant_ids)} tenant(s) that it is not registered for: "
        + ", ".join(tenant_id[:ID_CHARS_MAX] for tenant_id in tenant_ids[:_TENANTS_NAMED])
    )
    record.alerts.append(
        Alert(
            rule=ALERT_RULE_UNREGISTERED_PRODUCER,
            severity=SEVERITY_CRITICAL,
            subject=name,
            summary=f"usage was refused: {what}",
            request_ids=[request_id[:ID_CHARS_MAX] for request_id in request_ids[:ALERT_REQUEST_IDS_MAX]],
            figures={"events": events},
            labels={"producer_id": name},
        )
    )


def register(known: Registrations, said: ProducerRegistration, record: LedgerRecord) -> None:
    """Take what a command says, which has no problem, and state it."""
    made = ProducerRegistration()
    made.CopyFrom(said)
    made.alerted_ms = 0
    made.version.CopyFrom(LedgerPosition(generation=record.generation, sequence=record.sequence))
    known.set(made)
    record.registrations.append(made)
