"""A gateway as a process of its own, for tests that kill it: `python -m tests.serving.gateway_process FOLDER UPSTREAM`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from serving.event_loops import new_event_loop
from serving.gateway import GatewayServer, LimitSettings, vllm
from tests.serving.gateway_support import gateway_settings, known_directory

REQUEST_CHUNKS_MAX = 4


async def serve(folder: Path, upstream: str) -> None:
    """Serve until killed; the port stands in FOLDER/gateway-port."""
    models = {"trace": vllm("trace"), "trace-unary": vllm("trace-unary", decoupled=False)}
    # Few chunks may gather while the disk works, so that the test's bound is tight.
    limits = LimitSettings(request_chunks_max=REQUEST_CHUNKS_MAX)
    settings = gateway_settings(folder, upstream, tokenizers={}, models=models, limits=limits)
    server = GatewayServer(settings, known_directory())
    await server.start()
    partial = folder / "gateway-port.partial"
    partial.write_text(str(server.port))
    partial.replace(folder / "gateway-port")
    await asyncio.Event().wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve(Path(sys.argv[1]), sys.argv[2]))
