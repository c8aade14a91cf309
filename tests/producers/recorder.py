"""Records and says so, for tests that kill it: `python -m tests.producers.recorder FOLDER FIRST_NUMBER [in-between]`.

It writes a number to its output only after that event's receipt says durable. FIRST_NUMBER 0: it opens the journal and waits.
`in-between`: after a hundred groups, it says so and waits where the receipts of a group say durable and no number is written.
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
    for group in itertools.count():
        numbers = range(first + group * 7, first + group * 7 + 7)
        receipts = [meter.record(usage_event(number)) for number in numbers]
        if group == 100 and sys.argv[3:] == ["in-between"]:
            for receipt in receipts:
                receipt.durable()
            os.write(1, b"in between\n")
            threading.Event().wait()
        for number, receipt in zip(numbers, receipts, strict=True):
            receipt.durable()
            os.write(1, b"%d\n" % number)


if __name__ == "__main__":
    main()
