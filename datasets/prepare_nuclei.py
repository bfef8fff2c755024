#!/usr/bin/env python3
"""Convert the nuclei of the 2018 Data Science Bowl to COCO JSON.

Reads stage1_train/<id>/images/<id>.png with one mask per nucleus in stage1_train/<id>/masks/*.png. Writes the images
and annotations/instances_{train,test}.json to the output folder; datasets/README.md shows its layout.
"""

import argparse
import random
import shutil
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from kd_det.engine.cli import run_tool
from kd_det.errors import InputError

# Greatest median of a grey image that counts as one with a dark background.
DARK = 100


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder stage1_train")
    parser.add_argument("--output", type=Path, default=Path("datasets/nuclei"), help="folder to write (%(default)s)")
    parser.add_argument("--test-share", type=float, default=0.2, help="share of the images to test on (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (%(default)s)")
    parser.add_argument("--fluorescence", action="store_true", help="only grey images on a dark background")
    parser.add_argument("--max-side", type=int, help="leave out images with a longer side, in pixels")
    return parser.parse_args()


def read(path: Path, flags: int) -> np.ndarray:
    image = cv2.imread(str(path), flags)
    if image is None:
        raise InputError(f"{path}: not an image that can be read.")
    return image


def is_wanted(image: np.ndarray, fluorescence: bool, max_side: int | None) -> bool:
    if max_side is not None and max(image.shape[:2]) > max_side:
        return False
    is_grey = (image.max(axis=2) == image.min(axis=2)).all()
    return not fluorescence or (is_grey and np.median(image) < DARK)


def find_images(source: Path, fluorescence: bool, max_side: int | None) -> list[Path]:
    paths = sorted(source.glob("*/images/*.png"))
    if not paths:
        raise InputError(f"{source}: no */images/*.png found; the folder stage1_train of the download is needed.")
    wanted = []
    for path in tqdm(paths, unit="image", desc="choose", disable=None):
        if is_wanted(read(path, cv2.IMREAD_COLOR), fluorescence, max_side):
            wanted.append(path)
    return wanted


def convert(paths: list[Path], output: Path, split: str) -> str:
    """Copies the images of a split, writes its annotations, and returns a summary."""
    from kd_det.data.annotation_files import coco_annotation, write_coco

    images, annotations = [], []
    for image_id, path in enumerate(tqdm(paths, unit="image", desc=split, disable=None), 1):
        shutil.copyfile(path, output / "images" / path.name)
        height, width = read(path, cv2.IMREAD_COLOR).shape[:2]
        images.append({"id": image_id, "file_name": path.name, "width": width, "height": height})
        for mask_path in sorted(path.parents[1].glob("masks/*.png")):
            mask = read(mask_path, cv2.IMREAD_GRAYSCALE) > 0
            if mask.shape != (height, width):
                raise InputError(
                    f"{mask_path}: {mask.shape[1]} x {mask.shape[0]}, its image {width} x {height} pixels."
                )
            if mask.any():
                annotations.append(coco_annotation(mask, id=len(annotations) + 1, image_id=image_id, category_id=1))
    write_coco(output / "annotations" / f"instances_{split}.json", images, annotations, ["nucleus"])
    return f"{len(images)} images with {len(annotations)} nuclei to {split}"


def main() -> None:
    args = parse_args()
    if not 0 < args.test_share < 1:
        raise InputError(f"--test-share: {args.test_share} found; a number between 0 and 1 is allowed.")
    paths = find_images(args.source, args.fluorescence, args.max_side)
    random.Random(args.seed).shuffle(paths)
    test = round(args.test_share * len(paths))
    if not 0 < test < len(paths):
        raise InputError(f"{args.source}: {len(paths)} images fit, too few to train on some and test on others.")
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    written = [convert(paths[test:], args.output, "train"), convert(paths[:test], args.output, "test")]
    print(f"{args.output}: {', '.join(written)}.")


if __name__ == "__main__":
    run_tool(main)
