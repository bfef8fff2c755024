"""The plain student of a run: read, loaded, and written for stock Detectron2 and for TorchScript."""

import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, get_cfg
from detectron2.export import TracingAdapter
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, GeneralizedRCNN, build_model
from torch import Tensor, nn

from kd_det.checkpoint import load_strictly
from kd_det.config import add_kd_config, merge_file, student_config
from kd_det.engine import find_config
from kd_det.errors import InputError


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: Names of the files.
        needs: Registered parts that are not Detectron2's own; empty if stock Detectron2 builds the student.
        outputs: Names of what ``student.ts`` returns, in its order; empty without it.
        tried: Sizes (height, width) at which ``student.ts`` gave the results of the eager model.
    """

    files: list[str]
    needs: list[str]
    outputs: list[str]
    tried: list[tuple[int, int]]


def find_run(folder: str) -> tuple[str, str]:
    """Config file and newest checkpoint of a run's output folder.

    Raises:
        InputError: If one of them is missing.
    """
    config = Path(folder, "config.yaml")
    tag = Path(folder, "last_checkpoint")
    weights = Path(folder, tag.read_text(encoding="utf-8").strip() if tag.is_file() else "model_final.pth")
    for path in (config, weights):
        if not path.is_file():
            raise InputError(f"{folder}: not the output folder of a finished run: {path} does not exist.")
    return str(config), str(weights)


def read_student_config(config_file: str) -> CfgNode:
    """Config of the student alone, with kd_det's keys at their defaults.

    Args:
        config_file: A file, or the name of a config of the model zoo.

    Raises:
        InputError: If there is no such file, or it names parts that are not registered.
    """
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.KD.set_new_allowed(True)  # Heads of plugins, which the student alone does not need.
    merge_file(cfg, find_config(config_file))
    cfg = student_config(cfg)
    # The checkpoint holds these weights.
    cfg.MODEL.TIMM.PRETRAINED = False
    for key, (registry, name) in _parts(cfg).items():
        if name not in registry:
            raise InputError(
                f"{config_file}: {key} is {name!r}, which nothing registers; --plugin FILE imports what does."
            )
    return cfg


def load_student(cfg: CfgNode, weights: str, device: str) -> nn.Module:
    """The student in evaluation mode, its weights loaded strictly.

    Raises:
        InputError: If the weights do not fit.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    load_strictly(model, weights, key="weights of the run")
    return model.eval()


def export_student(
    cfg: CfgNode, weights: str, output: str, *, sample: Tensor | None = None, device: str = "cpu"
) -> Exported:
    """Write ``student.pth``, ``student.yaml`` and, given a sample, ``student.ts``: all of them, or nothing.

    What is traced and checked is the model that the written YAML describes, with the written weights.

    Args:
        cfg: Config of the student alone.
        weights: The run's checkpoint.
        output: The folder to make.
        sample: Image (3, H, W), float32, as the model expects it: 0 to 255, channels as INPUT.FORMAT says.
        device: Where the model is traced; ``student.ts`` is bound to it.

    Raises:
        InputError: If the folder exists, the weights do not fit, nothing is detected on the sample, or the traced model
            gives other results than the eager one.
    """
    target = Path(output)
    if target.exists():
        raise InputError(f"--output: {output} exists already; delete it or choose another folder.")
    model = load_student(cfg, weights, device)
    plain, needs = plain_config(cfg, str(target.resolve() / "student.pth"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        folder = Path(temporary, target.name)
        folder.mkdir()
        torch.save({"model": model.state_dict()}, folder / "student.pth")
        (folder / "student.yaml").write_text(header(needs) + plain.dump(), encoding="utf-8")
        model = _read_back(folder, needs, device)
        outputs, tried = [], []
        if sample is not None:
            outputs, tried = trace(model, sample.to(device), str(folder / "student.ts"))
        files = sorted(os.listdir(folder))
        folder.rename(target)
    return Exported(files, needs, outputs, tried)


def plain_config(cfg: CfgNode, weights: str) -> tuple[CfgNode, list[str]]:
    """The config without keys that stock Detectron2 does not know, and the parts of it that are not Detectron2's own.

    With such parts, the keys below MODEL that kd_det adds are kept, because some of the parts read them.
    """
    needs = [
        name for registry, name in _parts(cfg).values() if not registry.get(name).__module__.startswith("detectron2.")
    ]
    plain = cfg.clone()
    plain.MODEL.WEIGHTS = weights
    plain.OUTPUT_DIR = get_cfg().OUTPUT_DIR
    known = get_cfg()
    if needs:
        add_kd_config(known)
        del known["KD"], known.DATASETS["COCO_FORMAT"], known.DATASETS["VOC_FORMAT"]
    _drop_unknown(plain, known)
    return plain, needs


def trace(model: nn.Module, sample: Tensor, path: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Trace a detector on an image, save it, and compare the saved file with the eager model.

    The traced function maps one image to a tuple of tensors. Boxes are in pixels of that image, masks (R-CNN) are those
    of the boxes, (R, 1, m, m), as ``detectron2.layers.paste_masks_in_image`` takes them. Sizes of images may vary.

    Returns:
        Names of the tensors, and the sizes at which the results were equal.

    Raises:
        InputError: If nothing is detected on the sample, or results differ.
    """
    inference = None
    if isinstance(model, GeneralizedRCNN):

        def inference(rcnn, inputs):
            return [{"instances": rcnn.inference(inputs, do_postprocess=False)[0]}]

    adapter = TracingAdapter(model, [{"image": sample}], inference).eval()
    results = adapter(sample)
    found = adapter.outputs_schema(results)[0]["instances"]
    if not len(found):
        raise InputError(
            "student.ts: the student detects nothing on the sample, so a traced model cannot be compared with it; "
            "give an image with objects as --image, or leave TorchScript out with --no-torchscript."
        )
    with warnings.catch_warnings():
        # About constants that the comparison below shows to be harmless.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.jit.trace(adapter, (sample,), check_trace=False).save(path)
    traced = torch.jit.load(path, map_location=sample.device)

    height, width = sample.shape[-2:]
    other = F.interpolate(sample[None], (round(0.77 * height), round(1.13 * width)), mode="bilinear")[0]
    for image in (sample, other):
        _compare(adapter(image), traced(image), tuple(image.shape[-2:]))
    names = [*sorted(found.get_fields()), "image_size"]
    return names, [(height, width), tuple(other.shape[-2:])]


def header(needs: list[str]) -> str:
    """Comment for the top of ``student.yaml``."""
    if not needs:
        return "# For stock Detectron2.\n"
    return (
        f"# Not for Detectron2 alone: {', '.join(needs)} must be registered first, and the keys be known.\n"
        "#     import kd_det\n"
        "#     cfg = get_cfg()\n"
        "#     kd_det.add_kd_config(cfg)\n"
    )


def _parts(cfg: CfgNode) -> dict:
    return {
        "MODEL.META_ARCHITECTURE": (META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE),
        "MODEL.BACKBONE.NAME": (BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME),
    }


def _drop_unknown(node: CfgNode, known: CfgNode) -> None:
    for key in list(node):
        if key not in known:
            del node[key]
        elif isinstance(node[key], CfgNode):
            _drop_unknown(node[key], known[key])


def _read_back(folder: Path, needs: list[str], device: str) -> nn.Module:
    """The model that the written files describe, built as their reader will build it."""
    cfg = get_cfg()
    if needs:
        add_kd_config(cfg)
    cfg.merge_from_file(str(folder / "student.yaml"))
    cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    model.load_state_dict(torch.load(folder / "student.pth", weights_only=True)["model"])
    return model.eval()


def _compare(expected: tuple[Tensor, ...], actual: tuple[Tensor, ...], size: tuple[int, int]) -> None:
    for own, other in zip(expected, actual, strict=True):
        if own.shape != other.shape or not torch.allclose(own.float(), other.float(), rtol=1e-4, atol=1e-3):
            raise InputError(
                f"student.ts: on an image of {size[0]} x {size[1]} the traced model gives other results than the eager "
                f"one (tensors of {list(other.shape)} and {list(own.shape)}). Boxes of equal scores, or that overlap "
                "by the very threshold of the non-maximum suppression, can cause it: try another --image, or leave "
                "TorchScript out with --no-torchscript."
            )
