"""Read and rewrite KServe v2 inference messages without copying what is not asked for.

The protobufs are those of the `tritonclient` wheel. Everything that comes from a peer is checked before it is used: a length
that does not fit raises `TensorError`, which names the tensor, the value and the mend. A tensor that is not there is `None`,
never an error.
"""

from __future__ import annotations

from typing import Final

from serving.kserve.parameters import (
    EMPTY_FINAL_PARAMETER,
    FINAL_PARAMETER,
    drop_parameter,
    get_parameter,
    set_parameter,
)
from serving.kserve.reading import (
    count_elements,
    read_bool_input,
    read_bytes_input,
    read_bytes_output,
    read_integer_input,
    read_integer_output,
    read_integers_input,
    read_integers_output,
    read_text_input,
    read_texts_input,
)
from serving.kserve.tensors import (
    DTYPE_SIZE_BYTES,
    InferMessage,
    ModelInferRequest,
    ModelInferResponse,
    TensorError,
    find_input,
    find_output,
    has_shared_memory,
    pack_bytes,
    raw_input_position,
    unpack_bytes,
)
from serving.kserve.writing import (
    add_bool_input,
    add_bytes_input,
    add_bytes_output,
    add_integer_input,
    add_integer_output,
    request_output,
    strip_input,
    strip_output,
)

__all__ = [
    "DTYPE_SIZE_BYTES",
    "EMPTY_FINAL_PARAMETER",
    "FINAL_PARAMETER",
    "MAX_MESSAGE_BYTES",
    "SERVICE_NAME",
    "InferMessage",
    "ModelInferRequest",
    "ModelInferResponse",
    "TensorError",
    "add_bool_input",
    "add_bytes_input",
    "add_bytes_output",
    "add_integer_input",
    "add_integer_output",
    "count_elements",
    "drop_parameter",
    "find_input",
    "find_output",
    "get_parameter",
    "has_shared_memory",
    "pack_bytes",
    "raw_input_position",
    "read_bool_input",
    "read_bytes_input",
    "read_bytes_output",
    "read_integer_input",
    "read_integer_output",
    "read_integers_input",
    "read_integers_output",
    "read_text_input",
    "read_texts_input",
    "request_output",
    "set_parameter",
    "strip_input",
    "strip_output",
    "unpack_bytes",
]

SERVICE_NAME: Final = "inference.GRPCInferenceService"
# Triton's own bound; gRPC's default of 4 MiB refuses what a long prompt needs.
MAX_MESSAGE_BYTES: Final = 2**31 - 1
