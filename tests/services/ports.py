"""Ports that a test gives to processes which it starts later.

Promise: no two callers of one run get the same port, and nobody who takes any free port gets it meanwhile: the ports lie below
those that the kernel gives to whoever asks for none, each process of the run has a range of its own, and goes through it in
order. Minutes may pass until a broker, a gateway or a database is started on one.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import socket
from typing import Final

__all__ = ["free_port"]

# The kernel's own begin at 32768, unless the machine is set up otherwise.
_FIRST: Final = 18_000
_OF_A_PROCESS: Final = 900
_PROCESSES: Final = 16
_ORDER: Final = itertools.count(random.randrange(_OF_A_PROCESS))


def free_port(host: str = "127.0.0.1") -> int:
    """One that nobody listens on, and that no other test of the run is given."""
    worker = re.search(r"\d+$", os.environ.get("PYTEST_XDIST_WORKER", ""))
    # Who is no process of a run with several has the last range.
    begin = _FIRST + _OF_A_PROCESS * (_PROCESSES - 1 if worker is None else int(worker[0]) % (_PROCESSES - 1))
    for number in itertools.islice(_ORDER, _OF_A_PROCESS):
        port = begin + number % _OF_A_PROCESS
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no port from {begin} on is free")
