"""Mutations of a COCO file, and what a training and an evaluation with perfect detections make of one."""

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from kd_det.data import DetectionMapper, check_annotations, check_files, check_num_classes, register_datasets
from kd_det.data.datasets import load_training_images
from kd_det.engine.evaluation import build_evaluator, check_evaluation

VALUES = [
    *(None, True, False, 0, 1, 2, -1, 7, 1.0, 1.5, -0.0, 2**63, 10**400, 1e308, -1e308, 1e-300),
    *(math.nan, math.inf, -math.inf, "", "0", "1", "1.5", "text", "\ud800", "a\x00b", "../1.png", "x" * 5000),
    *([], {}, [[]], [{}], [1, 2], [1.5, 2, 3, 4, 5], [[1, 2, 3, 4, 5, 6]], [math.nan] * 6, [[math.inf] * 8], ["a"] * 4),
    *({"size": [64, 96], "counts": [10, 20, 6114]}, {"size": [64, 96], "counts": [-math.inf]}, {"counts": "~~~~~"}),
    *({"size": [1e9, 1e9], "counts": "Pl1"}, {"size": "ab", "counts": [1]}, {"a": 1}),
]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutate(data: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """Return a copy of a COCO file's content with one to three things changed, removed, doubled or wrapped."""
    data = copy.deepcopy(data)
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        everywhere = list(places(data))
        if not everywhere:
            break
        *parents, last = generator.choice(everywhere)
        parent = data
        for key in parents:
            parent = parent[key]
        kind = generator.random()
        if kind < 0.6:
            parent[last] = copy.deepcopy(generator.choice(VALUES))
        elif kind < 0.75:
            del parent[last]
        elif kind < 0.85:
            parent[last] = [parent[last]]
        elif kind < 0.95 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        else:
            parent[last] = str(parent[last])
    return data


def define(cfg: CfgNode, path: Path, images: Path) -> str:
    """Register a COCO file as the data set of training and test; its name is its path."""
    name = str(path)
    cfg.DATASETS.COCO_FORMAT[name] = CfgNode({"JSON": name, "IMAGE_ROOT": str(images)})
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    register_datasets(cfg)
    return name


def use(cfg: CfgNode, name: str) -> dict[str, Any]:
    """Do with a data set what a run does but for the model; returns what its evaluation says of perfect detections."""
    check_files(cfg)
    check_num_classes(cfg)
    check_evaluation(cfg)
    check_annotations(cfg)
    mapper = DetectionMapper(cfg, is_train=True)
    for record in load_training_images(cfg):
        mapper(record)
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [{"instances": perfect_detections(record, masks=cfg.MODEL.MASK_ON)}])
    return evaluator.evaluate()


def perfect_detections(record: dict[str, Any], *, masks: bool = False) -> Instances:
    """Return the objects of an image as a detector would find them; masks are the boxes'."""
    things = record["annotations"]
    found = Instances((record["height"], record["width"]))
    boxes = [BoxMode.convert(thing["bbox"], thing["bbox_mode"], BoxMode.XYXY_ABS) for thing in things]
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.pred_classes = torch.tensor([thing["category_id"] for thing in things], dtype=torch.int64)
    found.scores = torch.full((len(things),), 0.9)
    if masks:
        found.pred_masks = torch.zeros(len(things), *found.image_size, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(found.pred_masks, boxes, strict=True):
            mask[round(y0) : round(y1), round(x0) : round(x1)] = True
    return found


def forget(name: str) -> None:
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path
