"""What was charged long ago, by name: the ledger remembers an event for its horizon, the database for good.

Promise: of the events that are asked about, those that a ledger record charged, as far as the sink has written. What came
within the horizon the ledger knows by itself, so whoever leaves out what is found here charges no backfill a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

from sinks.engine import Reader

__all__ = ["charged_before"]

# Of the IDs in one query, which ClickHouse takes up to 256 KiB, even if each byte of them must be escaped.
_ID_BYTES_MAX = 100_000
_IDS_MAX = 1_000

# Tenant and request ID.
Name = tuple[str, str]


def charged_before(reader: Reader, names: Sequence[Name]) -> set[Name]:
    """Those of `names` that were charged."""
    found: set[Name] = set()
    for tenant_id, of_tenant in groupby(sorted(set(names)), key=itemgetter(0)):
        for request_ids in _parts([request_id for _, request_id in of_tenant]):
            rows = reader.query(
                "SELECT DISTINCT request_id FROM usage_events WHERE tenant_id = {tenant:String} "
                "AND request_id IN {requests:Array(String)}",
                {"tenant": tenant_id, "requests": request_ids},
            ).rows
            found.update((tenant_id, str(request_id)) for (request_id,) in rows)
    return found


def _parts(request_ids: Sequence[str]) -> Iterator[list[str]]:
    """As many at a time as one query may name."""
    part: list[str] = []
    size = 0
    for request_id in request_ids:
        size += len(request_id.encode())
        if part and (size > _ID_BYTES_MAX or len(part) == _IDS_MAX):
            yield part
            part, size = [], len(request_id.encode())
        part.append(request_id)
    if part:
        yield part
