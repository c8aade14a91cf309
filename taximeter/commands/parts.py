"""One part each, in the foreground, until SIGTERM or Ctrl-C: what containers run, and what `up` starts."""

import asyncio
import logging
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from taximeter import compose
from taximeter.commands.common import Context, command

__all__ = ["gateway", "model_server"]

LogLevelOption = Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")]


@command
def gateway(context: Context, log_level: LogLevelOption = "info") -> None:
    """Run the metering gateway: KServe v2 in front of a model server."""
    from serving.gateway import new_event_loop, run_gateway

    log_to_stderr(log_level)
    settings = compose.gateway_settings(context.config())
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(until_told(run_gateway(settings)))


@command
def model_server(context: Context, log_level: LogLevelOption = "info") -> None:
    """Run the small KServe v2 server with SmolLM2 on the CPU, for laptops."""
    from serving.model_server import serve

    log_to_stderr(log_level)
    asyncio.run(until_told(serve(compose.model_server_settings(context.config()))))


async def until_told(work: Coroutine[Any, Any, None]) -> None:
    """Run it until it ends, or until SIGTERM or Ctrl-C cancels it, which is a good end."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        if not task.cancelled():
            raise


def log_to_stderr(level: str) -> None:
    """A line an event, with its time."""
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def mark_ready(path: Path | None) -> None:
    """Tell whoever started this that it serves."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
