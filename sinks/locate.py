"""Where in Kafka's log a sink goes on: offsets start again when a log is recreated, so a position is looked for by its hash.

Promise: the offset that `locate` gives is right behind the record that the database stands at, or that of a founding record
that carries on from it, or, for an empty database, that of the first record, a founding one. Anything else is a LedgerError
that says what is in the log, what is in the database, and what to do. Bounded: it reads the log once at most, and only when
it was recreated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from google.protobuf.message import DecodeError

from billing.chain import record_hash
from billing.v1.ledger_pb2 import LedgerRecord
from sinks.errors import LedgerError, LedgerGap, LedgerUnavailable
from sinks.follow import Follower, describe, gap

__all__ = ["locate"]


@dataclass(frozen=True, slots=True)
class _Log:
    topic: str
    partition: int
    first_offset: int
    end_offset: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]"


def locate(consumer: Consumer, topic: str, follower: Follower, ledger_offset: int, *, timeout_s: float = 30.0) -> int:
    """The offset to go on from. `ledger_offset`: where the database's record stood when it was read.

    The consumer, which must tell the ends of partitions, is assigned to this one alone meanwhile. Raises LedgerError
    (LedgerUnavailable: again later), and KafkaException while Kafka is away.
    """
    log = _look(consumer, topic, follower.partition, timeout_s)
    if not follower.generation:
        for message in _read(consumer, log, log.first_offset, timeout_s):
            _check_begins(log, message)
            _check_key(log, message, follower)
            break
        return log.first_offset
    if log.first_offset <= ledger_offset < log.end_offset:
        for message in _read(consumer, log, ledger_offset, timeout_s):
            stored = message.value()
            if stored is not None and record_hash(stored) == follower.record_hash:
                _check_key(log, message, follower)
                return ledger_offset + 1
            break
    return _search(consumer, log, follower, timeout_s)


def _look(consumer: Consumer, topic: str, partition: int, timeout_s: float) -> _Log:
    """Where the log begins and ends. The end is asked by reading, for a broker may answer short of its last batch."""
    known = consumer.list_topics(topic, timeout=timeout_s).topics[topic]
    if known.error is not None or partition not in known.partitions:
        raise LedgerUnavailable(f"{topic}[{partition}] is not there; `taximeter topics apply` makes the topics")
    first, end = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=timeout_s)
    if end > first:
        for message in _messages(consumer, TopicPartition(topic, partition, end - 1), timeout_s):
            offset = message.offset()
            assert offset is not None
            end = offset + (message.error() is None)
    return _Log(topic, partition, first, end)


def _check_begins(log: _Log, message: Message) -> None:
    record = _parse(message)
    if record is None or record.WhichOneof("source") != "founding":
        held = "no ledger record" if record is None else describe(record.generation, record.sequence)
        raise LedgerError(
            f"{log}: the log begins at offset {log.first_offset} with {held}, and this database is empty: what was before has "
            "been deleted from the log; restore the database from a backup, or hand over the older records"
        )


def _check_key(log: _Log, message: Message, follower: Follower) -> None:
    """A sink with another key than the ledger's would refuse everything, for ever."""
    if not follower.is_own(message.value() or b""):
        raise LedgerError(
            f"{log}: the record at offset {message.offset()} is sealed with another key than this sink's: give it the "
            "installation's seal key (ledger.seal_key), the older ones too"
        )


def _search(consumer: Consumer, log: _Log, follower: Follower, timeout_s: float) -> int:
    """Look through the whole log for the database's record, or for the founding record that carries on from it."""
    first: LedgerRecord | None = None
    last_sequence = -1
    foundings: list[LedgerRecord] = []
    for message in _read(consumer, log, log.first_offset, timeout_s):
        offset, stored, record = message.offset(), message.value(), _parse(message)
        if record is None or stored is None or offset is None:
            continue
        first = first or record
        if record.generation == follower.generation:
            if record.sequence == follower.sequence and record_hash(stored) == follower.record_hash:
                _check_key(log, message, follower)
                return offset + 1
            last_sequence = max(last_sequence, record.sequence)
        if record.WhichOneof("source") == "founding":
            founding = record.founding
            foundings.append(record)
            if (
                founding.predecessor.generation == follower.generation
                and founding.predecessor.sequence == follower.sequence
                and founding.predecessor_hash == follower.record_hash
            ):
                _check_key(log, message, follower)
                return offset
    raise _not_found(log, follower, first, last_sequence, foundings)


def _not_found(
    log: _Log, follower: Follower, first: LedgerRecord | None, last_sequence: int, foundings: list[LedgerRecord]
) -> LedgerError:
    if first is None:
        return LedgerError(
            f"{log}: the log is empty, and this database stands at {follower}; has the topic been recreated? `taximeter up` "
            "founds it again from the ledger worker's state; in production restore the topic from its replica, then start it"
        )
    for record in foundings:
        if record.founding.HasField("predecessor") and record.generation != follower.generation:
            return gap(log.partition, str(follower), record.founding.predecessor)
    if first.generation != follower.generation:
        return LedgerError(
            f"{log}: the log is of {describe(first.generation, first.sequence)} and does not carry on this database's ledger, "
            f"which stands at {follower}; it belongs to another installation: give this sink another database"
        )
    if first.sequence > follower.sequence:
        return LedgerGap(
            f"{log}: the log starts at {describe(first.generation, first.sequence)}, after this database's {follower}: "
            "retention was shorter than the sink was away; hand over the records in between from the worker's copy",
            partition=log.partition,
            position=str(follower),
            needed=describe(first.generation, first.sequence - 1),
        )
    if last_sequence < follower.sequence:
        return LedgerError(
            f"{log}: the log ends at {describe(follower.generation, last_sequence)}, before this database's {follower}; "
            "records were lost from Kafka: restore the topic from its replica, or rebuild it from ledger_records here"
        )
    return LedgerError(
        f"{log}: the log holds another record at {follower} than this database; one of them was restored from another time, or "
        "was tampered with: compare the record's hash with ledger_records, and keep the one that the ledger workers follow"
    )


def _parse(message: Message) -> LedgerRecord | None:
    stored = message.value()
    if stored is None:
        return None
    try:
        return LedgerRecord.FromString(stored)
    except DecodeError:
        return None


def _read(consumer: Consumer, log: _Log, offset: int, timeout_s: float) -> Iterator[Message]:
    """The log's messages from `offset` to its end as it was when it was looked at."""
    if offset >= log.end_offset:
        return
    for message in _messages(consumer, TopicPartition(log.topic, log.partition, offset), timeout_s):
        position = message.offset()
        if message.error() is not None or position is None or position >= log.end_offset:
            return
        yield message
        if position + 1 >= log.end_offset:
            return


def _messages(consumer: Consumer, place: TopicPartition, timeout_s: float) -> Iterator[Message]:
    """Messages from `place` to the end of its partition, that end as the last one. Raises when none comes in time."""
    consumer.assign([place])
    deadline_s = time.monotonic() + timeout_s
    while True:
        message = consumer.poll(0.5)
        if message is None:
            if time.monotonic() > deadline_s:
                raise LedgerUnavailable(
                    f"{place.topic}[{place.partition}]: nothing came within {timeout_s:g} s; is Kafka well?"
                )
            continue
        error = message.error()
        if error is not None and error.code() != KafkaError._PARTITION_EOF:
            raise KafkaException(error)
        deadline_s = time.monotonic() + timeout_s
        yield message
        if error is not None:
            return
