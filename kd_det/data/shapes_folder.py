"""Writes a folder of synthetic scenes that is in both COCO and Pascal VOC layout."""

import json
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from kd_det.data.annotation_files import coco_annotation, write_coco, write_voc
from kd_det.data.shapes import CLASSES, VERSION, make_scene
from kd_det.errors import InputError

MIN_SIZE = 64


def write_shapes(output: str | Path, *, train: int = 600, test: int = 150, size: int = 160, seed: int = 0) -> bool:
    """Writes JPEGImages, Annotations and ImageSets (VOC), coco/instances_{train,test}.json and parameters.json.

    The whole folder appears at once, or not at all. An image depends only on the seed, its split, its number and the
    size, so that the first images stay the same when there are more of them.

    Args:
        output: The folder.
        train: Number of images to train on.
        test: Number of images to test on.
        size: Side of the images in pixels.
        seed: Seed of all randomness.

    Returns:
        False if the folder already exists and was made with the same parameters.

    Raises:
        InputError: If the folder holds anything else, or a parameter is too small.
    """
    # Detectron2 cannot read a VOC split with a single image.
    for name, value, least in (("train", train, 2), ("test", test, 2), ("size", size, MIN_SIZE), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"{name}: {value} found; {least} or more is allowed.")
    output = Path(output)
    parameters = {"train": train, "test": test, "size": size, "seed": seed, "version": VERSION}
    if output.exists():
        _check_existing(output, parameters)
        return False
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary, output.name)
        for name in ("JPEGImages", "Annotations", "ImageSets/Main", "coco"):
            (folder / name).mkdir(parents=True)
        with tqdm(total=train + test, unit="image", desc=str(output), disable=None) as progress:
            for index, (split, count) in enumerate({"train": train, "test": test}.items()):
                _write_split(folder, split, count, size, [seed, index], progress)
        (folder / "parameters.json").write_text(json.dumps(parameters), encoding="utf-8")
        folder.rename(output)
    return True


def _write_split(folder: Path, split: str, count: int, size: int, seed: list[int], progress: tqdm) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        scene, objects = make_scene(np.random.default_rng([*seed, number]), size)
        name = f"{split}_{number:05}"
        cv2.imwrite(str(folder / "JPEGImages" / f"{name}.jpg"), scene, [cv2.IMWRITE_JPEG_QUALITY, 92])
        image = {"id": number + 1, "file_name": f"{name}.jpg", "width": size, "height": size}
        new = [
            coco_annotation(mask, id=len(annotations) + i, image_id=image["id"], category_id=class_index + 1)
            for i, (class_index, mask) in enumerate(objects, 1)
        ]
        boxes = [(CLASSES[annotation["category_id"] - 1], annotation["bbox"]) for annotation in new]
        write_voc(folder / "Annotations" / f"{name}.xml", image, boxes)
        images.append(image)
        annotations += new
        progress.update()
    names = (Path(image["file_name"]).stem for image in images)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    write_coco(folder / "coco" / f"instances_{split}.json", images, annotations, CLASSES)


def _check_existing(output: Path, parameters: dict[str, int]) -> None:
    try:
        existing = json.loads((output / "parameters.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        existing = "something else"
    if existing != parameters:
        raise InputError(f"{output}: holds {existing}, not {parameters}; delete {output} or choose another folder.")
