"""What is missing of each producer, as text for people and as values for programs, with what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taximeter.times import show_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sinks.completeness import CompletenessReport, Missing, Neighbour, ProducerState
    from taximeter.output import Output

__all__ = ["completeness_values", "mend_missing", "mend_silent", "print_completeness"]


def mend_missing(producer_id: str) -> str:
    """What to do about events that are missing."""
    return (
        f"start {producer_id} on its journal: it sends them again. If the journal is gone, so is that usage: look with the "
        f"neighbours' times in the model server's own log, and give the numbers up with `taximeter lease retire {producer_id}`"
    )


def mend_silent(producer_id: str) -> str:
    """What to do about a producer of which nothing is heard."""
    return (
        f"nothing that it announced is lost by that, but its journal may hold more: start {producer_id} on it, or, if it is "
        f"gone for good, `taximeter lease retire {producer_id}`"
    )


def print_completeness(
    output: Output, report: CompletenessReport, missing: Sequence[tuple[ProducerState, list[Missing]]]
) -> None:
    """Each hole with its neighbours, then who is silent, then the sums."""
    for state, holes in missing:
        output.table(
            f"Producer {state.producer_id}, partition {state.partition}: {state.missing:,} event(s) are missing",
            ("numbers", "events ", "since", "arrived before", "arrived after"),
            [
                (
                    f"{entry.hole.first}-{entry.hole.last}",
                    entry.hole.numbers,
                    show_time(entry.hole.since_ms),
                    _beside(entry.before),
                    _beside(entry.after),
                )
                for entry in holes
            ],
        )
        output.say(f"do: {mend_missing(state.producer_id)}")
    for state in report.silent:
        output.say(f"Producer {state.producer_id} is silent since {show_time(state.seen_ms)}: {mend_silent(state.producer_id)}")
    output.pairs(
        "Completeness: every number that was given is in the ledger, or under way"
        if report.complete
        else "Completeness: usage is missing",
        {
            "as of": show_time(report.as_of_ms),
            "partitions": report.partitions,
            "producers": report.producers,
            "events missing": sum(state.missing for state in report.incomplete),
            "events under way": report.under_way,
            "silent producers": len(report.silent),
        },
    )


def completeness_values(
    report: CompletenessReport, missing: Sequence[tuple[ProducerState, list[Missing]]]
) -> dict[str, object]:
    """The same for programs."""
    return {
        "as_of": show_time(report.as_of_ms),
        "partitions": report.partitions,
        "producers": report.producers,
        "events_missing": sum(state.missing for state in report.incomplete),
        "events_under_way": report.under_way,
        "missing": [
            {
                **_producer_values(state),
                "first": entry.hole.first,
                "last": entry.hole.last,
                "events": entry.hole.numbers,
                "since": show_time(entry.hole.since_ms),
                "before": _neighbour_values(entry.before),
                "after": _neighbour_values(entry.after),
                "do": mend_missing(state.producer_id),
            }
            for state, holes in missing
            for entry in holes
        ],
        "silent": [{**_producer_values(state), "do": mend_silent(state.producer_id)} for state in report.silent],
    }


def _producer_values(state: ProducerState) -> dict[str, object]:
    return {
        "producer_id": state.producer_id,
        "partition": state.partition,
        "covered": state.covered,
        "highest": state.highest,
        "last_heard": show_time(state.seen_ms),
        "closed": state.closed,
    }


def _neighbour_values(neighbour: Neighbour | None) -> dict[str, object] | None:
    if neighbour is None:
        return None
    return {
        "sequence": neighbour.sequence,
        "tenant_id": neighbour.tenant_id,
        "request_id": neighbour.request_id,
        "arrived": show_time(neighbour.arrived_ms),
        "ended": show_time(neighbour.ended_ms) if neighbour.ended_ms else None,
        "rejected": neighbour.rejection or None,
    }


def _beside(neighbour: Neighbour | None) -> str:
    if neighbour is None:
        return "nothing"
    rejected = f", rejected: {neighbour.rejection}" if neighbour.rejection else ""
    return f"{neighbour.sequence}: {neighbour.request_id} of {neighbour.tenant_id}, {show_time(neighbour.arrived_ms)}{rejected}"
