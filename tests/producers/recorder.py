"""A process that records and says so, for tests that kill it: `python -m tests.producers.recorder FOLDER FIRST_NUMBER`.

It writes a number to its output only after that event's receipt says durable. FIRST_NUMBER 0: it opens the journal and waits.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from pathlib import Path

from tests.producers.support import open_meter, usage_event


def main() -> None:
    meter = open_meter(Path(sys.argv[1]))
    first = int(sys.argv[2])
    if first == 0:
        os.write(1, b"open\n")
        threading.Event().wait()
    for start in itertools.count(first, 7):
        numbers = range(start, start + 7)
        receipts = [meter.record(usage_event(number)) for number in numbers]
        for number, receipt in zip(numbers, receipts, strict=True):
            receipt.durable()
            os.write(1, b"%d\n" % number)


if __name__ == "__main__":
    main()
