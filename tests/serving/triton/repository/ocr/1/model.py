"""RapidOCR: the bytes of an image file in, its lines of text out, from the top down."""

import cv2
import numpy as np
import triton_python_backend_utils as pb_utils
from rapidocr_onnxruntime import RapidOCR


class TritonPythonModel:
    def initialize(self, args):
        self._ocr = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)

    def execute(self, requests):
        return [self._read(request) for request in requests]

    def _read(self, request):
        data = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
        image = cv2.imdecode(data, cv2.IMREAD_COLOR)
        if image is None:
            return pb_utils.InferenceResponse([], error=pb_utils.TritonError("image: not an image file"))
        found, _ = self._ocr(image)
        lines = [text.encode() for _, text, _ in found or ()]
        return pb_utils.InferenceResponse([pb_utils.Tensor("lines", np.array(lines, dtype=np.object_))])
