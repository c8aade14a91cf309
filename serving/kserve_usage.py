"""KServe v2 for a server that meters itself: the readers with which `producers`' gRPC interceptors bill what a gateway would.

The same code reads requests and responses here and in the gateway, so the same request is billed the same. The interceptor
has no tokenizer: a model whose profile counts by one alone is refused. One client stream is one bill, of one model; a gateway
bills each of its requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final
from uuid import uuid4

import grpc

from billing.v1.usage_pb2 import OPERATION_GENERATE
from producers.calls import Used
from producers.grpc_calls import RpcRefused, UsageReader
from serving import kserve
from serving.gateway.counting import AnswerCounter, PreparedRequest, prepare
from serving.gateway.profiles import ModelProfile
from serving.kserve import FINAL_PARAMETER, SERVICE_NAME, TensorError

__all__ = ["kserve_readers"]

_INFER: Final = f"/{SERVICE_NAME}/ModelInfer"
_STREAM_INFER: Final = f"/{SERVICE_NAME}/ModelStreamInfer"


def kserve_readers(profiles: Mapping[str, ModelProfile]) -> dict[str, Callable[[], UsageReader]]:
    """For `GrpcMetering.readers`: the two methods that cost tokens."""
    for profile in profiles.values():
        if profile.counts is None and profile.tokenizer is not None:
            raise ValueError(f"model {profile.model!r}: its tokens are counted by a tokenizer: put a gateway before it")
    return {
        _INFER: lambda: _KServeReader(profiles, stream=False),
        _STREAM_INFER: lambda: _KServeReader(profiles, stream=True),
    }


class _KServeReader:
    """One RPC's requests and responses."""

    def __init__(self, profiles: Mapping[str, ModelProfile], *, stream: bool) -> None:
        self.model = ""
        self.operation: int = OPERATION_GENERATE
        self.failed = False
        self._profiles = profiles
        self._stream = stream
        self._asked: dict[str, tuple[PreparedRequest, AnswerCounter]] = {}

    def take_request(self, request: Any) -> Any:
        """Make the model count."""
        profile = self._profiles.get(request.model_name)
        if profile is None:
            raise RpcRefused(grpc.StatusCode.NOT_FOUND, f"model_name: {request.model_name[:128]!r}: is not served here")
        if self.model and request.model_name != self.model:
            raise RpcRefused(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"model_name: {request.model_name[:128]!r}: this stream is of {self.model!r}: open another one",
            )
        self.model, self.operation = profile.model, profile.operation
        try:
            prepared = prepare(request, profile, uuid4().hex, stream=self._stream)
        except TensorError as error:
            raise RpcRefused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
        self._asked[request.id] = prepared, AnswerCounter(profile, prepared)
        return request

    def take_response(self, response: Any) -> Any:
        """Count, and take out what was injected."""
        if self._stream and response.error_message:
            self.failed = True
            return response
        answer = response.infer_response if self._stream else response
        found = self._asked.get(answer.id)
        if found is None:
            return response
        prepared, counter = found
        try:
            counter.take(answer)
        except TensorError as error:
            message = f"the model's answer cannot be metered: {error}"
            raise RpcRefused(grpc.StatusCode.INTERNAL, message) from error
        answer.id = prepared.client_id
        is_final = kserve.get_parameter(answer, FINAL_PARAMETER) is True
        hidden = self._stream and is_final and not answer.outputs and not prepared.empty_final_asked
        return None if hidden else response

    def used(self) -> Used:
        """Of all requests of the RPC."""
        total = Used()
        names = [rule.unit for rule in self._profiles[self.model].units] if self.model else []
        for _, counter in self._asked.values():
            counted = counter.counted()
            units = {unit: quantity for unit, quantity in zip(names, counted.units, strict=True) if quantity}
            total += Used(
                uncached_input_tokens=counted.input_tokens or 0, output_tokens=counted.output_tokens or 0, units=units
            )
        return total
