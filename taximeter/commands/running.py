"""`up`: everything embedded, in one supervised group of processes."""

import signal
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from taximeter.commands.common import Context, all_is_imported, command
from taximeter.config import Config
from taximeter.output import Output

if TYPE_CHECKING:
    from taximeter.embedded.installation import Installation

__all__ = ["run_until_told", "up"]


@partial(command, imports_more=True)
def up(
    context: Context,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but what goes wrong.")] = False,
) -> None:
    """Run everything on this machine: broker, ledger, ClickHouse, model server, gateway. Ctrl-C stops it cleanly."""
    from taximeter.embedded.installation import install

    all_is_imported()
    config = context.own_config()
    with context.data_dir.lock():
        installation = install(context.data_dir, config)
        output = context.output

        def tell(text: str) -> None:
            if not quiet:
                output.note(text)

        tell(f"starting in {context.data_dir.path}")
        run_until_told(installation, tell=tell, on_started=lambda: None if quiet else describe(output, installation.config))


def run_until_told(installation: "Installation", *, tell: Callable[[str], None], on_started: Callable[[], None]) -> None:
    """Start, keep running, and stop in order at SIGTERM or Ctrl-C."""
    stop = threading.Event()

    def told(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
    supervisor = installation.supervisor(
        tell=tell,
        on_change=lambda: installation.data_dir.write(installation.run_state(supervisor.pids())),
    )
    try:
        supervisor.start()
        if not stop.is_set():
            on_started()
        supervisor.watch(stop)
        tell("stopping: the gateway first, the broker last")
    finally:
        supervisor.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def describe(output: Output, config: Config) -> None:
    """Where everything is, and what to do next."""
    host = config.embedded.host
    places: dict[str, object] = {"Kafka": config.kafka.bootstrap}
    if config.embedded.gateway:
        places["gateway (KServe v2, gRPC)"] = f"{host}:{config.gateway.port}"
        places["models"] = ", ".join(config.models.profiles)
    places["queries"] = f"http://{host}:{config.clickhouse.loopback_port} (by the token in secrets/loopback_token)"
    output.pairs("Taximeter runs", places)
    output.say(
        "In another terminal: taximeter tenant create acme && taximeter credit grant acme 5 && taximeter key create acme\n"
        "Then: taximeter balance, taximeter usage, taximeter alerts --follow, taximeter doctor. Ctrl-C stops everything."
    )
