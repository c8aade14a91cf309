"""What the service asks of a model, and how a model's tensors are declared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncGenerator

    from serving.kserve import ModelInferRequest, ModelInferResponse

__all__ = ["STOP_INPUT", "VERSION", "Answer", "Model", "ModelStatistics", "TensorSpec"]

VERSION: Final = "1"
# As TensorRT-LLM has it: a request that says so is none, but stops the one that has its ID.
STOP_INPUT: Final = "stop"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as metadata and configuration describe it."""

    name: str
    datatype: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """One response's tensors; the service adds names, id and the final flag. A request's last answer is final,
    unless the model ends with an empty final response."""

    response: ModelInferResponse
    final: bool


@dataclass(slots=True)
class ModelStatistics:
    """Counts since the start, as ModelStatistics reports them."""

    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    succeeded_ns: int = 0
    failed_ns: int = 0
    responses: int = 0
    last_inference_ms: int = 0


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model's name, policy and tensors."""

    name: str
    decoupled: bool
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: dict[str, str] = field(default_factory=dict)


class Model(Protocol):
    """A model that answers requests with one or more responses."""

    @property
    def card(self) -> ModelCard: ...

    def infer(self, request: ModelInferRequest, stop: asyncio.Event) -> AsyncGenerator[Answer, Any]:
        """Answer the request. Closing the generator cancels the work; asking for the next answer says that the last
        one has been handed to the transport. Once `stop` is set the answer ends with what has been produced."""
        ...
