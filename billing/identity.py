"""Who is who: the partition of a tenant, the identity of a request, the fingerprint of what was said about it.

The dedupe key is a keyed 128-bit BLAKE2b of the length-prefixed (tenant, request ID), so that no delimiter in an ID and no
crafted pair collides with another; the time is not part of it, so a retry with another timestamp is still the same request.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

DEDUPE_KEY_BYTES = 16
FINGERPRINT_BYTES = 8
_FINGERPRINT = blake2b(digest_size=FINGERPRINT_BYTES)
_MASK = 0xFFFFFFFF
_M = 0x5BD1E995


def murmur2(data: bytes) -> int:
    """Kafka's murmur2 with its seed, as a signed-less 32-bit number (org.apache.kafka.common.utils.Utils.murmur2)."""
    length = len(data)
    h = 0x9747B28C ^ length
    whole = length & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little") * _M & _MASK
        k ^= k >> 24
        h = (h * _M & _MASK) ^ (k * _M & _MASK)
    tail = data[whole:]
    if tail:
        h ^= int.from_bytes(tail, "little")
        h = h * _M & _MASK
    h ^= h >> 13
    h = h * _M & _MASK
    return h ^ (h >> 15)


@lru_cache(maxsize=65_536)
def partition_of(tenant_id: str, partitions: int) -> int:
    """The partition where `tenant_id` lives, the one that Kafka's default partitioner picks for that key."""
    return (murmur2(tenant_id.encode()) & 0x7FFFFFFF) % partitions


def dedupe_key(key: bytes, tenant_id: str, request_id: str) -> bytes:
    """The 16 bytes under which (tenant, request) is remembered in a ledger whose founding record holds `key`."""
    return identities(key, (tenant_id,), (request_id,), (b"",))[0][0]


def identities(
    key: bytes, tenant_ids: Sequence[str], request_ids: Sequence[str], events: Sequence[bytes]
) -> tuple[list[bytes], list[bytes]]:
    """For each event its dedupe key, 16 bytes, and the fingerprint of its bytes as they came, 8 bytes.

    The dedupe key is BLAKE2b over the ledger's key, the tenant's length in four bytes, the tenant and the request ID.
    """
    of_tenant = {tenant_id: _tenant_hash(key, tenant_id).copy for tenant_id in set(tenant_ids)}
    digests = []
    fingerprints = []
    # A quarter of the step. One hash at a time: those of a whole batch, kept for a loop in C, would fill the processor's cache.
    for tenant_id, request_id, event in zip(tenant_ids, request_ids, events, strict=True):
        running = of_tenant[tenant_id]()
        running.update(request_id.encode())
        digests.append(running.digest())
        running = _FINGERPRINT.copy()
        running.update(event)
        fingerprints.append(running.digest())
    return digests, fingerprints


@lru_cache(maxsize=8_192)
def _tenant_hash(key: bytes, tenant_id: str) -> blake2b:
    """What has taken in key and tenant: a copy of it costs two thirds of a new one.

    The key goes before the message instead of into BLAKE2's own key block, which every copy would have to work through:
    nothing can be appended to a BLAKE2b, so a key of fixed length in front keys it as well.
    """
    encoded = tenant_id.encode()
    return blake2b(key + len(encoded).to_bytes(4, "little") + encoded, digest_size=DEDUPE_KEY_BYTES)
