"""A sink in a process of its own, into chDB, that a test pauses: prints the error that ended it.

Run as: python -m tests.sinks.loop_process BOOTSTRAP PREFIX FOLDER SEAL_KEY, the key in hexadecimal digits.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from sinks.engines.chdb import ChdbEngine
from sinks.errors import LedgerError
from sinks.loop import run_sink
from sinks.migrate import migrate
from sinks.settings import SinkSettings
from stream_processors.settings import TopicNames
from tests.stream_processors.worker_main import REFUSED


def main(bootstrap: str, prefix: str, folder: str, seal_key: str) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    engine = ChdbEngine(Path(folder))
    migrate(engine)
    names = TopicNames(prefix)
    settings = SinkSettings(
        bootstrap, ledger_topic=names.ledger, progress_topic=names.progress, seal_key=bytes.fromhex(seal_key), linger_ms=20
    )
    try:
        run_sink(settings, engine)
    except LedgerError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return REFUSED
    finally:
        engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
