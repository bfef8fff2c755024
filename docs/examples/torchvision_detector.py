"""Lets torchvision's Faster R-CNN teach: the model with its classes and normalisation, and the tap that reads it."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn
from torchvision.models import detection

from kd_det import TAP_REGISTRY
from kd_det.taps import BackboneTap, hook

CREATE = detection.fasterrcnn_resnet50_fpn_v2
COCO = detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]  # With the background and gaps.


class Pyramid(Backbone):
    def __init__(self, net):
        super().__init__()
        self.__dict__["net"] = net  # The detector holds it already; a second name would be a second key of its weights.

    def forward(self, images):
        return {f"p{i}": x for i, x in enumerate(self.net(images).values(), start=2)}

    def output_shape(self):
        return {f"p{i}": ShapeSpec(channels=self.net.out_channels, stride=2**i) for i in range(2, 7)}

    size_divisibility = 32


@META_ARCH_REGISTRY.register()
class TorchvisionDetector(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        names = COCO if count == 80 else ["background", *map(str, range(count))]
        self.columns = [*(i for i, name in enumerate(names) if i and name != "N/A"), 0]  # Here the background is last.
        self.net = CREATE(weights=None, weights_backbone=None, num_classes=len(names))
        self.backbone = Pyramid(self.net.backbone)
        for key in ("mean", "std"):  # torchvision's are for images in [0, 1].
            values = 255 * torch.tensor(getattr(self.net.transform, f"image_{key}")).view(3, 1, 1)
            self.register_buffer(f"pixel_{key}", values, persistent=False)
        self.to(cfg.MODEL.DEVICE)

    def preprocess_image(self, batch):
        images = [(x["image"].to(self.pixel_mean) - self.pixel_mean) / self.pixel_std for x in batch]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def forward(self, batch):
        found = self.net([x["image"].to(self.pixel_mean) / 255 for x in batch])
        return [{"instances": self.instances(*pair)} for pair in zip(found, batch, strict=True)]

    def instances(self, x, inputs):
        index = x["labels"].new_tensor([self.columns.index(i) if i in self.columns else -1 for i in x["labels"]])
        fields = {"pred_boxes": Boxes(x["boxes"]), "scores": x["scores"], "pred_classes": index}
        found = Instances(inputs["image"].shape[1:], **fields)
        return detector_postprocess(found[found.pred_classes >= 0], inputs["height"], inputs["width"])


@TAP_REGISTRY.register()
class TorchvisionDetectorTap(BackboneTap):
    def spec(self):
        return super().spec() | {"roi_logits": ShapeSpec(channels=len(self.model.columns))}

    def attach(self, stack, signals, names):
        super().attach(stack, signals, names)
        predictor, columns = self.model.net.roi_heads.box_predictor, self.model.columns
        if "roi_logits" in names:
            hook(stack, predictor, lambda _, out: signals.update(roi_logits=out[0][:, columns]))

    def run(self, features, names, student):
        if "roi_logits" in names:
            heads, boxes, images = self.model.net.roi_heads, student["roi_boxes"], len(features["p2"])
            size = tuple(4 * side for side in features["p2"].shape[2:])
            maps = dict(zip("0123", features.values(), strict=False))
            boxes = [boxes[boxes[:, 0] == i, 1:] for i in range(images)]
            heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, [size] * images)))
