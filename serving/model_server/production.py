"""What the server really produced, one JSON line a request, appended and never rewritten.

Tests hold bills against it: it is written by the one who makes the tokens, not by the one who counts them. A line is
written when the model has stopped working for the request, so a cancelled request's line comes after the cancel.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

import grpc

from serving.kserve import TensorError
from serving.model_server.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Account", "Production", "ProductionLog"]


@dataclass(slots=True)
class Production:
    """One request's account, filled in as the model works."""

    request_id: str
    model: str
    input_tokens: int = 0
    output_tokens: int = 0
    """Produced, whether or not anyone received them."""
    delivered_tokens: int = 0
    """Handed to the transport before the request ended."""
    outcome: str = "cancelled"
    """completed, cancelled, error or refused; cancelled until something else is known."""
    error: str | None = None


class Account:
    """Gathers one request's line and writes it once both sides are done: whoever answers, and the model."""

    def __init__(self, log: ProductionLog, production: Production) -> None:
        self.production = production
        self._log = log
        self._model_works = False
        self._answered = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RequestError | TensorError):
            internal = isinstance(error, RequestError) and error.code is grpc.StatusCode.INTERNAL
            self.production.outcome = "error" if internal else "refused"
            self.production.error = str(error)
        elif isinstance(error, Exception):
            self.production.outcome = "error"
            self.production.error = f"{type(error).__name__}: {error}"
        self._answered = True
        self._settle()

    def await_end(self) -> None:
        """The model works for the request: its line has to wait until `ended`."""
        self._model_works = True

    def ended(self, input_tokens: int, output_tokens: int) -> None:
        """The model has stopped working for the request."""
        self.production.input_tokens = input_tokens
        self.production.output_tokens = output_tokens
        self._model_works = False
        self._settle()

    def complete(self) -> None:
        """Every answer has been handed over."""
        self.production.outcome = "completed"

    def _settle(self) -> None:
        if self._answered and not self._model_works:
            self._log.write(self.production)


class ProductionLog:
    """Appends lines to a file; without a path it does nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, production: Production) -> None:
        if self._file is not None:
            # One write call with O_APPEND: lines of several servers do not mix.
            os.write(self._file, json.dumps(asdict(production)).encode() + b"\n")

    def account(self, request_id: str, model: str) -> Account:
        """The account of one request, to be used in a `with` statement around all of its answers."""
        return Account(self, Production(request_id, model))

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
