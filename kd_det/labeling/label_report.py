"""Writes the HTML report of a labelling: numbers by class, scores, and pictures of labelled images."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np

from kd_det.analysis.examples import make_view
from kd_det.data import choose_images
from kd_det.data.images import read_image
from kd_det.engine import picture_grid
from kd_det.engine.pictures import OBJECT, class_name, short_name
from kd_det.labeling.image_files import Found
from kd_det.labeling.thresholds import Validation
from kd_det.reporting import Page, write_page
from kd_det.reporting.gallery import Example, Gallery, Kind, embed
from kd_det.reporting.page import Cell, Detail, Section, Table
from kd_det.reporting.versions import describe_versions

GALLERY_IMAGES = 24
BINS = 10  # Number of bars in the histogram of scores.
MOST = 10  # Images with this many objects or more share a row.
KIND = Kind("teacher", OBJECT.color, OBJECT.symbol, "label, with its score")


def write_label_report(
    path: str,
    data: Mapping[str, Any],
    found: Found,
    thresholds: Sequence[float],
    validation: Validation | None,
    command: str,
) -> None:
    """Writes the report as one HTML file.

    Args:
        path: Path of the file.
        data: Content of the file of labels.
        found: The folder of its images.
        thresholds: The score threshold of each class.
        validation: How well the labels agree with a labelled data set, if that was measured.
        command: The command that made the labels.
    """
    info = data["info"]
    lead = [
        f"{len(data['images'])} images, {len(data['annotations'])} objects",
        f"labelled by {', '.join(info['teachers'])}",
        datetime.now().strftime("%Y-%m-%d %H:%M"),
    ]
    if validation:
        lead.insert(2, f"AP50 {validation.ap50:.2f} on {validation.dataset}")
    details = [Detail("Versions", describe_versions()), Detail("Images", found.root)]
    if info["unreadable"]:
        details.append(Detail("Images that cannot be read", "\n".join(info["unreadable"])))
    if command:
        details.insert(1, Detail("Command", command))
    page = Page(
        title="Labels of trained models",
        lead=lead,
        sections=[class_section(data, thresholds, validation), image_section(data), score_section(data)],
        gallery=make_gallery(data, found),
        details=details,
    )
    write_page(page, path)


def names_of(data: Mapping[str, Any]) -> list[str]:
    return [category["name"] for category in data["categories"]]


def class_section(data: Mapping[str, Any], thresholds: Sequence[float], validation: Validation | None) -> Section:
    """Shows the number of objects of each class and, if it was measured, how well they agree with ground truth."""
    objects = Counter(item["category_id"] for item in data["annotations"])
    images = Counter(number for number, _ in {(x["category_id"], x["image_id"]) for x in data["annotations"]})
    largest = max(objects.values(), default=1)
    columns = ["", "score from", "objects", "images"]
    note = ""
    if validation:
        columns += ["precision", "recall", "F1", "objects there"]
        note = f"Precision, recall and F1 in percent, at IoU 0.5, on the {validation.images} images of "
        note += f"{validation.dataset}."
    rows = []
    for number, (name, threshold) in enumerate(zip(names_of(data), thresholds, strict=True), 1):
        share = objects[number] / largest
        cells = [Cell(f"{threshold:.3f}"), Cell(str(objects[number]), share=share), Cell(str(images[number]))]
        if validation:
            quality = validation.classes[name]
            values = (quality.precision, quality.recall, quality.f1)
            cells += [Cell(f"{value:.1f}", share=value / 100) for value in values]
            cells.append(Cell(str(quality.objects)))
        rows.append((name, cells))
    return Section("classes", "Classes", "", [Table("Objects by class", columns, rows, note)])


def image_section(data: Mapping[str, Any]) -> Section:
    """Shows how many images have how many objects."""
    by_image = Counter(item["image_id"] for item in data["annotations"])
    counts = Counter(min(by_image[image["id"]], MOST) for image in data["images"])
    rows = histogram([(f"{i}" if i < MOST else f"{i} or more", counts[i]) for i in range(max(counts) + 1)])
    mean = len(data["annotations"]) / len(data["images"])
    note = f"{mean:.2f} objects per image. Training leaves out images without objects unless "
    note += "DATALOADER.FILTER_EMPTY_ANNOTATIONS is False."
    return Section("images", "Images", "", [Table("Images by their number of objects", ("", "images"), rows, note)])


def score_section(data: Mapping[str, Any]) -> Section:
    """Shows how many objects have which score, over all classes and for each."""
    scores = defaultdict(list)
    for item in data["annotations"]:
        scores[item["category_id"]].append(item["score"])
    edges = np.linspace(0, 1, BINS + 1)
    heads = [f"{low:.1f} to {high:.1f}" for low, high in pairwise(edges)]
    columns = [[x["score"] for x in data["annotations"]], *(scores[x["id"]] for x in data["categories"])]
    titles = ["all classes", *names_of(data)] if len(columns) > 2 else ["all classes"]
    counts = [np.histogram(column, edges)[0].tolist() for column in columns[: len(titles)]]
    largest = [max(max(column), 1) for column in counts]
    rows = [
        (head, [Cell(str(column[i]), share=column[i] / most) for column, most in zip(counts, largest, strict=True)])
        for i, head in enumerate(heads)
    ]
    return Section("scores", "Scores", "", [Table("Objects by score", ("", *titles), rows)])


def histogram(counts: Sequence[tuple[str, int]]) -> list[tuple[str, list[Cell]]]:
    """Makes the rows of a table with a bar for each count."""
    largest = max(count for _, count in counts)
    return [(head, [Cell(str(count), share=count / largest)]) for head, count in counts]


def make_gallery(data: Mapping[str, Any], found: Found) -> Gallery:
    """Shows labels on images that are spread evenly over those with objects."""
    by_image = defaultdict(list)
    for item in data["annotations"]:
        by_image[item["image_id"]].append(item)
    names = names_of(data)
    shown = choose_images([{**x, "annotations": by_image[x["id"]]} for x in data["images"]], GALLERY_IMAGES)
    examples = []
    for image in shown:
        picture = embed(read_image(found.path(image["file_name"]), "RGB"))
        name = picture_grid.printable(image["file_name"])
        marks = [mark_label(item, names) for item in image["annotations"]]
        caption = f"objects: {len(marks)}"
        view = make_view("labels", caption, name, marks, picture)
        examples.append(Example(name, picture, caption, sorted({mark.category for mark in marks}), (), [view]))
    used = sorted({category for example in examples for category in example.categories})
    note = f"{len(examples)} images, spread evenly over those with objects."
    return Gallery(note, examples, {i: class_name(names, i) for i in used}, [KIND], title="Labelled images")


def mark_label(item: Mapping[str, Any], names: Sequence[str]) -> picture_grid.Mark:
    """Marks a labelled object with its class and its score."""
    x, y, width, height = item["bbox"]
    category = item["category_id"] - 1
    label = f"{short_name(names, category)} {item['score']:.0%}".strip()
    style = picture_grid.Style(KIND.name, KIND.color, OBJECT.line)
    return picture_grid.Mark([x, y, x + width, y + height], style, label, item.get("segmentation"), category)
