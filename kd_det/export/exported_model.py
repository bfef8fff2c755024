"""Runs exported students, ONNX files and TorchScript, in the place of the models that they were exported from."""

import os
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from kd_det.errors import InputError, reason
from kd_det.export.onnx_file import OUTPUTS, import_package, open_session, run

# Maps the suffixes of exported files to the names of their formats.
FORMATS = {".onnx": "ONNX", ".ts": "TorchScript"}


def is_exported(path: str) -> bool:
    """Returns whether the name of a file is that of an exported student, not of weights."""
    return os.path.splitext(path)[1] in FORMATS


class ExportedModel(nn.Module):
    """Predicts with an exported student on the CPU; inputs and outputs are those of the model it was exported from.

    Args:
        path: The file, ``student.onnx`` or ``student.ts``.
        cfg: Config of the student alone.
        key: The argument that names the file, for messages.

    Attributes:
        path: The file.

    Raises:
        InputError: If there is no such file, it cannot be read, or its package is missing.
    """

    def __init__(self, path: str, cfg: CfgNode, key: str):
        super().__init__()
        self.path = path
        if not os.path.isfile(path):
            raise InputError(f"{key}: there is no file {path}.")
        self._infer = _load_onnx(path, key) if path.endswith(".onnx") else _load_torchscript(path, cfg, key)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Predicts one image after the other."""
        return [self._predict(x) for x in batched_inputs]

    def _predict(self, record: dict) -> dict:
        image = record["image"].float()
        found = self._infer(image)
        if "boxes" not in found:
            return {"scores": found["scores"]}
        size = (image.shape[1], image.shape[2])
        fields = {field: found[name] for field, name in OUTPUTS.items() if name in found}
        fields["pred_boxes"] = Boxes(found["boxes"])
        instances = Instances(size, **fields)
        height, width = record.get("height", size[0]), record.get("width", size[1])
        return {"instances": detector_postprocess(instances, height, width)}


def _load_onnx(path: str, key: str) -> Callable[[Tensor], dict[str, Tensor]]:
    import_package("onnxruntime", key)
    try:
        session = open_session(path)
    except Exception as error:  # ONNX Runtime raises errors of many types without a common parent.
        raise InputError(f"{key}: {path} cannot be read by ONNX Runtime: {reason(error)}") from error
    names = {output.name for output in session.get_outputs()}
    if "scores" not in names or [x.name for x in session.get_inputs()] != ["image"]:
        raise InputError(f"{key}: {path} is not an ONNX file of kd-det export: it has the outputs {sorted(names)}.")
    return lambda image: run(session, image)


def _load_torchscript(path: str, cfg: CfgNode, key: str) -> Callable[[Tensor], dict[str, Tensor]]:
    try:
        network = torch.jit.load(path, map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{key}: {path} is not TorchScript that can be read: {reason(error)}") from error
    fields = ["scores"]
    if cfg.MODEL.META_ARCHITECTURE != "ImageClassifier":
        keypoints = ["pred_keypoint_heatmaps", "pred_keypoints"] * cfg.MODEL.KEYPOINT_ON
        masks = ["pred_masks"] * cfg.MODEL.MASK_ON
        fields = ["pred_boxes", "pred_classes", *keypoints, *masks, "scores", "image_size"]

    def infer(image: Tensor) -> dict[str, Tensor]:
        tensors = zip(fields, network(image), strict=True)
        return {OUTPUTS[field]: tensor for field, tensor in tensors if field in OUTPUTS}

    return infer
