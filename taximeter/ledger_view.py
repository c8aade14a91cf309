"""What the ledger itself says: usage.ledger, read from its beginning by the chain's rule, independent of every other
part.

Promise: an event is in the answer if and only if a valid record of the chain accepted it. It reads whole partitions,
so it is for demonstrations and checks, not for questions that the database answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from billing.chain import Chain
from billing.v1.usage_pb2 import RawUsageBatch, UsageEvent
from stream_processors.kafka_ports import KafkaLogReader
from taximeter import compose

if TYPE_CHECKING:
    from collections.abc import Collection

    from taximeter.config import Config

__all__ = ["accepted_events"]


async def accepted_events(config: Config, tenants: Collection[str]) -> dict[str, UsageEvent]:
    """The accepted events of these tenants in the present generation, by request ID."""
    reader = KafkaLogReader(compose.kafka_settings(config))
    topic = compose.topic_names(config).ledger
    seal_key = compose.ledger_keys(config).seal_key
    found: dict[str, UsageEvent] = {}
    for partition in range(config.ledger.partitions):
        chain = Chain(partition, seal_key)
        first, end = await reader.bounds(topic, partition)
        async for chunk in reader.read(topic, partition, first, end):
            for _, stored in chunk:
                record = chain.accept(stored)
                if record is None or record.WhichOneof("source") != "usage":
                    continue
                dropped = {entry.index for entry in record.usage.dropped}
                for index, raw in enumerate(RawUsageBatch.FromString(record.usage.batch).events):
                    if index not in dropped:
                        event = UsageEvent.FromString(raw)
                        if event.tenant_id in tenants:
                            found[event.request_id] = event
    return found
