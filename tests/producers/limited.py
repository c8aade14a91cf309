"""A process whose files may not grow, until they may: `python -m tests.producers.limited FOLDER`.

It prints the refusal, and last how many events are durable.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from producers.errors import JournalError
from producers.journal import Journal, JournalSettings
from tests.producers.support import PARTITIONS, usage_event

LIMIT_BYTES = 6 << 20


def main() -> None:
    journal = Journal(Path(sys.argv[1]) / "journal", JournalSettings(partitions=PARTITIONS))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))
    event = usage_event(1).SerializeToString() * 1_000
    durable = 0
    for _ in range(200):
        try:
            journal.append(0, event).durable()
            durable += 1
        except JournalError as error:
            print("refused:", error)
            break
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    for _ in range(5):
        journal.append(0, event).durable()
        durable += 1
    journal.close()
    print(durable)


if __name__ == "__main__":
    main()
