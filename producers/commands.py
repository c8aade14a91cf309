"""Sends commands: credit, tenants, keys, prices.

Promise: `CommandSender.send` returns when every partition that the command concerns has acknowledged it, and raises
`CommandNotSent` otherwise, naming those that have not. Sending the same command again is safe: its ID is applied once in each
partition. A command about a tenant goes to the tenant's partition, a price book to all of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from billing.commands import sign
from billing.identity import partition_of
from billing.key_ring import Keys
from billing.limits import ID_CHARS_MAX, SCHEMA_VERSION
from billing.v1.command_pb2 import Command, LeaseRequest
from producers.errors import CommandNotSent

__all__ = ["CommandSender", "CommandSettings", "LeaseSender", "tenant_of"]

logger = logging.getLogger(__name__)

_METADATA_TIMEOUT_S = 5.0
_LEASE_TIMEOUT_MS = 5_000
_LEASES_QUEUED_MAX = 10_000


@dataclass(frozen=True)
class CommandSettings:
    """`security` is handed to librdkafka as it is and never shown."""

    bootstrap: str
    partitions: int
    topic: str = "billing.commands"
    security: Mapping[str, str] = field(default_factory=dict, repr=False)


def tenant_of(command: Command) -> str | None:
    """The tenant that the command concerns, "" for an operator's key; None where it concerns everyone. Raises `ValueError` if
    it lacks what it needs."""
    action = command.WhichOneof("action")
    if action is None:
        raise ValueError("action: is empty; say what the command does")
    if not 0 < len(command.command_id) <= ID_CHARS_MAX:
        raise ValueError(
            f"command_id: {command.command_id!r}; give it 1 to {ID_CHARS_MAX} characters, they make a repeat harmless"
        )
    if action in ("price_book", "lease_retirement", "producer_upsert", "alert_acknowledgement", "rules_change"):
        return None
    tenant = {
        "credit_grant": command.credit_grant.tenant_id,
        "tenant_upsert": command.tenant_upsert.tenant_id,
        "key_upsert": command.key_upsert.key.tenant_id,
        "lease_request": command.lease_request.tenant_id,
        "adjustment": command.adjustment.tenant_id,
        "invoice_finalization": command.invoice_finalization.tenant_id,
        "budget_upsert": command.budget_upsert.tenant_id,
        "project_upsert": command.project_upsert.tenant_id,
        "user_erasure": command.user_erasure.tenant_id,
    }[action]
    if not tenant and action != "key_upsert":
        raise ValueError(f"{action}.tenant_id: is empty; name the tenant that the command concerns")
    return tenant


class CommandSender:
    """Sends commands one after the other. Each `send` has a connection of its own: commands are rare, brokers come and go."""

    def __init__(self, settings: CommandSettings, key: Keys) -> None:
        """`key` is the installation's command key; the ledger refuses a command that was signed with another."""
        self.settings = settings
        self._key = key

    def send(self, command: Command, timeout_s: float = 30.0) -> dict[int, int]:
        """Returns the offset in each partition. Raises `CommandNotSent`, or `ValueError` for a command that cannot be meant."""
        tenant = tenant_of(command)
        if command.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version: {command.schema_version}; set it to {SCHEMA_VERSION}")
        partitions = range(self.settings.partitions) if tenant is None else [partition_of(tenant, self.settings.partitions)]
        producer = self._connect(min(timeout_s, _METADATA_TIMEOUT_S), timeout_s)
        value = sign(command, self._key)
        offsets: dict[int, int] = {}
        problems: dict[int, str] = dict.fromkeys(partitions, "not acknowledged in time")
        for partition in partitions:
            producer.produce(
                self.settings.topic,
                key=tenant,
                value=value,
                partition=partition,
                on_delivery=partial(_on_delivery, partition, offsets, problems),
            )
        producer.flush(timeout_s)
        if problems:
            raise self._not_sent("; ".join(f"partition {number}: {problem}" for number, problem in sorted(problems.items())))
        return offsets

    def _connect(self, metadata_timeout_s: float, timeout_s: float) -> Producer:
        producer = Producer(
            {
                "bootstrap.servers": self.settings.bootstrap,
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": 0,
                "message.timeout.ms": max(1_000, int(timeout_s * 1_000)),
                "allow.auto.create.topics": False,
                "log.connection.close": False,
                **self.settings.security,
                "logger": logger,
                "log_level": 2,
            }
        )
        try:
            topic = producer.list_topics(self.settings.topic, timeout=metadata_timeout_s).topics[self.settings.topic]
        except KafkaException as error:
            raise self._not_sent(str(error.args[0])) from error
        if topic.error is not None:
            raise self._not_sent(topic.error.str())
        if len(topic.partitions) != self.settings.partitions:
            # Sent on, it would land where its tenant does not live.
            raise self._not_sent(f"it has {len(topic.partitions)} partitions, the ledger {self.settings.partitions}")
        return producer

    def _not_sent(self, problem: str) -> CommandNotSent:
        return CommandNotSent(f"topic {self.settings.topic}: {problem}; send the same command again when Kafka answers")


class LeaseSender:
    """Sends lease requests as they come, over one connection, and waits for nothing.

    A request that is lost is no harm: the keeper of leases asks again. `send` may be called from one thread at a time.
    """

    def __init__(self, settings: CommandSettings, key: Keys) -> None:
        """`key` is the lease key: see `billing.commands.lease_key`."""
        self.lost = 0
        self._settings = settings
        self._key = key
        self._producer: Producer | None = None
        self._failed = False

    def send(self, request: LeaseRequest) -> None:
        """Hand `request` to the client library."""
        if self._failed or self._producer is None:
            # A connection that has outlived its broker may never deliver again.
            self._failed = False
            self._producer = self._connect()
        command = Command(
            schema_version=SCHEMA_VERSION,
            command_id=f"{request.holder_id[:64]}/{request.epoch}/{request.request_number}",
            issued_ms=time.time_ns() // 1_000_000,
            issuer=request.holder_id,
            lease_request=request,
        )
        try:
            self._producer.produce(
                self._settings.topic,
                key=request.tenant_id,
                value=sign(command, self._key),
                partition=partition_of(request.tenant_id, self._settings.partitions),
                on_delivery=self._on_delivery,
            )
            self._producer.poll(0)
        except (BufferError, KafkaException) as error:
            self._lose(str(error))

    def close(self, timeout_s: float = 1.0) -> None:
        """Wait a little for what is on its way: what does not arrive is given back by the next start."""
        if self._producer is not None:
            self._producer.flush(timeout_s)

    def _connect(self) -> Producer:
        return Producer(
            {
                "bootstrap.servers": self._settings.bootstrap,
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": 0,
                "message.timeout.ms": _LEASE_TIMEOUT_MS,
                "queue.buffering.max.messages": _LEASES_QUEUED_MAX,
                "allow.auto.create.topics": False,
                "log.connection.close": False,
                **self._settings.security,
                "logger": logger,
                "log_level": 2,
            }
        )

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._lose(error.str())

    def _lose(self, problem: str) -> None:
        self.lost += 1
        self._failed = True
        logger.info("a lease request was lost (%s); it is asked again", problem)


def _on_delivery(
    partition: int, offsets: dict[int, int], problems: dict[int, str], error: KafkaError | None, message: Message
) -> None:
    if error is not None:
        problems[partition] = error.str()
        return
    del problems[partition]
    offset = message.offset()
    offsets[partition] = -1 if offset is None else offset
