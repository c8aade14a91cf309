"""A tenant's life: suspended, closed, its projects; what becomes of usage, keys and credit is said and is so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from billing.amounts import PICO, to_amount
from billing.limits import CLOSED_KEYS_MAX
from billing.v1.account_pb2 import ACCOUNT_STATUS_ACTIVE, ACCOUNT_STATUS_CLOSED, ACCOUNT_STATUS_SUSPENDED, ApiKey
from billing.v1.command_pb2 import CreditGrant, KeyUpsert, ProjectUpsert, TenantUpsert
from billing.v1.invoice_pb2 import CREDIT_KIND_OPENING, CREDIT_KIND_PROMOTIONAL
from tests.billing.agreement import agreed
from tests.billing.ledgers import Ledger, batch, tenants_in, usage

if TYPE_CHECKING:
    from pathlib import Path

A = tenants_in(1)[0]
EVENT_PICO = 100 * 10_000 + 10 * 40_000


def ledger() -> Ledger:
    made = Ledger()
    made.price()
    made.tenant(A)
    for kind in (CREDIT_KIND_OPENING, CREDIT_KIND_PROMOTIONAL):
        grant = CreditGrant(tenant_id=A, amount=to_amount(PICO), currency="USD", kind=kind)
        assert made.command(credit_grant=grant).record.command.applied
    return made


def key(made: Ledger, key_id: str, **fields: object) -> str:
    said = ApiKey(**({"key_id": key_id, "tenant_id": A, "secret_hash": b"h" * 32} | fields))  # type: ignore[arg-type]
    return made.command(key_upsert=KeyUpsert(key=said)).record.command.refusal


def test_closing_revokes_keys_and_lets_promotional_credit_expire(tmp_path: Path) -> None:
    made = ledger()
    key(made, "k1")
    key(made, "k2", revoked=True)
    made.usage(batch([usage("r1", A)]))
    closed = made.command(tenant_upsert=TenantUpsert(tenant_id=A, status=ACCOUNT_STATUS_CLOSED)).record
    assert closed.command.outcome == (
        "closed: 1 key(s) revoked; 0.9999986 USD of credit expired; 1.00 USD that was paid for is left: "
        "pay it back, or expire it; usage that still comes is charged"
    )
    assert [(each.key_id, each.revoked) for each in closed.keys] == [("k1", True)]
    assert "is closed" in key(made, "k3")
    assert not key(made, "k2", revoked=True)
    # Late usage is charged.
    made.usage(batch([usage("r2", A)]))
    assert made.state.accounts[A].balance_pico == PICO - EVENT_PICO
    again = TenantUpsert(tenant_id=A, status=ACCOUNT_STATUS_CLOSED, expire_credit=True)
    outcome = made.command(tenant_upsert=again).record.command.outcome
    assert "0 key(s) revoked; 0.9999986 USD of credit expired; usage" in outcome
    assert made.state.accounts[A].balance_pico == 0
    agreed(made, tmp_path)


def test_more_keys_than_a_record_takes_are_revoked_by_a_repeat() -> None:
    made = ledger()
    for number in range(CLOSED_KEYS_MAX + 2):
        made.state.keys[f"k{number}"] = ApiKey(key_id=f"k{number}", tenant_id=A)
    closing = TenantUpsert(tenant_id=A, status=ACCOUNT_STATUS_CLOSED)
    assert "2 are left: close it again" in made.command(tenant_upsert=closing).record.command.outcome
    assert "closed: 2 key(s) revoked;" in made.command(tenant_upsert=closing).record.command.outcome
    assert all(each.revoked for each in made.state.keys.values())


def test_a_change_of_the_plan_wakes_nobody_up() -> None:
    made = ledger()
    for status in (ACCOUNT_STATUS_SUSPENDED, ACCOUNT_STATUS_CLOSED, ACCOUNT_STATUS_ACTIVE):
        made.command(tenant_upsert=TenantUpsert(tenant_id=A, status=status))
        made.command(tenant_upsert=TenantUpsert(tenant_id=A, display_name="new name"))
        assert made.state.accounts[A].status == status


def test_a_project_is_created_closed_and_opened_again(tmp_path: Path) -> None:
    made = ledger()

    def project(**fields: object) -> str:
        said = ProjectUpsert(**({"tenant_id": A, "project_id": "p"} | fields))  # type: ignore[arg-type]
        return made.command(project_upsert=said).record.command.refusal

    assert not project(display_name="Search")
    assert not key(made, "k1", project_id="p")
    assert not project(closed=True)
    assert "is closed" in key(made, "k2", project_id="p")
    assert not key(made, "k1", project_id="p", revoked=True)
    [closed] = made.state.all_projects()
    assert (closed.display_name, closed.closed) == ("Search", True)
    assert "project_id" in project(project_id="")
    assert "create the tenant" in project(tenant_id=tenants_in(1, 2)[1])
    assert not project()
    assert not key(made, "k2", project_id="p")
    agreed(made, tmp_path)
