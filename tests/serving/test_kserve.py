"""`serving.kserve` reads and rewrites what an unmodified tritonclient sends, and refuses what does not fit."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor

from serving import kserve

texts = st.lists(st.binary(max_size=40), max_size=6)


def bytes_request(*names: str) -> Any:
    request = service_pb2.ModelInferRequest(model_name="m")
    for name in names:
        kserve.add_bytes_input(request, name, [name.encode()])
    return request


@given(texts)
def test_bytes_round_trip(elements: list[bytes]) -> None:
    assert kserve.unpack_bytes(kserve.pack_bytes(elements), tensor="t") == elements


@given(texts)
def test_packs_as_triton_does(elements: list[bytes]) -> None:
    assert list(deserialize_bytes_tensor(kserve.pack_bytes(elements))) == elements


@given(st.binary(max_size=64))
def test_malformed_bytes_never_read_past_the_end(raw: bytes) -> None:
    try:
        elements = kserve.unpack_bytes(raw, tensor="t")
    except kserve.TensorError:
        return
    assert kserve.pack_bytes(elements) == raw


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        (b"\x01\x00\x00", "3 bytes left at offset 0"),
        (b"\x05\x00\x00\x00abc", "element 0 claims 5 bytes, 3 follow"),
        (b"\xff\xff\xff\xffabc", "claims 4294967295 bytes"),
    ],
)
def test_malformed_length_names_tensor_value_and_mend(raw: bytes, names: str) -> None:
    with pytest.raises(kserve.TensorError, match=names) as caught:
        kserve.unpack_bytes(raw, tensor="text_input")
    assert caught.value.tensor == "text_input"
    assert "length" in caught.value.mend


def test_raw_position_advances_only_for_inputs_without_contents_and_shared_memory() -> None:
    request = service_pb2.ModelInferRequest()
    typed = request.inputs.add(name="typed", datatype="BYTES", shape=[1])
    typed.contents.bytes_contents.append(b"t")
    shared = request.inputs.add(name="shared", datatype="BYTES", shape=[1])
    shared.parameters["shared_memory_region"].string_param = "region"
    for name in ("first", "second"):
        request.inputs.add(name=name, datatype="BYTES", shape=[1])
        request.raw_input_contents.append(kserve.pack_bytes([name.encode()]))

    assert [kserve.raw_input_position(request, n) for n in ("typed", "shared", "first", "second", "none")] == [
        None,
        None,
        0,
        1,
        None,
    ]
    assert kserve.read_text_input(request, "typed") == "t"
    assert kserve.read_text_input(request, "second") == "second"
    assert kserve.read_text_input(request, "absent") is None
    with pytest.raises(kserve.TensorError, match="shared memory"):
        kserve.read_text_input(request, "shared")

    assert kserve.strip_input(request, "first")
    assert kserve.read_text_input(request, "second") == "second"
    assert kserve.strip_input(request, "typed")
    assert kserve.read_text_input(request, "second") == "second"
    assert not kserve.strip_input(request, "first")


def test_reads_what_tritonclient_writes() -> None:
    text = triton.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array(["héllo 你好".encode()], dtype=np.object_))
    flag = triton.InferInput("stream", [1], "BOOL")
    flag.set_data_from_numpy(np.array([True]))
    scalar = triton.InferInput("max_tokens", [1, 1], "INT32")
    scalar.set_data_from_numpy(np.array([[7]], dtype=np.int32))
    request = service_pb2.ModelInferRequest()
    for one in (text, flag, scalar):
        request.inputs.append(one._get_tensor())
        request.raw_input_contents.append(one._get_content())

    assert kserve.read_text_input(request, "text_input") == "héllo 你好"
    assert kserve.read_bool_input(request, "stream") is True
    assert kserve.read_integer_input(request, "max_tokens") == 7


@pytest.mark.parametrize("dtype", sorted(set(kserve.DTYPE_SIZE_BYTES) - {"BOOL"}))
@pytest.mark.parametrize("shape", [[], [1], [1, 1]])
def test_integers_of_every_type_and_rank_are_what_tritonclient_reads(dtype: str, shape: list[int]) -> None:
    response = service_pb2.ModelInferResponse()
    kserve.add_bytes_output(response, "text_output", [b"x"])
    kserve.add_integer_output(response, "count", 101, dtype=dtype, shape=shape)
    assert kserve.read_integer_output(response, "count") == 101
    seen = triton.InferResult(response).as_numpy("count")
    assert list(seen.shape) == shape
    assert int(seen.reshape(())) == 101


@pytest.mark.parametrize(
    ("dtype", "field"), [("INT16", "int_contents"), ("UINT64", "uint64_contents"), ("INT64", "int64_contents")]
)
def test_typed_integers(dtype: str, field: str) -> None:
    response = service_pb2.ModelInferResponse()
    tensor = response.outputs.add(name="n", datatype=dtype, shape=[2])
    getattr(tensor.contents, field).extend([1, 2])
    assert kserve.read_integers_output(response, "n") == [1, 2]
    with pytest.raises(kserve.TensorError, match="2 elements"):
        kserve.read_integer_output(response, "n")


def test_strip_output_takes_its_raw_data_along() -> None:
    response = service_pb2.ModelInferResponse()
    kserve.add_integer_output(response, "num_input_tokens", 3, shape=())
    kserve.add_bytes_output(response, "text_output", [b"answer"])
    kserve.add_integer_output(response, "num_output_tokens", 5)
    assert kserve.strip_output(response, "num_input_tokens")
    assert not kserve.strip_output(response, "num_input_tokens")
    assert kserve.read_bytes_output(response, "text_output") == [b"answer"]
    assert kserve.read_integer_output(response, "num_output_tokens") == 5
    assert len(response.raw_output_contents) == 2


def test_outputs_that_do_not_match_their_raw_data_are_refused() -> None:
    response = service_pb2.ModelInferResponse()
    kserve.add_bytes_output(response, "text_output", [b"answer"])
    response.outputs.add(name="n", datatype="UINT32", shape=[1])
    with pytest.raises(kserve.TensorError, match="1 raw_output_contents for 2 outputs"):
        kserve.strip_output(response, "n")


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "message"),
    [
        ("UINT32", [1], b"\x01\x00", "2 bytes for UINT32"),
        ("UINT32", [-1], b"", "dimensions are not negative"),
        ("UINT32", [2**40], b"", "at most"),
        ("FP32", [1], struct.pack("<f", 1.0), "datatype 'FP32'"),
        ("UINT32", [1, 2], struct.pack("<2I", 1, 2), "exactly one"),
    ],
)
def test_integers_that_do_not_fit_are_refused(datatype: str, shape: list[int], raw: bytes, message: str) -> None:
    request = service_pb2.ModelInferRequest(raw_input_contents=[raw])
    request.inputs.add(name="n", datatype=datatype, shape=shape)
    with pytest.raises(kserve.TensorError, match=message):
        kserve.read_integer_input(request, "n")


def test_inputs_that_do_not_fit_are_refused() -> None:
    request = service_pb2.ModelInferRequest()
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    with pytest.raises(kserve.TensorError, match="no data"):
        kserve.read_text_input(request, "text_input")
    request.raw_input_contents.append(kserve.pack_bytes([b"\xff\xfe"]))
    with pytest.raises(kserve.TensorError, match="not UTF-8"):
        kserve.read_text_input(request, "text_input")
    request.inputs[0].shape[0] = 3
    with pytest.raises(kserve.TensorError, match="1 elements for shape"):
        kserve.read_text_input(request, "text_input")
    with pytest.raises(kserve.TensorError, match="already in the request"):
        kserve.add_bytes_input(request, "text_input", [b"x"])
    with pytest.raises(kserve.TensorError, match="must fit UINT8"):
        kserve.add_integer_output(service_pb2.ModelInferResponse(), "n", 256, dtype="UINT8")


def test_added_inputs_take_the_form_that_the_request_has() -> None:
    typed = service_pb2.ModelInferRequest()
    typed.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
    kserve.add_bool_input(typed, "return_num_input_tokens", True)
    assert not typed.raw_input_contents
    assert kserve.read_bool_input(typed, "return_num_input_tokens") is True

    raw = bytes_request("text_input")
    kserve.add_bool_input(raw, "return_num_input_tokens", True)
    assert len(raw.raw_input_contents) == 2
    assert kserve.read_bool_input(raw, "return_num_input_tokens") is True


def test_requested_outputs() -> None:
    request = bytes_request("text_input")
    assert not kserve.request_output(request, "n")
    assert len(request.outputs) == 0
    request.outputs.add(name="text_output")
    assert kserve.request_output(request, "n")
    assert not kserve.request_output(request, "n")
    assert [output.name for output in request.outputs] == ["text_output", "n"]


@pytest.mark.parametrize("value", [True, False, 0, -5, 2**63, "text", 1.5])
def test_parameters_keep_value_and_type(value: bool | int | float | str) -> None:
    response = service_pb2.ModelInferResponse()
    assert kserve.get_parameter(response, "p") is None
    kserve.set_parameter(response, "p", "before")
    kserve.set_parameter(response, "p", value)
    seen = kserve.get_parameter(response, "p")
    assert seen == value
    assert type(seen) is type(value)
    assert kserve.drop_parameter(response, "p")
    assert not kserve.drop_parameter(response, "p")


def test_parameter_beyond_64_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="must fit 64 bits"):
        kserve.set_parameter(service_pb2.ModelInferResponse(), "p", 2**64)
