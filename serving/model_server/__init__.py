"""A small KServe v2 server for laptops: SmolLM2 on the CPU with real streaming, and a back end that replays a trace."""

from serving.model_server.engine import find_smollm2_weights
from serving.model_server.errors import ModelLoadError, RequestError
from serving.model_server.server import ModelServer, serve
from serving.model_server.settings import EngineSettings, ServerSettings

__all__ = [
    "EngineSettings",
    "ModelLoadError",
    "ModelServer",
    "RequestError",
    "ServerSettings",
    "find_smollm2_weights",
    "serve",
]
