"""Makes a Detectron2 data set of a COCO annotation file and an image folder."""

import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json

from kd_det.config_kinds import show
from kd_det.data.coco_file import CocoFile, read_coco
from kd_det.data.coco_masks import are_numbers
from kd_det.data.keypoints import mirrored_pairs
from kd_det.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contents:
    """Summarises a COCO file for the checks before a run.

    Attributes:
        classes: Class names in the order of their ids.
        keypoints: Lists of keypoint names of the categories that have any, without duplicates.
        annotations: Number of annotations.
        objects: Number of annotations that are trained on: not crowds, and in an image of the file.
        without_mask: Indices, in the file's annotations, of the objects without a segmentation.
        with_rle: Indices of the objects with an RLE mask.
        changed: Whether Detectron2 reads a changed copy of the file.
    """

    classes: list[str]
    keypoints: list[list[str]]
    annotations: int
    objects: int
    without_mask: list[int]
    with_rle: list[int]
    changed: bool


@dataclass(frozen=True)
class CocoFormat:
    """Validates and loads a data set in COCO format; a function for the DatasetCatalog.

    Attributes:
        name: Name of the data set.
        json_file: Annotation file with polygons, RLE masks, or only boxes.
        image_root: The folder that contains the images.
        flip_pairs: Pairs of keypoints that swap places in a mirrored image; None takes those whose names differ only in
            left and right.
        scores: "weight" if the scores of annotations are the weights of their boxes in losses, else "ignore".
    """

    name: str
    json_file: str
    image_root: str
    flip_pairs: tuple[tuple[str, str], ...] | None = None
    scores: str = "ignore"

    def __str__(self) -> str:
        return f"{self.json_file} with {self.image_root}"

    def __call__(self) -> list[dict[str, Any]]:
        """Returns Detectron2's dicts of all images and completes the metadata, as `load_coco_json` does.

        An object whose polygons all have fewer than three points gets the segmentation [].

        Raises:
            InputError: If the file, an image or an annotation is missing or malformed.
        """
        records = self._load_changed() if self.contents.changed else self._load(self.json_file)
        if len(self.contents.keypoints) == 1:
            names = self.contents.keypoints[0]
            MetadataCatalog.get(self.name).set(keypoint_names=names, keypoint_flip_map=self.keypoint_pairs)
        return records

    def metadata(self) -> dict[str, Any]:
        return {"json_file": self.json_file, "image_root": self.image_root, "evaluator_type": "coco"}

    def check_files(self) -> None:
        key = f"DATASETS.COCO_FORMAT.{self.name}"
        if not os.path.isfile(self.json_file):
            raise InputError(f"{self.json_file}: file not found; {key}.JSON names it.")
        if not os.path.isdir(self.image_root):
            raise InputError(f"{self.image_root}: folder not found; {key}.IMAGE_ROOT names it.")

    @cached_property
    def contents(self) -> Contents:
        """Summarises the file; the first access reads and validates it."""
        file = self._read()
        for note in file.notes:
            logger.warning(note)
        data = file.data
        known = {image["id"] for image in data["images"]}
        objects = {
            i: item.get("segmentation")
            for i, item in enumerate(data["annotations"])
            if not item["iscrowd"] and item["image_id"] in known
        }
        categories = sorted(data["categories"], key=lambda category: category["id"])
        keypoints = [names for category in categories if (names := category.get("keypoints"))]
        return Contents(
            classes=[category["name"] for category in categories],
            keypoints=[names for i, names in enumerate(keypoints) if names not in keypoints[:i]],
            annotations=len(data["annotations"]),
            objects=len(objects),
            without_mask=[i for i, mask in objects.items() if mask is None],
            with_rle=[i for i, mask in objects.items() if isinstance(mask, dict)],
            changed=file.changed,
        )

    @property
    def classes(self) -> list[str]:
        return self.contents.classes

    @property
    def keypoint_pairs(self) -> list[tuple[str, str]]:
        """Returns the pairs of keypoints that swap places in a mirrored image.

        Raises:
            InputError: If FLIP_PAIRS names keypoints that the file does not have.
        """
        names = self.contents.keypoints[0]
        pairs = mirrored_pairs(names) if self.flip_pairs is None else self.flip_pairs
        unknown = [name for pair in pairs for name in pair if name not in names]
        if unknown:
            raise InputError(
                f"DATASETS.COCO_FORMAT.{self.name}.FLIP_PAIRS: {unknown[0]!r} is not a keypoint of {self.json_file}, "
                f"which has {', '.join(names)}."
            )
        return list(pairs)

    @contextlib.contextmanager
    def for_evaluation(self) -> Iterator[str]:
        """Yields a data set name whose metadata is complete and names an annotation file that COCOeval can use.

        It is the data set's own name unless the file had to be changed; then it is a name that exists only in the body.
        """
        if not self.contents.changed:
            yield self.name
            return
        metadata = MetadataCatalog.get(self.name)
        with self._read().readable() as path:
            MetadataCatalog.get(path).set(
                json_file=path,
                thing_classes=metadata.thing_classes,
                thing_dataset_id_to_contiguous_id=metadata.thing_dataset_id_to_contiguous_id,
            )
            try:
                yield path
            finally:
                MetadataCatalog.remove(path)

    def _load(self, json_file: str) -> list[dict[str, Any]]:
        keys = ["score"] if self.scores == "weight" else None
        return load_coco_json(json_file, self.image_root, self.name, keys)

    def _load_changed(self) -> list[dict[str, Any]]:
        file = self._read()
        with file.readable() as path:
            records = self._load(path)
        by_image = defaultdict(list)
        for item in file.data["annotations"]:
            by_image[item["image_id"]].append(item)
        for record in records:
            for annotation, item in zip(record["annotations"], by_image[record["image_id"]], strict=True):
                if item.get("segmentation") == []:
                    annotation["segmentation"] = []
        return records

    def _check_scores(self, annotations: list[dict[str, Any]]) -> None:
        """Checks that scores can be weights; annotations without a score have the weight 1."""
        key, scored = f"DATASETS.COCO_FORMAT.{self.name}.SCORES", False
        for i, item in enumerate(annotations):
            score = item.get("score")
            scored |= score is not None
            if score is not None and not (are_numbers([score]) and 0 <= score <= 1):
                raise InputError(
                    f"{self.json_file}: annotations[{i}] has score {show(score)}; a number from 0 to 1 is needed where "
                    f"{key} is weight."
                )
        if annotations and not scored:
            raise InputError(f"{self.json_file}: no annotation has a score, but {key} is weight; set it to ignore.")

    def _read(self) -> CocoFile:
        self.check_files()
        file = read_coco(self.json_file)
        if self.scores == "weight":
            self._check_scores(file.data["annotations"])
        paths = []
        for image in file.data["images"]:
            path = os.path.join(self.image_root, image["file_name"])
            if not os.path.isfile(path) and os.path.isfile(path.replace("\\", "/")):  # The file was written on Windows.
                image["file_name"] = image["file_name"].replace("\\", "/")
                file.changed, path = True, os.path.join(self.image_root, image["file_name"])
            paths.append(path)
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            raise InputError(
                f"{self.json_file}: {len(missing)} of {len(paths)} image files not found, the first is {missing[0]}."
            )
        return file
