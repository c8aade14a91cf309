"""The parameters of inference messages, and those by which the last response of a request is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tritonclient.grpc import service_pb2

if TYPE_CHECKING:
    from serving.kserve.tensors import InferMessage

__all__ = ["EMPTY_FINAL_PARAMETER", "FINAL_PARAMETER", "drop_parameter", "get_parameter", "set_parameter"]

# A response says by this parameter that it is the last one of its request.
FINAL_PARAMETER: Final = "triton_final_response"
# A request asks by this parameter for the last response even when it carries nothing else.
EMPTY_FINAL_PARAMETER: Final = "triton_enable_empty_final_response"


def get_parameter(message: InferMessage, name: str) -> bool | int | float | str | None:
    """The parameter's value, of whichever type it has; None if it is absent or empty."""
    parameters = message.parameters
    if name not in parameters:
        return None
    parameter = parameters[name]
    choice = parameter.WhichOneof("parameter_choice")
    if choice is None:
        return None
    value: bool | int | float | str = getattr(parameter, choice)
    return value


def set_parameter(message: InferMessage, name: str, value: bool | int | float | str) -> None:
    """Set the parameter in the field of the value's type, whatever it was before."""
    parameter = service_pb2.InferParameter()
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, str):
        parameter.string_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    elif -(2**63) <= value < 2**63:
        parameter.int64_param = value
    elif 0 <= value < 2**64:
        parameter.uint64_param = value
    else:
        raise ValueError(f"parameter {name!r}: {value}: must fit 64 bits")
    message.parameters[name].CopyFrom(parameter)


def drop_parameter(message: InferMessage, name: str) -> bool:
    """Remove the parameter; False if it was not there."""
    if name not in message.parameters:
        return False
    del message.parameters[name]
    return True
