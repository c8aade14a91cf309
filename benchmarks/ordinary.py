"""The ordinary way to count usage with Faust, as its documentation shows it: one JSON message an event, a table of seen
request IDs, tables of counts and sums, changelog topics behind them. It is what `benchmarks.ledger` compares the worker with.

Run as: python -m benchmarks.ordinary BOOTSTRAP TOPIC EVENTS FOLDER; prints events per second from the first to the last.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterable
from typing import Any

import faust


async def main(bootstrap: str, topic: str, events: int, folder: str) -> float:
    """Count until all events are in the tables."""
    app = faust.App(
        "ordinary",
        broker=f"kafka://{bootstrap}",
        store="memory://",
        datadir=folder,
        web_enabled=False,
        topic_disable_leader=True,
        topic_partitions=1,
        topic_replication_factor=1,
        broker_session_timeout=6.0,
        broker_heartbeat_interval=1.0,
        consumer_auto_offset_reset="earliest",
    )
    seen = app.Table("seen", default=int, partitions=1)
    requests = app.Table("requests", default=int, partitions=1)
    input_tokens = app.Table("input-tokens", default=int, partitions=1)
    output_tokens = app.Table("output-tokens", default=int, partitions=1)
    times: list[float] = []
    done = asyncio.Event()

    async def count(stream: AsyncIterable[dict[str, Any]]) -> None:
        taken = 0
        async for event in stream:
            if taken == 0:
                times.append(time.perf_counter())
            taken += 1
            request_id = f"{event['tenant_id']}/{event['request_id']}"
            if not seen[request_id]:
                seen[request_id] = 1
                key = f"{event['tenant_id']}/{event['model']}"
                requests[key] += 1
                input_tokens[key] += event["input_tokens"]
                output_tokens[key] += event["output_tokens"]
            if taken == events:
                times.append(time.perf_counter())
                done.set()

    app.agent(app.topic(topic, value_serializer="json"), name="count")(count)
    await app.start()
    await done.wait()
    await app.stop()
    return events / (times[1] - times[0])


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    print(asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])))
