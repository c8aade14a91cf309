"""Why an RPC ends without an answer, as one exception that carries what the client is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from serving.gateway.admission import Refusal
    from serving.kserve import TensorError

__all__ = ["CallError"]


class CallError(Exception):
    """The gateway ends this call itself, with a status and a sentence."""

    def __init__(self, status: grpc.StatusCode, message: str, answer: Any = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        # The back end's own words on a stream, which a client is to get as they are.
        self.answer = answer

    @classmethod
    def refused(cls, refusal: Refusal) -> CallError:
        return cls(refusal.status, refusal.message)

    @classmethod
    def invalid(cls, error: TensorError) -> CallError:
        return cls(grpc.StatusCode.INVALID_ARGUMENT, str(error))
