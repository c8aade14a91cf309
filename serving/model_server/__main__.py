"""`python -m serving.model_server`: serve until SIGTERM or Ctrl-C. Exits 0 when told to stop, 1 if it cannot start."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from contextlib import suppress
from pathlib import Path

from serving.event_loops import new_event_loop
from serving.model_server.errors import ModelLoadError
from serving.model_server.server import serve
from serving.model_server.settings import MODELS, EngineSettings, ServerSettings


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    server, engine = ServerSettings(), EngineSettings()
    parser = argparse.ArgumentParser(prog="python -m serving.model_server", description=__doc__)
    parser.add_argument("--host", default=server.host)
    parser.add_argument("--port", type=int, default=server.port, help="0 lets the system choose (default: %(default)s)")
    parser.add_argument("--port-file", type=Path, help="write the bound port here when calls are accepted")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--production-log", type=Path, help="append a JSON line per request: what was really produced")
    parser.add_argument("--empty-final", action="store_true", help="end streams with an empty final response")
    parser.add_argument("--weights", type=Path, help="another GGUF file than SmolLM2's")
    parser.add_argument("--threads", type=int, default=engine.threads)
    parser.add_argument("--context-tokens", type=int, default=engine.context_tokens)
    parser.add_argument("--max-concurrent", type=int, default=engine.max_concurrent)
    parser.add_argument("--max-queued", type=int, default=engine.max_queued)
    parser.add_argument("--max-output-tokens", type=int, default=engine.max_output_tokens)
    return parser.parse_args(argv)


def _settings(arguments: argparse.Namespace) -> ServerSettings:
    return ServerSettings(
        host=arguments.host,
        port=arguments.port,
        models=tuple(name.strip() for name in arguments.models.split(",") if name.strip()),
        empty_final=arguments.empty_final,
        production_log=arguments.production_log,
        engine=EngineSettings(
            weights=arguments.weights,
            threads=arguments.threads,
            context_tokens=arguments.context_tokens,
            max_concurrent=arguments.max_concurrent,
            max_queued=arguments.max_queued,
            max_output_tokens=arguments.max_output_tokens,
        ),
    )


async def _run(settings: ServerSettings, port_file: Path | None) -> None:
    def ready(port: int) -> None:
        if port_file is not None:
            # Whoever waits for the file must never read half of it.
            partial = port_file.with_name(f"{port_file.name}.partial")
            partial.write_text(f"{port}\n")
            partial.replace(port_file)
        sys.stdout.write(f"model server on {settings.host}:{port}: {', '.join(settings.models)}\n")
        sys.stdout.flush()

    serving = asyncio.create_task(serve(settings, ready))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, serving.cancel)
    with suppress(asyncio.CancelledError):
        await serving


def main(argv: list[str] | None = None) -> int:
    """Serve; the exit code says how it ended."""
    arguments = _arguments(argv)
    try:
        settings = _settings(arguments)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_run(settings, arguments.port_file))
    except (ModelLoadError, OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"model server: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
