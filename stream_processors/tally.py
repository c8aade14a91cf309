"""What a worker has done, as plain numbers: written on its event loop, read by whoever scrapes.

Promise: how many numbers there are is bounded by names in the contracts: reasons, rules, severities, actions. Each record that
was acknowledged here counts once; a replay counts for nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Final

from google.protobuf.message import DecodeError

from billing.v1.alert_pb2 import AlertRule, Severity
from billing.v1.command_pb2 import Command
from billing.v1.ledger_pb2 import DropReason, LedgerRecord

__all__ = ["COMMAND_ACTIONS", "COMMAND_OUTCOMES", "EVENT_RESULTS", "STEP_BOUNDS_S", "Tally", "alert_names"]

STEP_BOUNDS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_UNDECODABLE: Final = "undecodable"
_DROPS: Final[dict[int, str]] = {
    number: name.removeprefix("DROP_REASON_").lower() for name, number in DropReason.items() if number
}
_RULES: Final[dict[int, str]] = {number: name.removeprefix("ALERT_RULE_").lower() for name, number in AlertRule.items()}
_SEVERITIES: Final[dict[int, str]] = {number: name.removeprefix("SEVERITY_").lower() for name, number in Severity.items()}
# What becomes of an event; the last one is a whole message, however many events it was meant to hold.
EVENT_RESULTS: Final = ("accepted", *_DROPS.values(), _UNDECODABLE)
COMMAND_OUTCOMES: Final = ("applied", "refused")
_UNKNOWN_ACTION: Final = "unknown"
COMMAND_ACTIONS: Final = (*(field.name for field in Command.DESCRIPTOR.oneofs_by_name["action"].fields), _UNKNOWN_ACTION)


def alert_names(rule: int, severity: int) -> tuple[str, str]:
    """As labels; a number that a newer version knows is "unspecified"."""
    return _RULES.get(rule, _RULES[0]), _SEVERITIES.get(severity, _SEVERITIES[0])


class Tally:
    """One process's. `took` each record that is in the log, `stepped` for each run of the step."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter(dict.fromkeys(EVENT_RESULTS, 0))
        self.commands: Counter[tuple[str, str]] = Counter()
        self.alerts: Counter[tuple[str, str]] = Counter()
        # How many steps took up to each bound, and at the end how many took longer; and how long all of them took.
        self.steps = [0] * (len(STEP_BOUNDS_S) + 1)
        self.steps_s = 0.0

    def stepped(self, took_s: float) -> None:
        """One run of the step."""
        self.steps[bisect_left(STEP_BOUNDS_S, took_s)] += 1
        self.steps_s += took_s

    def took(self, record: LedgerRecord) -> None:
        """One record that was acknowledged."""
        source = record.WhichOneof("source")
        if source == "usage":
            self.events["accepted"] += len(record.usage.cost_pico_low)
            for dropped in record.usage.dropped:
                self.events[_DROPS.get(dropped.reason, _UNDECODABLE)] += 1
        elif source == "command":
            self.commands[_action(record.command.command), COMMAND_OUTCOMES[not record.command.applied]] += 1
        elif source == "rejected":
            self.events[_UNDECODABLE] += 1
        for alert in record.alerts:
            self.alerts[alert_names(alert.rule, alert.severity)] += 1


def _action(command: bytes) -> str:
    try:
        return Command.FromString(command).WhichOneof("action") or _UNKNOWN_ACTION
    except DecodeError:
        return _UNKNOWN_ACTION
