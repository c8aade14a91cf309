"""Clients that go at random, and the back end's own log beside every bill.

`python -m tests.serving.cut_off_trial` runs the full trial: 1,000 requests that are cancelled, pass their deadline, lose their
connection or end well, on streams and without, one in ten of them asked of a language model. `--call-only` takes the back end's
word to stop away, so that the end of the call is all that it hears: then it works on until it notices, gRPC drops what was on
its way, and the bill is never more than the log and less by what nobody was told; the trial shows by how much.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from billing.v1.usage_pb2 import Outcome, UsageEvent
from producers.meter import UsageMeter
from serving.event_loops import new_event_loop
from serving.gateway import GatewayServer, vllm
from serving.gateway.settings import GatewaySettings, LimitSettings
from tests.serving.gateway_support import (
    HEADERS,
    gateway_settings,
    journalled_all,
    model_server_process,
    production_lines,
    running,
    text_inputs,
    trace_inputs,
    wire,
)

__all__ = ["ENDS", "Seen", "Trial", "run"]

ENDS: Final = ("cancel", "deadline", "disconnect", "stall", "complete")
_AT_ONCE: Final = 8
_CHUNKS: Final = 60
_PROMPT: Final = "Once upon a time"


@dataclass(frozen=True, slots=True)
class Trial:
    """How large. `language_model_in`: one in so many requests is asked of SmolLM2; 0: none."""

    requests: int = 1_000
    seed: int = 1
    language_model_in: int = 10
    can_stop: bool = True


@dataclass(slots=True)
class Seen:
    """What came of it."""

    events: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    differences: list[tuple[str, tuple[int, int], tuple[int, int]]] = field(default_factory=list)
    """Requests whose bill is not the log's: ID, billed (input, output), produced."""
    without_line: int = 0
    """Bills of requests that the back end never heard of, all of them of nothing."""
    twice: int = 0
    never: int = 0
    """Lines of the log that have no bill."""
    gateway: Mapping[str, int] = field(default_factory=dict)

    @property
    def missing_tokens(self) -> list[int]:
        """Of each difference, the output that was not billed."""
        return [produced[1] - billed[1] for _, billed, produced in self.differences]


def trial_settings(folder: Path, upstream: str, *, can_stop: bool) -> GatewaySettings:
    """A gateway before a back end that stops on request, or one of which it does not know that."""
    stop = "stop" if can_stop else None
    models = [
        vllm("trace", stop_input=stop),
        vllm("trace-unary", decoupled=False, stop_input=stop),
        vllm("smollm2", tokenizer="smollm2", stop_input=stop),
    ]
    # Whoever is slow here is the machine, and what is asked is whether the counts are right.
    limits = LimitSettings(stop_timeout_s=60)
    return gateway_settings(folder, upstream, models={model.model: model for model in models}, limits=limits)


async def run(trial: Trial, folder: Path) -> Seen:
    """The trial, in an empty folder."""
    names = "smollm2,trace" if trial.language_model_in else "trace"
    with model_server_process(folder, models=names) as upstream:
        settings = trial_settings(folder, upstream, can_stop=trial.can_stop)
        async with running(settings) as server:
            await _ask_all(trial, server)
            await _settled(server)
            gateway = dict(server.metrics())
    # Now it is stopped: of clients that were gone before their requests were seen, those have their bills too.
    meter = await asyncio.to_thread(UsageMeter, settings.meter)
    try:
        events = journalled_all(meter)
    finally:
        meter.close()
    # Ended with SIGTERM: it has written every line.
    return _compare(events, production_lines(folder), gateway)


async def _ask_all(trial: Trial, server: GatewayServer) -> None:
    chance = random.Random(trial.seed)
    plans = [
        _Plan(
            number,
            end=chance.choice(ENDS),
            stream=chance.random() < 0.75,
            language_model=bool(trial.language_model_in) and number % trial.language_model_in == 0,
            # At once, before the first token, or somewhere on the way.
            after_s=chance.choice((0.0, chance.uniform(0, 0.05), chance.uniform(0, 0.3), chance.uniform(0, 0.3))),
            delay_ms=chance.choice((1, 2, 5)),
            chunk_tokens=chance.choice((1, 1, 3)),
        )
        for number in range(trial.requests)
    ]
    waiting = iter(plans)

    async def client() -> None:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as connected:
            for plan in waiting:
                if plan.end != "disconnect":
                    await _ask(plan, connected)
                    continue
                async with wire(server.port) as (port, cut), triton_aio.InferenceServerClient(f"127.0.0.1:{port}") as fragile:
                    await _ask(plan, fragile, cut)

    await asyncio.gather(*(client() for _ in range(_AT_ONCE)))


@dataclass(frozen=True, slots=True)
class _Plan:
    number: int
    end: str
    stream: bool
    language_model: bool
    after_s: float
    delay_ms: int
    chunk_tokens: int

    def entry(self) -> dict[str, Any]:
        if self.language_model:
            inputs = text_inputs(_PROMPT, stream=True, max_tokens=40)
            return {"model_name": "smollm2", "inputs": inputs, "request_id": str(self.number)}
        # Without a stream the whole answer is one chunk: it takes as long as a stream's would.
        delay_ms = self.delay_ms if self.stream else _CHUNKS * self.delay_ms
        inputs = trace_inputs(
            3 + self.number % 5, _CHUNKS, stream=self.stream, chunk_tokens=self.chunk_tokens, chunk_delay_ms=delay_ms
        )
        return {"model_name": "trace" if self.stream else "trace-unary", "inputs": inputs, "request_id": str(self.number)}


async def _ask(plan: _Plan, client: Any, cut: Callable[[], None] | None = None) -> None:
    # It is connected when its time begins.
    await client.is_server_live()
    # gRPC takes no deadline of nothing.
    timeout_s = max(plan.after_s, 0.001) if plan.end == "deadline" else 120
    work = _stream if plan.stream or plan.language_model else _unary
    asking = asyncio.create_task(work(client, plan, timeout_s))
    if plan.end in ("cancel", "disconnect", "stall"):
        await asyncio.wait({asking}, timeout=plan.after_s)
        if cut is None:
            asking.cancel()
        else:
            cut()
    with suppress(asyncio.CancelledError, grpc.aio.AioRpcError, InferenceServerException):
        await asking


async def _unary(client: Any, plan: _Plan, timeout_s: float) -> None:
    await client.infer(**plan.entry(), headers=HEADERS, client_timeout=timeout_s)


async def _stream(client: Any, plan: _Plan, timeout_s: float) -> None:
    async def entries() -> AsyncIterator[dict[str, Any]]:
        yield plan.entry()

    stream = client.stream_infer(entries(), headers=HEADERS, stream_timeout=timeout_s)
    try:
        async for _ in stream:
            if plan.end == "stall":
                # Reads no more, and is gone later.
                await asyncio.Event().wait()
    finally:
        stream.cancel()


async def _settled(server: GatewayServer) -> None:
    """Every request has its bill."""
    committed = threading.Event()
    server.meter.journal.subscribe(committed)
    async with asyncio.timeout(120):
        while server.meter.metrics()["open_requests"]:
            await asyncio.to_thread(committed.wait, 0.1)
            committed.clear()


def _compare(events: list[UsageEvent], lines: list[dict[str, Any]], gateway: Mapping[str, int]) -> Seen:
    produced = {line["request_id"]: (int(line["input_tokens"]), int(line["output_tokens"])) for line in lines}
    seen = Seen(len(events), gateway=gateway)
    billed: set[str] = set()
    for event in events:
        seen.twice += event.request_id in billed
        billed.add(event.request_id)
        seen.outcomes[Outcome.Name(event.outcome).removeprefix("OUTCOME_").lower()] += 1
        quantities = event.uncached_input_tokens, event.output_tokens
        if event.request_id not in produced:
            seen.without_line += 1
            if quantities != (0, 0):
                seen.differences.append((event.request_id, quantities, (0, 0)))
        elif quantities != produced[event.request_id]:
            seen.differences.append((event.request_id, quantities, produced[event.request_id]))
    seen.never = len(produced.keys() - billed)
    return seen


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="cut_off_trial", description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--call-only", action="store_true", help="the back end does not stop on request")
    arguments = parser.parse_args()
    trial = Trial(arguments.requests, arguments.seed, can_stop=not arguments.call_only)
    with (
        tempfile.TemporaryDirectory() as folder,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        seen = runner.run(run(trial, Path(folder)))
    print(f"{seen.events} bills: {json.dumps(dict(sorted(seen.outcomes.items())))}")
    print(f"the back end never heard of {seen.without_line}; billed twice {seen.twice}; produced and not billed {seen.never}")
    ends = {name: seen.gateway.get(name, 0) for name in ("cancels_confirmed", "cancels_unconfirmed", "clients_gone")}
    print(f"gateway: {json.dumps(ends)}")
    missing = sorted(seen.missing_tokens)
    print(f"bills that differ from the back end's log: {len(missing)}")
    if missing:
        middle, last = missing[len(missing) // 2], missing[int(0.99 * (len(missing) - 1))]
        print(f"output tokens not billed: least {missing[0]}, median {middle}, p99 {last}, most {missing[-1]}")
        for difference in seen.differences[:10]:
            print("  ", *difference)
    short = seen.twice or seen.never or (trial.can_stop and seen.differences) or (missing and missing[0] < 0)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
