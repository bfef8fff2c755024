"""Implements CrossKD: the student's hidden maps pass through the rest of the teacher's head."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor, nn

from kd_det.errors import InputError
from kd_det.heads.anchors import positive_count
from kd_det.heads.build import check_class_counts
from kd_det.losses import box_overlap_loss, decode_boxes, focal_soft_target_loss
from kd_det.losses.numerics import cast_up, standardize
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals

EPS = 1e-6
# Maps each branch of a RetinaNet's head to its predictor.
PREDICTORS = {"cls": "cls_score", "box": "bbox_pred"}


@KD_HEAD_REGISTRY.register()
class CrossHead(nn.Module):
    """Teaches a RetinaNet through the last layers of its teacher's head.

    CrossKD (Wang et al., CVPR 2024, https://arxiv.org/abs/2306.11369). In each branch of the head, what enters the
    student's last convolution gets the teacher's mean and standard deviation, channel by channel and level by level,
    and passes through a ReLU and the teacher's last convolution and predictor. What comes out is compared with the
    teacher's own prediction: classes by a cross-entropy that is weighted by how far both are apart, summed over all
    anchors that the student's own losses use, and boxes by one minus the generalised IoU, weighted by the teacher's
    largest class probability. Both are divided by the number of anchors labelled as objects. The student's own
    predictions learn from the labels alone, so that teacher and labels do not contradict each other there.

    As in the published code, the maps are aligned after the ReLU. A level of a single cell, which has no standard
    deviation, takes the teacher's values and adds nothing. The number of objects is averaged over processes; the
    published code divides by that of each process.

    Args:
        levels: Names of the maps on which the head runs, such as "p3".
        hidden: Number of convolutions of the student that a map has passed; one less than either head has.
        class_weight: Factor of the loss of classes; 0 leaves it out.
        box_weight: Factor of the loss of boxes; 0 leaves it out.
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 1.0,
        # Number of the student's convolutions before its maps enter the teacher's last one: MODEL.RETINANET.NUM_CONVS
        # of both networks less 1.
        "HIDDEN": 3,
        # Factor of the loss of classes; 0 leaves it out.
        "CLASS_WEIGHT": 1.0,
        # Factor of the loss of boxes; 0 leaves it out.
        "BOX_WEIGHT": 1.0,
    }

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[str],
        hidden: int = config["HIDDEN"],
        class_weight: float = config["CLASS_WEIGHT"],
        box_weight: float = config["BOX_WEIGHT"],
    ):
        super().__init__()
        self.levels = tuple(levels)
        self.hidden = hidden
        weights = {"cls": class_weight, "box": box_weight}
        self.weights = {branch: weight for branch, weight in weights.items() if weight > 0}
        self.signals = tuple(name for branch in self.weights for name in self._hidden(branch))
        layers = [name for branch in self.weights for name in self._layers(branch)]
        parameters = [f"{name}_{kind}" for name in layers for kind in ("weight", "bias")]
        self.teacher_signals = (*self.signals, "dense_logits", "dense_deltas", *parameters)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]
    ) -> dict[str, Any]:
        node = cfg.KD.CROSS
        if min(node.CLASS_WEIGHT, node.BOX_WEIGHT) < 0 or node.CLASS_WEIGHT == node.BOX_WEIGHT == 0:
            raise InputError(
                "KD.CROSS.CLASS_WEIGHT, KD.CROSS.BOX_WEIGHT: must be 0 or more, and one of them above 0, got "
                f"{node.CLASS_WEIGHT} and {node.BOX_WEIGHT}."
            )
        for side, spec in (("student", student_spec), ("teacher", teacher_spec)):
            check_convolutions(node.HIDDEN, side, spec)
        check_class_counts("KD.HEADS: CrossHead", "dense_logits", student_spec, teacher_spec)
        prefix = "dense_cls_hidden_"
        names = [name for name in {**student_spec, **teacher_spec} if name.startswith(prefix)]
        channels = [{spec[name].channels for name in names if name in spec} for spec in (student_spec, teacher_spec)]
        if channels[0] != channels[1]:
            raise InputError(
                "KD.HEADS: CrossHead needs heads of equally many channels, but the student's has "
                f"{channels[0].pop()} and the teacher's {channels[1].pop()}."
            )
        return {
            "levels": [name.removeprefix(prefix) for name in names],
            "hidden": node.HIDDEN,
            "class_weight": node.CLASS_WEIGHT,
            "box_weight": node.BOX_WEIGHT,
        }

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        compare = {"cls": self._classes, "box": self._boxes}
        labels, teacher = student["dense_labels"], {name: cast_up(x.detach()) for name, x in teacher.items()}
        logits = teacher["dense_logits"]
        count = positive_count(labels, background=logits.shape[-1], dtype=logits.dtype)
        return {
            f"loss_kd_cross_{branch}": weight * compare[branch](student, teacher, labels >= 0, count)
            for branch, weight in self.weights.items()
        }

    def _classes(self, student: Signals, teacher: Signals, used: Tensor, count: Tensor) -> Tensor:
        logits = teacher["dense_logits"]
        crossed = self._cross("cls", student, teacher, channels=logits.shape[-1])
        return focal_soft_target_loss(crossed, logits, weights=used, normalizer=count)

    def _boxes(self, student: Signals, teacher: Signals, used: Tensor, count: Tensor) -> Tensor:
        weights = teacher["dense_logits"].sigmoid().amax(dim=-1) * used
        anchors, scales = student["dense_anchors"].repeat(len(used), 1), student["dense_scales"].tolist()
        s_boxes, t_boxes = (
            decode_boxes(x.flatten(0, 1), anchors, weights=scales)
            for x in (self._cross("box", student, teacher, channels=4), teacher["dense_deltas"])
        )
        return box_overlap_loss(s_boxes, t_boxes, weights=weights.flatten(), normalizer=count)

    def _cross(self, branch: str, student: Signals, teacher: Signals, *, channels: int) -> Tensor:
        """Computes what the teacher's last layers make of the student's maps, (N, anchors, channels)."""
        predictions = []
        for name in self._hidden(branch):
            x = align(cast_up(student[name]), teacher[name])
            for layer in self._layers(branch):
                x = F.conv2d(x.relu(), teacher[f"{layer}_weight"], teacher[f"{layer}_bias"], padding="same")
            predictions.append(permute_to_N_HWA_K(x, channels))
        return cat(predictions, dim=1)

    def _hidden(self, branch: str) -> list[str]:
        return [f"dense_{branch}_hidden_{level}" for level in self.levels]

    def _layers(self, branch: str) -> list[str]:
        return [f"dense_{branch}_conv{self.hidden + 1}", f"dense_{PREDICTORS[branch]}"]


def align(student: Tensor, teacher: Tensor) -> Tensor:
    """Gives each channel of a map (N, C, H, W) the mean and the standard deviation of the teacher's.

    The gradient passes through the student's mean and deviation. A single value becomes the teacher's.

    Example:
        >>> import torch
        >>> align(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[10.0, 50.0]]]])).round()
        tensor([[[[10., 50.]]]])
    """
    over = (0, 2, 3)
    single = teacher.numel() == teacher.shape[1]
    deviation = teacher.std(over, correction=0 if single else 1, keepdim=True)
    return standardize(student, over, eps=EPS) * deviation + teacher.mean(over, keepdim=True)


def check_convolutions(hidden: int, side: str, spec: Mapping[str, ShapeSpec]) -> None:
    """Checks that a network is a RetinaNet with the right number of convolutions, and without norms, in its head.

    Raises:
        InputError: If it is not.
    """
    if "dense_logits" not in spec:
        raise InputError(f"KD.HEADS: CrossHead is for RetinaNets, and the {side} is none.")
    prefix, suffix = "dense_cls_conv", "_weight"
    numbers = [int(x[len(prefix) : -len(suffix)]) for x in spec if x.startswith(prefix) and x.endswith(suffix)]
    # What enters the first convolution has not passed a ReLU.
    if not numbers or numbers[0] < 2:
        raise InputError(
            "KD.HEADS: CrossHead needs heads with 2 convolutions or more (MODEL.RETINANET.NUM_CONVS) and without norms "
            f"(MODEL.RETINANET.NORM ''), which the {side} does not have."
        )
    if hidden + 1 not in numbers:
        raise InputError(
            f"KD.CROSS.HIDDEN: must be {numbers[0] - 1}, one less than the convolutions in the {side}'s head "
            f"(MODEL.RETINANET.NUM_CONVS), got {hidden}."
        )
