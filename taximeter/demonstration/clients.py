"""The demonstration's clients: an unmodified `tritonclient`, with an API key in its metadata and nothing else of ours.

What a client is told about its usage stands in the parameters of the response: `taximeter_request_id`,
`taximeter_input_tokens`, `taximeter_output_tokens`.
"""

from __future__ import annotations

import json
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from taximeter.errors import TaximeterError
from taximeter.new_keys import ASK_AGAIN_S, may_be_known_soon

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from taximeter.demonstration.script import Prompt

__all__ = ["Answer", "ask_all", "ask_for_refusal"]

_TIMEOUT_S: Final = 180.0
_CLIENTS: Final = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and the usage that the client was told."""

    prompt: Prompt
    text: str
    request_id: str
    input_tokens: int
    output_tokens: int


def ask_all(
    address: str, secrets: Mapping[str, str], prompts: Sequence[Prompt], on_answer: Callable[[], object]
) -> list[Answer]:
    """Every prompt's answer, in the order of the prompts; several at a time. The keys may be new."""
    began_s = time.monotonic()

    def ask(prompt: Prompt) -> Answer:
        while True:
            try:
                with InferenceServerClient(address) as client:
                    answer = (_stream if prompt.streamed else _infer)(client, prompt, secrets[prompt.tenant_id])
            except InferenceServerException as error:
                if not may_be_known_soon(error, time.monotonic() - began_s):
                    raise TaximeterError(f"the prompt {prompt.text[:40]!r} was not answered: {error.message()}") from None
                time.sleep(ASK_AGAIN_S)
            else:
                on_answer()
                return answer

    with ThreadPoolExecutor(_CLIENTS, thread_name_prefix="client") as pool:
        return list(pool.map(ask, prompts))


def ask_for_refusal(address: str, secret: str, prompt: Prompt, client_id: str) -> str:
    """Send what must be refused; what the client was told."""
    with InferenceServerClient(address) as client:
        try:
            client.infer(
                "smollm2-unary", _inputs(prompt), request_id=client_id, headers=_headers(secret), client_timeout=_TIMEOUT_S
            )
        except InferenceServerException as error:
            return f"{error.status()}: {error.message()}"
    raise TaximeterError(f"a prompt of {len(prompt.text)} characters was answered: it is over the plan's limit")


def _infer(client: Any, prompt: Prompt, secret: str) -> Answer:
    result = client.infer("smollm2-unary", _inputs(prompt), headers=_headers(secret), client_timeout=_TIMEOUT_S)
    return _answer(prompt, [result])


def _stream(client: Any, prompt: Prompt, secret: str) -> Answer:
    arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: arrived.put((result, error)), headers=_headers(secret), stream_timeout=_TIMEOUT_S)
    client.async_stream_infer("smollm2", _inputs(prompt), enable_empty_final_response=True)
    results = []
    final = False
    while not final:
        try:
            result, error = arrived.get(timeout=_TIMEOUT_S)
        except queue.Empty:
            raise TaximeterError(f"no answer to {prompt.text[:40]!r} within {_TIMEOUT_S:g} s: see logs/gateway.log") from None
        if error is not None:
            raise error
        results.append(result)
        final = result.get_response().parameters["triton_final_response"].bool_param
    client.stop_stream()
    return _answer(prompt, results)


def _answer(prompt: Prompt, results: Sequence[Any]) -> Answer:
    texts = [result.as_numpy("text_output") for result in results]
    told = results[-1].get_response().parameters
    return Answer(
        prompt=prompt,
        text=b"".join(bytes(text[0]) for text in texts if text is not None).decode(errors="replace"),
        request_id=told["taximeter_request_id"].string_param,
        input_tokens=told["taximeter_input_tokens"].int64_param,
        output_tokens=told["taximeter_output_tokens"].int64_param,
    )


def _inputs(prompt: Prompt) -> list[Any]:
    parameters = {"max_tokens": prompt.output_tokens_max, "temperature": 0}
    return [
        _text("text_input", prompt.text),
        _flag("stream", value=prompt.streamed),
        _flag("exclude_input_in_output", value=True),
        _text("sampling_parameters", json.dumps(parameters)),
    ]


def _text(name: str, text: str) -> Any:
    tensor = InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return tensor


def _flag(name: str, *, value: bool) -> Any:
    tensor = InferInput(name, [1], "BOOL")
    tensor.set_data_from_numpy(np.array([value]))
    return tensor


def _headers(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}
