"""Reads the student of a run from its output folder."""

import logging
from pathlib import Path

from detectron2.config import CfgNode
from torch import nn
from torch.optim.swa_utils import AveragedModel

from kd_det.checkpoint import load_strictly
from kd_det.checkpoint_folder import FINAL, read_tag
from kd_det.config import read_config, student_config
from kd_det.config_checks import check_network_values
from kd_det.construction import build_network
from kd_det.errors import InputError

logger = logging.getLogger(__name__)


def find_run(folder: str) -> tuple[str, str]:
    """Returns the config file and the newest checkpoint of a run's output folder.

    Raises:
        InputError: If one of them is missing.
    """
    config = Path(folder, "config.yaml")
    weights = Path(folder, read_tag(folder) or FINAL)
    for path in (config, weights):
        if not path.is_file():
            raise InputError(f"{folder}: not the output folder of a finished run: {path} does not exist.")
    if weights.name != FINAL:
        logger.warning("%s: the run is not finished; its newest checkpoint is %s.", folder, weights.name)
    return str(config), str(weights)


def read_student_config(config_file: str, key: str = "--config-file") -> CfgNode:
    """Reads the config of the student alone, with kd_det's keys at their defaults.

    Args:
        config_file: A file, or the name of a config of the model zoo.
        key: The argument that names it, for messages.

    Raises:
        InputError: If there is no such file, or it names parts that are not registered.
    """
    # The student alone needs no heads, so that those of plugins may be unknown.
    cfg = student_config(read_config(config_file, key, other_heads=True))
    # The checkpoint holds all weights.
    cfg.MODEL.TIMM.PRETRAINED = False
    check_network_values(cfg, config_file)
    return cfg


def load_student(cfg: CfgNode, weights: str, device: str, *, ema: bool = False) -> nn.Module:
    """Builds the student in evaluation mode and loads its weights strictly.

    Args:
        cfg: Config of the student alone.
        weights: The run's checkpoint.
        device: Device of the student.
        ema: Whether to load the averaged weights.

    Raises:
        InputError: If the weights do not fit the config, or there are no averaged weights.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = device
    model = build_network(cfg, "the run's config")
    other_parts = load_strictly(model, weights, key="weights of the run")
    if ema:
        if "ema" not in other_parts:
            raise InputError(f"--ema: {weights} has no averaged weights; SOLVER.EMA_DECAY of its run was 0.")
        averaged = AveragedModel(model)
        averaged.load_state_dict(other_parts["ema"])
        model = averaged.module
    return model.eval()
