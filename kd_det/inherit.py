"""Lets a student begin with the teacher's weights, in the parts after the bottom-up network."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_det.checkpoint.keys import is_counted
from kd_det.errors import InputError
from kd_det.taps.backbone import BackboneTap


@dataclass(frozen=True)
class Inheritance:
    """Records which of the teacher's tensors a student has taken over.

    Attributes:
        shapes: Maps the name of each tensor that the teacher has after its bottom-up network to the tensor's shape.
        refused: Maps the names of those that the student has not taken over to what it has instead, and why.
    """

    shapes: Mapping[str, torch.Size]
    refused: Mapping[str, str]

    def __str__(self) -> str:
        count = len(self.shapes) - len(self.refused)
        return f"{count} of {len(self.shapes)} tensors after the bottom-up network are the teacher's"


@torch.no_grad()
def inherit(student: BackboneTap, teacher: BackboneTap, *, same_classes: bool) -> Inheritance:
    """Copies the teacher's FPN, proposal network and heads into the student, wherever the shapes agree.

    A layer is copied as a whole or not at all: the bias and the norm of a convolution whose weight has another shape
    stay the student's. FGD (https://arxiv.org/abs/2111.11837), MGD (https://arxiv.org/abs/2205.01529) and ICD
    (https://arxiv.org/abs/2110.12724) begin so.

    Args:
        student: Tap of the model that is changed.
        teacher: Tap of the teacher.
        same_classes: Whether both know the same classes in the same order. If not, layers that predict classes are not
            copied.

    Raises:
        InputError: If no layer fits.

    Example:
        >>> from detectron2.modeling.backbone import BasicStem, ResNet
        >>> def classifier(depth, classes):
        ...     model = nn.Module()
        ...     model.backbone = ResNet(BasicStem(), ResNet.make_default_stages(depth), out_features=["res5"])
        ...     model.neck, model.linear = nn.Linear(512, 8), nn.Linear(8, classes)
        ...     return BackboneTap(model)
        >>> inherited = inherit(classifier(18, 10), classifier(34, 3), same_classes=True)
        >>> print(inherited)
        2 of 4 tensors after the bottom-up network are the teacher's
        >>> inherited.refused["linear.bias"]
        'its own: its weight is 10 x 8'
    """
    own, others = after_bottom_up(student), after_bottom_up(teacher)
    layers: dict[str, list[str]] = {}
    for name in others:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    of_classes = {name for layer in teacher.class_layers() for name in names_below(teacher.model, layer)}
    refused: dict[str, str] = {}
    for layer, names in layers.items():
        reason = find_mismatch(names, own, others)
        if not reason and not same_classes and of_classes.intersection(names):
            reason = "its own: the classes are not known to be the same"
        above = layer.rpartition(".")[0]
        if not reason and refused.keys() & layers.get(above, ()):
            reason = f"its own, as {above} is"  # The norm of a convolution that is not the teacher's.
        if reason:
            refused |= dict.fromkeys(names, reason)
            continue
        for name in names:
            own[name].copy_(others[name])
    shapes = {name: tensor.shape for name, tensor in others.items() if is_counted(name)}
    if len(refused) == len(others):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
        raise InputError(
            f"KD.INHERIT: none of the teacher's {len(shapes)} tensors after its bottom-up network fits the student"
            + (f" ({reasons})." if reasons else ".")
        )
    return Inheritance(shapes, {name: reason for name, reason in refused.items() if name in shapes})


def after_bottom_up(tap: BackboneTap) -> dict[str, Tensor]:
    """Maps the names of a model's tensors after its bottom-up network to the tensors; pixel statistics are left out."""
    bottom_up = set(names_below(tap.model, tap.bottom_up))
    state = tap.model.state_dict()
    return {name: x for name, x in state.items() if name not in bottom_up and not name.startswith("pixel_")}


def names_below(model: nn.Module, part: nn.Module) -> list[str]:
    """Lists the names that the tensors of a part have in the model."""
    prefix = next(name for name, module in model.named_modules() if module is part)
    return [f"{prefix}.{name}" for name in part.state_dict()]


def find_mismatch(names: list[str], own: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> str:
    """Describes what the student has instead of a layer of the teacher that does not fit; "" if the layer fits."""
    for name in names:
        key = name.rpartition(".")[2]
        if name not in own:
            return f"has no such {key}"
        if own[name].shape != others[name].shape:
            return f"its own: its {key} is {' x '.join(map(str, own[name].shape))}"
    return ""
