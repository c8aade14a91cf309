"""The disk under the journal is full: new work is refused before inference, never after; with space back it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    OPERATION_GENERATE,
    OUTCOME_COMPLETED,
    OUTCOME_INTERRUPTED,
    SERVICE_CLASS_STANDARD,
    UsageEvent,
)
from producers import openings
from producers.errors import JournalFull
from producers.meter import MeterSettings, UsageMeter
from serving.gateway import GatewayServer, vllm
from taximeter.embedded.process import accepts_connections
from tests.services import require
from tests.services.disk import Filler, SmallDiskUnavailableError, small_disk
from tests.serving.gateway_support import (
    HEADERS,
    PARTITIONS,
    billed,
    gateway_settings,
    journalled,
    known_directory,
    scripted_back_end,
    settled,
    told,
    trace_inputs,
    vllm_response,
)

_BACK_TIMEOUT_S = 120.0


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Whoever asks after the disk has filled up is refused, however fast that was.
    monkeypatch.setattr(openings, "_ROOM_KNOWN_S", 0.0)
    try:
        with small_disk(tmp_path / "disk", 24) as folder:
            yield folder
    except SmallDiskUnavailableError as error:
        require(False, str(error))


@dataclass
class _Stand:
    """A running gateway, its client, and a back end whose answers have a second half that waits."""

    server: GatewayServer
    client: Any
    seen: list[Any]
    starting: asyncio.Task[None]
    second_half: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, name: str, half: asyncio.Event | None = None) -> Any:
        """The last response. Sets `half` at the first."""
        last = None
        async for result, error in self.client.stream_infer(_one(name), headers=HEADERS):
            if error is not None:
                raise error
            last = result.get_response()
            if half is not None:
                half.set()
        return last

    async def refused(self, name: str) -> None:
        """Asks, is refused for want of room, and the back end has seen nothing."""
        before = len(self.seen)
        async with asyncio.timeout(_BACK_TIMEOUT_S):
            while True:
                stream = self.client.stream_infer(_one(name), headers={**HEADERS, "triton_grpc_error": "true"})
                with pytest.raises(grpc.aio.AioRpcError) as refusal:
                    await anext(aiter(stream))
                # grpc.aio's own words where a stream is refused before the client has said anything.
                if refusal.value.details() != "Internal error from Core":
                    break
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the disk is full" in str(refusal.value.details())
        assert len(self.seen) == before

    async def asked_until_served(self, name: str) -> Any:
        """What a client does that was refused: it tries again."""
        async with asyncio.timeout(_BACK_TIMEOUT_S):
            while True:
                try:
                    return await self.ask(name)
                except (InferenceServerException, grpc.aio.AioRpcError):
                    # UNAVAILABLE too: once it is recovered, keys are read.
                    await asyncio.sleep(0.1)


async def _one(name: str) -> AsyncIterator[dict[str, Any]]:
    yield {"model_name": "trace", "inputs": trace_inputs(11, 6), "request_id": name}


@asynccontextmanager
async def _stand(folder: Path) -> AsyncIterator[_Stand]:
    second_half = asyncio.Event()

    async def script(_request: Any, _context: Any) -> AsyncIterator[Any]:
        yield vllm_response("one ", input_tokens=11, new_tokens=2, final=False)
        yield vllm_response("two ", input_tokens=11, new_tokens=3, final=False)
        await second_half.wait()
        yield vllm_response("three", input_tokens=11, new_tokens=4, final=True)

    seen: list[Any] = []
    async with scripted_back_end(script, seen) as address:
        settings = gateway_settings(folder, address, tokenizers={}, models={"trace": vllm("trace")})
        server = GatewayServer(settings, known_directory())
        # It serves before it is ready.
        starting = asyncio.create_task(server.start())
        async with asyncio.timeout(_BACK_TIMEOUT_S):
            while not accepts_connections("127.0.0.1", server.port):
                await asyncio.wait({starting}, timeout=0.05)
        try:
            async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
                yield _Stand(server, client, seen, starting, second_half)
        finally:
            starting.cancel()
            await asyncio.wait({starting})
            await server.stop()


@pytest.mark.chaos
async def test_a_full_disk_refuses_before_inference_bills_what_runs_and_goes_on_with_space(disk: Path) -> None:
    filler = Filler(disk)
    async with _stand(disk) as stand:
        await stand.starting
        # Of these, the first half has left when the disk fills up.
        halves = [asyncio.Event() for _ in range(40)]
        running_ones = [asyncio.create_task(stand.ask(f"runs-{i}", half)) for i, half in enumerate(halves)]
        async with asyncio.timeout(_BACK_TIMEOUT_S):
            await asyncio.gather(*(half.wait() for half in halves))
        filler.fill()
        # Before the reserve is touched, and after.
        await stand.refused("before")
        stand.second_half.set()
        answers = await asyncio.gather(*running_ones)
        await stand.refused("after")
        events = await settled(stand.server, len(halves))
        assert {told(answer)[:3] for answer in answers} == {billed(event) for event in events}  # type: ignore[index]
        assert {event.outcome for event in events} == {OUTCOME_COMPLETED}
        assert {billed(event)[1:] for event in events} == {(11, 9)}
        assert len(events) == len(halves) == len(stand.seen)
        assert stand.server.metrics()["journal_full"] == 2

        filler.give_back()
        answer = await stand.asked_until_served("with space")
        assert told(answer)[1:3] == (11, 9)  # type: ignore[index]
        assert len(await settled(stand.server, len(halves) + 1)) == len(halves) + 1
        assert (disk / "journal.sqlite.reserve").stat().st_size > 1 << 20, "the next time there is a reserve again"


def _left_open(disk: Path, count: int) -> None:
    """What a process leaves behind that was killed with so many requests open."""
    meter = UsageMeter(MeterSettings(disk / "journal.sqlite", PARTITIONS))
    for number in range(count):
        event = UsageEvent(
            request_id=f"left-{number}",
            tenant_id="tenant-a",
            model="trace",
            operation=OPERATION_GENERATE,
            service_class=SERVICE_CLASS_STANDARD,
            count_source=COUNT_SOURCE_BACKEND,
            outcome=OUTCOME_INTERRUPTED,
            started_ms=1_000,
            ended_ms=2_000,
            client_request_id="x" * 100,
        )
        meter.open(event)
    # Makes durable what is pending.
    meter.close()


@pytest.mark.chaos
async def test_a_gateway_that_starts_on_a_full_disk_bills_what_was_open_and_refuses(disk: Path) -> None:
    _left_open(disk, 30)
    filler = Filler(disk)
    filler.fill()
    async with _stand(disk) as stand:
        stand.second_half.set()
        await stand.starting
        assert stand.server.recovered == 30
        assert len(journalled(stand.server.meter)) == 30
        await stand.refused("on the full disk")
        filler.give_back()
        await stand.asked_until_served("with space")


@pytest.mark.chaos
async def test_a_gateway_that_starts_with_no_reserve_left_refuses_and_recovers_later(disk: Path) -> None:
    count = 3_000
    _left_open(disk, count)
    (disk / "journal.sqlite.reserve").unlink()
    filler = Filler(disk)
    filler.fill(leave_bytes=200 << 10)
    async with _stand(disk) as stand:
        stand.second_half.set()
        while not stand.server.gateway.journal_full:
            await asyncio.wait({stand.starting}, timeout=0.05)
        assert stand.server.recovered == 0
        await stand.refused("on the full disk")
        filler.give_back()
        async with asyncio.timeout(_BACK_TIMEOUT_S):
            await stand.starting
        assert stand.server.recovered == count
        await stand.asked_until_served("with space")
        recovered = stand.server.meter.journal.highest_sequence
        assert sum(map(recovered, range(PARTITIONS))) == count + 1
        assert stand.server.meter.metrics()["open_requests"] == 0


@pytest.mark.chaos
def test_a_journal_whose_reserve_is_spent_opens_no_request_and_says_so(disk: Path) -> None:
    filler = Filler(disk)
    filler.fill(leave_bytes=2 << 20)
    meter = UsageMeter(MeterSettings(disk / "journal.sqlite", PARTITIONS))
    event = UsageEvent(
        request_id="r",
        tenant_id="tenant-a",
        model="trace",
        operation=OPERATION_GENERATE,
        service_class=SERVICE_CLASS_STANDARD,
        count_source=COUNT_SOURCE_BACKEND,
        outcome=OUTCOME_COMPLETED,
        started_ms=1_000,
        ended_ms=2_000,
    )
    with pytest.raises(JournalFull, match="no room to close another request"):
        meter.open(event)
    meter.close()
