"""A one-stage detector that kd_det does not know, and the tap that lets all heads distil it.

Every cell of a feature map predicts the classes of the object that it lies in, and how far the object's sides are.
"""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from fvcore.nn import sigmoid_focal_loss_jit
from torch import nn

from kd_det import TAP_REGISTRY
from kd_det.taps import BackboneTap, hook


# ---- The detector ----
class PointHead(nn.Module):
    """Predicts classes and boxes at every cell: (N, cells, K) logits and (N, cells, 4) distances in strides."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.hidden = nn.Conv2d(channels, channels, 3, padding=1)
        self.classes = nn.Conv2d(channels, num_classes, 1)
        self.sides = nn.Conv2d(channels, 4, 1)
        nn.init.constant_(self.classes.bias, -4.0)

    def forward(self, features):
        hidden = [self.hidden(x).relu() for x in features]
        logits = [self.classes(x).flatten(2) for x in hidden]
        sides = [self.sides(x).exp().flatten(2) for x in hidden]
        return torch.cat(logits, dim=2).transpose(1, 2), torch.cat(sides, dim=2).transpose(1, 2)


@META_ARCH_REGISTRY.register()
class PointDetector(nn.Module):
    @configurable
    def __init__(self, *, backbone, num_classes, pixel_mean, pixel_std):
        super().__init__()
        self.backbone = backbone
        self.strides = [shape.stride for shape in backbone.output_shape().values()]
        self.num_classes = num_classes
        self.head = PointHead(next(iter(backbone.output_shape().values())).channels, num_classes)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg):
        return {
            "backbone": build_backbone(cfg),
            "num_classes": cfg.MODEL.RETINANET.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self):
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs):
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def forward(self, batched_inputs):
        images = self.preprocess_image(batched_inputs)
        features = list(self.backbone(images.tensor).values())
        logits, sides = self.head(features)
        points, strides = self.cells(features)
        if self.training:
            return self.losses(logits, sides, points, strides, [x["instances"] for x in batched_inputs])
        boxes = torch.cat([points - sides[..., :2] * strides, points + sides[..., 2:] * strides], dim=2)
        found = map(self.detections, logits.sigmoid(), boxes, images.image_sizes)
        return [
            {"instances": detector_postprocess(x, inputs["height"], inputs["width"])}
            for x, inputs in zip(found, batched_inputs, strict=True)
        ]

    def cells(self, features):
        """Centres (cells, 2) in pixels, and strides (cells, 1), of all cells of all levels."""
        points, strides = [], []
        for x, stride in zip(features, self.strides, strict=True):
            rows, columns = (torch.arange(n, device=x.device) for n in x.shape[-2:])
            grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).reshape(-1, 2)
            points.append((grid + 0.5) * stride)
            strides.append(torch.full((len(grid), 1), float(stride), device=x.device))
        return torch.cat(points), torch.cat(strides)

    def losses(self, logits, sides, points, strides, instances):
        targets, distances = [], []
        for x in instances:
            boxes = x.gt_boxes.tensor.to(self.device)
            sizes = torch.cat([points[:, None] - boxes[:, :2], boxes[:, 2:] - points[:, None]], dim=2)
            area = x.gt_boxes.area().to(self.device).expand(len(points), -1)
            area = area.masked_fill(sizes.min(dim=2).values <= 0, float("inf"))
            smallest, index = F.pad(area, (0, 1), value=float("inf")).min(dim=1)
            inside = smallest.isfinite()
            target = torch.zeros_like(logits[0])
            target[inside, x.gt_classes.to(self.device)[index[inside]]] = 1
            targets.append(target)
            distance = torch.full_like(sides[0], float("nan"))
            distance[inside] = sizes[inside, index[inside]]
            distances.append(distance / strides)
        target, distance = torch.stack(targets), torch.stack(distances)
        known = ~distance.isnan()
        count = max(known.sum() / 4, 1)
        focal = sigmoid_focal_loss_jit(logits, target, alpha=0.25, gamma=2.0, reduction="sum")
        error = torch.where(known, (sides.log() - distance.nan_to_num(1).log()).abs(), 0)
        return {"loss_classes": focal / count, "loss_sides": error.sum() / count / 4}

    def detections(self, scores, boxes, size):
        score, index = scores.flatten().topk(min(300, scores.numel()))
        boxes, classes = Boxes(boxes[index // self.num_classes]), index % self.num_classes
        boxes.clip(size)
        kept = batched_nms(boxes.tensor, score, classes, 0.5)[:100]
        return Instances(size, pred_boxes=boxes[kept], scores=score[kept], pred_classes=classes[kept])


# ---- Its tap ----
@TAP_REGISTRY.register()
class PointDetectorTap(BackboneTap):
    @classmethod
    def head_defaults(cls, cfg):
        return {"SOURCES": ["dense"]}

    def spec(self):
        return super().spec() | {"dense_logits": ShapeSpec(channels=self.model.num_classes)}

    def attach(self, stack, signals, names):
        super().attach(stack, signals, names)
        if "dense_logits" in names:
            hook(stack, self.model.head, lambda _, output: signals.update(dense_logits=output[0]))

    def run(self, features, names, student):
        if "dense_logits" in names:
            self.model.head(list(features.values()))
