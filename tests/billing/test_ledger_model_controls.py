"""Negative controls of the state machines: each rule that is broken here turns them red. Only tests turn these switches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from billing import adjustments, command_step, invoice_step, replay, usage_admission
from billing.amounts import from_amount
from billing.state import LedgerState, MemorySeenKeys
from billing.v1.command_pb2 import Command
from tests.billing.test_ledger_model import LedgerMachine

_SETTINGS = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
    print_blob=False,
)


def commands_repeat() -> Any:
    """A command that comes again is applied again."""
    return mock.patch.object(command_step, "remembered_id", return_value="")


@contextlib.contextmanager
def dedupe_by_payload() -> Iterator[None]:
    """An event is known again by what it says."""
    identities: Callable[..., Any] = usage_admission.identities  # type: ignore[attr-defined]

    def by_payload(*arguments: Any) -> tuple[list[bytes], list[bytes]]:
        _, fingerprints = identities(*arguments)
        return [fingerprint * 2 for fingerprint in fingerprints], fingerprints

    with mock.patch.object(usage_admission, "identities", by_payload):
        yield


def nothing_is_remembered() -> Any:
    return mock.patch.object(MemorySeenKeys, "remember")


def keys_never_expire() -> Any:
    return mock.patch.object(MemorySeenKeys, "expire")


@contextlib.contextmanager
def credit_in_any_currency() -> Iterator[None]:
    """A grant is added up whatever currency it names."""
    grant = command_step._grant

    def take(state: LedgerState, said: Command, *others: Any) -> None:
        account = state.accounts.get(said.credit_grant.tenant_id)
        if account is not None and from_amount(said.credit_grant.amount) > 0:
            said.credit_grant.currency = account.currency
        grant(state, said, *others)

    with mock.patch.object(command_step, "_grant", take):
        yield


def replay_forgets_a_founding() -> Any:
    """Who follows keeps its old settings, inputs and windows when the log is founded again."""
    return mock.patch.object(replay, "_found")


def voids_are_forgotten() -> Any:
    """An event that was voided is voided again."""
    return mock.patch.object(adjustments, "_corrected_keys", return_value=[])


def months_are_invoiced_in_any_order() -> Any:
    """A month is invoiced before it is over, again, and before the one that comes first."""
    return mock.patch.object(invoice_step, "_check_turn")


CONTROLS = [
    commands_repeat,
    dedupe_by_payload,
    nothing_is_remembered,
    keys_never_expire,
    credit_in_any_currency,
    replay_forgets_a_founding,
    voids_are_forgotten,
    months_are_invoiced_in_any_order,
]


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.__name__)
def test_a_broken_rule_is_seen(control: Callable[[], Any]) -> None:
    with control(), pytest.raises(AssertionError):
        run_state_machine_as_test(LedgerMachine, settings=_SETTINGS)
