"""Lets torchvision's Faster R-CNN teach: the model with its classes and normalisation, and the tap that reads it."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torchvision.models import detection

from kd_det import TAP_REGISTRY
from kd_det.taps import BackboneTap, ForeignBackbone, hook

CREATE = detection.fasterrcnn_resnet50_fpn_v2
COCO = detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]  # With the background and gaps.


@META_ARCH_REGISTRY.register()
class TorchvisionDetector(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        names = COCO if count == 80 else ["background", *map(str, range(count))]
        self.columns = [*(i for i, name in enumerate(names) if i and name != "N/A"), 0]  # Here the background is last.
        self.net = CREATE(weights=None, weights_backbone=None, num_classes=len(names)).to(cfg.MODEL.DEVICE)
        shapes = {f"p{i}": ShapeSpec(channels=self.net.backbone.out_channels, stride=2**i) for i in range(2, 7)}
        self.backbone = ForeignBackbone(lambda images: self.net.backbone(images).values(), shapes)

    def preprocess_image(self, batch):  # torchvision's statistics are those of RGB in [0, 1].
        images = [self.net.transform.normalize(x["image"].to(next(self.parameters())) / 255) for x in batch]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def forward(self, batch):
        found = self.net([x["image"].to(next(self.parameters())) / 255 for x in batch])
        return [{"instances": self.translate(*pair)} for pair in zip(found, batch, strict=True)]

    def translate(self, found, inputs):
        classes = torch.tensor([self.columns.index(i) if i in self.columns else -1 for i in found["labels"]])
        fields = {"pred_boxes": Boxes(found["boxes"]), "scores": found["scores"], "pred_classes": classes}
        instances = Instances(inputs["image"].shape[1:], **fields)[classes >= 0]
        return detector_postprocess(instances, inputs["height"], inputs["width"])


@TAP_REGISTRY.register()
class TorchvisionDetectorTap(BackboneTap):
    def spec(self):
        return super().spec() | {"roi_logits": ShapeSpec(channels=len(self.model.columns))}

    def attach(self, stack, signals, names):
        super().attach(stack, signals, names)
        predictor, columns = self.model.net.roi_heads.box_predictor, self.model.columns
        hook(stack, predictor, lambda _, out: signals.update(roi_logits=out[0][:, columns]))

    def run(self, features, names, student):
        if "roi_logits" in names:
            heads, boxes, images = self.model.net.roi_heads, student["roi_boxes"], len(features["p2"])
            size = tuple(4 * side for side in features["p2"].shape[2:])
            maps = dict(zip("0123", features.values(), strict=False))
            boxes = [boxes[boxes[:, 0] == i, 1:] for i in range(images)]
            heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, [size] * images)))
