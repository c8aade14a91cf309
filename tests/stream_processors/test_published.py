"""What a record becomes on the topics that gateways follow, and in which order."""

from __future__ import annotations

from billing.v1.account_pb2 import AccountUpdate
from stream_processors.publisher_app import Batch, messages_of
from stream_processors.settings import TopicNames
from tests.billing.ledgers import Ledger, batch, tenants_in, usage

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
