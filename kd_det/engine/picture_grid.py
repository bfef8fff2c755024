"""Draws a grid of cells, which show text or an image with marked boxes, masks and labels."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from detectron2.utils.visualizer import GenericMask
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

from kd_det.errors import one_line
from kd_det.files import write_whole

DPI = 100
FONT_SIZE = 10
LABEL_SIZE = 8
WORDS_SIZE = 14
LINE_WIDTH, HALO_WIDTH = 3 * 72 / DPI, 5 * 72 / DPI  # Both are odd numbers of pixels, so both are centred.
RATIOS = (0.25, 1.5)  # These limit a row's height relative to the column width.
MASK_OPACITY = 0.45
SHADES = (0, 0.5, 0.25, 0.75)  # These shares of white tell the masks of one kind apart.
LETTER = 0.62  # This is the mean width of a letter relative to the font size.


@dataclass(frozen=True)
class Style:
    """Defines the look of a kind of box; its line and symbol distinguish it even without the colour."""

    name: str
    color: str
    line: str
    symbol: str = ""

    def label(self, text: str) -> str:
        """Returns a label that begins with the symbol."""
        return f"{self.symbol} {text}".strip()


@dataclass(frozen=True)
class Mark:
    """Holds a box (x0, y0, x1, y1) in pixels of an image, its label, its mask in a form that GenericMask reads, and its
    class.
    """

    box: Sequence[float]
    style: Style
    label: str = ""
    mask: Any = None
    category: int = -1


@dataclass(frozen=True)
class Scene:
    """Describes a cell with an image, RGB (H, W, 3), marks on it and a line of text below it."""

    pixels: np.ndarray
    marks: Sequence[Mark] = ()
    caption: str = ""


@dataclass(frozen=True)
class Words:
    """Describes a cell with text instead of an image."""

    text: str
    color: str = "black"


def draw_grid(
    titles: Sequence[str],
    rows: Sequence[Sequence[np.ndarray | Scene | Words]],
    width: int,
    *,
    legend: Sequence[Style] = (),
) -> Figure:
    """Draws rows of cells; each row begins with an image.

    Args:
        titles: The title of each column; long lines are wrapped.
        rows: The cells of each row.
        width: Width of each column in pixels.
        legend: Styles of boxes to explain above the titles.
    """
    cells = [[Scene(cell) if isinstance(cell, np.ndarray) else cell for cell in row] for row in rows]
    size = max(FONT_SIZE, width / 40)
    titles = [wrap(title, width, size) for title in titles]
    heights = [width * row_ratio(row) / DPI for row in cells]
    lines = 1 + max(title.count("\n") for title in titles) + 2 * bool(legend)
    extra = lines * size + 2 * FONT_SIZE * len(rows)
    layout = ConstrainedLayoutEngine(h_pad=0.1)
    figure = Figure((len(titles) * width / DPI, sum(heights) + extra / 72), dpi=DPI, layout=layout)
    axes = figure.subplots(len(rows), len(titles), squeeze=False, gridspec_kw={"height_ratios": heights})
    if legend:
        draw_legend(figure, legend, size)
    for i, (row, row_axes) in enumerate(zip(cells, axes, strict=True)):
        for title, cell, axis in zip(titles, row, row_axes, strict=True):
            draw_cell(axis, cell, title if i == 0 else "", size)
    FigureCanvasAgg(figure)  # Attaching a canvas makes it possible to measure text.
    figure.draw_without_rendering()  # Labels can be placed only after everything else has been.
    figure.set_layout_engine("none")
    for row, row_axes in zip(cells, axes, strict=True):
        for cell, axis in zip(row, row_axes, strict=True):
            if isinstance(cell, Scene):
                place_labels(axis, cell.marks)
    return figure


def row_ratio(row: Sequence[Scene | Words]) -> float:
    """Returns the height of a row relative to the width of a column; the image in its first cell decides."""
    first = row[0]
    assert isinstance(first, Scene)
    height, width = first.pixels.shape[:2]
    return min(max(height / width, RATIOS[0]), RATIOS[1])


def draw_legend(figure: Figure, styles: Sequence[Style], size: float) -> None:
    """Explains styles of boxes above all titles."""
    lines = [Line2D([], [], color=x.color, ls=x.line, lw=LINE_WIDTH, label=x.label(x.name)) for x in styles]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(styles), fontsize=size, handlelength=3)


def draw_cell(axis: Axes, cell: Scene | Words, title: str, size: float) -> None:
    """Draws a cell without its labels."""
    axis.set(xticks=[], yticks=[], anchor="N")
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=size, parse_math=False)
    if isinstance(cell, Words):
        text = wrap(cell.text, axis.get_window_extent().width, WORDS_SIZE)
        place = {"ha": "center", "va": "center"}
        axis.text(0.5, 0.5, text, place, color=cell.color, fontsize=WORDS_SIZE, in_layout=False, parse_math=False)
        return
    height, width = cell.pixels.shape[:2]
    axis.set_xlabel(cell.caption, fontsize=FONT_SIZE, parse_math=False)
    masks, colors = [mark.mask for mark in cell.marks], [mark.style.color for mark in cell.marks]
    pixels = overlay_masks(cell.pixels, masks, 2 * round(axis.get_window_extent().width), colors)
    axis.imshow(pixels, extent=(0, width, height, 0))
    for mark in cell.marks:
        x0, y0, x1, y1 = mark.box
        box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, linewidth=LINE_WIDTH)
        box.set(edgecolor=mark.style.color, linestyle=mark.style.line)
        box.set_path_effects([patheffects.withStroke(linewidth=HALO_WIDTH, foreground="black")])
        axis.add_patch(box)


def overlay_masks(
    pixels: np.ndarray, masks: Sequence[Any], width: int, colors: Sequence[str] | None = None
) -> np.ndarray:
    """Overlays each mask that is not None on an image, in its own translucent shade of a colour.

    Args:
        pixels: The image, RGB (H, W, 3).
        masks: Masks (H, W) in forms that GenericMask reads.
        width: Width to which a larger image is reduced.
        colors: The colour of each mask; None means white.
    """
    shape = pixels.shape[:2]
    scale = min(1, width / shape[1])
    size = [max(1, round(scale * side)) for side in reversed(shape)]
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    for i, mask in enumerate(masks):
        if mask is not None:
            small = cv2.resize(GenericMask(mask, *shape).mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
            inside = small.astype(bool)
            white = SHADES[i % len(SHADES)]
            shade = 255 * (white + (1 - white) * np.array(to_rgb(colors[i] if colors else "white")))
            pixels[inside] = (1 - MASK_OPACITY) * pixels[inside] + MASK_OPACITY * shade
    return pixels


def place_labels(axis: Axes, marks: Sequence[Mark]) -> None:
    """Writes the labels of an image's marks; skips labels that have no room at their box without covering others."""
    limits = axis.get_window_extent()
    taken: list[Bbox] = []
    for mark in filter(lambda mark: mark.label, marks):
        style = {"fontsize": LABEL_SIZE, "color": "black", "va": "bottom"}
        background = {"facecolor": mark.style.color, "alpha": 0.85, "linewidth": 0, "pad": 1}
        # Without a transform, the position is in pixels of the picture.
        text = axis.text(0, 0, mark.label, style, transform=None, parse_math=False, bbox=background)
        room = text.get_window_extent().padded(1)
        box = Bbox(axis.transData.transform(np.reshape(mark.box, (2, 2))))
        place = find_place(box, room, limits, taken)
        if place is None:
            text.remove()
        else:
            text.set_position((place.x0 + 1, place.y0 + 1))
            taken.append(place)


def find_place(box: Bbox, size: Bbox, limits: Bbox, taken: Sequence[Bbox]) -> Bbox | None:
    """Finds a place for a label next to its box, or inside a large box, within the limits and over no other label.

    Args:
        box: The box in pixels of the picture, with y pointing upwards.
        size: A box of the label's size.
        limits: The image's box.
        taken: Boxes of the labels that have already been placed.
    """
    above, below = box.ymax, box.ymin - size.height
    corners = [(box.xmin, above), (box.xmax - size.width, above), (box.xmin, below), (box.xmax - size.width, below)]
    if box.width * box.height > 6 * size.width * size.height:
        corners.append((box.xmin, box.ymax - size.height))
    for x, y in corners:
        x = min(max(x, limits.xmin), limits.xmax - size.width)
        place = Bbox.from_bounds(x, y, size.width, size.height)
        is_inside = limits.ymin <= place.ymin and place.ymax <= limits.ymax and x >= limits.xmin
        if is_inside and not any(place.overlaps(other) for other in taken):
            return place
    return None


def wrap(text: str, width: float, size: float) -> str:
    """Wraps text to a width in pixels at a font size; each line becomes at most two."""
    letters = int(width / (LETTER * size * DPI / 72))
    return "\n".join(textwrap.fill(line, letters, max_lines=2, placeholder="…") for line in text.splitlines())


def printable(text: str) -> str:
    """Returns text on one line, with single spaces, and escape sequences for characters that cannot be printed."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in one_line(text))


def save(figure: Figure, path: str) -> None:
    """Writes a picture as PNG, atomically."""
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def as_pixels(figure: Figure) -> np.ndarray:
    """Converts a picture to RGB, uint8 (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
