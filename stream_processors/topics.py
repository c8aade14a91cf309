"""Topics, and the founding of a ledger: what `taximeter topics apply` (embedded: `up`) does, and nobody else.

Promise: `plan` only looks, and names every change that `apply` would make; `apply` may be interrupted and run again. A ledger
is founded only where there never was one: in an empty ledger partition of which nothing has been published. If some partitions
were founded and others not, the rest is founded with the same generation and settings; the commands that all of them were sent
meanwhile, price books too, are read from the beginning there.

Where the broker forgot everything and local stores hold the state (embedded), the ledger is founded again on them: the new
generation's founding records name the last record of the old one, and state accounts, keys, marks and price books in full.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)

from billing import replay
from billing.alerts import RESOLVE_MS
from billing.chain import Chain, UnreadableRecord
from billing.completeness import missing_grace_ms, silence_ms
from billing.drift import DRIFT_MILLIONTHS
from billing.founding import GENERATION_BYTES, LedgerSettings, found, found_again
from billing.key_ring import Keys
from billing.state import LedgerState
from billing.v1.ledger_pb2 import Founding, LedgerRecord
from stream_processors.errors import RefusedToStart, WorkerError
from stream_processors.kafka_ports import MESSAGE_BYTES_MAX, KafkaLogReader, KafkaLogWriter
from stream_processors.settings import KafkaSettings, TopicNames, TopicSettings

if TYPE_CHECKING:
    from stream_processors.local_store import LocalStore

__all__ = ["ApplySettings", "Change", "apply", "check_partitions", "existing_topics", "make_ledger_topic", "plan"]

_LEADER_PAUSE_S = 0.02
_LEADER_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is not as it should be, and what is done about it."""

    kind: str
    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class ApplySettings:
    """What to make. `state_folder` is given where the broker may have forgotten a ledger that local stores still hold."""

    kafka: KafkaSettings
    topics: TopicSettings
    ledger: LedgerSettings
    seal_key: Keys
    names: TopicNames = field(default_factory=TopicNames)
    state_folder: Path | None = None
    writer: str = "topics apply"

    def __post_init__(self) -> None:
        if self.topics.partitions != self.ledger.partitions:
            raise ValueError(
                f"partitions: {self.topics.partitions} for topics, {self.ledger.partitions} for the ledger; give one number"
            )
        if self.topics.ledger_retention_ms < self.ledger.dedupe_horizon_ms:
            raise ValueError(
                f"ledger_retention_ms: {self.topics.ledger_retention_ms} is under the dedupe horizon of "
                f"{self.ledger.dedupe_horizon_ms}; a state could not be rebuilt from the log"
            )


def check_partitions(kafka: KafkaSettings, names: TopicNames) -> int:
    """How many partitions the ledger's topics have; RefusedToStart where one is missing or they differ."""
    existing = _existing(AdminClient(kafka.client()), kafka)
    needed = _wanted(names, TopicSettings(partitions=1))
    missing = [name for name in needed if name not in existing]
    if missing:
        raise RefusedToStart(f"topic {missing[0]} is not there; run: taximeter topics apply")
    counts = {name: existing[name] for name in needed}
    if len(set(counts.values())) > 1:
        raise RefusedToStart(
            f"the topics have different numbers of partitions ({counts}); a tenant's input, ledger and account must share "
            "one: recreate those that were changed"
        )
    return next(iter(counts.values()))


async def plan(settings: ApplySettings) -> list[Change]:
    """What `apply` would do."""
    admin = AdminClient(settings.kafka.client())
    changes = [change for change, _ in await asyncio.to_thread(_topic_changes, admin, settings)]
    created = {change.name for change in changes if change.kind == "create topic"}
    missing = list(range(settings.topics.partitions))
    if settings.names.ledger not in created:
        missing = await _unfounded(settings)
    if settings.names.progress not in created:
        await _refuse_forgotten(settings, missing)
    ledger = settings.names.ledger
    return changes + [Change("found ledger", f"{ledger}[{partition}]", "founding record") for partition in missing]


async def apply(settings: ApplySettings) -> list[Change]:
    """Make topics right and found what is not founded; what was done."""
    admin = AdminClient(settings.kafka.client())
    changes = []
    for change, act in await asyncio.to_thread(_topic_changes, admin, settings):
        await asyncio.to_thread(act)
        changes.append(change)
    return changes + await _found(settings)


# --- topics ---


def existing_topics(settings: ApplySettings) -> dict[str, int]:
    """Every topic of the cluster, and how many partitions it has."""
    return _existing(AdminClient(settings.kafka.client()), settings.kafka)


def make_ledger_topic(settings: ApplySettings) -> list[Change]:
    """The ledger's topic alone, made right, for who puts a ledger there that was; what was done."""
    changes = []
    for change, act in _topic_changes(AdminClient(settings.kafka.client()), settings):
        if change.name == settings.names.ledger:
            act()
            changes.append(change)
    return changes


def _wanted(names: TopicNames, topics: TopicSettings) -> dict[str, dict[str, str]]:
    def kept(retention_ms: int) -> dict[str, str]:
        return {"cleanup.policy": "delete", "retention.ms": str(retention_ms)}

    # Retention counts from when Kafka got it: a sender's clock may be wrong, which must neither delete its usage nor refuse it.
    arrival = {"message.timestamp.type": "LogAppendTime"}
    # A record's time is its log time. It never goes back, so one worker's clock, years ahead, would make all later usage too
    # old: Kafka holds it against its own clock, with every write.
    bounded = {"message.timestamp.type": "CreateTime", "message.timestamp.after.max.ms": str(topics.log_time_ahead_max_ms)}

    large = {"max.message.bytes": str(MESSAGE_BYTES_MAX)}
    return {
        names.events: {**kept(topics.input_retention_ms), **large, **arrival},
        names.commands: {**kept(topics.input_retention_ms), **large, **arrival},
        names.ledger: {**kept(topics.ledger_retention_ms), **large, **bounded},
        names.accounts: {"cleanup.policy": "compact"},
        names.keys: {"cleanup.policy": "compact"},
        names.prices: {"cleanup.policy": "compact", **large},
        names.progress: {"cleanup.policy": "compact"},
        names.alerts: kept(topics.notice_retention_ms),
        names.rejected: {**kept(topics.notice_retention_ms), **large},
    }


def _existing(admin: AdminClient, kafka: KafkaSettings) -> dict[str, int]:
    try:
        metadata = admin.list_topics(timeout=kafka.request_timeout_ms / 1000)
    except KafkaException as error:
        raise RefusedToStart(f"Kafka at {kafka.bootstrap} does not answer ({error}); is it running?") from error
    return {name: len(topic.partitions) for name, topic in metadata.topics.items()}


def _topic_changes(admin: AdminClient, settings: ApplySettings) -> list[tuple[Change, Callable[[], None]]]:
    existing = _existing(admin, settings.kafka)
    partitions = settings.topics.partitions
    timeout_s = settings.kafka.request_timeout_ms / 1000
    changes: list[tuple[Change, Callable[[], None]]] = []
    for name, config in _wanted(settings.names, settings.topics).items():
        if name not in existing:
            detail = f"{partitions} partitions, " + ", ".join(f"{k}={v}" for k, v in config.items())
            replication = settings.topics.replication or -1
            topic = NewTopic(name, num_partitions=partitions, replication_factor=replication, config=config)
            changes.append((Change("create topic", name, detail), _creation(admin, topic, settings.kafka)))
            continue
        if existing[name] != partitions:
            raise RefusedToStart(
                f"topic {name} has {existing[name]} partitions, the setting partitions is {partitions}; the number is fixed "
                f"once a ledger is founded: set it to {existing[name]}"
            )
        now = _config(admin, name, timeout_s)
        wrong = {key: value for key, value in config.items() if now.get(key) != value}
        if wrong:
            detail = ", ".join(f"{key}: {now.get(key)} to {value}" for key, value in wrong.items())
            changes.append((Change("alter topic", name, detail), _alteration(admin, name, wrong, timeout_s)))
    return changes


def _creation(admin: AdminClient, topic: NewTopic, kafka: KafkaSettings) -> Callable[[], None]:
    timeout_s = kafka.request_timeout_ms / 1000

    def act() -> None:
        futures: Mapping[str, Future[None]] = admin.create_topics([topic], request_timeout=timeout_s)
        for future in futures.values():
            future.result(timeout_s)
        _await_leaders(topic, kafka, timeout_s)

    return act


def _await_leaders(topic: NewTopic, kafka: KafkaSettings, timeout_s: float) -> None:
    """A topic is said to be created a moment before its partitions can be read: whoever founds a ledger then was refused."""
    asked = {TopicPartition(topic.topic, partition): OffsetSpec.latest() for partition in range(topic.num_partitions)}
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            # A new client each time: one that was told once that there is no leader may believe it until its time is over.
            admin = AdminClient(kafka.client())
            for future in admin.list_offsets(asked, request_timeout=min(_LEADER_TIMEOUT_S, timeout_s)).values():
                future.result(timeout_s)
        except KafkaException as error:
            if time.monotonic() >= deadline:
                raise RefusedToStart(
                    f"topic {topic.topic} was created and cannot be read after {timeout_s:g} s ({error}); is Kafka well?"
                ) from error
            time.sleep(_LEADER_PAUSE_S)
        else:
            return


def _alteration(admin: AdminClient, name: str, config: Mapping[str, str], timeout_s: float) -> Callable[[], None]:
    def act() -> None:
        entries = [ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET) for key, value in config.items()]
        resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries)
        for future in admin.incremental_alter_configs([resource], request_timeout=timeout_s).values():
            future.result(timeout_s)

    return act


def _config(admin: AdminClient, name: str, timeout_s: float) -> dict[str, str | None]:
    (future,) = admin.describe_configs([ConfigResource(ResourceType.TOPIC, name)], request_timeout=timeout_s).values()
    return {key: entry.value for key, entry in future.result(timeout_s).items()}


# --- founding ---


async def _unfounded(settings: ApplySettings) -> list[int]:
    """Ledger partitions that hold nothing at all."""
    reader = KafkaLogReader(settings.kafka)
    missing = []
    for partition in range(settings.topics.partitions):
        first, end = await reader.bounds(settings.names.ledger, partition)
        if first == end == 0:
            missing.append(partition)
        elif first == end:
            raise RefusedToStart(
                f"{settings.names.ledger}[{partition}]: the log is empty from offset {first}: its records were deleted. "
                "Restore it; a new founding record would forget what was charged"
            )
    return missing


async def _refuse_forgotten(settings: ApplySettings, missing: Sequence[int]) -> None:
    """Whoever publishes says how far it is in a topic that is kept: there was a ledger, and no local store with its state is
    named."""
    if settings.state_folder is not None:
        return
    reader, names = KafkaLogReader(settings.kafka), settings.names
    for partition in missing:
        _, end = await reader.bounds(names.progress, partition)
        if end:
            raise RefusedToStart(
                f"{names.ledger}[{partition}]: it is empty, and {names.progress}[{partition}] says how far it was read: its "
                "records are gone, and a new founding record would forget prices, balances and what was charged. Restore it: "
                "docs/operating.md. To begin with nothing, delete all topics of the installation first"
            )


async def _first_record(settings: ApplySettings, partition: int) -> LedgerRecord:
    reader = KafkaLogReader(settings.kafka)
    first, end = await reader.bounds(settings.names.ledger, partition)
    async for chunk in reader.read(settings.names.ledger, partition, first, min(end, first + 1)):
        follow = Chain(partition, settings.seal_key)
        try:
            record = follow.accept(chunk[0][1])
            if follow.refusal:
                raise UnreadableRecord(f"offset {first}: {follow.refusal}; or is ledger.seal_key not this installation's?")
        except UnreadableRecord as error:
            raise RefusedToStart(f"{settings.names.ledger}[{partition}]: {error}") from error
        if record is not None:
            return record
    raise RefusedToStart(
        f"{settings.names.ledger}[{partition}]: the log starts at offset {first} without its founding record, so other "
        "partitions cannot be founded to match; restore the topic"
    )


async def _found(settings: ApplySettings) -> list[Change]:
    missing = await _unfounded(settings)
    if not missing:
        return []
    await _refuse_forgotten(settings, missing)
    generation, ledger = secrets.token_bytes(GENERATION_BYTES), settings.ledger
    present = [partition for partition in range(settings.topics.partitions) if partition not in missing]
    stores = {partition: store for partition in missing if (store := _store(settings, partition)) is not None}
    changes = []
    writer = KafkaLogWriter(settings.kafka)
    try:
        states = {partition: state for partition, store in stores.items() if (state := store.load()) is not None}
        if present:
            record = await _first_record(settings, present[0])
            generation, ledger = record.generation, _settings_of(ledger, record.founding)
        elif states:
            ledger = _settings_of(ledger, next(iter(states.values())).settings)
        if ledger.partitions != settings.topics.partitions:
            raise RefusedToStart(
                f"the ledger was founded with {ledger.partitions} partitions, the setting is {settings.topics.partitions}; "
                f"set partitions to {ledger.partitions}"
            )
        for partition in missing:
            state = states.get(partition)
            if state is not None and state.generation == generation:
                raise RefusedToStart(
                    f"{settings.names.ledger}[{partition}]: it is empty, and partition {present[0]} goes on in the generation "
                    "that the local store is of: positions of both would be the same. Restore the partition; or delete all "
                    "topics of the installation, and found all of it again on the local stores"
                )
            now_ms = time.time_ns() // 1_000_000
            if state is None:
                record, stored = found(ledger, partition, generation, now_ms, settings.seal_key, settings.writer)
            else:
                record, stored = found_again(state, generation, now_ms, settings.seal_key, settings.writer)
            offset = await _write(writer, settings.names.ledger, partition, stored, record.log_time_ms)
            if state is not None:
                _carry_on(stores[partition], state, record, stored, offset)
            detail = f"generation {generation.hex()[:12]}" + (", on the local state" if state is not None else "")
            changes.append(Change("found ledger", f"{settings.names.ledger}[{partition}]", detail))
    finally:
        for store in stores.values():
            store.close()
        await writer.close(settings.kafka.request_timeout_ms / 1000)
    return changes


def _store(settings: ApplySettings, partition: int) -> LocalStore | None:
    if settings.state_folder is None:
        return None
    folder = settings.state_folder / f"partition-{partition}"
    if not folder.exists():
        return None
    # RocksDB and what is around it take a while to load, and most ledgers are founded where there is no store.
    from stream_processors.local_store import LocalStore

    return LocalStore(folder, partition, keep_unconfirmed=True)


def _carry_on(store: LocalStore, state: LedgerState, record: LedgerRecord, stored: bytes, offset: int) -> None:
    """The local store goes along at once; were this process killed before, the worker would do it from the log."""
    from stream_processors.local_store import Acknowledged

    replay.apply(state, record, stored)
    store.apply([Acknowledged(record, stored, offset)])


def _settings_of(given: LedgerSettings, founding: Founding) -> LedgerSettings:
    return replace(
        given,
        partitions=founding.partitions,
        dedupe_key=founding.dedupe_key,
        dedupe_horizon_ms=founding.dedupe_horizon_ms,
        window_lateness_ms=founding.window_lateness_ms,
        future_alert_ms=founding.future_alert_ms,
        future_reject_ms=founding.future_reject_ms,
        alert_cooldown_ms=founding.alert_cooldown_ms,
        missing_grace_ms=missing_grace_ms(founding),
        silence_ms=silence_ms(founding),
        alert_resolve_ms=founding.alert_resolve_ms or RESOLVE_MS,
        drift_millionths=founding.drift_millionths or DRIFT_MILLIONTHS,
        default_rules=founding.default_plan.rules,
        default_currency=founding.default_currency,
        default_prompt_tokens_max=founding.default_plan.prompt_tokens_max,
        default_burst_tokens_floor=founding.default_plan.burst_tokens_floor,
        default_burst_factor=founding.default_plan.burst_factor,
        default_duplicate_flood_events=founding.default_plan.duplicate_flood_events,
    )


async def _write(writer: KafkaLogWriter, topic: str, partition: int, stored: bytes, time_ms: int) -> int:
    sent: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
    writer.write(topic, partition, stored, lambda offset, problem: sent.set_result((offset, problem)), time_ms=time_ms)
    offset, problem = await sent
    if problem:
        raise WorkerError(f"{topic}[{partition}]: the founding record could not be written ({problem})")
    if offset != 0:
        raise RefusedToStart(
            f"{topic}[{partition}]: the founding record got offset {offset}; somebody else wrote at the same time. Stop other "
            "`topics apply` runs and workers, delete the topic, and run it again"
        )
    return offset
