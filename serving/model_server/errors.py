"""Why a request was not answered: a gRPC status and a message that names the field, the value and the mend."""

from __future__ import annotations

import grpc

__all__ = ["ModelLoadError", "RequestError"]


class RequestError(Exception):
    """A request that cannot be answered. Unary calls end with the status; streams say it in band."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @classmethod
    def invalid(cls, message: str) -> RequestError:
        return cls(grpc.StatusCode.INVALID_ARGUMENT, message)


class ModelLoadError(RuntimeError):
    """A model cannot be served: its weights or its engine are missing or unusable."""
