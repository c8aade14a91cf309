"""What a record becomes on the topics that gateways follow, and in which order."""

from __future__ import annotations

from collections import Counter

from billing.amounts import to_amount
from billing.commands import lease_key
from billing.founding import LedgerSettings
from billing.v1.account_pb2 import AccountUpdate
from billing.v1.command_pb2 import BudgetUpsert, LeaseRequest, ProjectUpsert
from stream_processors.publisher_app import Batch, messages_of
from stream_processors.settings import TopicNames
from tests.billing.ledgers import COMMAND_KEY, Ledger, batch, tenants_in, usage

TOPICS = TopicNames()


def test_a_tick_comes_behind_every_account_that_it_speaks_for() -> None:
    """Found by the simulator (seed 26 at 64d6f3b): a batch kept the tick where its first record had put it."""
    ledger = Ledger()
    first, second = tenants_in(1)[:2]
    published = Batch()
    for tenant_id in (first, second):
        messages_of(ledger.usage(batch([usage(tenant_id, tenant_id)])).record, TOPICS, published)
    updates = [AccountUpdate.FromString(value) for (topic, _), value in published.states.items() if topic == TOPICS.accounts]
    assert [update.account.tenant_id for update in updates] == [first, second, ""]
    assert updates[-1].tick.version.sequence == 2


def test_a_name_with_a_delimiter_takes_nobody_elses_place() -> None:
    """Of a key the last value alone is sent, and kept by Kafka: a producer may name a tenant as somebody's lease is called."""
    ledger = Ledger(0, LedgerSettings(partitions=1, dedupe_key=b"k" * 32))
    published = Batch()
    for tenant_id in ("a", "a/b", "tick/0", "a%2Fb"):
        messages_of(ledger.tenant(tenant_id).record, TOPICS, published)
    for tenant_id, holder_id in (("a", "b/c"), ("a/b", "c")):
        asked = LeaseRequest(tenant_id=tenant_id, holder_id=holder_id, epoch=1, request_number=1, duration_ms=1_000)
        messages_of(ledger.command(key=lease_key(COMMAND_KEY), lease_request=asked).record, TOPICS, published)
    for project_id, user_id in (("/x", ""), ("", "x/")):
        budget = BudgetUpsert(tenant_id="a", amount=to_amount(1), project_id=project_id, user_id=user_id)
        messages_of(ledger.command(budget_upsert=budget).record, TOPICS, published)
    for tenant_id, project_id in (("a", "b/c"), ("a/b", "c")):
        project = ProjectUpsert(tenant_id=tenant_id, project_id=project_id)
        messages_of(ledger.command(project_upsert=project).record, TOPICS, published)
    names = ["lease/a/b/c", "budget/a//x/", "project/a/b/c"]
    messages_of(ledger.usage(batch([usage(name, name) for name in names])).record, TOPICS, published)
    updates = [AccountUpdate.FromString(value) for (topic, _), value in published.states.items() if topic == TOPICS.accounts]
    assert Counter(update.WhichOneof("update") for update in updates) == {
        "account": 7,
        "lease": 2,
        "budget": 2,
        "project": 2,
        "tick": 1,
    }
    assert (TOPICS.accounts, "lease/a%2Fb/c") in published.states


def test_of_a_budget_that_has_ended_nothing_is_kept_unless_there_is_one_again() -> None:
    ledger = Ledger(0, LedgerSettings(partitions=1, dedupe_key=b"k" * 32))
    ledger.tenant("a")
    published = Batch()

    def budget(user_id: str, amount: int) -> None:
        said = BudgetUpsert(tenant_id="a", amount=to_amount(amount), user_id=user_id)
        messages_of(ledger.command(budget_upsert=said).record, TOPICS, published)

    for user_id, amount in (("maria", 1), ("maria", 0), ("peter", 1), ("peter", 0), ("peter", 2)):
        budget(user_id, amount)
    ended = TOPICS.accounts, "budget/a//maria"
    assert published.ended == {ended}
    # Who follows is told first: compaction comes later.
    assert AccountUpdate.FromString(published.states[ended]).budget.gone
    assert not AccountUpdate.FromString(published.states[TOPICS.accounts, "budget/a//peter"]).budget.gone
