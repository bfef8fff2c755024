"""Brings what a teacher computes onto the level names, boxes and grids of its student."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor

from kd_det.errors import InputError
from kd_det.signals import BOX_SIGNALS, Signals
from kd_det.taps import BackboneTap, padded_size, padding_of

# Signals of a map that follow its name in FEATURES.
SUFFIXES = ("", "_preact", "_norm_weight", "_norm_bias")
# Boxes of the student, (R, 5), on which the teacher computes.
BOXES = ("roi_boxes", "mask_boxes", "keypoint_boxes")
# Ratios of two grids that differ by less are equal.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class View:
    """Describes how a teacher sees a batch.

    Attributes:
        inputs: The batch, with images of the teacher's size.
        factors: Vertical and horizontal enlargement of each image, (N, 2), float64 on the CPU.
        extent: Height and width of the student's padded batch, in its pixels; None if no map has to be aligned.
        own_extent: The same in the teacher's pixels.
    """

    inputs: list[dict]
    factors: Tensor
    extent: tuple[int, int] | None = None
    own_extent: tuple[int, int] | None = None


class Alignment:
    """Maps the level names, boxes and grids of a student to those of its teacher, and the teacher's signals back.

    Signals of boxes depend on neither size nor padding, so only the boxes are scaled. A map (N, C, H, W) is cut to the
    student's padded batch if a cell covers equally many pixels of the original image in both networks; it then keeps
    its values exactly. Otherwise it is resampled, so that the centre of each of the student's cells takes the value
    that the teacher's map has at this point of the image. The taps cut predictions for anchors, level by level.

    Args:
        student: Tap of the student.
        teacher: Tap of the teacher.
        features: Maps names of the student's feature maps to those of the teacher's that stand for them.
        scale: Factor by which the images are enlarged for the teacher.
    """

    def __init__(
        self,
        student: BackboneTap,
        teacher: BackboneTap,
        *,
        features: Mapping[str, str] | None = None,
        scale: float = 1.0,
    ):
        self.student = student
        self.teacher = teacher
        self.features = dict(features or {})
        self.scale = scale
        self._strides = student.strides(), teacher.strides()
        spec = teacher.spec()
        # Maps names of signals to the teacher's own where these differ; "" where it has none.
        self._renamed = {
            f"{name}{suffix}": f"{own}{suffix}" if f"{own}{suffix}" in spec else ""
            for name, own in self.features.items()
            for suffix in SUFFIXES
        }
        self._paddings = [padding_of(tap.backbone) for tap in (student, teacher)]
        pairs = [(self.stride(name), self._strides[1][self.own_name(name)]) for name in self._common_maps()]
        # Whether the teacher sees the images as the student does, and its maps have the student's grids already.
        self.is_identity = scale == 1 and self._paddings[0] == self._paddings[1] and all(a == b for a, b in pairs)

    def _common_maps(self) -> list[str]:
        """Lists the student's names of the maps that both networks have."""
        return [name for name in {**self._strides[0], **self._renamed} if self.own_name(name) in self._strides[1]]

    def own_name(self, name: str) -> str:
        """Returns the teacher's own name of a signal."""
        return self._renamed.get(name, name)

    def stride(self, name: str) -> int:
        """Returns the student's pixels per cell of a map; for a map that only the teacher has, the teacher's."""
        strides = self._strides[0]
        base = name.removesuffix("_preact")
        return strides.get(name) or strides.get(base) or self._strides[1][self.own_name(name)]

    def spec(self) -> dict[str, ShapeSpec]:
        """Maps the name of every signal that the teacher gives to its shape, with the student's names and strides."""
        own = self.teacher.spec()
        spec = own | {name: own[other] for name, other in self._renamed.items() if other}
        return {
            name: shape if shape.stride is None else dataclasses.replace(shape, stride=self.stride(name))
            for name, shape in spec.items()
            if self.own_name(name)
        }

    def check_features(self) -> None:
        """Checks the names of the map.

        Raises:
            InputError: If a network does not have a feature map that the map names.
        """
        pairs = [("student", name, "", self.student) for name in self.features]
        pairs += [("teacher", own, f" (for {name})", self.teacher) for name, own in self.features.items()]
        for side, name, role, tap in pairs:
            known = [x for x, shape in tap.spec().items() if shape.stride is not None and not x.endswith("_preact")]
            if name not in known:
                raise InputError(
                    f"KD.TEACHER.FEATURES: {name!r}{role} is not a feature map of the {side}, which has "
                    f"{', '.join(known)}."
                )

    def check(self, names: Collection[str]) -> None:
        """Checks that the named signals can be aligned.

        Raises:
            InputError: If one cannot.
        """
        if self.is_identity:
            return
        maps = {self.own_name(name) for name in names} & self._strides[1].keys()
        others = {name for name in names if self.own_name(name) not in maps and not name.endswith(("_weight", "_bias"))}
        anchors = sorted(name for name in others if name.startswith(("rpn_", "dense_")))
        if self.scale != 1 and (anchors or "input_gradient" in others):
            what = ", ".join(anchors) or "input_gradient"
            raise InputError(
                f"KD.TEACHER.SCALE: must be 1.0 for heads that compare {what}, got {self.scale}: enlarged images have "
                + ("anchors of other objects." if anchors else "gradients of their own size.")
            )
        if not set(anchors) <= set(self.teacher.cut_signals):
            self.student.check_padding(self.teacher, anchors)

    def view(self, batched_inputs: list[dict], names: Collection[str]) -> View:
        """Makes the teacher's view of a batch.

        Args:
            batched_inputs: The batch that the data loader gives to the student.
            names: The signals that some head asked for; only boxes do not need the student's extent.
        """
        factors = torch.ones(len(batched_inputs), 2, dtype=torch.float64)
        if self.is_identity:
            return View(batched_inputs, factors)
        sizes = torch.tensor([x["image"].shape[-2:] for x in batched_inputs])
        if self.scale != 1:
            enlarged = (sizes * self.scale).round().long().clamp(min=1)
            factors = enlarged / sizes.double()
            batched_inputs = [
                {**x, "image": resize(x["image"].to(self.teacher.device), size)}
                for x, size in zip(batched_inputs, enlarged.tolist(), strict=True)
            ]
        if all(name.startswith(BOX_SIGNALS) for name in names):
            return View(batched_inputs, factors)
        height, width = padded_size(sizes.amax(dim=0).tolist(), self._paddings[0])
        own_height, own_width = (torch.tensor([height, width]) * factors.amax(dim=0)).ceil().long().tolist()
        return View(batched_inputs, factors, (height, width), (own_height, own_width))

    def scaled_boxes(self, student: Signals, view: View) -> Signals:
        """Returns the student's signals with its boxes in the teacher's pixels."""
        if self.scale == 1:
            return student
        boxes = {name: student[name] for name in BOXES if name in student}
        return student | {
            name: torch.cat([x[:, :1], x[:, 1:] * view.factors.to(x)[x[:, 0].long()][:, [1, 0, 1, 0]]], dim=1)
            for name, x in boxes.items()
        }

    def aligned(self, signals: Signals, names: Collection[str], view: View) -> Signals:
        """Returns the named signals on the student's grids.

        Args:
            signals: The teacher's signals, by its own names.
            names: The signals that some head asked for.
            view: The view in which they were computed.
        """
        own = {name: self.own_name(name) for name in names}
        return {
            name: self._on_grid(name, signals[other], view) if other in self._strides[1] else signals[other]
            for name, other in own.items()
            if other in signals
        }

    def _on_grid(self, name: str, x: Tensor, view: View) -> Tensor:
        if view.extent is None:
            return x
        stride = self.stride(name)
        ratios = view.factors * stride / self._strides[1][self.own_name(name)]
        height, width = (-(-pixels // stride) for pixels in view.extent)
        return resample(x, ratios, (height, width))

    def describe(self, names: Collection[str]) -> str:
        """Describes how the teacher differs from a twin of the student; "" if it does not.

        Args:
            names: The signals that some head asked for.
        """
        parts = [f"images x {self.scale:g}"] if self.scale != 1 else []
        if self._paddings[0] != self._paddings[1]:
            parts.append("padding cut off")
        for name in self._common_maps():
            own, stride = self.own_name(name), self._strides[1][self.own_name(name)] / self.scale
            change = f"resampled from stride {stride:g}" if stride != self.stride(name) else ""
            source = f"the teacher's {own}" if own != name else ""
            if name in names and (change or source):
                parts.append(f"{name}: {', '.join(filter(None, (source, change)))}")
        return f"The teacher is aligned with the student: {'; '.join(parts)}." if parts else ""


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes an image (C, H, W) bilinearly, with its range of values, to a float image."""
    shrinks = size[0] < image.shape[-2] or size[1] < image.shape[-1]
    return F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=shrinks)[0]


def resample(x: Tensor, ratios: Tensor, size: tuple[int, int]) -> Tensor:
    """Resamples maps at the centres of the cells of another grid with the same upper left corner.

    Cells are first averaged in blocks whose sides are the whole parts of the ratios, then interpolated bilinearly. A
    map that depends linearly on the place keeps its values, except within half a cell of its border. A map whose ratios
    are 1 is only cut.

    Args:
        x: Maps (N, C, H, W).
        ratios: Cells of the map per cell of the result, vertically and horizontally for each image, (N, 2).
        size: Height and width of the result.

    Example:
        >>> resample(torch.arange(8.0).view(1, 1, 1, 8), torch.tensor([[1.0, 2.0]]), (1, 3)).flatten()
        tensor([0.5000, 2.5000, 4.5000])
    """
    dtype, (height, width) = x.dtype, size
    pool = [max(int(ratio + TOLERANCE), 1) for ratio in ratios.amin(dim=0).tolist()]
    if max(pool) > 1:
        x, ratios = F.avg_pool2d(x, pool, ceil_mode=True), ratios / torch.tensor(pool)
    if (ratios - 1).abs().max() < TOLERANCE:
        return x[..., :height, :width]
    x = x.to(torch.promote_types(dtype, torch.float32))
    # Places of the centres of the result's cells in the map, from -1 at its one border to 1 at the other.
    rows, columns = (
        ((torch.arange(n, dtype=torch.float64) + 0.5) * ratio[:, None] * 2 / cells - 1).to(x)
        for n, ratio, cells in zip(size, ratios.double().unbind(dim=1), x.shape[-2:], strict=True)
    )
    grid = torch.stack([columns[:, None, :].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)], dim=-1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False).to(dtype)
