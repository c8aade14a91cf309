"""What all tests of serving share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tritonclient.grpc.aio as triton_aio

from serving.gateway import GatewayServer
from serving.gateway.directory import Directory
from serving.tokenizers import load_tokenizer
from tests.serving.gateway_support import gateway_settings, known_directory, model_server_process, running


@pytest.fixture(scope="session", autouse=True)
def _each_tokenizer_is_loaded_once() -> Iterator[None]:
    """A gateway loads its tokenizers when it starts, SmolLM2's for most of a second. Hundreds of tests start one on the same
    file, and a tokenizer that is loaded never changes."""
    with patch("serving.tokenizers.registry.load_tokenizer", cache(load_tokenizer)):
        yield


@pytest.fixture(scope="session")
def back_end(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a model server that counts what it is told to. A file that needs another one has its own."""
    with model_server_process(tmp_path_factory.mktemp("model-server"), models="trace") as address:
        yield address


@pytest.fixture
def directory() -> Directory:
    return known_directory()


@pytest.fixture
async def server(tmp_path: Path, back_end: str, directory: Directory) -> AsyncIterator[GatewayServer]:
    async with running(gateway_settings(tmp_path, back_end), directory) as started:
        yield started


@pytest.fixture
async def client(server: GatewayServer) -> AsyncIterator[Any]:
    async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as made:
        yield made


@pytest.fixture
async def direct(back_end: str) -> AsyncIterator[Any]:
    async with triton_aio.InferenceServerClient(back_end) as made:
        yield made
