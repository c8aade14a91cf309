"""Try a model's profile on a live server: a real gateway in this process, one request through it, and the usage event that it
wrote.

Nothing is billed: the gateway's journal is a temporary file that nobody sends, and its one key is known to nobody else.
"""

from __future__ import annotations

import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from billing.v1.account_pb2 import (
    ACCOUNT_STATUS_ACTIVE,
    BILLING_MODE_POSTPAID,
    KEY_SCOPE_METER,
    Account,
    AccountUpdate,
    ApiKey,
    Plan,
)
from billing.v1.usage_pb2 import COUNT_SOURCE_BACKEND, UsageEvent
from producers.meter import MeterSettings
from serving import kserve
from serving.gateway import AdmissionSettings, DirectorySettings, GatewayServer, hash_secret
from serving.gateway.directory import Directory
from serving.gateway.metering import now_ms
from serving.gateway.sample_requests import make_request, problems_of
from serving.gateway.settings import GatewaySettings, UpstreamTls
from serving.gateway.tokenizer_checks import count_difference, describe, fingerprint_difference
from serving.tokenizers import Framing
from taximeter.errors import MisuseError, NotReadyError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from serving.gateway.profiles import ModelProfile

__all__ = ["Trial", "TrialRequest", "try_profile"]

_TENANT = "models-check"
_TIMEOUT_S = 120.0
_ANSWER_CHARS = 200


@dataclass(frozen=True, slots=True)
class TrialRequest:
    """What is sent."""

    prompt: str
    output_tokens: int
    inputs: Mapping[str, list[Any]]
    """By tensor: texts, numbers, or the bytes of a file."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of it."""

    problems: tuple[str, ...]
    """What the profile says and the server does not."""
    event: UsageEvent | None
    """What would be billed; None where the request could not be made."""
    error: str
    """What the back end, or the gateway, said instead of an answer."""
    answer: str
    responses: int
    tokenizer_input: int | None
    tokenizer_output: int | None
    """What the tokenizer counts of the same texts, where there is one."""
    fingerprint: str
    """The tokenizer's."""


async def try_profile(
    profile: ModelProfile,
    tokenizers: Mapping[str, Path],
    upstream: str,
    asked: TrialRequest,
    tls: UpstreamTls | None = None,
) -> Trial:
    """Send one request to the server at `upstream`. Raises NotReadyError where it does not describe the model, MisuseError
    where no request can be made."""
    with tempfile.TemporaryDirectory(prefix="taximeter-models-check-") as folder:
        secret, pepper = secrets.token_hex(16), secrets.token_bytes(32)
        settings = GatewaySettings(
            meter=MeterSettings(Path(folder) / "journal.sqlite", partitions=1),
            directory=DirectorySettings("127.0.0.1:1", pepper, partitions=1),
            models={profile.model: profile},
            tokenizers={name: path for name, path in tokenizers.items() if name == profile.tokenizer},
            upstream=upstream,
            upstream_tls=tls,
            # No ledger is followed, so no account is ever out of date.
            admission=AdmissionSettings(fail_open=True),
            port=0,
        )
        server = GatewayServer(settings, _directory(hash_secret(pepper, secret)))
        try:
            await server.start()
            return await _try(server, profile, asked, (("x-api-key", secret),))
        finally:
            await server.stop()


def _directory(secret_hash: bytes) -> Directory:
    directory = Directory(1)
    key = ApiKey(key_id="check", tenant_id=_TENANT, secret_hash=secret_hash, scopes=[KEY_SCOPE_METER])
    directory.on_key(b"check", key.SerializeToString(), 0)
    account = Account(tenant_id=_TENANT, status=ACCOUNT_STATUS_ACTIVE, currency="USD", log_time_ms=now_ms())
    account.plan.CopyFrom(Plan(billing_mode=BILLING_MODE_POSTPAID))
    directory.on_account(_TENANT.encode(), AccountUpdate(account=account).SerializeToString(), 0)
    return directory


async def _try(
    server: GatewayServer, profile: ModelProfile, asked: TrialRequest, metadata: tuple[tuple[str, str], ...]
) -> Trial:
    settings = server.gateway.settings
    try:
        described = await describe(server.gateway.upstream, profile.model, settings.limits.control_timeout_s)
    except grpc.aio.AioRpcError as error:
        raise NotReadyError(
            f"the server at {settings.upstream} does not describe model {profile.model!r} "
            f"({error.code().name}: {error.details()}): name a server with --upstream, and a model that it has"
        ) from None
    problems = tuple(problems_of(profile, described.metadata, described.config))
    try:
        request = make_request(profile, described.metadata, described.config, asked.inputs, asked.prompt, asked.output_tokens)
    except kserve.TensorError as error:
        raise MisuseError(f"{error} (--input {error.tensor}=VALUE, or =@FILE)") from error
    limit = settings.limits.message_bytes_max
    options = [("grpc.max_receive_message_length", limit), ("grpc.max_send_message_length", limit)]
    responses, said = [], ""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            if profile.decoupled:
                call = stub.ModelStreamInfer(_once(request), metadata=metadata, timeout=_TIMEOUT_S)
                async for response in call:
                    said = said or response.error_message
                    responses.append(response.infer_response)
            else:
                responses.append(await stub.ModelInfer(request, metadata=metadata, timeout=_TIMEOUT_S))
        except grpc.aio.AioRpcError as failure:
            said = f"{failure.code().name}: {failure.details()}"
    events = server.meter.journal.read(0, 0, 10, 1_000_000).events
    text = _text(profile, responses)
    counted = await _tokenizer_counts(server, profile, asked, text)
    event = UsageEvent.FromString(events[0]) if events else None
    fingerprint = "" if profile.tokenizer is None else server.tokens.fingerprint(profile.tokenizer)
    if event is not None and event.count_source == COUNT_SOURCE_BACKEND and counted[0] is not None:
        difference = count_difference(profile.tokenizer, counted[0], event.uncached_input_tokens)
        problems += (difference,) if difference else ()
    elif fingerprint and described.fingerprint not in ("", fingerprint):
        problems += (fingerprint_difference(profile.tokenizer, fingerprint, described.fingerprint),)
    return Trial(problems, event, said, text[:_ANSWER_CHARS], len(responses), *counted, fingerprint)


async def _once(request: Any) -> AsyncIterator[Any]:
    yield request


def _text(profile: ModelProfile, responses: list[Any]) -> str:
    outputs = [profile.text_output, *(name for name in profile.metered_outputs if name != profile.text_output)]
    parts: list[bytes] = []
    for response in responses:
        for name in outputs:
            tensor = None if name is None else kserve.find_output(response, name)
            if name is not None and tensor is not None and tensor.datatype == "BYTES":
                parts += kserve.read_bytes_output(response, name) or ()
    return b"".join(parts).decode(errors="replace")


async def _tokenizer_counts(
    server: GatewayServer, profile: ModelProfile, asked: TrialRequest, text: str
) -> tuple[int | None, int | None]:
    if profile.tokenizer is None:
        return None, None
    prompt = asked.inputs.get(profile.text_inputs[0], [asked.prompt]) if profile.text_inputs else []
    texts = [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in prompt]
    seen = await server.tokens.count_all(profile.tokenizer, texts, profile.framing, "")
    if profile.text_output is None:
        return seen.tokens, None
    written = await server.tokens.count_all(profile.tokenizer, [text], Framing.OUTPUT, "")
    return seen.tokens, written.tokens
