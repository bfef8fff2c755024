"""Implements inherit and explore: half of the student's channels learn to resemble the teacher's, half to differ."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from detectron2.config import configurable
from fvcore.nn import weight_init
from torch import Tensor, nn

from kd_det.errors import InputError, check_choice
from kd_det.heads.build import freeze
from kd_det.heads.coders import (
    AutoEncoder,
    Feature,
    build_coder,
    check_factor_options,
    encode,
    first_boxes,
    reconstruction_loss,
    rescale,
    valid_cells,
    zero_padding,
)
from kd_det.heads.norms import check_norm
from kd_det.heads.scalars import log_scalar
from kd_det.losses import exploration_loss, inheritance_loss
from kd_det.losses.numerics import add_up, cast_up, mean, unit_vectors
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals

KINDS = ("ft", "at", "od")
# Maps each distance to the options of the losses.
DISTANCES: dict[str, dict[str, Any]] = {"l1": {"p": 1}, "l2": {"p": 2}, "cosine": {"cosine": True}}
DIVISIONS = ("natural", "random")
ENCODERS = ("trained", "random")
EXPLORE_TARGETS = ("teacher", "noise")


@KD_HEAD_REGISTRY.register()
class InheritExploreHead(nn.Module):
    """Pulls one half of the student's channels toward the teacher, and pushes the other half away from it.

    Inherit and explore (IE-KD, Huang et al., CVPR 2021, https://arxiv.org/abs/2107.00181). The inheriting half learns
    what the teacher knows; the exploring half finds features that the teacher lacks. Both are compared with the teacher
    by one of:

    * ``ft``: mean absolute difference of factors, each of unit length per image (or box);
    * ``at``: the same for attention maps, which need no encoders and so no stage before the run;
    * ``od``: length of the difference of the rectified factors, mean over images (or boxes).

    For the first two, the root of the mean square or the cosine may replace the mean absolute difference, as where the
    paper and the published code compare distances.

    Factors come from encoders as in the published code: three 3x3 convolutions, batch norms and leaky ReLUs; each half
    and each feature has its own. A stage before the run trains the teacher's encoder, with a decoder, to reconstruct
    the teacher's features; in the run it is frozen.

    The exploring half's loss is the negated distance, or the absolute cosine. For ``ft`` and ``at`` it is bounded. For
    ``od`` it has no lower bound: the encoder's last batch norm could lower it forever by its weight alone. Therefore
    the exploring half's rectified factor is first scaled to the length of the teacher's, which the paper does not do;
    the farthest factor is then one that shares no active neuron with the teacher's, at sqrt(2) times that length. The
    multiple is logged as ``kd/ie_od_distance/<feature>``, since the length changes while the student trains.

    The means of ``ft`` and ``at`` fall with the size of the map, and the length of ``od`` grows with it.
    "map_invariant" multiplies or divides by the square root of the number of elements; "code" does not, as published.
    In both, the exploring factor of ``od`` has the length of the teacher's, and cosines do not depend on the size. The
    best weight on CIFAR according to the paper is 50 with "code", which equals 1.1 with "map_invariant" for ``ft``
    (32x8x8 elements) and 6.25 for ``at`` (8x8); the published configs have 1 and, for factor transfer, 500.

    Two options are controls, which the paper does not have. With `encoder` "random" the exploring half's encoder keeps
    its initial weights, so that only the student can make a difference; its batch norms then change nothing. With
    `explore_target` "noise" the exploring half is pushed away from Gaussian noise, drawn anew in every iteration, which
    has the length of the teacher's factor per image (or box) and tells nothing about the teacher.

    Args:
        features: Maps each compared feature, a map of the backbone or ``roi_features``, to its description. The student
            must have an even number of channels.
        boxes: Compare ``roi_features`` of at most this many sampled boxes per image, foreground first; 0 compares all
            of them.
        kind: "ft", "at" or "od".
        distance: "l1", "l2" or "cosine"; "od" has its own distance and takes "l1".
        divide: "natural" (the first half of the channels inherits) or "random" (a division drawn once, and saved).
        seed: Seed of the random division; the same on every process.
        inherit_weight: Factor of the inheriting half's loss; 0 leaves it out.
        explore_weight: Factor of the exploring half's loss; 0 leaves it out.
        encoder: The exploring half's encoder: "trained" together with the student, or "random" and frozen.
        explore_target: The exploring half is pushed away from the factor of the "teacher" or from "noise".
        norm: Normalisation in encoders and decoders: "BN" (published code), "SyncBN", "GN" or "LN".
        scale: "map_invariant" or "code".
        reconstruction: Loss of the auto-encoder in the stage before the run: "l2" (paper) or "l1" (published code).
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 1.1,
        # "ft" (factors), "at" (attention maps, which need no stage) or "od" (rectified factors).
        "KIND": "ft",
        # Distance for "ft" and "at": "l1" (mean of absolute differences, the paper's best, assumed by WEIGHT), "l2"
        # (root of the mean square) or "cosine" (an alternative in the published code, which ignores SCALE).
        "DISTANCE": "l1",
        # Feature maps of the backbone, or roi_features, the features of the sampled boxes.
        "IN_FEATURES": ["roi_features"],
        # Compare roi_features of at most this many sampled boxes per image, foreground first; 0 compares all of them,
        # which costs as much as a small student.
        "BOXES": 48,
        # The student's channels that inherit: "natural" (the first half) or "random" (a half drawn from SEED).
        "DIVIDE": "natural",
        # Factor of the inheriting half's loss; 0 leaves the half out.
        "INHERIT_WEIGHT": 1.0,
        # Factor of the exploring half's loss, which already has its sign; 0 leaves the half out.
        "EXPLORE_WEIGHT": 1.0,
        # The exploring half's encoder: "trained" with the student (published), or "random", a control: it keeps its
        # initial weights, which follow from SEED.
        "ENCODER": "trained",
        # The exploring half is pushed away from the factor of the "teacher" (published) or, as a control, from "noise"
        # of the same length, drawn anew in every iteration.
        "EXPLORE_TARGET": "teacher",
        # Channels of the factors, as a share of the teacher's channels.
        "FACTOR_RATE": 0.5,
        # Normalisation in encoders and decoders: BN (published), SyncBN, GN or LN.
        "NORM": "BN",
        # "map_invariant": equally strong at every map size; the default WEIGHT is that of "ft" on CIFAR, "at" would
        # take 6.25. "code": the published mean, whose best weight on CIFAR is 50.
        "SCALE": "map_invariant",
        # Loss of the auto-encoder's reconstruction: "l2" (paper) or "l1" (published code).
        "RECONSTRUCTION": "l2",
    }

    pretrains_student = False

    @configurable
    def __init__(
        self,
        *,
        features: Mapping[str, Feature],
        boxes: int = config["BOXES"],
        kind: str = config["KIND"],
        distance: str = config["DISTANCE"],
        divide: str = config["DIVIDE"],
        seed: int = 0,
        inherit_weight: float = config["INHERIT_WEIGHT"],
        explore_weight: float = config["EXPLORE_WEIGHT"],
        encoder: str = config["ENCODER"],
        explore_target: str = config["EXPLORE_TARGET"],
        norm: str = config["NORM"],
        scale: str = config["SCALE"],
        reconstruction: str = config["RECONSTRUCTION"],
    ):
        super().__init__()
        self.features = dict(features)
        self.boxes = boxes
        self.kind = kind
        self.distance = distance
        self.explore_target = explore_target
        self.scale = scale
        self.reconstruction = reconstruction
        weights = {"inherit": inherit_weight, "explore": explore_weight}
        self.weights = {part: weight for part, weight in weights.items() if weight}
        self.signals = tuple(features)
        self.pretrained = () if kind == "at" else ("auto_encoders",)
        self.pretrain_signals = ()
        self.pretrain_teacher_signals = self.signals
        self.auto_encoders = nn.ModuleDict()
        encoders = {part: nn.ModuleDict() for part in self.weights}
        generator = torch.Generator().manual_seed(seed)
        for name, (student, teacher, factor, _) in features.items():
            order = torch.randperm(student, generator=generator) if divide == "random" else None
            self.register_buffer(f"order_{name}", order)
            if kind != "at":
                self.auto_encoders[name] = AutoEncoder(coder(teacher, factor, norm), coder(factor, teacher, norm))
            for halves in encoders.values():
                halves[name] = nn.Identity() if kind == "at" else coder(student // 2, factor, norm)
        self.encoders = nn.ModuleDict(encoders)
        if encoder == "random":
            freeze(self.encoders["explore"])

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node, key = cfg.KD.INHERIT_EXPLORE, "KD.INHERIT_EXPLORE"
        features = check_factor_options(key, node, student_spec, teacher_spec)
        choices = {
            "KIND": KINDS,
            "DISTANCE": DISTANCES,
            "DIVIDE": DIVISIONS,
            "ENCODER": ENCODERS,
            "EXPLORE_TARGET": EXPLORE_TARGETS,
        }
        for option, allowed in choices.items():
            check_choice(f"{key}.{option}", node[option], allowed)
        if node.KIND == "od" and node.DISTANCE != "l1":
            raise InputError(f"{key}.DISTANCE: must stay l1 with KIND 'od', which has its own, got {node.DISTANCE!r}.")
        for name, feature in features.items():
            if feature.student_channels % 2:
                raise InputError(
                    f"{key}.IN_FEATURES: {name!r} has {feature.student_channels} channels in the student; their number "
                    "must be even to be divided into halves."
                )
        channels = [c for student, *rest, _ in features.values() for c in (student // 2, *rest)]
        check_norm(cfg, "INHERIT_EXPLORE", channels if node.KIND != "at" else [])
        weights = node.INHERIT_WEIGHT, node.EXPLORE_WEIGHT
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise InputError(
                f"{key}: INHERIT_WEIGHT and EXPLORE_WEIGHT must be finite, 0 or more (exploration has its sign in the "
                f"loss) and not both 0, got {weights[0]} and {weights[1]}."
            )
        if node.ENCODER == "random" and node.KIND == "at":
            raise InputError(f"{key}.ENCODER: must stay trained with KIND 'at', which has no encoders, got 'random'.")
        for option in ("ENCODER", "EXPLORE_TARGET"):
            if node[option] != cls.config[option] and not node.EXPLORE_WEIGHT:
                raise InputError(
                    f"{key}.{option}: must stay {cls.config[option]} with EXPLORE_WEIGHT 0, where nothing explores, "
                    f"got {node[option]!r}."
                )
        return {
            "features": features,
            "boxes": node.BOXES,
            "kind": node.KIND,
            "distance": node.DISTANCE,
            "divide": node.DIVIDE,
            "seed": max(cfg.SEED, 0),
            "inherit_weight": node.INHERIT_WEIGHT,
            "explore_weight": node.EXPLORE_WEIGHT,
            "encoder": node.ENCODER,
            "explore_target": node.EXPLORE_TARGET,
            "norm": node.NORM,
            "scale": node.SCALE,
            "reconstruction": node.RECONSTRUCTION,
        }

    def pretrain(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        loss = reconstruction_loss(self.auto_encoders, self.features, teacher, batch, kind=self.reconstruction)
        return {"loss_kd_inherit_explore_reconstruct": loss}

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        student, teacher = first_boxes(self.boxes, student, teacher)
        return self.compare(student, self.teacher_factors(teacher, batch), batch)

    def compare(self, student: Signals, targets: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Computes the losses on all boxes, with the teacher's factors as :meth:`teacher_factors` returns them."""
        losses: dict[str, Tensor] = {}
        for part, halves in self.halves(student, batch).items():
            distances = [self._distance(part, halves[name], targets[name], name, batch) for name in self.features]
            losses[f"loss_kd_inherit_explore_{part}"] = self.weights[part] * add_up(distances)
        return losses

    def halves(self, student: Signals, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Encodes the student's halves, without those whose weight is 0.

        Returns:
            Maps "inherit" and "explore" to the factor of that half of each feature, (N, m, H, W), by the feature's
            name; for the kind "at" to the half itself, (N, C / 2, H, W).
        """
        factors: dict[str, dict[str, Tensor]] = {part: {} for part in self.weights}
        for name, feature in self.features.items():
            x, order = student[name], self.get_buffer(f"order_{name}")
            mask = valid_cells(batch, x, feature.stride)
            halves = (x if order is None else x[:, order]).chunk(2, dim=1)
            for part, half in zip(("inherit", "explore"), halves, strict=True):
                if part in factors:
                    factors[part][name] = encode(self.encoders.get_submodule(f"{part}.{name}"), half, mask)
        return factors

    @torch.no_grad()
    def teacher_factors(self, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        """Maps each feature's name to the teacher's factor, (N, m, H, W); for the kind "at" to the feature itself."""
        return {
            name: encode(
                self.auto_encoders.get_submodule(f"{name}.encoder") if self.pretrained else nn.Identity(),
                teacher[name],
                valid_cells(batch, teacher[name], feature.stride),
            )
            for name, feature in self.features.items()
        }

    def _distance(self, part: str, half: Tensor, target: Tensor, name: str, batch: Batch) -> Tensor:
        mask = valid_cells(batch, half, self.features[name].stride)
        bounded = (part, self.kind) == ("explore", "od")
        if bounded:
            target = cast_up(target).relu()
            half = with_length_of(cast_up(half).relu(), target)
        if (part, self.explore_target) == ("explore", "noise"):
            noise = zero_padding(torch.randn_like(target, dtype=torch.float64), mask).to(target.dtype)
            target = with_length_of(noise.relu() if bounded else noise, target)
        options = {} if self.kind == "od" else DISTANCES[self.distance]
        loss = (inheritance_loss if part == "inherit" else exploration_loss)(half, target, kind=self.kind, **options)
        if bounded:
            log_scalar(f"kd/ie_od_distance/{name}", lambda: -loss.detach() / mean_length(target))
        if options.get("cosine"):
            return loss
        return rescale(loss, half, mask, kind=self.kind, scale=self.scale, p=options.get("p", 1))


def mean_length(x: Tensor) -> Tensor:
    """Averages the L2 norms of the samples of x (N, ...); at least 1e-12."""
    return mean(x.flatten(1).norm(dim=1)).clamp(min=1e-12)


def with_length_of(x: Tensor, target: Tensor) -> Tensor:
    """Scales each sample of x (N, ...) to the L2 norm of the same sample of `target`; zeros stay zeros."""
    return (unit_vectors(x.flatten(1)) * target.flatten(1).norm(dim=1, keepdim=True)).view_as(x)


def coder(before: int, after: int, norm: str = "BN") -> nn.Sequential:
    """Builds three normalised 3x3 convolutions between leaky ReLUs, as published; the first keeps the channels."""
    return nn.Sequential(nn.LeakyReLU(0.1), *build_coder(before, after, norm=norm, convolution=msra_convolution))


def msra_convolution(*args: Any, **kwargs: Any) -> nn.Conv2d:
    """Builds a convolution whose initial weights preserve the variance through ReLUs (He et al., 2015)."""
    layer = nn.Conv2d(*args, **kwargs)
    weight_init.c2_msra_fill(layer)
    return layer
