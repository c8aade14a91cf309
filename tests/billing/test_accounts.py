"""An account states what changed, whatever alone changed: what is not stated again would be lost for every reader."""

from __future__ import annotations

from dataclasses import fields

import pytest

from billing.accounts import AccountState
from billing.v1.account_pb2 import ACCOUNT_STATUS_SUSPENDED, Calendar, Plan, Restriction

CHANGED: dict[str, object] = {
    "currency": "EUR",
    "plan": Plan(plan_id="another"),
    "status": ACCOUNT_STATUS_SUSPENDED,
    "display_name": "Acme",
    "calendar": Calendar(time_zone="Europe/Berlin", from_month=[0], offset_minutes=[60]),
    "restrictions": [Restriction(alert_id="one", until_ms=10_000)],
}
NAMES = [field.name for field in fields(AccountState) if not field.name.startswith("_") and field.name != "tenant_id"]


@pytest.mark.parametrize("name", NAMES)
def test_whatever_changes_alone_is_stated(name: str) -> None:
    account = AccountState("acme", "USD", Plan())
    account.to_account(b"g", 1, 1_000)
    before = getattr(account, name)
    for value in (CHANGED.get(name, 7), before):
        setattr(account, name, value)
        stated = account.to_account(b"g", 2, 2_000)
        assert getattr(AccountState.from_account(stated), name) == value
