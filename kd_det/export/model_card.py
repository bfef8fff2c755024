"""Writes the model card of an exported student, in the form of the Hugging Face Hub."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import CfgNode
from torch import nn

import kd_det
from kd_det.config import has_teacher, look_up, student_config
from kd_det.data import known_class_names
from kd_det.data.checks import NUM_CLASSES
from kd_det.engine.summary import architecture, numbers, parameters
from kd_det.errors import InputError
from kd_det.registry import config_key
from kd_det.reporting.curves import read_line

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
# Maps the files of an export to what the card says about them.
FILES = {
    "student.pth": "the weights, a plain Detectron2 checkpoint.",
    "student.safetensors": "the same weights as safetensors; Detectron2 names the tensors alike.",
    "student.yaml": "the config, for Detectron2; its first lines say whether kd_det is needed, too.",
    "student.ts": "the network in TorchScript, for torch and torchvision alone.",
    "student.onnx": "the network in ONNX; its metadata has the classes, channel order and test size.",
    "backbone.pth": "the backbone alone, usable as MODEL.WEIGHTS of a detector.",
}
# Metrics in a card: the AP of boxes and masks, and the accuracy of classifiers. The first one is its main result.
METRICS = ("bbox AP", "bbox AP50", "segm AP", "segm AP50", "keypoints AP", "top1", "top5")
TIMED_ROUNDS = 5


@dataclass(frozen=True)
class Origin:
    """Describes where an exported student comes from.

    Attributes:
        cfg: Config of the whole run, with its teacher and heads.
        folder: Output folder of the run; "" if only its config and its weights are named.
        command: The command that exports it.
        ema: Whether the averaged weights are exported.
    """

    cfg: CfgNode
    folder: str
    command: str
    ema: bool = False


def measure_ms(model: Callable[[list[dict]], Any], batch: list[dict]) -> float:
    """Measures the median time in ms of a prediction for a batch, after one that warms up."""
    times = []
    for _ in range(TIMED_ROUNDS + 1):
        begin = time.perf_counter()
        model(batch)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def make_card(
    origin: Origin, model: nn.Module, files: list[str], speeds: Mapping[str, float], image: str
) -> "ModelCard":
    """Makes the model card of a student.

    Args:
        origin: Where the student comes from.
        model: The student.
        files: Names of the exported files.
        speeds: Maps names of files to ms per image.
        image: Size of that image, for the card.

    Raises:
        InputError: If the package ``huggingface_hub`` is missing.
    """
    try:
        from huggingface_hub import EvalResult, ModelCard, ModelCardData
    except ImportError as error:
        raise InputError(f"--model-card: needs huggingface_hub ({error}): pip install huggingface_hub.") from error
    cfg = origin.cfg
    student = student_config(cfg)
    title = Path(origin.folder).resolve().name if origin.folder else architecture(student)
    metrics, source = read_metrics(origin)
    spread = read_spread(origin)
    test = ", ".join(cfg.DATASETS.TEST) or "no data set"
    task = task_of(student)
    main = next((name for name in METRICS if name in metrics), None)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=name,
            dataset_name=name,
            metric_type="accuracy" if main == "top1" else "mAP",
            metric_name=main,
            metric_value=round(metrics[main], 2),
        )
        for name in cfg.DATASETS.TEST[:1]
        if main
    ]
    data = ModelCardData(
        license="unknown",
        library_name="detectron2",
        pipeline_tag=task,
        tags=["detectron2", "kd_det", *(["knowledge-distillation"] if has_teacher(cfg) else [])],
        model_name=title,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        task=task.replace("-", " ").capitalize(),
        classes=class_list(student),
        architecture=architecture(student),
        parameters=parameters(model).partition(",")[0],
        train=", ".join(cfg.DATASETS.TRAIN) or "no data set",
        test=test,
        pixels=f"{cfg.INPUT.FORMAT}; {numbers(cfg.MODEL.PIXEL_MEAN)}; {numbers(cfg.MODEL.PIXEL_STD)}",
        teacher=describe_teacher(cfg),
        heads=describe_heads(cfg),
        schedule=f"{cfg.SEED}, {cfg.SOLVER.MAX_ITER}, {cfg.SOLVER.IMS_PER_BATCH}",
        metrics={name: f"{value:.2f}{spread.get(name, '')}" for name, value in metrics.items()},
        metrics_source=source,
        differences=read_differences(origin),
        speeds=dict(speeds),
        speed_image=image,
        machine=f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        files={name: FILES[name] for name in FILES if name in files},
        command=origin.command,
        train_command=read_train_command(origin),
        version=kd_det.__version__,
    )


def task_of(cfg: CfgNode) -> str:
    """Returns the Hub's name of a student's task."""
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        return "image-classification"
    if cfg.MODEL.KEYPOINT_ON:
        return "keypoint-detection"
    segments = cfg.MODEL.MASK_ON or cfg.MODEL.META_ARCHITECTURE in ("PanopticFPN", "SemanticSegmentor")
    return "image-segmentation" if segments else "object-detection"


def class_list(cfg: CfgNode) -> list[str]:
    """Returns the names of a student's classes in the order of their indices; a number stands for an unknown name."""
    names = known_class_names(cfg)
    key = NUM_CLASSES.get(cfg.MODEL.META_ARCHITECTURE)
    return [*names, *map(str, range(len(names), look_up(cfg, key) if key else 0))]


def describe_teacher(cfg: CfgNode) -> str:
    """Names the config and the weights of the teacher in a cell of a table."""
    if not has_teacher(cfg):
        return "none"
    teacher = cfg.KD.TEACHER
    return f"{teacher.CONFIG_FILE}, weights: {teacher.WEIGHTS or 'those of that config'}"


def describe_heads(cfg: CfgNode) -> str:
    """Names the distillation heads with their weights in a cell of a table."""
    weights = {name: cfg.KD.get(config_key(name), {}).get("WEIGHT") for name in cfg.KD.HEADS}
    return ", ".join(name if x is None else f"{name} (WEIGHT {x:g})" for name, x in weights.items()) or "none"


# ---- What earlier commands measured ----
def read_metrics(origin: Origin) -> tuple[dict[str, float], str]:
    """Reads the metrics of a run: those of the comparison that ``kd-det repeat`` made, or of its last evaluation.

    Returns:
        A dict that maps the names of ``METRICS`` to percentages, and a description of its source.
    """
    if not origin.folder:
        return {}, ""
    comparison, run = read_comparison(origin)
    if run and not origin.ema:
        found = {name: run["metrics"].get(name) for name in METRICS}
        seeds = sum(other["name"] == run["name"] for other in comparison["runs"])
        return known_numbers(found), f"as kd-det repeat compared it (one of {seeds} seeds)"
    prefix = "ema/" if origin.ema else ""
    last: dict[str, float] = {}
    iteration: object = None
    path = Path(origin.folder, "metrics.json")
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        scalars = read_line(line)
        found = {name: scalars.get(prefix + name.replace(" ", "/")) for name in METRICS}
        found |= {name: scalars.get(f"{prefix}classification/{name}") for name in ("top1", "top5")}
        if known_numbers(found):
            last, iteration = known_numbers(found), scalars.get("iteration")
    return last, f"in the last evaluation of the run (iteration {iteration})"


def read_spread(origin: Origin) -> dict[str, str]:
    """Describes the mean and the standard deviation of metrics over the seeds of a run of ``kd-det repeat``."""
    comparison, run = read_comparison(origin)
    column = comparison.get("summary", {}).get(run["name"], {}) if run else {}
    known = {name: column[name] for name in METRICS if name in column and column[name]["mean"] is not None}
    return {name: f" (all seeds: {x['mean']:.2f} ± {x['std']:.2f})" for name, x in known.items()}


def read_differences(origin: Origin) -> list[tuple[str, ...]]:
    """Reads the differences of a student to its baselines, if the run is one of ``kd-det repeat``.

    Returns:
        Rows of a table: metric, baseline, mean difference with its interval, number of seeds, verdict.
    """
    comparison, run = read_comparison(origin)
    rows: list[tuple[str, ...]] = []
    for baseline, columns in comparison.get("differences", {}).items():
        column = columns.get(run["name"], {}) if run else {}
        for metric in (name for name in METRICS if name in column):
            each = column[metric]
            if each["mean"] is None:
                continue
            limits = (each["low"], each["high"])
            interval = "" if None in limits else " [{:+.2f}, {:+.2f}]".format(*limits)
            rows.append((metric, baseline, f"{each['mean']:+.2f}{interval}", str(each["seeds"]), each["verdict"]))
    return rows


def read_comparison(origin: Origin) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Reads the comparison of ``kd-det repeat``, if the run is one of its runs, and finds the run in it.

    Returns:
        The content of ``comparison.json``, and the entry of the run; ({}, None) without one.
    """
    root = Path(origin.folder or ".").resolve().parent
    path = root / "comparison" / "comparison.json"
    if not origin.folder or not (root / "repeat.json").is_file() or not path.is_file():
        return {}, None
    comparison = json.loads(path.read_text(encoding="utf-8"))
    name = Path(origin.folder).resolve().name
    run = next((run for run in comparison["runs"] if Path(run["source"]).name == name), None)
    return comparison, run


def read_train_command(origin: Origin) -> str:
    """Returns the commands of ``kd-det repeat`` that trained the run; "" if it was trained otherwise."""
    path = Path(origin.folder or ".").resolve().parent / "repeat.json"
    if not origin.folder or not path.is_file():
        return ""
    return "\n".join(json.loads(path.read_text(encoding="utf-8"))["commands"])


def known_numbers(values: Mapping[str, object]) -> dict[str, float]:
    """Leaves out what is not a number: metrics that are missing, or cannot be computed."""
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
