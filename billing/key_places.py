"""Where keys are used from: the distinct places of each key within an hour of log time.

A place is the client's address where events carry it (the attribute `client.address`), else the region, else the server. A
batch's events are sampled, so that a busy ledger pays the same for a large batch as for a small one; a key that is used from
many places shows within a few batches. Nothing is kept of an earlier hour.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from billing.limits import KEY_PLACES_KEPT, PLACE_CHARS_MAX, PLACED_KEYS_MAX
from billing.v1.ledger_pb2 import KeyPlaces, LedgerRecord
from billing.v1.usage_pb2 import UsageEvent

HOUR_MS = 3_600_000
ADDRESS_ATTRIBUTE = "client.address"


def place_of(event: UsageEvent, *, with_attributes: bool = True) -> str:
    """Where the request came from, as far as its event says; `with_attributes`: whether it may have any."""
    # `get` adds nothing to the map.
    address = event.attributes.get(ADDRESS_ATTRIBUTE, "") if with_attributes else ""
    return (address or event.region or event.server_id)[:PLACE_CHARS_MAX]


class Places:
    """Of all keys of a partition."""

    def __init__(self) -> None:
        self.hour = 0
        self._of: dict[tuple[str, str], list[str]] = {}
        self._keys: Counter[str] = Counter()

    def note(self, tenant_id: str, key_id: str, place: str, record: LedgerRecord) -> Sequence[str]:
        """The key's places of this hour, that one included; a new one is stated."""
        hour = record.log_time_ms // HOUR_MS
        known = self._of.get((tenant_id, key_id), ()) if hour == self.hour else ()
        if place in known or len(known) >= KEY_PLACES_KEPT:
            return known
        if not known and hour == self.hour and self._keys[tenant_id] >= PLACED_KEYS_MAX:
            return known
        stated = KeyPlaces(tenant_id=tenant_id, key_id=key_id, hour=hour, places=[*known, place])
        record.key_places.append(stated)
        self.set(stated)
        return self._of[tenant_id, key_id]

    def set(self, stated: KeyPlaces) -> None:
        """Take what a record states. What is said of a later hour ends what is known of this one."""
        if stated.hour < self.hour:
            return
        if stated.hour > self.hour:
            self.hour = stated.hour
            self._of.clear()
            self._keys.clear()
        if (stated.tenant_id, stated.key_id) not in self._of:
            self._keys[stated.tenant_id] += 1
        self._of[stated.tenant_id, stated.key_id] = list(stated.places)

    def forget(self, before_hour: int) -> None:
        """Let go of an hour that nobody asks for any more."""
        if self.hour < before_hour:
            self._of.clear()
            self._keys.clear()

    def all(self) -> Iterator[KeyPlaces]:
        """What is known, in a stated order."""
        for tenant_id, key_id in sorted(self._of):
            yield KeyPlaces(tenant_id=tenant_id, key_id=key_id, hour=self.hour, places=self._of[tenant_id, key_id])
