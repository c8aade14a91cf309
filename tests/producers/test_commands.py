"""Commands reach the partitions that they concern, signed, or the caller hears of it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from confluent_kafka.admin import NewTopic

from billing.amounts import to_amount
from billing.commands import verify
from billing.identity import partition_of
from billing.v1.command_pb2 import Command, CreditGrant, PriceBook, ProjectUpsert, SignedCommand, TenantUpsert
from producers.commands import CommandSender, CommandSettings, tenant_of
from producers.errors import CommandNotSent
from producers.follower import TopicFollower
from tests.producers.support import create_topics

KEY = b"command key of a test installation"
PARTITIONS = 4


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that stands still for a while is not what is looked at here."""
    monkeypatch.setattr("producers.commands._METADATA_TIMEOUT_S", 60.0)


def grant(tenant_id: str = "acme") -> Command:
    return Command(
        schema_version=1,
        command_id="grant-1",
        credit_grant=CreditGrant(tenant_id=tenant_id, amount=to_amount(5), currency="EUR"),
    )


def price_book() -> Command:
    return Command(schema_version=1, command_id="prices-1", price_book=PriceBook(version=1, currency="EUR"))


def test_a_tenants_command_goes_to_the_tenant_and_a_price_book_to_all(
    bootstrap: str, unique_name: Callable[[str], str]
) -> None:
    topic = unique_name("billing.commands")
    create_topics(bootstrap, NewTopic(topic, PARTITIONS, 1))
    sender = CommandSender(CommandSettings(bootstrap, PARTITIONS, topic), KEY)
    assert sender.send(grant()) == {partition_of("acme", PARTITIONS): 0}
    assert set(sender.send(price_book())) == {0, 1, 2, 3}

    heard: list[tuple[int, bytes, Command]] = []
    complete = threading.Event()

    def take(key: bytes, value: bytes, partition: int) -> None:
        heard.append((partition, key, verify(SignedCommand.FromString(value), KEY)))
        if len(heard) == PARTITIONS + 1:
            complete.set()

    follower = TopicFollower(bootstrap, topic, take)
    follower.start()
    assert complete.wait(180)
    follower.close()
    assert (partition_of("acme", PARTITIONS), b"acme", grant()) in heard
    assert sorted(partition for partition, _, command in heard if command == price_book()) == [0, 1, 2, 3]


def test_a_topic_that_is_not_the_ledgers_takes_no_command(bootstrap: str, unique_name: Callable[[str], str]) -> None:
    topic = unique_name("billing.commands")
    with pytest.raises(CommandNotSent, match=topic):
        CommandSender(CommandSettings(bootstrap, PARTITIONS, topic), KEY).send(grant(), timeout_s=60)
    create_topics(bootstrap, NewTopic(topic, PARTITIONS + 1, 1))
    with pytest.raises(CommandNotSent, match="5 partitions, the ledger 4"):
        CommandSender(CommandSettings(bootstrap, PARTITIONS, topic), KEY).send(grant(), timeout_s=60)


def test_no_broker_is_an_error_within_the_timeout(free_port: Callable[[], int]) -> None:
    sender = CommandSender(CommandSettings(f"127.0.0.1:{free_port()}", PARTITIONS), KEY)
    with pytest.raises(CommandNotSent, match="send the same command again"):
        sender.send(grant(), timeout_s=1)


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (Command(schema_version=1, command_id="x"), "action"),
        (Command(schema_version=1, credit_grant=CreditGrant(tenant_id="acme")), "command_id"),
        (grant(""), r"credit_grant\.tenant_id"),
        (Command(schema_version=1, command_id="x", tenant_upsert=TenantUpsert()), r"tenant_upsert\.tenant_id"),
        (Command(schema_version=1, command_id="x", project_upsert=ProjectUpsert()), r"project_upsert\.tenant_id"),
        (Command(command_id="x", price_book=PriceBook(version=1)), "schema_version"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused_before_it_is_sent(command: Command, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        CommandSender(CommandSettings("nowhere:1", PARTITIONS), KEY).send(command)


def test_every_action_says_whom_it_concerns() -> None:
    actions = {field.name for field in Command.DESCRIPTOR.oneofs_by_name["action"].fields}
    for action in actions:
        command = Command(schema_version=1, command_id="x")
        getattr(command, action).SetInParent()
        try:
            # A key of no tenant is an operator's, and lives where the empty name does.
            assert tenant_of(command) == ("" if action == "key_upsert" else None)
        except ValueError as error:
            assert action in str(error)  # noqa: PT017
