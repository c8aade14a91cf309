"""Whether a model's tokenizer here is the one that its back end has: asked of the back end before the model is served.

Promise: no request of a model is admitted before its tokenizer was compared, or the back end was found to be one that cannot be
asked. A tokenizer that differs ends the start. A back end that is away does not: its models are compared before the first
request of each, and their requests refused until then. A request of a model that was compared pays for one look into a
dictionary.

What a back end says of its tokenizer, in this order:

    its ModelConfig has the parameter `tokenizer_fingerprint`, and it is that of ours     the same
    it counts one short prompt, where it reports counts and may be asked for an answer     the same, or another one
    its fingerprint is another, and nothing else can be asked                             another one
    none of that                                                                          it cannot be asked: said once

One tokenizer has another fingerprint as a GGUF file than as a folder, so a count has the last word where there is one.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Literal

import grpc
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from serving.gateway import admission
from serving.gateway.chunks import read_response
from serving.gateway.counting import AnswerCounter, prepare
from serving.gateway.sample_requests import SAMPLE_PROMPT, make_request
from serving.kserve import SERVICE_NAME, TensorError
from serving.tokenizers import TokenizerMismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.gateway.admission import Refusal
    from serving.gateway.counting import PreparedRequest
    from serving.gateway.profiles import ModelProfile
    from serving.gateway.tokens import TokenCounts
    from serving.gateway.upstream import Upstream
    from serving.kserve import ModelInferRequest

__all__ = [
    "FINGERPRINT_PARAMETER",
    "Agreement",
    "Asking",
    "Description",
    "Finding",
    "TokenizerChecks",
    "compare",
    "count_difference",
    "describe",
    "fingerprint_difference",
]

_LOG = logging.getLogger(__name__)

FINGERPRINT_PARAMETER: Final = "tokenizer_fingerprint"
# `metadata`: what the back end says of the model; `probe`: an answer of one token too.
Asking = Literal["probe", "metadata", "off"]
_AT_ONCE_MAX: Final = 4
_AWAY_RETRY_S: Final = 1
# A model server that was mended is found after so long.
_DIFFERS_RETRY_S: Final = 30
# Of an answer of one token.
_RESPONSES_MAX: Final = 8
# The back end, or the model, may be there later.
_AWAY: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.NOT_FOUND,
    }
)
# Triton's UNAVAILABLE for what --grpc-restricted-protocol keeps from whoever has no key to it: that stays so.
_RESTRICTED: Final = "protocol is restricted"


class Agreement(Enum):
    """What a comparison came to."""

    SAME = "same"
    DIFFERS = "differs"
    AWAY = "away"
    UNASKABLE = "unaskable"


@dataclass(frozen=True, slots=True)
class Finding:
    """Of one model, and why."""

    agreement: Agreement
    detail: str


@dataclass(frozen=True, slots=True)
class Description:
    """What a server says of a model."""

    metadata: Any
    config: Any | None
    """Triton's; other servers have none."""

    @property
    def fingerprint(self) -> str:
        """Of the model's tokenizer; empty: it says nothing of that."""
        if self.config is None or FINGERPRINT_PARAMETER not in self.config.parameters:
            return ""
        stated: str = self.config.parameters[FINGERPRINT_PARAMETER].string_value
        return stated


def _is_away(error: grpc.aio.AioRpcError) -> bool:
    return error.code() in _AWAY and _RESTRICTED not in (error.details() or "")


async def describe(upstream: Upstream, model: str, timeout_s: float) -> Description:
    """Ask the server. Raises grpc.aio.AioRpcError where it does not describe the model."""

    async def ask(method: str, request: Any) -> bytes:
        found: bytes = await upstream.raw(SERVICE_NAME, method)(request.SerializeToString(), timeout=timeout_s)
        return found

    metadata = service_pb2.ModelMetadataResponse.FromString(
        await ask("ModelMetadata", service_pb2.ModelMetadataRequest(name=model))
    )
    try:
        config = await ask("ModelConfig", service_pb2.ModelConfigRequest(name=model))
    except grpc.aio.AioRpcError as error:
        if _is_away(error):
            raise
        return Description(metadata, None)
    return Description(metadata, service_pb2.ModelConfigResponse.FromString(config).config)


def count_difference(tokenizer: str | None, counted: int, told: int) -> str:
    """What is wrong where the tokenizer and the back end count one prompt; empty: nothing is."""
    if counted == told:
        return ""
    what = f"tokenizer {tokenizer!r} counts {counted} tokens of a prompt of which the back end counts {told}"
    return f"{what}: it is not the model's, or the model puts something around the prompt"


def fingerprint_difference(tokenizer: str | None, own: str, stated: str) -> str:
    """What is wrong where the model states another fingerprint, and nobody counts."""
    return f"tokenizer {tokenizer!r} has the fingerprint {own}, and the model states {stated}"


async def _told(
    profile: ModelProfile, request: ModelInferRequest, prepared: PreparedRequest, upstream: Upstream, timeout_s: float
) -> int | None:
    """How many tokens the back end counts of the request's prompt. Raises TensorError where it does not take the request."""
    counter = AnswerCounter(profile, prepared)
    if not profile.decoupled:
        counter.take(await upstream.infer(request, timeout=timeout_s))
        return counter.counted().input_tokens
    call = upstream.stream_infer(request, timeout=timeout_s)
    try:
        async for data in call:
            response = read_response(data)
            if response.error_message:
                raise TensorError("the sample request", response.error_message, "the back end refuses it")
            counter.take(response.infer_response)
            if counter.responses == _RESPONSES_MAX:
                break
        return counter.counted().input_tokens
    finally:
        # One that does not keep to the one token that was asked for is not waited for.
        call.cancel()


async def compare(profile: ModelProfile, tokens: TokenCounts, upstream: Upstream, asking: Asking, timeout_s: float) -> Finding:
    """Hold the profile's tokenizer against its back end's."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _compare(profile, tokens, upstream, asking, timeout_s)
    except TimeoutError:
        return Finding(Agreement.AWAY, f"it has not answered within {timeout_s:g} s")
    except grpc.aio.AioRpcError as error:
        agreement = Agreement.AWAY if _is_away(error) else Agreement.UNASKABLE
        return Finding(agreement, f"{error.code().name}: {error.details()}")
    except (TensorError, DecodeError) as error:
        return Finding(Agreement.UNASKABLE, str(error))


async def _compare(profile: ModelProfile, tokens: TokenCounts, upstream: Upstream, asking: Asking, timeout_s: float) -> Finding:
    name = profile.tokenizer
    assert name is not None, "a model without a tokenizer is not compared"
    described = await describe(upstream, profile.model, timeout_s)
    own, stated = tokens.fingerprint(name), described.fingerprint
    if stated == own:
        return Finding(Agreement.SAME, f"the model states its fingerprint {own}")
    why = f"the model states no {FINGERPRINT_PARAMETER}"
    if profile.counts is None or not profile.counts.input_flag:
        why += ", and its back end reports no counts"
    elif asking == "metadata":
        why += ", and it is not to be asked for an answer"
    else:
        request = make_request(profile, described.metadata, described.config, {}, SAMPLE_PROMPT, 1)
        request_id = f"taximeter-tokenizer-check-{secrets.token_hex(8)}"
        prepared = prepare(request, profile, request_id, stream=profile.decoupled)
        told = await _told(profile, request, prepared, upstream, timeout_s)
        if told is not None:
            counted = (await tokens.count_all(name, prepared.prompts, prepared.framing, "")).tokens
            difference = count_difference(name, counted, told)
            if difference:
                return Finding(Agreement.DIFFERS, difference)
            return Finding(Agreement.SAME, f"both count {told} tokens of a prompt")
        why += ", and its back end counted nothing of a prompt"
    if stated:
        return Finding(Agreement.DIFFERS, fingerprint_difference(name, own, stated))
    return Finding(Agreement.UNASKABLE, why)


class TokenizerChecks:
    """Those of one gateway. Belongs to one event loop."""

    def __init__(
        self,
        profiles: Mapping[str, ModelProfile],
        tokens: TokenCounts,
        upstream: Upstream,
        asking: Asking,
        timeout_s: float,
    ) -> None:
        """`timeout_s`: of one comparison, and of the start, which waits for all of them; one that takes longer goes on, and
        the requests of its model wait for it."""
        self._tokens = tokens
        self._upstream = upstream
        self._asking = asking
        self._timeout_s = timeout_s
        # Of these no request goes on as it is.
        self.unchecked: dict[str, ModelProfile] = {}
        if asking != "off":
            self.unchecked |= {model: profile for model, profile in profiles.items() if profile.tokenizer is not None}
        self.findings: dict[str, Finding] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE_MAX)
        self._found_s: dict[str, float] = {}
        self._is_serving = False

    async def start(self) -> None:
        """Compare all of them. Raises TokenizerMismatchError; what a back end that is away has, requests will ask."""
        running = [self._begin(model) for model in self.unchecked]
        if running:
            await asyncio.wait(running, timeout=self._timeout_s)
        self._is_serving = True
        differing = {model: finding for model, finding in self.findings.items() if finding.agreement is Agreement.DIFFERS}
        if differing:
            raise TokenizerMismatchError(
                *(self._told_wrong(self.unchecked[model], finding) for model, finding in differing.items())
            )

    async def refusal(self, model: str) -> Refusal | None:
        """For a request of a model of `unchecked`, after one more comparison, which all that come meanwhile share; None: it may
        go on."""
        finding = self.findings.get(model)
        if finding is not None and finding.agreement is Agreement.DIFFERS:
            left_s = self._found_s[model] + _DIFFERS_RETRY_S - time.monotonic()
            if left_s > 0:
                return admission.tokenizer_refusal(model, int(left_s) + 1, differs=True)
        await asyncio.wait({self._begin(model)}, timeout=self._timeout_s)
        if model not in self.unchecked:
            return None
        finding = self.findings.get(model)
        differs = finding is not None and finding.agreement is Agreement.DIFFERS
        return admission.tokenizer_refusal(model, _DIFFERS_RETRY_S if differs else _AWAY_RETRY_S, differs=differs)

    async def close(self) -> None:
        """Ask no more."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _begin(self, model: str) -> asyncio.Task[None]:
        task = self._running.get(model)
        if task is None:
            task = self._running[model] = asyncio.get_running_loop().create_task(self._check(self.unchecked[model]))
            task.add_done_callback(lambda _: self._running.pop(model))
        return task

    async def _check(self, profile: ModelProfile) -> None:
        async with self._slots:
            finding = await compare(profile, self._tokens, self._upstream, self._asking, self._timeout_s)
        model, before = profile.model, self.findings.get(profile.model)
        self.findings[model] = finding
        self._found_s[model] = time.monotonic()
        match finding.agreement:
            case Agreement.SAME:
                del self.unchecked[model]
                _LOG.info("model %s: tokenizer %r is its back end's: %s", model, profile.tokenizer, finding.detail)
            case Agreement.UNASKABLE:
                del self.unchecked[model]
                _LOG.warning(
                    "model %s: its back end cannot be asked whether tokenizer %r is the model's (%s): what it counts is taken "
                    "on trust; `taximeter models check %s` shows it",
                    model,
                    profile.tokenizer,
                    finding.detail,
                    model,
                )
            case Agreement.AWAY if before is None or before.agreement is not Agreement.AWAY:
                _LOG.warning(
                    "model %s: its back end cannot say now whether tokenizer %r is the model's (%s): it is asked again before "
                    "a request goes on",
                    model,
                    profile.tokenizer,
                    finding.detail,
                )
            case Agreement.DIFFERS if self._is_serving and before != finding:
                # One that is found at the start ends it, and is told there.
                _LOG.error("%s; requests are refused meanwhile", self._told_wrong(profile, finding))

    def _told_wrong(self, profile: ModelProfile, finding: Finding) -> str:
        return (
            f"model {profile.model!r}: {finding.detail}: set models.tokenizers.{profile.tokenizer} to the tokenizer that the "
            f"model has (`taximeter models check {profile.model}` tries one), or gateway.check_tokenizers to another value"
        )
