"""Lets a one-stage detector in a TorchScript file teach: its classes and normalisation, the model, and its tap.

The file's module maps normalised RGB images (N, 3, H, W) to maps, class logits (N, cells, K) and boxes (N, cells, 4).
"""

import torch
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances

from kd_det import TAP_REGISTRY
from kd_det.taps import BackboneTap, ForeignBackbone, hook

CLASSES = ("person", "bicycle", "car")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # Of RGB in [0, 1].
LEVELS = {"p3": ShapeSpec(channels=16, stride=8), "p4": ShapeSpec(channels=16, stride=16)}


@META_ARCH_REGISTRY.register()
class TorchScriptTeacher(torch.nn.Module):
    loads_weights, class_names = True, CLASSES

    def __init__(self, cfg):
        super().__init__()
        self.net = torch.nn.Sequential(torch.jit.load(cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE))  # Sequential takes hooks.
        self.backbone = ForeignBackbone(lambda images: self.net(images)[0], LEVELS)
        strides = [shape.stride for shape in LEVELS.values()]
        anchors = {"sizes": [[x] for x in strides], "aspect_ratios": [[1.0]], "offset": 0.5}  # One square per cell.
        self.anchor_generator = DefaultAnchorGenerator(strides=strides, **anchors)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values, device=cfg.MODEL.DEVICE).view(3, 1, 1), persistent=False)

    def preprocess_image(self, batch):
        images = [(x["image"].to(self.mean) / 255 - self.mean) / self.std for x in batch]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def forward(self, batch):
        images = self.preprocess_image(batch)
        _, logits, boxes = self.net(images.tensor)
        found = zip(logits.sigmoid(), boxes, images.image_sizes, batch, strict=True)
        return [{"instances": self.detect(*x)} for x in found]

    def detect(self, scores, boxes, size, inputs):
        scores, index = scores.flatten().topk(min(1000, scores.numel()))
        boxes, classes = boxes[index // len(CLASSES)], index % len(CLASSES)
        best = batched_nms(boxes, scores, classes, 0.5)[:100]
        found = Instances(size, pred_boxes=Boxes(boxes[best]), scores=scores[best], pred_classes=classes[best])
        return detector_postprocess(found, inputs["height"], inputs["width"])


@TAP_REGISTRY.register()
class TorchScriptTeacherTap(BackboneTap):
    def spec(self):
        return super().spec() | {"dense_logits": ShapeSpec(channels=len(CLASSES))}

    def attach(self, stack, signals, names):
        super().attach(stack, signals, names)
        hook(stack, self.model.net, lambda _, output: signals.update(dense_logits=output[1]))
