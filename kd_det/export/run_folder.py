"""The student of a run: its files, its config, and the model."""

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
    """Config file and newest checkpoint of a run's output folder.

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
    """Config of the student alone, with kd_det's keys at their defaults.

    Args:
        config_file: A file, or the name of a config of the model zoo.
        key: What names it, for messages.

    Raises:
        InputError: If there is no such file, or it names parts that are not registered.
    """
    # The student alone does not need heads of plugins.
    cfg = student_config(read_config(config_file, key, other_heads=True))
    # The checkpoint holds these weights.
    cfg.MODEL.TIMM.PRETRAINED = False
    check_network_values(cfg, config_file)
    return cfg


def load_student(cfg: CfgNode, weights: str, device: str, *, ema: bool = False) -> nn.Module:
    """The student in evaluation mode, its weights loaded strictly.

    Args:
        cfg: Config of the student alone.
        weights: The run's checkpoint.
        device: Where the student is built.
        ema: Whether to take the averaged weights.

    Raises:
        InputError: If the weights do not fit, or there are no averaged ones.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = device
    model = build_network(cfg, "the run's config")
    rest = load_strictly(model, weights, key="weights of the run")
    if ema:
        if "ema" not in rest:
            raise InputError(f"--ema: {weights} has no averaged weights; SOLVER.EMA_DECAY of its run was 0.")
        averaged = AveragedModel(model)
        averaged.load_state_dict(rest["ema"])
        model = averaged.module
    return model.eval()
