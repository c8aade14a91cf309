"""`demo`: start everything, show the whole path, stop everything, and fail if anything did not match."""

import contextlib
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from taximeter.commands.common import Context, command
from taximeter.demonstration.script import TENANTS
from taximeter.embedded.state import DataDir
from taximeter.output import Output

if TYPE_CHECKING:
    from taximeter.demonstration.show import Demonstration

__all__ = ["demo"]


@command
def demo(
    context: Context,
    keep: Annotated[bool, typer.Option("--keep", help="Stay up afterwards, and say what to try next.")] = False,
) -> None:
    """Show the whole path on this machine: a real language model, real prompts, and every token on the bill."""
    from taximeter.demonstration.show import Demonstration, check
    from taximeter.embedded.installation import install

    folder = Path(tempfile.mkdtemp(prefix="taximeter-demo-"))
    data_dir = DataDir(folder)
    config = context.own_config()
    # On a busy machine a tenant's first lease may take longer than clients would be asked to wait.
    patience = config.gateway.model_copy(update={"lease_wait_ms": max(config.gateway.lease_wait_ms, 30_000)})
    config = config.model_copy(update={"gateway": patience})
    output = context.output
    began_s = time.monotonic()
    finished = False
    try:
        with data_dir.lock():
            installation = install(data_dir, config)
            supervisor = installation.supervisor(
                tell=output.note, on_change=lambda: data_dir.write(installation.run_state(supervisor.pids()))
            )
            ended = threading.Event()
            _end_on_signals(ended)
            output.note(f"starting Kafka, the ledger, ClickHouse, SmolLM2 and the gateway in {folder}")
            supervisor.start()
            watcher = threading.Thread(target=supervisor.watch, args=(ended,), name="supervisor")
            watcher.start()
            try:
                show = Demonstration(installation.config, output, folder)
                show.run()
                check(show)
                took_s = time.monotonic() - began_s
                output.say(f"Everything matched, answer by answer: told = ledger = ClickHouse. {took_s:.0f} s in all.")
                if keep:
                    _say_what_next(output, folder, show)
                    with contextlib.suppress(KeyboardInterrupt):
                        ended.wait()
            finally:
                ended.set()
                watcher.join()
                supervisor.stop()
        finished = True
    finally:
        if finished:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            output.note(f"what was written, logs too, stays in {folder}")


def _end_on_signals(ended: threading.Event) -> None:
    """SIGTERM as Ctrl-C: the first of them interrupts the main thread, and nothing disturbs the stopping in order after it."""

    def told(_number: int, _frame: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        ended.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGINT, told)


def _say_what_next(output: Output, folder: Path, show: "Demonstration") -> None:
    tenant = TENANTS[0].tenant_id
    gateway = f"{show.config.gateway.host}:{show.config.gateway.port}"
    output.say(
        f"""
It stays up until Ctrl-C. In another terminal:

  export TAXIMETER_DATA_DIR={folder}
  taximeter balance
  taximeter statement {tenant}
  taximeter alerts --follow
  taximeter credit grant {tenant} 10 --reason "because it works"
  taximeter audit
  taximeter doctor

The gateway speaks KServe v2 on {gateway}; {tenant}'s key, for the metadata "authorization: Bearer …":

  {show.secrets[tenant]}
"""
    )
