"""One part each, in the foreground, until SIGTERM or Ctrl-C: what containers run, and what `up` starts."""

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from taximeter import compose, compose_serving
from taximeter.collectors import sink_spans, worker_spans
from taximeter.commands.common import Context, all_is_imported, command
from taximeter.config import read_secret
from taximeter.errors import TaximeterError
from taximeter.logs import LogFormat, LogLevel, start_logging
from taximeter.times import now_ms

__all__ = ["api", "gateway", "model_server", "notifier", "sink", "worker"]

LogLevelOption = Annotated[
    LogLevel, typer.Option("--log-level", envvar="TAXIMETER_LOG_LEVEL", help="How much is said on standard error.")
]
LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", envvar="TAXIMETER_LOG_FORMAT", help="For people, or a JSON document a line.")
]

# What a stop leaves a collector that does not answer.
_OTLP_CLOSE_S = 3.0
# What it is made of is loaded by itself alone.
_part = partial(command, imports_more=True)


@_part
def gateway(context: Context, log_level: LogLevelOption = "info", log_format: LogFormatOption = "text") -> None:
    """Run the metering gateway: KServe v2 in front of a model server."""
    from serving.event_loops import new_event_loop
    from serving.gateway import run_gateway

    all_is_imported()
    start_logging("gateway", log_level, log_format)
    config = context.config()
    settings = compose_serving.gateway_settings(config)
    with contextlib.ExitStack() as stack, asyncio.Runner(loop_factory=new_event_loop) as runner:

        def watch(server: Any) -> None:
            if address := config.gateway.metrics_address:
                from taximeter.metrics import gateway_metrics, serve_metrics

                close = serve_metrics("gateway.metrics_address", address, gateway_metrics(server), lambda: server.waiting_for)
                stack.callback(close)

        runner.run(until_told(run_gateway(settings, watch=watch)))


@_part
def worker(
    context: Context,
    ready_file: Annotated[Path | None, typer.Option(help="Made when the worker has joined its group.")] = None,
    log_level: LogLevelOption = "info",
    log_format: LogFormatOption = "text",
) -> None:
    """Run a ledger worker: usage and commands in, ledger records out; start as many as there are partitions."""
    from stream_processors.worker import run_worker

    all_is_imported()
    start_logging("worker", log_level, log_format)
    config = context.config()
    settings, spans = compose.worker_settings(config), worker_spans(config)
    with contextlib.ExitStack() as stack:
        if spans is not None:
            stack.callback(spans.close, _OTLP_CLOSE_S)
        waits_for = "its group, which it has not joined yet"

        def watch(ledger: Any, publisher: Any) -> None:
            if spans is not None:
                ledger.on_recorded = spans.took
            if address := config.ledger.metrics_address:
                from taximeter.metrics import serve_metrics, worker_metrics

                metrics = worker_metrics(ledger, publisher)
                stack.callback(serve_metrics("ledger.metrics_address", address, metrics, lambda: waits_for))

        def ready(_ledger: Any) -> None:
            nonlocal waits_for
            waits_for = ""
            mark_ready(ready_file)

        asyncio.run(run_worker(settings, ready=ready, watch=watch))


@_part
def sink(
    context: Context,
    migrate: Annotated[
        bool, typer.Option("--migrate/--no-migrate", help="Bring the schema up to date first, or refuse an older one.")
    ] = True,
    log_level: LogLevelOption = "info",
    log_format: LogFormatOption = "text",
) -> None:
    """Run the sink: the ledger into ClickHouse. With chDB it owns the database and answers everybody's queries."""
    from sinks.anchors import Anchoring
    from sinks.embedded import LoopbackServer
    from sinks.loop import run_sink
    from sinks.migrate import migrate as migrate_schema
    from sinks.migrate import pending
    from sinks.status import SinkStatus

    all_is_imported()
    start_logging("sink", log_level, log_format)
    config = context.config()
    settings, spans, status = compose.sink_settings(config), sink_spans(config), SinkStatus()
    with compose.open_engine(config) as engine, contextlib.ExitStack() as stack:
        if migrate:
            migrate_schema(engine)
        elif pending(engine):
            raise TaximeterError("the database is not at this version's schema: run `taximeter migrate`")
        if config.clickhouse.engine == "chdb":
            token = read_secret(config.clickhouse, "loopback_token", needed_for="answering queries").decode()
            port = config.clickhouse.loopback_port
            server = LoopbackServer(compose.as_json_reader(engine), token, port, status=status.snapshot)
            stack.enter_context(contextlib.closing(server.start()))
        if address := config.clickhouse.metrics_address:
            from taximeter.metrics import serve_metrics, sink_metrics

            close = serve_metrics("clickhouse.metrics_address", address, sink_metrics(status), lambda: status.waiting_for)
            stack.callback(close)
        if config.ledger.anchor_file is not None:
            assert settings.seal_key is not None, "compose reads it"
            anchoring = Anchoring(config.ledger.anchor_file, engine, settings.seal_key, now_ms)
            stack.enter_context(contextlib.closing(anchoring.start()))
        if spans is not None:
            stack.callback(spans.close, _OTLP_CLOSE_S)
        run_sink(settings, engine, status=status, on_stored=None if spans is None else spans.took)


@_part
def api(
    context: Context,
    ready_file: Annotated[Path | None, typer.Option(help="Made when the API answers.")] = None,
    log_level: LogLevelOption = "info",
    log_format: LogFormatOption = "text",
) -> None:
    """Run the billing API: gRPC and HTTP/JSON for operators and tenants."""
    from serving.api import run_api

    all_is_imported()
    start_logging("api", log_level, log_format)
    config = context.config()
    settings = compose_serving.api_settings(config)
    with contextlib.ExitStack() as stack:

        def watch(server: Any) -> None:
            if address := config.api.metrics_address:
                from taximeter.metrics import api_metrics, serve_metrics

                close = serve_metrics(
                    "api.metrics_address", address, api_metrics(server), lambda: str(server.calls.waiting_for)
                )
                stack.callback(close)

        asyncio.run(until_told(run_api(settings, ready=lambda _: mark_ready(ready_file), watch=watch)))


@_part
def notifier(
    context: Context,
    ready_file: Annotated[Path | None, typer.Option(help="Made when the alert topic has been read.")] = None,
    log_level: LogLevelOption = "info",
    log_format: LogFormatOption = "text",
) -> None:
    """Run the notifier: alerts to the endpoints that the configuration names, as webhooks or to Alertmanager."""
    from serving.notifier.notifier import run_notifier

    all_is_imported()
    start_logging("notifier", log_level, log_format)
    config = context.config()
    settings = compose_serving.notifier_settings(config)
    with contextlib.ExitStack() as stack:

        def watch(notifier: Any) -> None:
            if address := config.notifier.metrics_address:
                from taximeter.metrics import notifier_metrics, serve_metrics

                metrics = notifier_metrics(notifier)
                stack.callback(serve_metrics("notifier.metrics_address", address, metrics, lambda: str(notifier.waiting_for)))

        asyncio.run(until_told(run_notifier(settings, ready=lambda: mark_ready(ready_file), watch=watch)))


@_part
def model_server(context: Context, log_level: LogLevelOption = "info") -> None:
    """Run the small KServe v2 server with SmolLM2 on the CPU, for laptops."""
    from serving.event_loops import new_event_loop
    from serving.model_server import serve

    all_is_imported()
    start_logging("model-server", log_level)
    settings = compose_serving.model_server_settings(context.config())
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(until_told(serve(settings)))


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


def mark_ready(path: Path | None) -> None:
    """Tell whoever started this that it serves."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
