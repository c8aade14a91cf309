"""The demonstration: what the clients were told, what the ledger holds and what ClickHouse holds, side by side.

Promise: it ends well only if all three agree on every answer, to the token, the oversized prompt was refused and
raised its alert, and the burst arrived whole. Each difference is named.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

from billing.amounts import format_pico, parse_decimal_to_pico
from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    OPERATION_CHAT,
    OUTCOME_COMPLETED,
    SERVICE_CLASS_STANDARD,
    UsageEvent,
)
from sinks import queries
from sinks.statement import statement as make_statement
from taximeter.commanding import Commander, PlanTerms
from taximeter.compose import meter_settings, open_reader, publisher_settings
from taximeter.demonstration.clients import Answer, ask_all, ask_for_refusal
from taximeter.demonstration.script import OVERSIZED, PROMPT_TOKENS_MAX, PROMPTS, TENANTS
from taximeter.errors import TaximeterError
from taximeter.feeding import Feed
from taximeter.ledger_view import accepted_events
from taximeter.reports import print_alerts, print_balances, print_statement
from taximeter.times import MINUTE_MS, now_ms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sinks.engine import Reader
    from sinks.queries import EventRow, Totals
    from taximeter.config import Config
    from taximeter.output import Output

__all__ = ["Demonstration", "check"]

T = TypeVar("T")
_WAIT_S: Final = 120.0
_LOOK_S: Final = 0.05
_SETTLE_S: Final = 0.5
_BURST_EVENTS: Final = 50_000
_BURST_TENANTS: Final = 20
_REFUSED_RULE: Final = "prompt_over_limit"


@dataclass(slots=True)
class Demonstration:
    """One run against an `up` that runs."""

    config: Config
    output: Output
    folder: Path
    differences: list[str] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """All of it; `differences` says afterwards what did not match."""
        began_ms = now_ms()
        address = f"{self.config.gateway.host}:{self.config.gateway.port}"
        with open_reader(self.config) as reader:
            self._make_tenants(reader)
            with self.output.progress("prompts answered by SmolLM2", len(PROMPTS)) as advance:
                answers = ask_all(address, self.secrets, PROMPTS, advance)
            refused_id = f"oversized-{secrets.token_hex(4)}"
            refusal = ask_for_refusal(address, self.secrets[OVERSIZED.tenant_id], OVERSIZED, refused_id)
            self._compare(reader, answers)
            print_balances(self.output, queries.balances(reader))
            tenant = TENANTS[0].tenant_id
            statement = make_statement(reader, tenant, 0, -(-now_ms() // MINUTE_MS) * MINUTE_MS)
            assert statement is not None, "its balance was just shown"
            print_statement(self.output, statement)
            self._show_refusal(reader, refusal, began_ms)
            self._burst(reader)

    # --- steps ---

    def _make_tenants(self, reader: Reader) -> None:
        commander = Commander(self.config, "taximeter demo")
        keys = {tenant.tenant_id: commander.key(tenant.tenant_id, project_id="demo") for tenant in TENANTS}
        terms = PlanTerms(prompt_tokens_max=PROMPT_TOKENS_MAX)
        commands = []
        for tenant in TENANTS:
            commands += [
                commander.tenant(tenant.tenant_id, tenant.name, "USD", terms),
                commander.credit(tenant.tenant_id, parse_decimal_to_pico(tenant.credit), "USD", "a gift for the demonstration"),
                keys[tenant.tenant_id].command,
            ]
        commander.give(commands, reader, _WAIT_S)
        self.secrets = {tenant_id: key.secret for tenant_id, key in keys.items()}

    def _compare(self, reader: Reader, answers: list[Answer]) -> None:
        """Told to the client = ledger = ClickHouse, answer by answer."""
        wanted = {answer.request_id for answer in answers}
        rows: dict[str, EventRow] = {}
        deadline_s = time.monotonic() + _WAIT_S
        while len(rows) < len(wanted) and time.monotonic() < deadline_s:
            for tenant in TENANTS:
                ids = [answer.request_id for answer in answers if answer.prompt.tenant_id == tenant.tenant_id]
                rows |= {row.request_id: row for row in queries.events(reader, tenant.tenant_id, ids)}
            time.sleep(_LOOK_S)
        ledger = asyncio.run(accepted_events(self.config, {tenant.tenant_id for tenant in TENANTS}))
        cells = []
        for answer in answers:
            event, row = ledger.get(answer.request_id), rows.get(answer.request_id)
            told = (answer.input_tokens, answer.output_tokens)
            in_ledger = None if event is None else (event.uncached_input_tokens, event.output_tokens)
            in_database = None if row is None else (row.quantities.uncached_input_tokens, row.quantities.output_tokens)
            same = told == in_ledger == in_database
            if not same:
                self.differences.append(
                    f"request {answer.request_id} of {answer.prompt.tenant_id}: told {_pair(told)} tokens, the ledger has "
                    f"{_pair(in_ledger)}, ClickHouse {_pair(in_database)}"
                )
            cells.append(
                (
                    answer.prompt.tenant_id,
                    answer.prompt.language,
                    _short(answer.prompt.text),
                    _short(answer.text),
                    _pair(told),
                    _pair(in_ledger),
                    _pair(in_database),
                    "-" if row is None else format_pico(row.cost_pico, row.currency),
                    "yes" if same else "NO",
                )
            )
        columns = ("tenant", "language", "prompt", "answer", "told ", "ledger ", "ClickHouse ", "cost ", "same")
        self.output.table("Answer by answer: input + output tokens", columns, cells)

    def _show_refusal(self, reader: Reader, refusal: str, began_ms: int) -> None:
        self.output.say(f"The oversized prompt was refused, and never reached the model:\n  {refusal}")
        found = self._await(
            lambda: [row for row in queries.alerts(reader, OVERSIZED.tenant_id, began_ms - 60_000) if row.rule == _REFUSED_RULE]
        )
        if not found:
            self.differences.append(f"no alert {_REFUSED_RULE} for {OVERSIZED.tenant_id} within {_WAIT_S:g} s")
        print_alerts(self.output, found)

    def _burst(self, reader: Reader) -> None:
        """Synthetic usage through meter, Kafka, ledger and sink, as fast as this machine does it."""
        run = secrets.token_hex(6)
        feed = Feed(
            self.folder / "burst",
            meter_settings(self.config, self.folder / "burst" / "journal.sqlite"),
            publisher_settings(self.config),
        )
        try:
            earlier = self._settled(reader)
            # Connected, and known to the ledger, before the clock runs.
            feed.run(lambda _: islice(_burst_events(f"{run}-first", 0), 1), due_s=None, stalled_s=_WAIT_S)
            # The ledger has it before the database does.
            self._await(lambda: queries.totals(reader).events > earlier.events)
            before = self._settled(reader)
            began_s = time.monotonic()
            with self.output.progress("synthetic events recorded", _BURST_EVENTS) as advance:
                fed = feed.run(lambda skip: _burst_events(run, skip), due_s=None, stalled_s=_WAIT_S, on_recorded=advance)
            arrived = self._await(lambda: queries.totals(reader).events - before.events >= _BURST_EVENTS)
            visible_s = time.monotonic() - began_s
        finally:
            feed.close()
        after = queries.totals(reader)
        events = after.events - before.events
        tokens = after.quantities.input_tokens - before.quantities.input_tokens
        expected_tokens = sum(event.uncached_input_tokens for event in _burst_events(run, 0))
        if not arrived or events != _BURST_EVENTS or tokens != expected_tokens:
            self.differences.append(
                f"the burst sent {_BURST_EVENTS:,} events of {expected_tokens:,} input tokens, ClickHouse shows {events:,} "
                f"and {tokens:,}"
            )
        self.output.pairs(
            "Throughput of a burst of synthetic usage on this machine",
            {
                "events": _BURST_EVENTS,
                "durable in the journal, events/s": round(_BURST_EVENTS / fed.recorded_s),
                "in the ledger, events/s": round(_BURST_EVENTS / fed.covered_s),
                "in ClickHouse, events/s": round(_BURST_EVENTS / visible_s),
            },
        )

    def _settled(self, reader: Reader) -> Totals:
        """The totals once nothing more comes: what was sent before must not count as part of what is measured."""
        seen = queries.totals(reader)
        while True:
            time.sleep(_SETTLE_S)
            now = queries.totals(reader)
            if now.events == seen.events:
                return now
            seen = now

    def _await(self, look: Callable[[], T]) -> T:
        deadline_s = time.monotonic() + _WAIT_S
        while not (found := look()) and time.monotonic() < deadline_s:
            time.sleep(_LOOK_S)
        return found


def check(demonstration: Demonstration) -> None:
    """Raise what did not match."""
    if demonstration.differences:
        raise TaximeterError("; ".join(demonstration.differences))


def _burst_events(run: str, skip: int) -> Iterator[UsageEvent]:
    at_ms = now_ms()
    for number in range(skip, _BURST_EVENTS):
        yield UsageEvent(
            request_id=f"burst-{run}-{number}",
            tenant_id=f"synthetic-{number % _BURST_TENANTS:02d}",
            project_id="burst",
            model="synthetic",
            operation=OPERATION_CHAT,
            service_class=SERVICE_CLASS_STANDARD,
            outcome=OUTCOME_COMPLETED,
            count_source=COUNT_SOURCE_BACKEND,
            started_ms=at_ms,
            ended_ms=at_ms,
            uncached_input_tokens=100 + number % 900,
            output_tokens=number % 300,
        )


def _pair(tokens: tuple[int, int] | None) -> str:
    return "-" if tokens is None else f"{tokens[0]:,} + {tokens[1]:,}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 28 else line[:27] + "…"
