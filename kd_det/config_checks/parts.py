"""Checks that the parts that a config names for its model are registered."""

from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY
from detectron2.utils.registry import Registry

from kd_det.config import look_up, student_config
from kd_det.errors import InputError

RPN = {"MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY, "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY}
PROPOSALS = {"MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY}
ROI_HEADS = {"MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY}
SEM_SEG = {"MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY}
# Maps each of Detectron2's meta-architectures to its keys that name registered classes; others may not use these keys.
PARTS = {
    "GeneralizedRCNN": PROPOSALS | ROI_HEADS,
    "PanopticFPN": PROPOSALS | ROI_HEADS | SEM_SEG,
    "ProposalNetwork": PROPOSALS,
    "SemanticSegmentor": SEM_SEG,
    "RetinaNet": {"MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY},
}
# These parts predict rotated boxes; the data sets that kd_det reads have upright ones.
ROTATED = ("RRPN", "RROIHeads", "RotatedAnchorGenerator")


def check_parts(cfg: CfgNode, source: str) -> None:
    """Checks that every class and function that the config names for its model is registered and can be trained.

    Args:
        source: Origin of the config, for messages.

    Raises:
        InputError: If one is not, or needs rotated boxes.
    """
    for key, (registry, name) in registered_parts(cfg).items():
        if name not in registry:
            known = ", ".join(sorted(known for known, _ in registry))
            raise InputError(
                f"{source}: {key} is {name!r}, which nothing registers (--plugin FILE imports what does); there are "
                f"{known}."
            )
        if name in ROTATED:
            raise InputError(
                f"{source}: {key} is {name!r}, which needs rotated boxes; kd_det supports upright ones only."
            )


def registered_parts(cfg: CfgNode) -> dict[str, tuple[Registry, str]]:
    """Maps the keys that name a registered part of the model to the registry and the name of the part."""
    node = cfg.MODEL
    parts = {"MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY, "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY}
    parts |= PARTS.get(student_config(cfg).MODEL.META_ARCHITECTURE, {})
    if node.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
        parts.pop("MODEL.PROPOSAL_GENERATOR.NAME", None)
    elif "MODEL.PROPOSAL_GENERATOR.NAME" in parts and node.PROPOSAL_GENERATOR.NAME in ("RPN", "RRPN"):
        parts |= RPN
    if "MODEL.ROI_HEADS.NAME" in parts:
        if node.ROI_BOX_HEAD.NAME:
            parts["MODEL.ROI_BOX_HEAD.NAME"] = ROI_BOX_HEAD_REGISTRY
        if node.MASK_ON:
            parts["MODEL.ROI_MASK_HEAD.NAME"] = ROI_MASK_HEAD_REGISTRY
        if node.KEYPOINT_ON:
            parts["MODEL.ROI_KEYPOINT_HEAD.NAME"] = ROI_KEYPOINT_HEAD_REGISTRY
    return {key: (registry, look_up(cfg, key)) for key, registry in parts.items()}
