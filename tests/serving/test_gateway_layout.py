"""Where a request's inputs are, walked once for each form of request."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from tritonclient.grpc import service_pb2

from serving import kserve
from serving.gateway.counting import prepare
from serving.gateway.credentials import SecretHasher, hash_secret
from serving.gateway.layout import Place, layout_of
from serving.gateway.profiles import tensorrt_llm_ids, vllm
from serving.kserve import ModelInferRequest
from serving.tokenizers import Framing


def raw_request(*inputs: tuple[str, str, list[int], bytes]) -> ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="m")
    for name, datatype, shape, data in inputs:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(data)
    return request


def test_inputs_with_data_beside_them_have_no_place_among_the_raw_ones() -> None:
    request = service_pb2.ModelInferRequest()
    request.inputs.add(name="typed", datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
    request.inputs.add(name="raw", datatype="BYTES", shape=[2])
    request.raw_input_contents.append(kserve.pack_bytes([b"a", b"b"]))
    found = layout_of(request)
    assert found.places == {"typed": Place(None, "BOOL", True), "raw": Place(0, "BYTES", False)}
    assert found.shared is None


def test_a_form_that_was_seen_before_is_not_walked_again_and_others_never_take_its_place() -> None:
    first = raw_request(("a", "BOOL", [1], b"\1"), ("b", "BYTES", [1, 1], b""))
    again = raw_request(("a", "BOOL", [1], b"\0"), ("b", "BYTES", [1, 1], b"other data"))
    assert layout_of(again) is layout_of(first)
    # The same bytes one after the other, cut elsewhere.
    joined = raw_request(("a", "", [], b"\1"), ("", "BOOL", [1], b""))
    moved = raw_request(("a", "BOOL", [1], b"\1"), ("", "", [], b""))
    assert len({b"".join([tensor.SerializeToString() for tensor in request.inputs]) for request in (joined, moved)}) == 1
    assert layout_of(joined).places["a"].datatype == ""
    assert layout_of(moved).places["a"].datatype == "BOOL"


def test_of_two_inputs_with_one_name_it_is_the_first_and_shared_memory_shows_in_any() -> None:
    request = raw_request(("a", "BOOL", [1], b"\1"), ("a", "BYTES", [3], b""))
    assert layout_of(request).places == {"a": Place(0, "BOOL", True)}
    request.inputs[1].parameters["shared_memory_region"].string_param = "region"
    assert layout_of(request).shared == "a"


def test_many_forms_are_forgotten_and_read_right_again() -> None:
    for number in range(600):
        name = f"input{number}"
        assert layout_of(raw_request((name, "BOOL", [1], b"\1"))).places == {name: Place(0, "BOOL", True)}


@pytest.mark.parametrize("behind", [True, False])
def test_flags_behind_one_that_is_replaced_are_read_where_they_were(behind: bool) -> None:
    flags = [("return_num_input_tokens", "BOOL", [1], b"\0"), ("chat_template", "BOOL", [1], b"\1")]
    text = ("text_input", "BYTES", [1], kserve.pack_bytes([b"hello"]))
    tail = ("stream", "BOOL", [1], b"\0")
    request = raw_request(text, *(flags if behind else flags[::-1]), tail)
    assert prepare(request, vllm("m"), "ours", stream=False).framing is Framing.CHAT

    ids = [
        ("return_num_output_tokens", "BOOL", [1, 1], b"\0"),
        ("return_all_generated_tokens", "BOOL", [1, 1], b"\1"),
        ("streaming", "BOOL", [1, 1], b"\0"),
    ]
    request = raw_request(("input_ids", "INT32", [1, 1], bytes(4)), ("input_lengths", "INT32", [1, 1], b"\1\0\0\0"), *ids)
    assert prepare(request, tensorrt_llm_ids("m"), "ours", stream=False).repeats_all


@pytest.mark.parametrize("size", [16, 64, 65, 200])
def test_the_hasher_that_has_its_pepper_gives_the_same_hash(size: int) -> None:
    pepper = bytes(range(size))
    expected = hmac.new(pepper, b"a secret", hashlib.sha256).digest()
    assert SecretHasher(pepper)("a secret") == hash_secret(pepper, "a secret") == expected
