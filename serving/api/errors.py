"""Why a call ends without an answer: one exception, told as a gRPC status or as RFC 9457 problem details.

What a caller sent does not fit the contract: 400. It fits, and cannot be meant (an end before its start, a page token of
another question): 422, INVALID_ARGUMENT in gRPC too.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import grpc

__all__ = ["HTTP_STATUSES", "ApiError", "Problem"]

HTTP_STATUSES: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    grpc.StatusCode.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    grpc.StatusCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS: HTTPStatus.CONFLICT,
    grpc.StatusCode.FAILED_PRECONDITION: HTTPStatus.CONFLICT,
    grpc.StatusCode.OUT_OF_RANGE: HTTPStatus.GONE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    grpc.StatusCode.UNIMPLEMENTED: HTTPStatus.NOT_IMPLEMENTED,
    grpc.StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    grpc.StatusCode.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}
_RETRY_S: Final = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """RFC 9457: `detail` names the field, the value and the mend."""

    status: int
    title: str
    detail: str

    def values(self) -> dict[str, object]:
        return {"type": "about:blank", "title": self.title, "status": self.status, "detail": self.detail}


class ApiError(Exception):
    """A call ends with this status and sentence."""

    def __init__(self, status: grpc.StatusCode, message: str, http_status: HTTPStatus | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.http_status = http_status or HTTP_STATUSES[status]

    @property
    def problem(self) -> Problem:
        return Problem(self.http_status.value, self.http_status.phrase, self.message)

    @property
    def retry_after_s(self) -> int:
        """When it is worth another try; 0: it is not."""
        return _RETRY_S if self.status in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE) else 0

    @classmethod
    def malformed(cls, message: str) -> ApiError:
        """It does not fit the contract."""
        return cls(grpc.StatusCode.INVALID_ARGUMENT, message)

    @classmethod
    def unacceptable(cls, message: str) -> ApiError:
        """It fits the contract and cannot be meant."""
        return cls(grpc.StatusCode.INVALID_ARGUMENT, message, HTTPStatus.UNPROCESSABLE_ENTITY)

    @classmethod
    def unknown(cls, what: str, name: str) -> ApiError:
        """There is none, or none that the caller may see: nobody is told which."""
        return cls(grpc.StatusCode.NOT_FOUND, f"{what} {name!r} is not known")
