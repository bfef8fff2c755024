"""Draws pictures during a run, which show where student and teacher look and what they predict."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data import detection_utils as utils
from detectron2.engine import HookBase
from detectron2.structures import Instances
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd_det.classification import ImageClassifier
from kd_det.classification.image_mapper import ClassificationMapper
from kd_det.config import student_config
from kd_det.data import DetectionMapper, choose_images, class_names
from kd_det.data.loader import own_random_numbers
from kd_det.engine.matching import match, operating_point
from kd_det.engine.picture_grid import as_pixels
from kd_det.engine.pictures import Choice, draw_attention, draw_classifications, draw_detections
from kd_det.losses import attention_map
from kd_det.mutual import evaluation_mode
from kd_det.signals import flipped
from kd_det.taps import build_tap, describe_model
from kd_det.wrapper import StudentWrapper, as_wrapper

IMAGES = 2


class Visualization(HookBase):
    """Puts pictures into the event storage, at the iterations at which Detectron2's models put theirs.

    There is one picture such as ``attention/p3`` for each feature map that a head compares; it shows where the map is
    active, as attention transfer measures it, in all networks side by side. The picture ``predictions`` shows the
    ground truth and the predictions of the networks; detectors show the instances above the score that gives the best
    F1 on these images. A teacher whose classes are compared by name is shown with those that the student shares; any
    other teacher with another number of classes is left out.

    The images are the same each time, so that they can be followed over the run. They are taken from the first test
    set, or from the first training set if there is no test set, and read as in a test. Images of the last batch would
    change with every picture and be cropped and flipped.

    The networks run once more for this, in evaluation mode, without gradients and without the DDP wrapper, so only one
    process needs this hook. The run's weights, statistics and random numbers are the same as without it.

    Args:
        cfg: The run's config.
        model: The run's model, without the DDP wrapper.
    """

    def __init__(self, cfg: CfgNode, model: StudentWrapper):
        self.period = cfg.VIS_PERIOD
        self.cfg = student_config(cfg)
        self.model = model
        self.networks = model.networks(cfg)
        specs = [build_tap(network.model).spec() for network in self.networks]
        # The output of a ReLU is shown instead of its input.
        compared = {name.removesuffix("_preact") for name in model.compared}
        maps = compared.intersection(*specs)
        # The strides of each map, in the order of the networks.
        self.strides = {
            name: [spec[name].stride for spec in specs]
            for name, shape in specs[0].items()
            if shape.stride and name in maps
        }
        self.dataset = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)[0]

    @cached_property
    def records(self) -> list[dict]:
        return choose_images(DatasetCatalog.get(self.dataset), IMAGES)

    def after_step(self) -> None:
        if self.trainer.iter % self.period:
            return
        with own_random_numbers(0), evaluation_mode(self.model), torch.no_grad():
            for name, picture in self._draw().items():
                self.trainer.storage.put_image(name, as_pixels(picture).transpose(2, 0, 1))

    def _draw(self) -> dict[str, Figure]:
        student = self.model.students[0]
        device = next(student.parameters()).device
        classifies = isinstance(student, ImageClassifier)
        kind = "scores" if classifies else "instances"
        mapper = (ClassificationMapper if classifies else DetectionMapper)(self.cfg, is_train=False)
        inputs = [mapper(record) for record in self.records]
        images = [utils.convert_image_to_rgb(x["image"].permute(1, 2, 0), self.cfg.INPUT.FORMAT) for x in inputs]
        maps: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in self.strides}
        predictions = {}
        for i, network in enumerate(self.networks):
            half = network.dtype not in (None, torch.float32)
            autocast = torch.autocast(device.type, dtype=network.dtype, enabled=half)
            with build_tap(network.model).record(maps) as signals, autocast:
                outputs = network.model.to(device)(flipped(inputs) if network.flip_channels else inputs)
            for name, strides in self.strides.items():
                sizes = [image.shape[:2] for image in images]
                maps[name][network.title] = attention_maps(signals[name], strides[i], sizes)
            if network.classes is not None:
                outputs = network.classes.translate(outputs)
            elif describe_model(network.model) != describe_model(student):
                continue
            if kind in outputs[0]:
                predictions[network.title] = [x[kind].to("cpu") for x in outputs]
        pictures = {f"attention/{name}": draw_attention(images, columns) for name, columns in maps.items()}
        # A data set for semantic segmentation alone has no objects to draw.
        if predictions and (classifies or all("annotations" in record for record in self.records)):
            shown = self.records, class_names(self.dataset), predictions
            pictures["predictions"] = draw_classifications(*shown) if classifies else self._draw_detections(*shown)
        return pictures

    @staticmethod
    def _draw_detections(records: list[dict], names: list[str], predictions: dict[str, list[Instances]]) -> Figure:
        truth = [record["annotations"] for record in records]
        choices = {}
        for title, instances in predictions.items():
            matches = match(list(zip(truth, instances, strict=True)), classes=len(names))
            choices[title] = Choice(operating_point(matches), " on these images")
        return draw_detections(records, names, predictions, choices)


def build_visualization(cfg: CfgNode, model: nn.Module) -> list[HookBase]:
    """Builds the hook if VIS_PERIOD is set and the model has several networks to compare; returns no hook otherwise."""
    wrapper = as_wrapper(model)
    if cfg.VIS_PERIOD > 0 and len(wrapper.networks(cfg)) > 1:
        return [Visualization(cfg, wrapper)]
    return []


def attention_maps(feature: Tensor, stride: int, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Computes where a network is active in each image: maps (height, width) with a maximum of 1.

    Args:
        feature: Feature map of a batch, (N, C, H, W), whose images are padded on the right and at the bottom.
        stride: Pixels per cell.
        sizes: Height and width of each image in pixels.
    """
    maps = attention_map(feature).view(-1, 1, *feature.shape[2:])
    # The last cell may be missing if the images do not fill it.
    largest = np.max(sizes, axis=0).tolist()
    covered = [max(stride * cells, pixels) for cells, pixels in zip(feature.shape[2:], largest, strict=True)]
    maps = F.interpolate(maps, size=covered, mode="bilinear")[:, 0]
    cropped = [heat[:height, :width] for heat, (height, width) in zip(maps, sizes, strict=True)]
    return [(heat / heat.max().clamp(min=1e-12)).cpu().numpy() for heat in cropped]
