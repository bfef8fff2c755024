"""Pictures of several models on the same images: what they predict, and where they look."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.structures import BoxMode, Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from kd_det.data.images import read_image
from kd_det.files import write_whole

CELL = 640  # least width of an image in the picture of detections, in pixels
SMALL_CELL = 200  # width in the picture of classifications
DPI = 100
FONT_SIZE = 10


@dataclass(frozen=True)
class Words:
    """A cell of the grid that has no image."""

    text: str
    color: str = "black"


def draw_detections(
    images: Sequence[dict],
    class_names: Sequence[str],
    predictions: Mapping[str, Sequence[Instances]],
    threshold: float,
) -> Figure:
    """A grid: one row per image, the ground truth in the first column, then one column per detector.

    Args:
        images: Detectron2's dicts of the images.
        class_names: Names of the classes; each has one colour in all columns.
        predictions: Name of a detector to its instances on each image.
        threshold: Least score of the instances that are drawn.
    """
    palette = class_colors(len(class_names))
    masks = any(found.has("pred_masks") for column in predictions.values() for found in column)
    rows = []
    for i, image in enumerate(images):
        pixels = read_image(image["file_name"], "RGB")
        cells = [draw_truth(pixels, image["annotations"], class_names, palette, masks=masks)]
        for found in predictions.values():
            cells.append(draw_found(pixels, found[i][found[i].scores >= threshold], class_names, palette))
        rows.append(cells)
    return draw_grid(["ground truth", *predictions], rows, CELL)


def draw_classifications(
    images: Sequence[dict], class_names: Sequence[str], predictions: Mapping[str, Sequence[Tensor]]
) -> Figure:
    """A grid: one row per image, its label beside it, then one column per classifier.

    In a classifier's column stand its most probable class, green where it is the label and red where not, and the
    probability.

    Args:
        images: Dicts with `label`, and with `image` (H, W, 3) as RGB or its `file_name`.
        class_names: Names of the classes; of those that have none the index is shown.
        predictions: Name of a classifier to its scores (K,) of each image.
    """
    names = dict(enumerate(class_names))
    rows = []
    for i, image in enumerate(images):
        pixels = image["image"] if "image" in image else read_image(image["file_name"], "RGB")
        label = image["label"]
        cells = [pixels, Words(str(names.get(label, label)))]
        for scores in predictions.values():
            found = scores[i].argmax().item()
            color = "green" if found == label else "red"
            cells.append(Words(f"{names.get(found, found)}\n{scores[i][found]:.0%}", color))
        rows.append(cells)
    return draw_grid(["", "label", *predictions], rows, SMALL_CELL)


def draw_attention(images: Sequence[np.ndarray], maps: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """A grid: one row per image, which stands in the first column, then one column per network with its map over it.

    Args:
        images: RGB, uint8 (H, W, 3).
        maps: Name of a network to its map of each image, (H, W), from 0, blue, to 1, red.
    """
    rows = [
        [pixels, *(overlay(pixels, found) for found in row)]
        for pixels, *row in zip(images, *maps.values(), strict=True)
    ]
    width = max(SMALL_CELL, min(CELL // 2, max(pixels.shape[1] for pixels in images)))
    return draw_grid(["", *maps], rows, width)


def overlay(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of an image (H, W, 3) and the colours of values (H, W) from 0 to 1."""
    return ((pixels + 255 * colormaps["jet"](values)[..., :3]) / 2).astype(np.uint8)


def draw_grid(titles: Sequence[str], rows: Sequence[Sequence[np.ndarray | Words]], width: int) -> Figure:
    """Rows of cells, each column with a title and `width` pixels wide; a row begins with an image."""
    heights = [row[0].shape[0] / row[0].shape[1] for row in rows]
    size = len(titles) * width / DPI, sum(heights) * width / DPI + 0.5
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, row_axes in zip(rows, axes, strict=True):
        for cell, axis in zip(row, row_axes, strict=True):
            axis.set_axis_off()
            if isinstance(cell, Words):
                axis.text(0.5, 0.5, cell.text, color=cell.color, fontsize=1.4 * FONT_SIZE, ha="center", va="center")
            else:
                axis.imshow(cell)
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title, fontsize=max(FONT_SIZE, width / 32))
    return figure


def save(figure: Figure, path: str) -> None:
    """Write a picture as PNG, in one piece."""
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def as_pixels(figure: Figure) -> np.ndarray:
    """A picture as RGB, uint8 (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def draw_truth(
    pixels: np.ndarray, annotations: list[dict], class_names: Sequence[str], palette: list, *, masks: bool
) -> np.ndarray:
    """An image with its annotated objects, their masks if asked for and there; crowds are left out."""
    kept = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
    classes = [annotation["category_id"] for annotation in kept]
    boxes = [BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS) for annotation in kept]
    masks = masks and all("segmentation" in annotation for annotation in kept)
    return _draw(
        pixels,
        boxes=np.asarray(boxes, dtype=float).reshape(-1, 4),
        masks=[annotation["segmentation"] for annotation in kept] if masks else None,
        labels=[class_names[c] for c in classes],
        colors=[palette[c] for c in classes],
    )


def draw_found(pixels: np.ndarray, found: Instances, class_names: Sequence[str], palette: list) -> np.ndarray:
    """An image with a detector's instances and their scores."""
    classes = found.pred_classes.tolist()
    return _draw(
        pixels,
        boxes=found.pred_boxes.tensor.numpy(),
        masks=found.pred_masks.numpy() if found.has("pred_masks") else None,
        labels=[f"{class_names[c]} {score:.0%}" for c, score in zip(classes, found.scores.tolist(), strict=True)],
        colors=[palette[c] for c in classes],
    )


def class_colors(count: int) -> list[np.ndarray]:
    """One colour per class from Detectron2's palette, dark ones left out, repeated where the classes are many."""
    palette = [color for color in colormap(rgb=True, maximum=1) if color.max() > 0.6]
    return [palette[i % len(palette)] for i in range(count)]


def _draw(pixels: np.ndarray, boxes: np.ndarray, masks: Any, labels: list[str], colors: list) -> np.ndarray:
    scale = max(1.0, CELL / pixels.shape[1])
    visualizer = Visualizer(pixels, scale=scale)
    visualizer.overlay_instances(boxes=boxes, masks=masks, assigned_colors=colors)
    # Labels of small objects would be tiny.
    for (x, y, *_), label in zip(boxes, labels, strict=True):
        visualizer.draw_text(label, (x, y), font_size=FONT_SIZE / scale, color="w", horizontal_alignment="left")
    return visualizer.output.get_image()
