"""Each text of each batch is answered by the model smollm2, through Triton itself; all answers come together."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


def _answer(text, options):
    inputs = [
        pb_utils.Tensor("text_input", np.array([text], dtype=np.object_)),
        pb_utils.Tensor("sampling_parameters", np.array([json.dumps(options)], dtype=np.object_)),
        pb_utils.Tensor("exclude_input_in_output", np.array([True])),
    ]
    asked = pb_utils.InferenceRequest(model_name="smollm2", requested_output_names=["text_output"], inputs=inputs)
    parts = []
    for response in asked.exec(decoupled=True):
        if response.has_error():
            raise ValueError(response.error().message())
        tensor = pb_utils.get_output_tensor_by_name(response, "text_output")
        if tensor is not None:
            parts += [part if isinstance(part, bytes) else part.encode() for part in tensor.as_numpy().flatten()]
    return b"".join(parts)


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            texts = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()
            limit = pb_utils.get_input_tensor_by_name(request, "max_tokens")
            options = {} if limit is None else {"max_tokens": int(limit.as_numpy().flat[0])}
            try:
                answers = [[_answer(text, options)] for text in texts.flatten()]
                output = pb_utils.Tensor("text_output", np.array(answers, dtype=np.object_))
                responses.append(pb_utils.InferenceResponse([output]))
            except ValueError as error:
                responses.append(pb_utils.InferenceResponse([], error=pb_utils.TritonError(str(error))))
        return responses
