"""Applied adjustments as rows: one for each part of each line, and one for each event that was corrected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from billing.amounts import PICO, from_amount
from billing.line_parts import from_units
from billing.v1.command_pb2 import AdjustmentKind, Command
from sinks.event_columns import OPERATIONS, SERVICE_CLASSES, EnumNames

if TYPE_CHECKING:
    from sinks.columns import Accepted

__all__ = ["ADJUSTMENT_KINDS", "adjustment_rows", "corrected_rows"]

ADJUSTMENT_KINDS = EnumNames(AdjustmentKind.items(), "ADJUSTMENT_KIND_")


def _applied(batch: Sequence[Accepted]) -> Iterator[tuple[Accepted, Command]]:
    for accepted in batch:
        record = accepted.record
        if record.WhichOneof("source") == "command" and record.command.applied:
            command = Command.FromString(record.command.command)
            if command.HasField("adjustment"):
                yield accepted, command


def adjustment_rows(batch: Sequence[Accepted]) -> Iterator[tuple[object, ...]]:
    """Rows of `adjustments`."""
    for accepted, command in _applied(batch):
        said, record = command.adjustment, accepted.record
        for line_number, line in enumerate(said.lines, start=1):
            key = line.key
            for part_number, part in enumerate(line.parts, start=1):
                yield (
                    said.tenant_id,
                    command.command_id,
                    line_number,
                    part_number,
                    ADJUSTMENT_KINDS[said.kind],
                    key.period_start_ms,
                    key.period_end_ms,
                    key.project_id,
                    key.model,
                    OPERATIONS[key.operation],
                    SERVICE_CLASSES[key.service_class],
                    key.price_version,
                    part.quantity_of,
                    part.terms,
                    # The column has the decimals of amounts; the ledger's bound on units leaves it room.
                    from_units(part.units) * PICO,
                    part.unit_pico,
                    from_amount(part.amount),
                    said.currency,
                    said.invoice,
                    command.issuer,
                    command.reason,
                    record.log_time_ms,
                    record.partition,
                    record.generation.hex(),
                    record.sequence,
                    accepted.version,
                )


def corrected_rows(batch: Sequence[Accepted]) -> Iterator[tuple[object, ...]]:
    """Rows of `corrected_events`."""
    for accepted, command in _applied(batch):
        said, record = command.adjustment, accepted.record
        for request_id in said.corrected_request_ids:
            yield (
                said.tenant_id,
                request_id,
                command.command_id,
                ADJUSTMENT_KINDS[said.kind],
                record.log_time_ms,
                record.partition,
                accepted.version,
            )
