"""A trace as real requests through the gateway, to the model that reports the trace's own counts.

Promise: when it returns, each row of the trace was answered and billed exactly once, also where the gateway was
killed in the middle. The gateway gives every inference a request ID of its own, so a request that was sent twice
would be billed twice; therefore a row whose answer did not come is not simply sent again. Its fate is looked up
first, under the client's ID that it carried: billed as completed, it is done; not, it is sent again under the next
attempt's ID, and what was delivered of the first is billed beside it, as interrupted.

"Not billed" is known, not guessed: the gateway recovers its journal before it serves again and numbers what it
records. So a request of no tokens by a tenant of our own in each partition is behind everything that the gateway knew
before it died; when the database has that one, it has all before it.

What is known of each row stands in a file that is synced before the row is sent, so a run that was killed goes on
where it was.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
from tritonclient.grpc.aio import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from billing.identity import partition_of
from serving.addresses import authority
from serving.event_loops import new_event_loop
from sinks import queries
from sinks.errors import EngineUnavailable
from taximeter.commanding import Commander, PlanTerms
from taximeter.compose import open_reader
from taximeter.errors import NotReadyError, TaximeterError
from taximeter.new_keys import may_be_known_soon
from taximeter.traces import Trace, TraceRow, tenant_names

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sinks.engine import Reader
    from taximeter.config import Config
    from taximeter.output import Advance, Output

__all__ = ["replay_through_gateway"]

_TIMEOUT_S: Final = 60.0
_HEALED_S: Final = 90.0
_PAUSE_S: Final = 0.5
_ATTEMPTS_MAX: Final = 20
_ASK_AT_ONCE: Final = 500
# What cannot be known of a request that was answered so: it may have been billed.
_UNKNOWN: Final = ("StatusCode.UNAVAILABLE", "StatusCode.CANCELLED", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.UNKNOWN")
_KNOWN_SQL: Final = """
SELECT DISTINCT client_request_id FROM usage_events FINAL
WHERE tenant_id = {tenant:String} AND client_request_id IN {ids:Array(String)}
"""
_COMPLETED_SQL: Final = f"{_KNOWN_SQL} AND outcome = 'completed'"


@dataclass(slots=True)
class _Sent:
    row: TraceRow
    tenant: str
    attempt: int

    def client_id(self, prefix: str) -> str:
        return f"{prefix}-{self.row.number}-{self.attempt}"


def replay_through_gateway(
    config: Config,
    output: Output,
    trace: Trace,
    folder: Path,
    *,
    tenants: int,
    start_ms: int,
    model: str,
    concurrency: int,
) -> dict[str, object]:
    """Every row once; the figures of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    barriers = _barrier_tenants(config.ledger.partitions)
    keys = _keys(config, folder, [*tenant_names(tenants), *barriers])
    prefix = f"replay-{trace.digest[:8]}-{start_ms}-{_run_number(folder)}"
    with open_reader(config) as reader, (folder / "attempts.jsonl").open("a+") as file:
        replay = _Replay(config, reader, file, keys, barriers, prefix, model, concurrency)
        told = output.progress("answered by the gateway", len(trace.rows))
        with told as advance, asyncio.Runner(loop_factory=new_event_loop) as runner:
            result = runner.run(replay.run(trace, tenants, advance))
    (folder / "attempts.jsonl").unlink()
    return result


class _Replay:
    def __init__(
        self,
        config: Config,
        reader: Reader,
        file: IO[str],
        keys: dict[str, str],
        barriers: Sequence[str],
        prefix: str,
        model: str,
        concurrency: int,
    ) -> None:
        self._reader = reader
        self._file = file
        self._keys = keys
        self._barriers = barriers
        self._prefix = prefix
        self._model = model
        self._concurrency = concurrency
        self._url = authority(config.gateway.host, config.gateway.port)
        # The same for every row.
        self._text = _text_input("text_input", "")
        self._unknown: list[_Sent] = []
        self._answered = 0
        self._settled = 0
        self._sent_again = 0
        self._began_s = 0.0

    async def run(self, trace: Trace, tenants: int, advance: Advance) -> dict[str, object]:
        self._began_s = asyncio.get_running_loop().time()
        answered, unsettled = self._read_attempts()
        queue: list[_Sent] = []
        for row in trace.rows:
            if row.number in answered:
                advance()
                continue
            sent = _Sent(row, trace.tenant(row, tenants), unsettled.get(row.number, 0))
            # An attempt of a run that was killed may have been billed.
            (self._unknown if row.number in unsettled else queue).append(sent)
        queue.reverse()
        await self._settle(queue, advance)
        while queue or self._unknown:
            async with InferenceServerClient(self._url) as client:
                await asyncio.gather(*(self._work(client, queue, advance) for _ in range(self._concurrency)))
            await self._settle(queue, advance)
        return {"answered": self._answered + len(answered), "sent_again": self._sent_again}

    async def _work(self, client: Any, queue: list[_Sent], advance: Advance) -> None:
        while queue and not self._unknown:
            sent = queue.pop()
            self._note(sent, "sent")
            try:
                row = sent.row
                client_id = sent.client_id(self._prefix)
                await self._infer(client, sent.tenant, client_id, row.context_tokens, row.generated_tokens)
            except InferenceServerException as error:
                if may_be_known_soon(error, asyncio.get_running_loop().time() - self._began_s):
                    queue.append(sent)
                    await asyncio.sleep(_PAUSE_S)
                    continue
                if error.status() not in _UNKNOWN:
                    raise TaximeterError(f"row {sent.row.number} for {sent.tenant} was refused: {error.message()}") from None
                self._unknown.append(sent)
            else:
                self._note(sent, "answered")
                self._answered += 1
                advance()

    async def _infer(self, client: Any, tenant: str, client_id: str, context_tokens: int, output_tokens: int) -> None:
        script = {"context_tokens": context_tokens, "output_tokens": output_tokens}
        await client.infer(
            self._model,
            [self._text, _text_input("sampling_parameters", json.dumps(script))],
            request_id=client_id,
            headers={"authorization": f"Bearer {self._keys[tenant]}"},
            client_timeout=_TIMEOUT_S,
        )

    async def _settle(self, queue: list[_Sent], advance: Advance) -> None:
        """Look up what became of those without an answer; those that were not billed as completed go back to the queue."""
        if not self._unknown:
            return
        await self._await_healed()
        unknown, self._unknown = self._unknown, []
        billed = await asyncio.to_thread(self._billed, unknown)
        for sent in unknown:
            if sent.client_id(self._prefix) in billed:
                self._note(sent, "answered")
                self._answered += 1
                advance()
                continue
            sent.attempt += 1
            if sent.attempt > _ATTEMPTS_MAX:
                raise TaximeterError(
                    f"row {sent.row.number} was sent {_ATTEMPTS_MAX} times and never answered: see `taximeter doctor`"
                )
            self._sent_again += 1
            queue.append(sent)

    async def _await_healed(self) -> None:
        """The gateway serves again, and everything that it knew before is in the database."""
        deadline_s = asyncio.get_running_loop().time() + _HEALED_S
        self._settled += 1
        waiting = {tenant: f"{self._prefix}-settled-{self._settled}-{os.getpid()}" for tenant in self._barriers}
        unsent = dict(waiting)
        while waiting:
            if asyncio.get_running_loop().time() >= deadline_s:
                raise NotReadyError(
                    f"the gateway at {self._url} or what is behind it has not come back within {_HEALED_S:g} s: see "
                    "`taximeter doctor`, then run the same command again; it goes on from here"
                )
            try:
                async with InferenceServerClient(self._url) as client:
                    for tenant, client_id in list(unsent.items()):
                        await self._infer(client, tenant, client_id, 0, 0)
                        del unsent[tenant]
                for tenant in waiting.keys() - unsent.keys():
                    if await asyncio.to_thread(self._find, _KNOWN_SQL, tenant, [waiting[tenant]]):
                        del waiting[tenant]
            except (InferenceServerException, EngineUnavailable):
                pass  # on its way back; the deadline bounds how often we ask
            await asyncio.sleep(_PAUSE_S)

    def _billed(self, unknown: Sequence[_Sent]) -> set[str]:
        by_tenant: dict[str, list[str]] = {}
        for sent in unknown:
            by_tenant.setdefault(sent.tenant, []).append(sent.client_id(self._prefix))
        return set().union(*(self._find(_COMPLETED_SQL, tenant, ids) for tenant, ids in by_tenant.items()))

    def _find(self, sql: str, tenant: str, client_ids: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for first in range(0, len(client_ids), _ASK_AT_ONCE):
            parameters = {"tenant": tenant, "ids": list(client_ids[first : first + _ASK_AT_ONCE])}
            found |= {str(row[0]) for row in self._reader.query(sql, parameters).rows}
        return found

    def _note(self, sent: _Sent, state: str) -> None:
        self._file.write(json.dumps([sent.row.number, sent.attempt, state]) + "\n")
        self._file.flush()

    def _read_attempts(self) -> tuple[set[int], dict[int, int]]:
        """Rows that were answered, and the last attempt of those that were sent."""
        self._file.seek(0)
        answered: set[int] = set()
        sent: dict[int, int] = {}
        for line in self._file:
            try:
                number, attempt, state = json.loads(line)
            except ValueError:
                break  # torn by the kill; what stood there was not acted upon
            if state == "answered":
                answered.add(number)
            else:
                sent[number] = attempt
        self._file.seek(0, os.SEEK_END)
        return answered, {number: attempt for number, attempt in sent.items() if number not in answered}


def _text_input(name: str, value: str) -> Any:
    text = InferInput(name, [1], "BYTES")
    text.set_data_from_numpy(np.array([value.encode()], dtype=np.object_))
    return text


def _barrier_tenants(partitions: int) -> list[str]:
    """One tenant in each partition, for requests that cost nothing and mark a place in the ledger."""
    found: dict[int, str] = {}
    number = 0
    while len(found) < partitions:
        name = f"replay-barrier-{number}"
        found.setdefault(partition_of(name, partitions), name)
        number += 1
    return [found[partition] for partition in range(partitions)]


def _keys(config: Config, folder: Path, tenants: Sequence[str]) -> dict[str, str]:
    """A key for each tenant, made once; tenants that are not there are created, billed afterwards and without a limit."""
    path = folder / "keys.json"
    try:
        known: dict[str, str] = json.loads(path.read_text())
    except FileNotFoundError:
        known = {}
    missing = [tenant for tenant in tenants if tenant not in known]
    if not missing:
        return known
    commander = Commander(config, "replay")
    keys = {tenant: commander.key(tenant, project_id="trace") for tenant in missing}
    with open_reader(config) as reader:
        there = {row.tenant_id for row in queries.balances(reader) if row.status == "active"}
        terms = PlanTerms(prepaid=False, burst_tokens_floor=0, burst_factor=0)
        commander.give(
            [commander.tenant(tenant, "", "", terms) for tenant in missing if tenant not in there], reader, _HEALED_S
        )
        commander.give([key.command for key in keys.values()], reader, _HEALED_S)
    known |= {tenant: key.secret for tenant, key in keys.items()}
    descriptor = os.open(path.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(known, file)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".new").replace(path)
    return known


def _run_number(folder: Path) -> int:
    """Which run of this replay it is: a run that goes on keeps its number, the next one has another."""
    path = folder / "run.json"
    number: int = json.loads(path.read_text()) if path.exists() else 0
    if not (folder / "attempts.jsonl").exists():
        number += 1
        path.write_text(json.dumps(number))
    return number
