"""Detects objects in an image: python onnx_predictor.py student.onnx photo.jpg."""

import json
import sys

import cv2
import numpy as np
import onnxruntime


def predict(session, image):
    """Returns the boxes (N, 4) in pixels of a BGR image, the names of their classes and their scores."""
    about = session.get_modelmeta().custom_metadata_map
    short, long = sorted(image.shape[:2])
    scale = min(int(about["min_size"]) / short or 1, int(about["max_size"]) / long)
    size = [int(scale * side + 0.5) for side in image.shape[1::-1]]
    pixels = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    pixels = pixels[:, :, ::-1] if about["channel_order"] == "RGB" else pixels
    inputs = {"image": np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)}
    boxes, classes, scores = session.run(["boxes", "classes", "scores"], inputs)
    return boxes / scale, [json.loads(about["classes"])[i] for i in classes], scores


if __name__ == "__main__":
    student = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    for box, name, score in zip(*predict(student, cv2.imread(sys.argv[2])), strict=True):
        print(f"{name} {score:.4f} {np.round(box, 2).tolist()}")
