"""Exports the plain student of a run for stock Detectron2, for TorchScript and for ONNX."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from safetensors.torch import save
from torch import Tensor, nn

from kd_det.classification import ImageClassifier
from kd_det.config import add_kd_config
from kd_det.config_checks import registered_parts
from kd_det.errors import InputError
from kd_det.export.exported_model import ExportedModel, is_exported
from kd_det.export.model_card import Origin, make_card, measure_ms
from kd_det.export.onnx_file import check_onnx_export, export_onnx
from kd_det.export.run_folder import load_student
from kd_det.export.torchscript import trace
from kd_det.files import naming
from kd_det.formats import backbone_of_classifier


@dataclass(frozen=True)
class Exported:
    """Describes an export.

    Attributes:
        files: Names of the files.
        needs: Registered parts that are not Detectron2's own; empty if stock Detectron2 can build the student.
        outputs: Names of the tensors that ``student.ts`` returns, in order; empty without it.
        tried: Sizes (height, width) at which ``student.ts`` gave the same results as the eager model.
        onnx_outputs: Names of the outputs of ``student.onnx``, in order; empty without it.
        onnx_tried: Sizes at which ``student.onnx`` gave the same results as the eager model.
    """

    files: list[str]
    needs: list[str]
    outputs: list[str]
    tried: list[tuple[int, int]]
    onnx_outputs: list[str]
    onnx_tried: list[tuple[int, int]]


def export_student(
    cfg: CfgNode,
    weights: str,
    output: str,
    *,
    ema: bool = False,
    sample: Tensor | None = None,
    device: str = "cpu",
    torchscript: bool = True,
    onnx: bool = False,
    safetensors: bool = False,
    origin: Origin | None = None,
) -> Exported:
    """Writes ``student.pth``, ``student.yaml`` and, given a sample, ``student.ts`` and ``student.onnx``: all or none.

    If asked for, also writes ``student.safetensors`` and a model card, ``README.md``. For an image classifier, also
    writes ``backbone.pth``, usable as MODEL.WEIGHTS of a detector with the same backbone.
    The model that is traced and checked is built from the written files.

    Args:
        cfg: Config of the student alone.
        weights: The run's checkpoint.
        output: The folder to create.
        ema: Whether to export the averaged weights instead of the student's latest ones.
        sample: Image (3, H, W), float32, as the model expects it: 0 to 255, channels in the order of INPUT.FORMAT.
        device: Device on which the model is traced; ``student.ts`` runs only there.
        torchscript: Whether to write ``student.ts``.
        onnx: Whether to write ``student.onnx``, see :func:`kd_det.export.onnx_file.export_onnx`.
        safetensors: Whether to write ``student.safetensors``.
        origin: Where the student comes from, for a model card; None writes no card.

    Raises:
        InputError: If the folder exists, the weights do not fit, there are no averaged weights, nothing is detected on
            the sample, or an exported model gives other results than the eager one; for ONNX also if the architecture
            is not supported or a package is missing.
    """
    if onnx:
        check_onnx_export(cfg)
    target = Path(output)
    if target.exists():
        raise InputError(f"--output: {output} exists already; delete it or choose another folder.")
    model = load_student(cfg, weights, device, ema=ema)
    plain, needs = plain_config(cfg, str(target.resolve() / "student.pth"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with naming(output), tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        folder = Path(temporary, target.name)
        folder.mkdir()
        _save({"model": model.state_dict()}, folder / "student.pth")
        if safetensors:
            (folder / "student.safetensors").write_bytes(as_safetensors(model))
        (folder / "student.yaml").write_text(header(needs) + plain.dump(), encoding="utf-8")
        if isinstance(model, ImageClassifier):
            _save(backbone_checkpoint(model), folder / "backbone.pth")
        model = _read_back(folder, needs, device)
        traced: tuple[list[str], list[tuple[int, int]]] = [], []
        translated: tuple[list[str], list[tuple[int, int]]] = [], []
        if sample is not None and torchscript:
            traced = trace(model, sample.to(device), str(folder / "student.ts"))
        if sample is not None and onnx:
            translated = export_onnx(model.to("cpu"), cfg, sample, str(folder / "student.onnx"))
        if origin is not None:
            write_card(origin, model, cfg, sample if device == "cpu" else None, folder)
        files = sorted(os.listdir(folder))
        folder.rename(target)
    return Exported(files, needs, *traced, *translated)


def plain_config(cfg: CfgNode, weights: str) -> tuple[CfgNode, list[str]]:
    """Removes the keys that stock Detectron2 does not know.

    If the config has parts that are not Detectron2's own, kd_det's keys are kept, except KD and data sets, because some
    of these parts read them.

    Args:
        cfg: Config of the student alone.
        weights: The new MODEL.WEIGHTS.

    Returns:
        The config, and the names of the parts that are not Detectron2's own.
    """
    needs = [
        name
        for registry, name in registered_parts(cfg).values()
        if not registry.get(name).__module__.startswith("detectron2.")
    ]
    plain = cfg.clone()
    plain.MODEL.WEIGHTS = weights
    plain.OUTPUT_DIR = get_cfg().OUTPUT_DIR
    known = get_cfg()
    if needs:
        add_kd_config(known)
        del known["KD"]
        for key in ("COCO_FORMAT", "VOC_FORMAT", "IMAGE_FOLDER", "MIX"):
            del known.DATASETS[key]
    _drop_unknown(plain, known)
    return plain, needs


def as_safetensors(model: nn.Module) -> bytes:
    """Returns the weights of a model as the content of a safetensors file."""
    # A file of safetensors must not hold tensors that share their memory.
    weights = {key: value.detach().clone().contiguous() for key, value in model.state_dict().items()}
    return save(weights, {"format": "pt"})


def write_card(origin: Origin, model: nn.Module, cfg: CfgNode, sample: Tensor | None, folder: Path) -> None:
    """Writes ``README.md``, with the speed of the exported files in the folder on the sample, if there is one.

    Args:
        origin: Where the student comes from.
        model: The student.
        cfg: Config of the student alone.
        sample: Image (3, H, W) on the CPU, as the model expects it; None measures no speed.
        folder: The folder of the other files.
    """
    files = sorted(os.listdir(folder))
    speeds, size = {}, ""
    if sample is not None:
        models = {"student.pth": model}
        models |= {name: ExportedModel(str(folder / name), cfg, name) for name in files if is_exported(name)}
        with torch.no_grad():
            speeds = {name: measure_ms(x, [{"image": sample}]) for name, x in models.items()}
        size = f"{sample.shape[1]} x {sample.shape[2]} pixels"
    make_card(origin, model, files, speeds, size).save(folder / "README.md")


def backbone_checkpoint(model: ImageClassifier) -> dict[str, Any]:
    """Makes a checkpoint of a classifier's backbone, which Detectron2 loads into any model with the same backbone."""
    weights = backbone_of_classifier(model.state_dict())
    # The frozen normalisations of most detectors have no counters; all others start to count anew.
    weights = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    return {"model": weights, "matching_heuristics": True, "__author__": "kd_det"}


def header(needs: list[str]) -> str:
    """Returns the comment at the top of ``student.yaml``."""
    if not needs:
        return "# For stock Detectron2.\n"
    return (
        f"# Not for Detectron2 alone: kd_det, or your plugin, must register {', '.join(needs)} first.\n"
        "#     import kd_det\n"
        "#     cfg = get_cfg()\n"
        "#     kd_det.add_kd_config(cfg)\n"
        "# The same network in TorchScript, student.ts, needs torch and torchvision alone.\n"
    )


def _drop_unknown(node: CfgNode, known: CfgNode) -> None:
    for key in list(node):
        if key not in known:
            del node[key]
        elif isinstance(node[key], CfgNode):
            _drop_unknown(node[key], known[key])


def _save(data: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # Given only the path, torch does not say why it cannot write a file.
        torch.save(data, file)


def _read_back(folder: Path, needs: list[str], device: str) -> nn.Module:
    """Builds the model from the written files, in the same way as a user will."""
    cfg = get_cfg()
    if needs:
        add_kd_config(cfg)
    cfg.merge_from_file(str(folder / "student.yaml"))
    cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    model.load_state_dict(torch.load(folder / "student.pth", weights_only=True)["model"])
    return model.eval()
