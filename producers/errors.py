"""Everything that producers raise, as one tree:

    ProducerError
    ├── InvalidEvent           the event cannot be billed as it is (also a ValueError)
    ├── RequestClosed          an open request was used after it was closed
    ├── NotDurableInTime       the disk has not answered within the caller's bound (also a TimeoutError)
    ├── TopicUnread            a topic could not be read to its end in time (also a TimeoutError)
    ├── CommandNotSent         not every partition has acknowledged a command; sending it again is safe
    └── JournalError
        ├── JournalFull        no room, by the setting or on the disk: refused, nothing of it is kept
        ├── JournalWriteFailed the disk refused a group of events
        ├── JournalLocked      another process has the journal
        ├── JournalMismatch    the journal was begun under other settings
        ├── JournalUnreadable  the file is no journal that this version can read
        └── JournalClosed      it was used after close()

A message names the setting or field, the value and the mend.
"""

from __future__ import annotations

__all__ = [
    "CommandNotSent",
    "InvalidEvent",
    "JournalClosed",
    "JournalError",
    "JournalFull",
    "JournalLocked",
    "JournalMismatch",
    "JournalUnreadable",
    "JournalWriteFailed",
    "NotDurableInTime",
    "ProducerError",
    "RequestClosed",
    "TopicUnread",
]


class ProducerError(Exception):
    """The root: catch it to catch all."""


class InvalidEvent(ProducerError, ValueError):
    """The event cannot be billed as it is; nothing of it was kept."""


class RequestClosed(ProducerError):
    """An open request was used after it was closed: its usage is settled and cannot change."""


class NotDurableInTime(ProducerError, TimeoutError):
    """Whether the events are on disk is unknown: the disk has not answered within the caller's bound."""


class TopicUnread(ProducerError, TimeoutError):
    """What a topic says now is not known: it could not be read to its end in time."""


class CommandNotSent(ProducerError):
    """Not every partition has acknowledged the command. Sending the same command again is safe: its ID is applied once."""


class JournalError(ProducerError):
    """The journal could not do what it was asked."""


class JournalFull(JournalError):
    """There is no room for the event: it is refused, so the caller can refuse the work that it would have paid for."""


class JournalWriteFailed(JournalError):
    """The disk refused a group. Its events count as not durable; a crash right now may still leave them in the journal."""


class JournalLocked(JournalError):
    """Another process has the journal: one journal belongs to one process."""


class JournalMismatch(JournalError):
    """The journal was begun under another number of partitions or another producer ID, and holds numbers under it."""


class JournalUnreadable(JournalError):
    """The file is not a journal, was written by a newer version, or is damaged."""


class JournalClosed(JournalError):
    """The journal was used after it was closed, or its writer has ended on an error of its own."""
