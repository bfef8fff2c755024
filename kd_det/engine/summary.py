"""Logs a summary before training starts, so that a wrong set-up shows at once and not days later."""

import logging
from collections.abc import Collection

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from kd_det.checkpoint import counted_keys
from kd_det.engine.flops import count_gflops
from kd_det.engine.loaders import is_classifier
from kd_det.engine.trainer import Trainer
from kd_det.inherit import Inheritance
from kd_det.mutual import evaluation_mode
from kd_det.wrapper import Network

logger = logging.getLogger(__name__)
# This is the side in pixels. An R-CNN with 50 layers takes one core 2 s at this size and 7 s at 800.
LARGEST_ON_CPU = 320
# Maps a part of the name of a backbone's builder to the key that describes such a backbone.
DETAILS = {
    "timm": ("TIMM", "NAME"),
    "cifar": ("CIFAR", "NAME"),
    "fully_connected": ("FULLY_CONNECTED", "NAME"),
    "resnet": ("RESNETS", "DEPTH"),
}


def log_summary(trainer: Trainer, *, stage: str = "") -> None:
    """Logs the networks and the heads of a run in the main process, as tables.

    Operations are counted for the whole inference on one blank image of the test size. On a CPU its side has at most
    320 pixels, so that counting takes a few seconds. The count for an R-CNN depends on how many boxes it proposes.

    Args:
        trainer: A trainer with its weights loaded.
        stage: Path of the checkpoint of a pre-training stage, if there was one.
    """
    if not comm.is_main_process():
        return
    parts = [network_table(trainer, image_side(trainer.cfg)), *trainer.wrapper.describe(trainer.cfg)]
    if trainer.inheritance is not None:
        parts.append(inheritance_table(trainer.inheritance))
    solver, datasets = trainer.cfg.SOLVER, trainer.cfg.DATASETS
    evaluated = f"evaluated on {', '.join(datasets.TEST)}" if datasets.TEST else "not evaluated"
    if patience := trainer.cfg.TEST.PATIENCE:
        evaluated += f"; ends after {patience} evaluations without a better {trainer.cfg.TEST.BEST_METRIC}"
    parts.append(
        f"On {', '.join(datasets.TRAIN)}: {solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images; {evaluated}."
    )
    if stage:
        parts.append(f"The pre-training stage has trained {stage}.")
    logger.info("Summary of the run:\n%s", "\n\n".join(parts))


def initial_weights(cfg: CfgNode) -> str:
    """Describes the initial weights that a config gives a network."""
    if cfg.MODEL.WEIGHTS:
        return cfg.MODEL.WEIGHTS
    return "timm's, of ImageNet" if "timm" in cfg.MODEL.BACKBONE.NAME and cfg.MODEL.TIMM.PRETRAINED else "random"


def network_table(trainer: Trainer, side: int) -> str:
    """Formats a table with one column for each network of a run, the students first.

    Args:
        trainer: A trainer with its weights loaded.
        side: Side, in pixels, of the square image for which operations are counted.
    """
    networks = trainer.wrapper.networks(trainer.cfg)
    device = next(trainer.student.parameters()).device
    rows = {
        "architecture": [architecture(x.cfg) for x in networks],
        "parameters": [parameters(x.model) for x in networks],
        f"GFLOPs, {side} x {side}": [gflops(x.model.to(device), side) for x in networks],
        "weights": [weights(x, trainer) for x in networks],
        "images": [x.cfg.INPUT.FORMAT + (", channels flipped" if x.flip_channels else "") for x in networks],
        "pixel mean": [numbers(x.cfg.MODEL.PIXEL_MEAN) for x in networks],
        "pixel std": [numbers(x.cfg.MODEL.PIXEL_STD) for x in networks],
        "precision": [precision(x, trainer.cfg) for x in networks],
    }
    table = [[name, *cells] for name, cells in rows.items()]
    return tabulate(table, ["", *(x.title for x in networks)], disable_numparse=True)


def weights(network: Network, trainer: Trainer) -> str:
    """Describes where the weights of a network come from."""
    loaded = trainer.checkpointer.loaded
    if network.weights:
        total = len(counted_keys(network.model))
        return f"{network.weights}: {total} of {total} keys"
    if network.model is trainer.student and loaded.path:
        return "{}: {} of {} keys".format(*loaded)
    # The number of matched keys is known only for the first student.
    return loaded.path if trainer.start_iter else initial_weights(network.cfg)


def precision(network: Network, cfg: CfgNode) -> str:
    """Names the precision of a network's forward pass."""
    if network.dtype is None:
        return "mixed" if cfg.SOLVER.AMP.ENABLED else "float32"
    return str(network.dtype).removeprefix("torch.")


def architecture(cfg: CfgNode) -> str:
    """Names a network's meta-architecture and backbone, with its size."""
    builder = cfg.MODEL.BACKBONE.NAME
    details = [f"{key} {cfg.MODEL[node][key]}" for part, (node, key) in DETAILS.items() if part in builder]
    return " ".join([cfg.MODEL.META_ARCHITECTURE, builder, *details])


def parameters(model: nn.Module) -> str:
    """Counts the parameters, and those that are trained."""
    counts = [(p.numel(), p.numel() * p.requires_grad) for p in model.parameters()]
    total, trained = (sum(column) / 1e6 for column in zip(*counts, strict=True))
    return f"{total:.2f} M, {trained:.2f} M trained"


def gflops(model: nn.Module, side: int) -> str:
    """Formats the billions of multiply-adds of the inference on a blank image; "-" if they cannot be counted."""
    try:
        with evaluation_mode(model):
            return f"{count_gflops(model, {'image': torch.zeros(3, side, side)}):.2f}"
    except Exception as error:  # A network that cannot be traced may still be trainable.
        logger.debug("Not counted: %s", error)
        return "-"


def numbers(values: Collection[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def image_side(cfg: CfgNode) -> int:
    """Returns the side in pixels of the image for which operations are counted."""
    if is_classifier(cfg):
        side = cfg.INPUT.CLASSIFICATION.SIZE
    else:
        side = cfg.INPUT.MIN_SIZE_TEST or max(cfg.INPUT.MIN_SIZE_TRAIN)
    return min(side, LARGEST_ON_CPU) if cfg.MODEL.DEVICE == "cpu" else side


def inheritance_table(inheritance: Inheritance) -> str:
    """Formats a table of the tensors that the student has taken over from its teacher, and of those that it has not."""
    rows = [
        [name, " x ".join(map(str, shape)), inheritance.refused.get(name, "the teacher's")]
        for name, shape in inheritance.shapes.items()
    ]
    table = tabulate(rows, ["tensor", "in the teacher", "in the student"], disable_numparse=True)
    return f"KD.INHERIT: {inheritance}.\n{table}"
