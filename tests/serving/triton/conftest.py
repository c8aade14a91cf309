"""A real Triton for the tests of this folder, and a gateway in front of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from billing.v1.account_pb2 import KEY_SCOPE_METER, KEY_SCOPE_OPERATE
from serving.gateway import GatewayServer
from serving.gateway.profiles import generic, ocr, vllm
from tests.services import require
from tests.services.triton import TritonServer, TritonUnavailableError, triton_environment
from tests.serving.gateway_support import api_key, gateway_settings, known_directory, put_key, running
from tests.serving.triton.conformance import OPERATOR

REPOSITORY = Path(__file__).with_name("repository")


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """NVIDIA's server with the models of `repository/`."""
    try:
        environment = triton_environment()
    except TritonUnavailableError as error:
        require(False, str(error))
        raise
    server = TritonServer(tmp_path_factory.mktemp("triton"), REPOSITORY, environment)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def server(tmp_path: Path, triton: TritonServer) -> AsyncIterator[GatewayServer]:
    """The gateway; the key `OPERATOR` may use its back end's controls too."""
    directory = known_directory()
    put_key(directory, api_key(key_id="operator", secret=OPERATOR, scopes=[KEY_SCOPE_METER, KEY_SCOPE_OPERATE]))
    models = (
        vllm("smollm2", tokenizer="smollm2"),
        generic("smollm2-batch", tokenizer="smollm2", decoupled=False),
        ocr("ocr", text_output="lines"),
    )
    settings = gateway_settings(tmp_path, triton.address, models={model.model: model for model in models})
    async with running(settings, directory) as started:
        yield started
