"""How far the readers of the ledger say that they are, held against the log: a log that lost its end must not grow a new one.

Promise: `check_readers` refuses where a reader (a sink, the publisher) has taken a record that the log does not have, or has
another one in its place. Whoever writes on such a log forks it: the readers ignore what comes, and nothing of it is ever shown.
The marks must have been read before the log's end was: then each of them is of a record that the log had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from billing.chain import UnreadableRecord
from billing.key_ring import Keys
from billing.v1.account_pb2 import LedgerPosition, Progress
from stream_processors.errors import RefusedToStart
from stream_processors.log_place import Standing, find_place

if TYPE_CHECKING:
    from stream_processors.ledger_host import LogReader

__all__ = ["PUBLISHER", "check_readers", "cut", "last_marks"]

# How the publisher calls itself.
PUBLISHER = "publisher"

# Read in a fraction of a second; Kafka compacts a topic late, and a takeover must not wait for days of marks.
_RECENT_MESSAGES = 20_000


async def last_marks(reader: LogReader, topic: str, partition: int) -> dict[str, Progress]:
    """What readers last wrote about their places in this partition, by their names.

    Bounded: the topic's last messages are read, where each reader that is well writes again and again, and all of them only if
    the publisher is not among those: a sink that writes an empty database anew says so thousands of times while workers stand
    still, far behind what the publisher has taken. Whose mark is older still is as far behind the publisher.
    """
    marks: dict[str, Progress] = {}
    first, end = await reader.bounds(topic, partition)
    recent = max(first, end - _RECENT_MESSAGES)
    await _read_marks(reader, topic, partition, recent, end, marks)
    if PUBLISHER not in marks:
        older: dict[str, Progress] = {}
        await _read_marks(reader, topic, partition, first, recent, older)
        marks = older | marks
    return marks


async def _read_marks(reader: LogReader, topic: str, partition: int, start: int, end: int, marks: dict[str, Progress]) -> None:
    async for chunk in reader.read(topic, partition, start, end):
        for _, value in chunk:
            progress = Progress.FromString(value)
            if progress.reader:
                marks[progress.reader] = progress


async def check_readers(
    reader: LogReader, ledger_topic: str, marks: dict[str, Progress], reached: LedgerPosition, seal_key: Keys
) -> None:
    """Raise RefusedToStart unless the log, whose last record is `reached`, has what every one of `marks` stands for.

    A mark of another generation says nothing: that ledger has been founded again.
    """
    own = {name: mark for name, mark in marks.items() if mark.position.generation == reached.generation}
    for name, mark in own.items():
        first, end = await reader.bounds(ledger_topic, mark.partition)
        try:
            found = await find_place(reader, ledger_topic, mark, seal_key, first, end)
        except UnreadableRecord as error:
            raise RefusedToStart(f"{ledger_topic}[{mark.partition}]: {error}") from error
        if found.standing is Standing.LOST or mark.position.sequence > reached.sequence:
            raise cut(ledger_topic, name, mark, first, end)


def cut(ledger_topic: str, name: str, mark: Progress, first: int, end: int) -> RefusedToStart:
    """The error for a log that does not have what a reader has taken from it."""
    return RefusedToStart(
        f"{ledger_topic}[{mark.partition}]: the reader {name} has taken sequence {mark.position.sequence} at offset "
        f"{mark.ledger_offset}, and the log, offsets {first} to {end}, does not have that record: its end was cut, or it was "
        "restored from an older time, and acknowledged usage is missing. Restore the topic from its replicas or a backup; a "
        "sink's database has the records in ledger_records. Only if it is known that the log is right: stop everything, give "
        "the sinks empty databases, delete the topic usage.progress, run `taximeter topics apply`, and start again"
    )
