"""What can stop a worker. Each says what happened and what to do; none is raised for bad input, which becomes a record.

WorkerError
├── RefusedToStart     the configuration, a topic or a log is not what the ledger was founded with
├── HostStopped        this process may no longer write; a new one starts over from the log
├── LocalStoreError    the local store cannot be used; it can always be rebuilt from the log
├── SnapshotRefused    a snapshot is damaged, forged or another one than the log announces; there is an older one, or the log
├── BucketError        the place where snapshots lie does not answer, or refuses
└── BackupError        a backup is damaged, or is not of this ledger; nothing is made of it
"""

from __future__ import annotations

__all__ = ["BackupError", "BucketError", "HostStopped", "LocalStoreError", "RefusedToStart", "SnapshotRefused", "WorkerError"]


class WorkerError(RuntimeError):
    """The root of this folder's errors."""


class RefusedToStart(WorkerError):
    """Starting would risk losing or doubling usage."""


class HostStopped(WorkerError):
    """Something happened after which only the log can tell what holds."""


class LocalStoreError(WorkerError):
    """The local store is damaged, of another format, or in use."""


class SnapshotRefused(WorkerError):
    """A snapshot is not what it must be: nothing of it is used."""


class BucketError(WorkerError):
    """Snapshots can be neither written nor read just now."""


class BackupError(WorkerError):
    """A backup cannot be added to, or nothing can be made of it."""
