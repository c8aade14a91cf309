"""The load driver for requests: tritonclient through the gateway, outside of everything that is killed.

Promise: an attempt is synced to the history before it is sent, and its receipt when it is over: ok where the whole answer came
and the usage that was told is what was asked for; unknown, with what had been delivered, where the stream broke. A request that
broke is not sent again under its ID: the gateway counts inferences, and a client's second one is a second charge.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final

import grpc
import numpy as np
import tritonclient.grpc.aio as triton_aio

from billing.identity import partition_of
from tests.chaos.history import Attempt, History, Outcome, Receipt

__all__ = ["GatewayLoad"]

_MODEL: Final = "trace"
_STREAMS: Final = 10
_CHUNK_DELAY_MS: Final = 10
_DEADLINE_S: Final = 30.0
_PAUSE_S: Final = 0.25
# What a gateway may have counted and not delivered: the chunks that it holds, and one that is on its way.
_CHUNKS_ON_THE_WAY: Final = 65
# Refused before anything was forwarded: nothing may be charged.
_REFUSED: Final = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.PERMISSION_DENIED)


class GatewayLoad:
    """Streams of requests by each tenant with its own key. `begin`, `end`; one at a time."""

    def __init__(self, address: str, partitions: int) -> None:
        self.keys: dict[str, str] = {}
        self.acknowledged = 0
        # Requests that are streaming now and of which something has arrived.
        self.flowing: dict[str, int] = {}
        self._address = address
        self._partitions = partitions
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway-load", daemon=True)
        self._thread.start()
        self._running = False
        self._working: Future[None] | None = None
        self._count = 0

    def begin(
        self, history: History, prefix: str, tenants: Sequence[str], prices_pico: Mapping[str, int], draw: random.Random
    ) -> None:
        """Ask, with several requests at a time, until `end`."""
        self._history, self._prefix, self._tenants = history, prefix, tenants
        self._prices = {name: prices_pico[name] for name in ("uncached_input_tokens", "output_tokens")}
        self._draw = random.Random(draw.random())
        self._count, self.acknowledged, self._running = 0, 0, True
        self._working = asyncio.run_coroutine_threadsafe(self._work(), self._loop)

    def end(self, timeout_s: float = 40.0) -> bool:
        """Ask no more; every request that is on its way ends by its own deadline."""
        self._running = False
        working, self._working = self._working, None
        if working is not None:
            working.result(timeout_s)
        return True

    def marks(self, timeout_s: float = 10.0) -> dict[str, object] | None:
        """A request in each partition, answered: the gateway numbers it after everything that it knew before."""
        barriers = asyncio.run_coroutine_threadsafe(self._barriers(), self._loop).result(timeout_s + _DEADLINE_S)
        return None if barriers is None else {"requests": barriers}

    def close(self) -> None:
        self._running = False
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _work(self) -> None:
        await asyncio.gather(*(self._one_after_another() for _ in range(_STREAMS)))

    async def _one_after_another(self) -> None:
        while self._running:
            if await self._request(self._draw.choice(self._tenants)) is not Outcome.OK:
                await asyncio.sleep(_PAUSE_S)

    async def _barriers(self) -> list[str] | None:
        homes = {partition_of(tenant_id, self._partitions): tenant_id for tenant_id in self._tenants}
        names = []
        for tenant_id in homes.values():
            if await self._request(tenant_id) is not Outcome.OK:
                return None
            names.append(f"{self._prefix}{self._count}")
        return names

    async def _request(self, tenant_id: str) -> Outcome:
        self._count += 1
        draw, name = self._draw, f"{self._prefix}{self._count}"
        chunk_tokens = draw.randint(1, 5)
        tokens = {"uncached_input_tokens": draw.randint(1, 3_000), "output_tokens": draw.randint(1, 120)}
        slack = {"output_tokens": _CHUNKS_ON_THE_WAY * chunk_tokens}
        attempt = Attempt(name, tenant_id, tokens, self._prices, exact=False, slack=slack, at_ms=time.time_ns() // 1_000_000)
        await asyncio.to_thread(self._history.add, [attempt])
        receipt = await self._stream(attempt, chunk_tokens)
        self.flowing.pop(name, None)
        await asyncio.to_thread(self._history.add, [receipt])
        self.acknowledged += receipt.outcome is Outcome.OK
        return receipt.outcome

    async def _stream(self, attempt: Attempt, chunk_tokens: int) -> Receipt:
        name, delivered = attempt.request_id, 0
        told: dict[str, int] | None = None

        def unknown(reason: str) -> Receipt:
            counts = {**attempt.tokens, "output_tokens": delivered} if delivered else {}
            return Receipt(name, Outcome.UNKNOWN, counts, reason)

        try:
            async with triton_aio.InferenceServerClient(self._address) as client, asyncio.timeout(_DEADLINE_S):
                headers = {"authorization": f"Bearer {self.keys[attempt.tenant_id]}"}
                async for result, error in client.stream_infer(_one(attempt, chunk_tokens), headers=headers):
                    if error is not None:
                        return unknown(f"in band: {error}")
                    delivered += len(result.as_numpy("text_output")[0])
                    self.flowing[name] = delivered
                    told = _told(result.get_response()) or told
        except grpc.aio.AioRpcError as error:
            if error.code() in _REFUSED and not delivered:
                return Receipt(name, Outcome.FAILED, reason=f"{error.code()}: {error.details()}")
            return unknown(f"{error.code()}: {error.details()}")
        except TimeoutError:
            return unknown("no end within the deadline")
        if told is None or delivered != attempt.tokens["output_tokens"]:
            return unknown(f"the stream ended without an end: {delivered} delivered, told {told}")
        if told != attempt.tokens:
            # As good as a wrong charge, and found as one: the driver was told what it had not asked for.
            return Receipt(name, Outcome.FAILED, reason=f"told {told}")
        return Receipt(name, Outcome.OK)


async def _one(attempt: Attempt, chunk_tokens: int) -> AsyncIterator[dict[str, Any]]:
    script = {
        "context_tokens": attempt.tokens["uncached_input_tokens"],
        "output_tokens": attempt.tokens["output_tokens"],
        "chunk_tokens": chunk_tokens,
        "chunk_delay_ms": _CHUNK_DELAY_MS,
    }
    sampling = triton_aio.InferInput("sampling_parameters", [1], "BYTES")
    sampling.set_data_from_numpy(np.array([json.dumps(script).encode()], dtype=np.object_))
    stream = triton_aio.InferInput("stream", [1], "BOOL")
    stream.set_data_from_numpy(np.array([True]))
    yield {"model_name": _MODEL, "inputs": [sampling, stream], "request_id": attempt.request_id}


def _told(response: Any) -> dict[str, int] | None:
    parameters = response.parameters
    if "taximeter_output_tokens" not in parameters:
        return None
    return {
        "uncached_input_tokens": parameters["taximeter_input_tokens"].int64_param,
        "output_tokens": parameters["taximeter_output_tokens"].int64_param,
    }
