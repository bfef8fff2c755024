"""Signals of noise, in the shapes that a network would give."""

import math

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
CLASSES = 3
BOXES, FOREGROUND, KEYPOINTS = 6, 3, 2
# Dense heads and RPNs have two anchors in each cell of these maps; the hidden maps of all networks are equally wide.
ANCHOR_LEVELS, ANCHORS, HIDDEN = ("p4", "p5"), 2, 8


# Maps the last layers of dense heads, of two convolutions and of four, to the numbers of their outputs.
DENSE_LAYERS = {
    "dense_cls_conv2": HIDDEN,
    "dense_box_conv2": HIDDEN,
    "dense_cls_conv4": HIDDEN,
    "dense_box_conv4": HIDDEN,
    "dense_cls_score": ANCHORS * CLASSES,
    "dense_bbox_pred": ANCHORS * 4,
}


def make_spec(channels: int) -> dict[str, ShapeSpec]:
    """The signals of a Mask R-CNN, a RetinaNet and a classifier in one, whose feature maps have so many channels."""
    return {
        **{name: ShapeSpec(channels=channels, stride=stride) for name, stride in STRIDES.items()},
        **{f"res{i}": ShapeSpec(channels=channels * 2**i, stride=2**i) for i in range(2, 6)},
        **{f"res{i}_preact": ShapeSpec(channels=channels * 2**i, stride=2**i) for i in range(2, 6)},
        "roi_features": ShapeSpec(channels=channels, height=4, width=4),
        "roi_box_features": ShapeSpec(channels=channels),
        "roi_box_preact": ShapeSpec(channels=channels),
        "roi_logits_weight": ShapeSpec(channels=channels),
        "roi_logits_bias": ShapeSpec(channels=CLASSES + 1),
        "roi_logits": ShapeSpec(channels=CLASSES + 1),
        "roi_deltas": ShapeSpec(channels=4 * CLASSES),
        "rpn_logits": ShapeSpec(channels=1),
        "rpn_deltas": ShapeSpec(channels=4),
        "mask_logits": ShapeSpec(channels=CLASSES),
        "dense_logits": ShapeSpec(channels=CLASSES),
        "dense_deltas": ShapeSpec(channels=4),
        "pooled": ShapeSpec(channels=channels, height=1, width=1),
        "logits": ShapeSpec(channels=CLASSES),
        "logits_weight": ShapeSpec(channels=channels),
        "logits_bias": ShapeSpec(channels=CLASSES),
        "input_gradient": ShapeSpec(channels=3),
        **{name: ShapeSpec(channels=channels * 2**i) for i in range(2, 6) for name in norm_names(i)},
        "roi_deltas_weight": ShapeSpec(channels=channels),
        "roi_deltas_bias": ShapeSpec(channels=4 * CLASSES),
        "keypoint_logits": ShapeSpec(channels=KEYPOINTS),
        "sem_seg_logits": ShapeSpec(channels=CLASSES),
        **{f"dense_{x}_hidden_{level}": ShapeSpec(channels=HIDDEN) for x in ("cls", "box") for level in ANCHOR_LEVELS},
        **{f"{name}_weight": ShapeSpec(channels=HIDDEN) for name in DENSE_LAYERS},
        **{f"{name}_bias": ShapeSpec(channels=rows) for name, rows in DENSE_LAYERS.items()},
    }


def norm_names(stage: int) -> list[str]:
    """Weight and bias of the last batch norm of a stage."""
    return [f"res{stage}_norm_weight", f"res{stage}_norm_bias"]


def make_signals(spec: dict[str, ShapeSpec], *, seed: int, size=(64, 128), dtype=torch.float32) -> dict:
    """Noise of the shapes that two images of a size give; each has boxes of objects and of the background."""
    generator = torch.Generator().manual_seed(seed)
    cells = {name: (-(-size[0] // stride), -(-size[1] // stride)) for name, stride in STRIDES.items()}
    counts = [ANCHORS * math.prod(cells[level]) for level in ANCHOR_LEVELS]
    shapes = {
        "roi_features": (BOXES, spec["roi_features"].channels, 4, 4),
        "roi_box_features": (BOXES, spec["roi_box_features"].channels),
        "roi_box_preact": (BOXES, spec["roi_box_preact"].channels),
        "roi_logits_weight": (CLASSES + 1, spec["roi_box_features"].channels),
        "roi_logits_bias": (CLASSES + 1,),
        "roi_logits": (BOXES, CLASSES + 1),
        "roi_deltas": (BOXES, 4 * CLASSES),
        "roi_deltas_weight": (4 * CLASSES, spec["roi_box_features"].channels),
        "roi_deltas_bias": (4 * CLASSES,),
        "rpn_logits": (2, sum(counts), 1),
        "rpn_deltas": (2, sum(counts), 4),
        "mask_logits": (FOREGROUND, CLASSES, 8, 8),
        "dense_logits": (2, sum(counts), CLASSES),
        "dense_deltas": (2, sum(counts), 4),
        "keypoint_logits": (FOREGROUND, KEYPOINTS, 8, 8),
        "sem_seg_logits": (2, CLASSES, *cells["p2"]),
        **{f"dense_{x}_hidden_{level}": (2, HIDDEN, *cells[level]) for x in ("cls", "box") for level in ANCHOR_LEVELS},
        **{f"{name}_weight": (rows, HIDDEN, 3, 3) for name, rows in DENSE_LAYERS.items()},
        **{f"{name}_bias": (rows,) for name, rows in DENSE_LAYERS.items()},
        "pooled": (2, spec["pooled"].channels),
        "logits": (2, CLASSES),
        "logits_weight": (CLASSES, spec["pooled"].channels),
        "logits_bias": (CLASSES,),
        "input_gradient": (2, 3, *size),
        **{name: (spec[name].channels,) for i in range(2, 6) for name in norm_names(i) if name in spec},
    }
    for name, shape in spec.items():
        if shape.stride:
            shapes[name] = (2, shape.channels, -(-size[0] // shape.stride), -(-size[1] // shape.stride))
    signals = {name: torch.randn(shapes[name], generator=generator).to(dtype) for name in spec}
    signals["roi_classes"] = torch.tensor([0, 1, CLASSES, 2, CLASSES, CLASSES])
    signals["labels"] = torch.tensor([0, CLASSES - 1])
    foreground = signals["roi_classes"] < CLASSES
    signals["mask_classes"] = signals["roi_classes"][foreground]
    signals["roi_boxes"] = torch.tensor([[2 * i // BOXES, 4.0, 4.0, 40.0, 40.0] for i in range(BOXES)])
    signals["roi_gt_boxes"] = signals["roi_boxes"][:, 1:] + 2.0
    signals["roi_scales"] = torch.tensor([10.0, 10.0, 5.0, 5.0])
    signals["mask_boxes"] = signals["keypoint_boxes"] = signals["roi_boxes"][foreground]
    signals["keypoint_labels"] = torch.tensor([[5, -1], [63, 0], [-1, 7]])
    signals["sem_seg_labels"] = torch.arange(2 * math.prod(size)).reshape(2, *size) // 50 % (CLASSES + 1) - 1
    for kind, classes in (("rpn", [-1, 0, 1]), ("dense", [CLASSES, -1, 0, CLASSES, 1, 2])):
        signals[f"{kind}_counts"] = torch.tensor(counts)
        signals[f"{kind}_scales"] = torch.ones(4)
        signals[f"{kind}_anchors"] = torch.tensor([[4.0 * i, 4.0, 4.0 * i + 32, 40.0] for i in range(sum(counts))])
        signals[f"{kind}_labels"] = torch.tensor(classes).repeat(sum(counts))[: 2 * sum(counts)].reshape(2, -1)
    return signals


def make_input(height: int, width: int, *boxes) -> dict:
    """An image with objects, as the data loader gives it; boxes are x0, y0, x1, y1."""
    objects = Instances((height, width), gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4)))
    return {"image": torch.zeros(3, height, width), "instances": objects}
