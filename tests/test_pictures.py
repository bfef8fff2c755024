"""Tests pictures: hits, false detections and misses in their colours, masks, labels and titles."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from matplotlib.colors import to_rgb

from kd_det.engine.matching import OperatingPoint
from kd_det.engine.picture_grid import Mark, Scene, as_pixels, draw_grid, overlay_masks, printable
from kd_det.engine.pictures import CELL, FALSE, HIT, MISSED, OBJECT, Choice, draw_attention, draw_detections

NAMES = ["ant", "bee"]
LEFT, RIGHT = (10, 10, 40, 50), (60, 20, 90, 55)


def choice(threshold: float = 0.0, note: str = "") -> Choice:
    return Choice(OperatingPoint(threshold, 0.5), note)


@pytest.fixture
def image(tmp_path):
    """A grey image with an ant at the left and a bee at the right."""
    path = str(tmp_path / "grey.png")
    cv2.imwrite(path, np.full((64, 96, 3), 128, np.uint8))
    boxes = enumerate((LEFT, RIGHT))
    annotations = [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": i} for i, box in boxes]
    return {"file_name": path, "annotations": annotations}


def detections(*found, masks: bool = False) -> Instances:
    """Detections from (box, class, score), with the box as the mask if asked for."""
    instances = Instances((64, 96))
    instances.pred_boxes = Boxes(torch.tensor([box for box, *_ in found], dtype=torch.float32).reshape(-1, 4))
    instances.pred_classes = torch.tensor([number for _, number, _ in found], dtype=torch.int64)
    instances.scores = torch.tensor([score for *_, score in found])
    if masks:
        instances.pred_masks = torch.zeros(len(found), 64, 96, dtype=torch.bool)
        for mask, ((x0, y0, x1, y1), *_) in zip(instances.pred_masks, found, strict=True):
            mask[y0:y1, x0:x1] = True
    return instances


def cells(figure) -> list[np.ndarray]:
    """The pixels of each image of a picture, row by row."""
    pixels = as_pixels(figure)[::-1]
    boxes = [axis.get_window_extent() for axis in figure.axes]
    return [pixels[round(box.y0) : round(box.y1), round(box.x0) : round(box.x1)][::-1] for box in boxes]


def styles(cell: np.ndarray) -> set[str]:
    """Names of the kinds of boxes that are seen in an image."""

    def is_seen(style) -> bool:
        return (cell == np.round(255 * np.array(to_rgb(style.color))).astype(np.uint8)).all(axis=2).sum() > 50

    return {style.name for style in (OBJECT, HIT, FALSE, MISSED) if is_seen(style)}


@pytest.mark.parametrize(
    ("found", "threshold", "kinds", "caption"),
    [
        ([(LEFT, 0, 0.9), (RIGHT, 1, 0.8)], 0.5, {"hit"}, "2 hit, 0 false, 0 missed"),
        ([(LEFT, 0, 0.9), (RIGHT, 1, 0.4)], 0.5, {"hit", "missed"}, "1 hit, 0 false, 1 missed"),
        ([((1, 1, 8, 8), 0, 0.9), (RIGHT, 0, 0.8)], 0.5, {"false", "missed"}, "0 hit, 2 false, 2 missed"),
        ([], 0.5, {"missed"}, "0 hit, 0 false, 2 missed"),
    ],
)
def test_colours_show_hits_false_detections_and_misses(image, found, threshold, kinds, caption):
    figure = draw_detections([image], NAMES, {"run": [detections(*found)]}, {"run": choice(threshold)})
    truth, run = cells(figure)
    assert styles(truth) == {"object"}
    assert styles(run) == kinds
    assert [axis.get_xlabel() for axis in figure.axes] == ["grey.png, objects: 2", caption]


def test_kinds_of_boxes_differ_without_colour():
    kinds = [HIT, FALSE, MISSED]
    assert len({style.line for style in kinds}) == len({style.symbol for style in kinds}) == 3


def test_crowds_are_not_drawn(image):
    image["annotations"][1]["iscrowd"] = 1
    figure = draw_detections([image], NAMES, {"run": [detections((LEFT, 0, 0.9), (RIGHT, 1, 0.8))]}, {"run": choice()})
    assert [axis.get_xlabel() for axis in figure.axes] == ["grey.png, objects: 1", "1 hit, 0 false, 0 missed"]


def test_every_column_has_a_title_with_its_threshold(image):
    found = [detections((LEFT, 0, 0.9))]
    choices = {"plain": choice(0.25, ", AP 40.00"), "$\\frac{x$\n|": choice(0.75)}
    figure = draw_detections([image], NAMES, {"plain": found, "$\\frac{x$\n|": found}, choices)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [
        "ground truth",
        "plain\nscore ≥ 0.25: F1 50.00, AP 40.00",
        "$\\frac{x$ |\nscore ≥ 0.75: F1 50.00",
    ]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["object", "✓ hit", "✗ false", "○ missed"]
    assert as_pixels(figure).shape[1] == 3 * CELL
    maps = {"student": [np.zeros((4, 4))]}
    assert [axis.get_title() for axis in draw_attention([np.zeros((4, 4, 3), np.uint8)], maps).axes] == [
        "image",
        "student",
    ]


def texts(figure, column: int) -> list[str]:
    return [text.get_text() for text in figure.axes[column].texts]


def test_labels_of_boxes(image):
    """The name of the only class says nothing, and that of a class that is not labelled is not known."""
    found = {"run": [detections((LEFT, 0, 0.9), (RIGHT, 0, 0.8), ((1, 1, 9, 9), 2, 0.7))]}
    figure = draw_detections([image], NAMES, found, {"run": choice()})
    assert texts(figure, 0) == ["ant", "bee"]
    assert texts(figure, 1) == ["✓ ant 90%", "✗ ant 80%", "○ bee"]
    figure = draw_detections([image], ["x" * 100, "bee"], found, {"run": choice()})
    assert texts(figure, 0)[0] == "x" * 19 + "…"
    image["annotations"][1] |= {"category_id": 0, "bbox": (70, 0, 90, 9)}
    figure = draw_detections([image], ["ant"], found, {"run": choice()})
    assert texts(figure, 0) == []
    assert texts(figure, 1) == ["✓ 90%", "✗ 80%"]


def test_each_mask_has_its_own_colour(image):
    """Also two of one class."""
    found = detections((LEFT, 0, 0.9), (RIGHT, 0, 0.8), masks=True)
    for annotation in image["annotations"]:
        x0, y0, x1, y1 = annotation["bbox"]
        annotation["segmentation"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
    image["annotations"].append(image["annotations"][0] | {"segmentation": []})
    figure = draw_detections([image], NAMES, {"run": [found]}, {"run": choice()})
    for cell in cells(figure):
        scale = cell.shape[1] / 96
        left, right, beside = (
            cell[round(scale * y), round(scale * x)].tolist() for x, y in ((25, 40), (75, 45), (50, 5))
        )
        assert beside == [128] * 3
        assert left != beside
        assert right not in (left, beside)


@pytest.mark.parametrize(("width", "shape"), [(400, (100, 200)), (100, (50, 100))])
def test_masks_on_large_images(width, shape):
    mask = np.zeros((100, 200), bool)
    mask[:, :100] = True
    found = overlay_masks(np.full((100, 200, 3), 7, np.uint8), [None, mask], width)
    assert found.shape[:2] == shape
    middle = shape[1] // 2
    assert (found[:, middle:] == 7).all()
    assert (found[:, :middle] == found[0, 0]).all()
    assert found[0, 0].tolist() != [7] * 3


@pytest.mark.parametrize("shape", [(24, 32), (600, 800), (30, 600), (600, 30)])
def test_boxes_and_labels_stay_inside_and_labels_do_not_overlap(shape):
    height, width = shape
    rng = np.random.default_rng(0)
    corners = rng.uniform(-0.1, 1.1, (60, 2, 2)) * (width, height)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    marks = [Mark(box, HIT, f"✓ name {i}") for i, box in enumerate(boxes)]
    figure = draw_grid(["a", "b"], [[Scene(np.full((*shape, 3), 90, np.uint8), marks)] * 2], 300)
    pixels = as_pixels(figure).copy()
    for axis in figure.axes:
        image = axis.get_window_extent()
        places = [text.get_window_extent() for text in axis.texts]
        assert all(
            image.padded(0.5).contains(*place.min) and image.padded(0.5).contains(*place.max) for place in places
        )
        assert not any(a.overlaps(b) for i, a in enumerate(places) for b in places[:i])
        rows = slice(len(pixels) - int(image.y1) - 2, len(pixels) - int(image.y0) + 2)
        pixels[rows, int(image.x0) - 1 : int(image.x1) + 2] = 255
    is_colored = np.ptp(pixels, axis=2) > 30  # Titles are grey.
    assert not is_colored.any()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n b\tc", "a b c"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\ud800", "\\ud800"),
        ("a\u2028b", "a b"),
        ("日本 é", "日本 é"),
    ],
)
def test_text_is_printable_and_on_one_line(text, line):
    assert printable(text) == line
