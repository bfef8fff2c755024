"""Exports a student to ONNX and compares the file with the eager model in ONNX Runtime."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling.roi_heads import keypoint_head
from torch import Tensor, nn

import kd_det
from kd_det.classification import ImageClassifier
from kd_det.config import look_up
from kd_det.data import known_class_names
from kd_det.data.checks import NUM_CLASSES
from kd_det.errors import InputError, reason
from kd_det.export.adapter import make_adapter, resize

OPSET = 18
ARCHITECTURES = ("GeneralizedRCNN", "RetinaNet", "ImageClassifier")
# Maps the names of Detectron2's fields to those of the file's outputs, in their order.
OUTPUTS = {
    "pred_boxes": "boxes",
    "pred_classes": "classes",
    "scores": "scores",
    "pred_masks": "masks",
    "pred_keypoints": "keypoints",
}
# Largest absolute differences to the eager model. Boxes and keypoints are in pixels.
TOLERANCES = {"boxes": 1e-3, "classes": 0.0, "scores": 1e-4, "masks": 1e-3, "keypoints": 1e-3}


# ---- Requirements ----
def check_onnx_export(cfg: CfgNode) -> None:
    """Checks that the packages are installed and the architecture is supported, before anything is loaded.

    Args:
        cfg: Config of the student alone.

    Raises:
        InputError: If one of them is not.
    """
    import_package("onnx", "--onnx")
    import_package("onnxruntime", "--onnx")
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in ARCHITECTURES:
        raise InputError(f"--onnx: MODEL.META_ARCHITECTURE {name} is not supported; {', '.join(ARCHITECTURES)} are.")
    if cfg.MODEL.LOAD_PROPOSALS:
        raise InputError("--onnx: MODEL.LOAD_PROPOSALS is not supported: the file takes an image and no proposals.")


def import_package(name: str, key: str) -> ModuleType:
    """Imports a package of the extra ``deploy``.

    Args:
        name: Name of the package.
        key: The argument that needs it, for messages.

    Raises:
        InputError: If it is missing.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(f"{key}: needs {name} ({error}): pip install 'kd_det[deploy]'.") from error


# ---- Export ----
class OnnxOutputs(nn.Module):
    """Maps one image (3, H, W) to the tensors of ``OUTPUTS`` that a student gives.

    Args:
        model: The student, in evaluation mode.
        sample: An image as the model expects it.

    Attributes:
        names: Names of the tensors, in order.

    Raises:
        InputError: If nothing is detected on the sample.
    """

    def __init__(self, model: nn.Module, sample: Tensor):
        super().__init__()
        self.adapter, fields = make_adapter(model, sample, "student.onnx", "leave --onnx out")
        self.places = [fields.index(field) for field in OUTPUTS if field in fields]
        self.names = [OUTPUTS[fields[place]] for place in self.places]
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        tensors = self.adapter(image)
        return tuple(tensors[place] for place in self.places)


def export_onnx(model: nn.Module, cfg: CfgNode, sample: Tensor, path: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Exports a model to ONNX, checks the file, and compares it with the eager model on several images and sizes.

    The input ``image`` is (3, H, W), float32 from 0 to 255; the file normalises it. The outputs of a detector are
    ``boxes`` (N, 4) in pixels of the input, ``classes`` (N,), ``scores`` (N,) and, where the model has them, ``masks``
    (N, 1, m, m), which fill their boxes, and ``keypoints`` (N, K, 3): x, y and score. That of a classifier is
    ``scores`` (K,). The file's metadata is that of :func:`describe`.

    Height and width are dynamic. Only a classifier that computes something else at another size, such as most vision
    transformers, takes images of the sample's size alone.

    Args:
        model: The model on the CPU, in evaluation mode.
        cfg: Config of the student alone, with its data sets.
        sample: Image (3, H, W) as the model expects it.
        path: The file to write.

    Returns:
        The names of the outputs, and the sizes at which the results were equal.

    Raises:
        InputError: If nothing is detected on the sample, an operator is not supported, or the results differ.
    """
    student = OnnxOutputs(model, sample)
    same_size = [sample, sample.flip(2)]
    other_sizes = [resize(sample, 0.77, 1.13), resize(sample, 1.25, 0.9)]
    if isinstance(model, ImageClassifier):
        try:
            return _export_and_compare(student, cfg, path, [*same_size, *other_sizes], dynamic=True)
        except (AssertionError, RuntimeError, InputError):
            return _export_and_compare(student, cfg, path, same_size, dynamic=False)
    return _export_and_compare(student, cfg, path, [*same_size, *other_sizes], dynamic=True)


def _export_and_compare(
    student: OnnxOutputs, cfg: CfgNode, path: str, images: list[Tensor], *, dynamic: bool
) -> tuple[list[str], list[tuple[int, int]]]:
    write(student, images[0], path, dynamic=dynamic)
    finish(path, describe(cfg))
    session = open_session(path)
    for image in images:
        expected = dict(zip(student.names, student(image), strict=True))
        size = image.shape[1:]
        try:
            found = run(session, image)
        except Exception as error:  # ONNX Runtime raises errors of many types without a common parent.
            raise InputError(
                f"student.onnx: ONNX Runtime cannot run it on an image of {size[0]} x {size[1]}: {reason(error)}"
            ) from error
        compare(expected, found, size)
    return student.names, list(dict.fromkeys((image.shape[1], image.shape[2]) for image in images))


def write(student: OnnxOutputs, sample: Tensor, path: str, *, dynamic: bool) -> None:
    """Writes the graph of a student by torch's exporter of traced graphs.

    The newer exporter (``dynamo=True``) refuses the data-dependent branches of Detectron2's proposals.

    Raises:
        InputError: If the exporter does not know an operator of the student.
    """
    axes = {name: {0: "detections"} for name in student.names if "boxes" in student.names}
    if dynamic:
        axes["image"] = {1: "height", 2: "width"}
    with warnings.catch_warnings(), replaced_keypoints():
        # The exporter warns about itself and about constants, which the comparison shows to be harmless.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                student,
                (sample,),
                path,
                input_names=["image"],
                output_names=student.names,
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise InputError(f"student.onnx: the student cannot be exported: {reason(error)}") from error


def finish(path: str, metadata: dict[str, str]) -> None:
    """Adds metadata to an ONNX file and checks the file by ``onnx.checker``."""
    import onnx

    model = onnx.load(path)
    model.producer_name, model.producer_version = "kd_det", kd_det.__version__
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
    onnx.checker.check_model(path, full_check=True)


def describe(cfg: CfgNode) -> dict[str, str]:
    """Describes what a program needs to know about an ONNX file: strings, most of them JSON.

    Args:
        cfg: Config of the student alone, with its data sets.

    Returns:
        "architecture", "opset", "classes" (names in the order of their indices; numbers where they are unknown),
        "channel_order" (RGB or BGR), "pixel_mean" and "pixel_std" (which the graph applies), and how test images were
        resized: "min_size" and "max_size" of the shorter and the longer side of a detector's images; "size" of a
        classifier's, and "resize" of their shorter side before the crop, 0 without one.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE
    names = known_class_names(cfg)
    names += map(str, range(len(names), look_up(cfg, NUM_CLASSES[architecture])))
    metadata: dict[str, Any] = {
        "architecture": architecture,
        "opset": OPSET,
        "classes": names,
        "channel_order": cfg.INPUT.FORMAT,
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
    }
    if architecture == "ImageClassifier":
        metadata |= {"size": cfg.INPUT.CLASSIFICATION.SIZE, "resize": cfg.INPUT.CLASSIFICATION.RESIZE_TEST}
    else:
        metadata |= {"min_size": cfg.INPUT.MIN_SIZE_TEST, "max_size": cfg.INPUT.MAX_SIZE_TEST}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


# ---- Keypoints ----
@contextmanager
def replaced_keypoints() -> Iterator[None]:
    """Lets Detectron2's keypoint heads call :func:`locate_keypoints`, which the exporter can translate."""
    original = keypoint_head.heatmaps_to_keypoints
    keypoint_head.heatmaps_to_keypoints = locate_keypoints
    try:
        yield
    finally:
        keypoint_head.heatmaps_to_keypoints = original


@torch.jit.script_if_tracing
def locate_keypoints(maps: Tensor, rois: Tensor) -> Tensor:
    """Finds keypoints in heatmaps; gives what ``detectron2.structures.heatmaps_to_keypoints`` gives.

    Args:
        maps: Logits (N, K, S, S) of the places of K keypoints in each box.
        rois: Boxes (N, 4).

    Returns:
        x, y, logit and score of each keypoint, (N, K, 4). The score is softmax's over the cells of the heatmap.
    """
    keypoints = maps.shape[1]
    corners = rois[:, :2]
    sizes = (rois[:, 2:] - corners).clamp(min=1.0)
    pixels = sizes.ceil().long()
    scales = sizes / pixels
    found = maps.new_zeros(0, keypoints, 4)
    for i in range(maps.shape[0]):
        width, height = int(pixels[i, 0]), int(pixels[i, 1])
        enlarged = F.interpolate(maps[i : i + 1], size=(height, width), mode="bicubic", align_corners=False)
        logits, places = enlarged.reshape(keypoints, -1).max(dim=1)
        x = ((places % width).float() + 0.5) * scales[i, 0] + corners[i, 0]
        y = ((places // width).float() + 0.5) * scales[i, 1] + corners[i, 1]
        scores = (maps[i].reshape(keypoints, -1) - logits[:, None]).exp().sum(dim=1).reciprocal()
        found = torch.cat((found, torch.stack((x, y, logits, scores), dim=1)[None]))
    return found


# ---- ONNX Runtime ----
def open_session(path: str) -> Any:
    """Opens a file in ONNX Runtime on the CPU, with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # Errors are raised, and need not be printed as well.
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session: Any, image: Tensor) -> dict[str, Tensor]:
    """Runs an exported file on one image (3, H, W), float32.

    Returns:
        A dict that maps the names of the outputs to tensors.
    """
    results = session.run(None, {"image": image.numpy()})
    return {output.name: torch.from_numpy(x) for output, x in zip(session.get_outputs(), results, strict=True)}


def compare(expected: dict[str, Tensor], actual: dict[str, Tensor], size: tuple[int, ...]) -> None:
    """Compares the outputs of a file with those of the eager model.

    Args:
        expected: Maps names to tensors of the eager model.
        actual: The same of the file.
        size: Height and width of the image, for messages.

    Raises:
        InputError: If they differ; it names what differs and by how much.
    """
    differences = []
    for name, eager in expected.items():
        found = actual[name]
        if found.shape != eager.shape:
            differences.append(f"{name} {list(found.shape)} instead of {list(eager.shape)}")
        elif eager.numel():
            largest = float((found.double() - eager.double()).abs().max())
            # In float32, coordinates in large images have fewer decimals.
            allowed = max(TOLERANCES[name], 2e-6 * max(size) if name in ("boxes", "keypoints") else 0)
            if not largest <= allowed:
                differences.append(f"{name} by up to {largest:.2g} (allowed: {allowed:.2g})")
    if differences:
        raise InputError(
            f"student.onnx: on an image of {size[0]} x {size[1]} ONNX Runtime gives other results than the eager "
            f"model: {', '.join(differences)}. In a detector, boxes with equal scores, or with an overlap right at the "
            "threshold of the non-maximum suppression, can cause this: try another --image, or leave --onnx out."
        )
