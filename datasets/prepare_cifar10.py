#!/usr/bin/env python3
"""Write some images per class of CIFAR-10 as folders of PNG files.

Reads the official archive, unpacked to cifar-10-batches-py in $DETECTRON2_DATASETS (or datasets). datasets/README.md
shows its layout and that of the output.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from kd_det.engine.cli import run_tool
from kd_det.errors import InputError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("datasets/cifar10-mini"), help="folder (%(default)s)")
    parser.add_argument("--train", type=int, default=1000, help="training images per class (%(default)s)")
    parser.add_argument("--test", type=int, default=400, help="test images per class (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides which images (%(default)s)")
    return parser.parse_args()


def choose(labels: np.ndarray, count: int, seed: int) -> list[int]:
    """Chooses `count` images of each class at random, and returns their sorted indices."""
    rng = np.random.default_rng(seed)
    available = int(np.bincount(labels).min())
    if not 1 <= count <= available:
        raise InputError(f"--train, --test: got {count}; each class has {available} images.")
    chosen = [rng.choice(np.flatnonzero(labels == label), count, replace=False) for label in np.unique(labels)]
    return sorted(map(int, np.concatenate(chosen)))


def main() -> None:
    args = parse_args()
    if args.output.exists():
        raise InputError(f"--output: {args.output} exists already; delete it or choose another folder.")
    from detectron2.data import DatasetCatalog

    from kd_det.data import class_names

    for split, count in (("train", args.train), ("test", args.test)):
        records = DatasetCatalog.get(f"cifar10_{split}")
        classes = class_names(f"cifar10_{split}")
        indices = choose(np.array([record["label"] for record in records]), count, args.seed)
        for index in tqdm(indices, desc=split, unit="image", disable=None):
            path = args.output / split / classes[records[index]["label"]] / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), records[index]["image"][:, :, ::-1])
    print(f"{args.output}: {args.train} training and {args.test} test images per class")


if __name__ == "__main__":
    run_tool(main)
