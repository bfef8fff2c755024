"""The teacher: a frozen model that is seen by no optimizer, checkpoint or DDP bucket."""

import hashlib
import logging
from collections.abc import Collection

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from kd_det.checkpoint import load_strictly
from kd_det.config import add_kd_config, merge_file, merge_list, student_config
from kd_det.errors import InputError
from kd_det.signals import Signals
from kd_det.taps import build_tap

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Teacher:
    """A frozen model and its tap.

    It is no ``nn.Module``: held by one, it stays out of its parameters, its state_dict and its ``train()``.

    Args:
        model: The trained model. It is frozen and put into evaluation mode.
        flip_channels: Whether the images come in the reversed channel order (RGB for BGR or the other way round).
        dtype: Precision of the forward.
        source: Where the model comes from, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        flip_channels: bool = False,
        dtype: torch.dtype = torch.float32,
        source: str = "a model without a file",
    ):
        self.source = source
        self.model = model.eval().requires_grad_(False)
        self.tap = build_tap(model)
        self.flip_channels = flip_channels
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def fingerprint(self) -> str:
        """A hash of the weights."""
        digest = hashlib.sha256()
        for key, value in self.model.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device) -> "Teacher":
        """Move the model, unless it is there."""
        if self.device != device:
            self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, batched_inputs: list[dict], names: Collection[str], student: Signals) -> Signals:
        """Compute the named signals on the student's batch.

        Args:
            batched_inputs: As the data loader gives them to the student.
            names: The signals that some head asked for; parts of the model behind none of them do not run.
            student: The student's signals, whose boxes ROI signals are computed on.
        """
        if self.flip_channels:
            batched_inputs = [{**x, "image": x["image"].flip(0)} for x in batched_inputs]
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            signals = self.tap.compute(batched_inputs, names, student)
        return {name: signal.detach() for name, signal in signals.items()}


def build_teacher(cfg: CfgNode) -> Teacher:
    """Build the teacher that ``KD.TEACHER`` names and load its weights strictly.

    Args:
        cfg: The student's config.

    Raises:
        InputError: If the config or the weights do not exist or do not fit each other.
    """
    node = cfg.KD.TEACHER
    if node.DTYPE not in DTYPES:
        raise InputError(f"KD.TEACHER.DTYPE: got {node.DTYPE!r}; allowed are {', '.join(DTYPES)}.")
    teacher_cfg, weights = load_teacher_config(cfg)
    formats = cfg.INPUT.FORMAT, teacher_cfg.INPUT.FORMAT
    if formats[0] != formats[1] and set(formats) != {"RGB", "BGR"}:
        raise InputError(
            f"INPUT.FORMAT: the student reads {formats[0]}, the teacher {formats[1]}; only RGB and BGR convert."
        )
    model = build_model(teacher_cfg)
    load_strictly(model, weights, key="KD.TEACHER.WEIGHTS")
    logging.getLogger(__name__).info("Teacher: %s, weights %s", node.CONFIG_FILE, weights)
    source = f"{node.CONFIG_FILE} with {weights}"
    return Teacher(model, flip_channels=formats[0] != formats[1], dtype=DTYPES[node.DTYPE], source=source)


def load_teacher_config(cfg: CfgNode) -> tuple[CfgNode, str]:
    """The teacher's own config, on the student's device, and the path of its weights."""
    node = cfg.KD.TEACHER
    if not node.CONFIG_FILE:
        raise InputError("KD.TEACHER.CONFIG_FILE: no teacher is named; give a config file or the name of a zoo config.")
    teacher_cfg = get_cfg()
    add_kd_config(teacher_cfg)
    zoo = not PathManager.isfile(node.CONFIG_FILE)
    try:
        merge_file(teacher_cfg, model_zoo.get_config_file(node.CONFIG_FILE) if zoo else node.CONFIG_FILE)
        zoo_weights = model_zoo.get_checkpoint_url(node.CONFIG_FILE) if zoo and not node.WEIGHTS else ""
    except RuntimeError as error:
        raise InputError(f"KD.TEACHER.CONFIG_FILE: there is no such file, and {error}") from error
    merge_list(teacher_cfg, node.OPTS, "KD.TEACHER.OPTS")
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher_cfg = student_config(teacher_cfg)
    weights = node.WEIGHTS or zoo_weights or teacher_cfg.MODEL.WEIGHTS
    if not weights:
        raise InputError(f"KD.TEACHER.WEIGHTS: no file is named, and MODEL.WEIGHTS of {node.CONFIG_FILE} is empty.")
    return teacher_cfg, weights
