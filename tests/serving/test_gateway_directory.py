"""What the directory makes of messages, in any order, good and bad."""

from __future__ import annotations

from typing import Any

import pytest

from billing.amounts import PICO, to_amount
from billing.identity import partition_of
from billing.v1.account_pb2 import AccountUpdate, BudgetState, LedgerPosition, Project
from serving.gateway import hash_secret
from serving.gateway.directory import Directory
from tests.serving.gateway_support import (
    PARTITIONS,
    PEPPER,
    SECRET,
    account,
    api_key,
    known_directory,
    put_account,
    put_key,
    tick,
)

HASH = hash_secret(PEPPER, SECRET)


def test_finds_a_key_by_its_hash_only() -> None:
    directory = known_directory()
    key = directory.find_key(HASH)
    assert key is not None
    assert (key.tenant_id, key.project_id, key.user_id) == ("tenant-a", "project", "user")
    assert directory.find_key(hash_secret(PEPPER, "another")) is None
    assert directory.find_key(b"") is None


def test_a_lower_version_is_ignored() -> None:
    directory = Directory(PARTITIONS)
    put_account(directory, account(balance_pico=7, sequence=5))
    put_account(directory, account(balance_pico=9, sequence=4))
    found = directory.find_account("tenant-a")
    assert found is not None
    assert found.balance_pico == 7
    put_key(directory, api_key(revoked=True, version=LedgerPosition(generation=b"g", sequence=5)))
    put_key(directory, api_key(version=LedgerPosition(generation=b"g", sequence=4)))
    key = directory.find_key(HASH)
    assert key is not None
    assert key.revoked


def test_a_new_generation_replaces_an_older_one_by_log_time() -> None:
    directory = Directory(PARTITIONS)
    put_account(directory, account(balance_pico=7, sequence=500, log_time_ms=1_000))
    newer = account(balance_pico=9, sequence=0, log_time_ms=2_000)
    newer.account.version.generation = b"h"
    put_account(directory, newer)
    put_account(directory, account(balance_pico=7, sequence=501, log_time_ms=1_500))
    found = directory.find_account("tenant-a")
    assert found is not None
    assert found.balance_pico == 9


def test_an_old_generation_read_again_revives_no_revoked_key() -> None:
    directory = Directory(PARTITIONS)
    put_key(directory, api_key(revoked=True, version=LedgerPosition(generation=b"h", sequence=0)))
    put_key(directory, api_key(version=LedgerPosition(generation=b"g", sequence=9)))
    key = directory.find_key(HASH)
    assert key is not None
    assert key.revoked


def test_a_rotated_secret_no_longer_opens() -> None:
    directory = known_directory()
    put_key(directory, api_key(secret="new secret", version=LedgerPosition(generation=b"g", sequence=2)))
    assert directory.find_key(HASH) is None
    assert directory.find_key(hash_secret(PEPPER, "new secret")) is not None


def test_a_tombstone_takes_key_and_account_away() -> None:
    directory = known_directory()
    directory.on_key(b"key-a", b"", 0)
    directory.on_account(b"tenant-a", b"", 0)
    assert directory.find_key(HASH) is None
    assert directory.find_account("tenant-a") is None


def test_what_cannot_be_read_is_counted_and_changes_nothing() -> None:
    directory = known_directory()
    directory.on_key(b"key-a", b"\xff\xff", 0)
    directory.on_account(b"tenant-a", b"\xff\xff", 0)
    assert directory.counts() == {"directory_keys": 1, "directory_accounts": 1, "directory_unreadable": 2}


def test_freshness_is_that_of_the_tenants_partition() -> None:
    directory = Directory(PARTITIONS)
    partition = partition_of("tenant-a", PARTITIONS)
    assert directory.log_time_ms("tenant-a") == 0
    directory.on_account(b"tick", tick((partition + 1) % PARTITIONS, 900).SerializeToString(), 0)
    assert directory.log_time_ms("tenant-a") == 0
    directory.on_account(b"tick", tick(partition, 800).SerializeToString(), 0)
    directory.on_account(b"tick", tick(partition, 700).SerializeToString(), 0)
    assert directory.log_time_ms("tenant-a") == 800


def budget(sequence: int = 1, **fields: Any) -> AccountUpdate:
    said: dict[str, Any] = {
        "tenant_id": "tenant-a",
        "amount": to_amount(PICO),
        "hard_stop": True,
        "used_up": True,
        "period_end_ms": 1_000,
    }
    state = BudgetState(**(said | fields))
    state.version.CopyFrom(LedgerPosition(generation=b"g", sequence=sequence))
    return AccountUpdate(budget=state)


@pytest.mark.parametrize("whose", [{}, {"project_id": "project"}, {"user_id": "user"}])
def test_a_budget_that_is_used_up_stops_whom_it_is_of_until_its_period_ends(whose: dict[str, str]) -> None:
    directory = known_directory()
    key = directory.find_key(HASH)
    assert key is not None

    def stops(sequence: int, **fields: Any) -> bool:
        directory.on_account(b"budget", budget(sequence, **(whose | fields)).SerializeToString(), 0)
        stop = directory.find_stop(key, 999)
        assert directory.find_stop(key, 1_000) is None
        names = whose.get("project_id", ""), whose.get("user_id", ""), PICO
        assert stop is None or (stop.project_id, stop.user_id, stop.amount_pico) == names
        return stop is not None

    assert stops(2)
    assert stops(1, used_up=False), "what is older says nothing"
    assert not stops(3, used_up=False)
    assert stops(3)
    assert not stops(4, hard_stop=False)
    assert stops(5)
    assert not stops(6, gone=True)


@pytest.mark.parametrize("whose", [{"project_id": "other"}, {"user_id": "other"}, {"tenant_id": "tenant-b"}])
def test_a_budget_of_others_stops_nobody(whose: dict[str, str]) -> None:
    directory = known_directory()
    key = directory.find_key(HASH)
    assert key is not None
    directory.on_account(b"budget", budget(1, **whose).SerializeToString(), 0)
    assert directory.find_stop(key, 999) is None


def test_a_slash_in_a_name_makes_it_nobody_elses() -> None:
    directory = Directory(PARTITIONS)
    named_key = api_key()
    named_key.user_id = "x/"
    put_key(directory, named_key)
    directory.on_account(b"budget", budget(5, project_id="/x", used_up=False).SerializeToString(), 0)
    directory.on_account(b"budget", budget(4, user_id="x/").SerializeToString(), 0)
    key = directory.find_key(HASH)
    assert key is not None
    assert directory.find_stop(key, 999) is not None
    # A budget that ended leaves the topic; a tenant may be called as its key is.
    for tenant_id, gone in (("budget/tenant-a/x/", b"budget%2Ftenant-a%2Fx%2F"), ("a%2Fb", b"a%252Fb")):
        named = account()
        named.account.tenant_id = tenant_id
        put_account(directory, named)
        directory.on_account(tenant_id.encode(), b"", 0)
        assert directory.find_account(tenant_id) is not None
        directory.on_account(gone, b"", 0)
        assert directory.find_account(tenant_id) is None


def test_a_project_is_closed_and_opened_again() -> None:
    directory = known_directory()
    for sequence, closed in ((2, True), (1, False), (3, False)):
        project = Project(tenant_id="tenant-a", project_id="project", closed=closed)
        project.version.CopyFrom(LedgerPosition(generation=b"g", sequence=sequence))
        directory.on_account(b"project", AccountUpdate(project=project).SerializeToString(), 0)
        assert directory.is_closed("tenant-a", "project") == (sequence < 3)
    assert not directory.is_closed("tenant-a", "other")


def test_balances_are_exact_beyond_64_bits() -> None:
    directory = Directory(PARTITIONS)
    put_account(directory, account(balance_pico=-(10**25) + 1))
    found = directory.find_account("tenant-a")
    assert found is not None
    assert found.balance_pico == -(10**25) + 1
    assert PICO < 2**64
