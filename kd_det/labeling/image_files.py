"""Finds image files in folders, and reads them ahead of the detectors."""

import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data import DatasetCatalog
from torch.utils.data import DataLoader, Dataset

from kd_det.data.images import image_suffixes
from kd_det.data.workers import ignore_signals
from kd_det.errors import InputError, shorten

logger = logging.getLogger(__name__)
Mapper = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """Holds the images of folders.

    Attributes:
        root: The folder that contains all of the folders.
        names: Paths of the images relative to it, sorted, with slashes.
    """

    root: str
    names: list[str]

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def without(self, datasets: Collection[str]) -> "Found":
        """Returns the images that do not belong to registered data sets.

        Args:
            datasets: Names of the data sets.

        Raises:
            InputError: If no image is left.
        """
        excluded = {os.path.realpath(record["file_name"]) for name in datasets for record in DatasetCatalog.get(name)}
        kept = [name for name in self.names if os.path.realpath(self.path(name)) not in excluded]
        if not kept:
            raise InputError(f"--exclude: all {len(self.names)} images belong to {', '.join(datasets)}.")
        return Found(self.root, kept)


def find_images(folders: Sequence[str]) -> Found:
    """Finds the image files in folders and in the folders below these; hidden ones are left out.

    Raises:
        InputError: If a folder is missing or has no images.
    """
    paths: set[str] = set()
    for folder in folders:
        paths |= set(_list_images(folder))
    root = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    return Found(root, sorted(os.path.relpath(path, root).replace(os.sep, "/") for path in paths))


def _list_images(folder: str) -> list[str]:
    """Returns the absolute paths of the images in a folder."""
    if not os.path.isdir(folder):
        raise InputError(f"--images: {folder} is not a folder; a folder of images is needed.")
    images: list[str] = []
    others: list[str] = []
    for place, folders, files in os.walk(os.path.abspath(folder), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(name for name in files if not name.startswith(".")):
            is_image = os.path.splitext(name)[1].lower() in image_suffixes()
            (images if is_image else others).append(os.path.join(place, name))
    if not images:
        found = f"only other files, such as {os.path.basename(others[0])}" if others else "no files at all"
        raise InputError(f"--images: {folder} has no images, {found}; names of images end in .jpg, .png and so on.")
    if others:
        names = shorten([os.path.relpath(path, folder) for path in others], 3)
        logger.warning("%s: files that are not images by their names are left out: %s.", folder, names)
    return images


class ImageReader(Dataset):
    """Maps an index to an image as each mapper gives it, or to the message of the error that it cannot be read.

    Args:
        records: Dicts with the `file_name` of each image.
        mappers: What reads an image.
    """

    def __init__(self, records: Sequence[dict[str, Any]], mappers: Sequence[Mapper]):
        self.records = records
        self.mappers = mappers

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> list[dict[str, Any]] | str:
        try:
            return [mapper(dict(self.records[index])) for mapper in self.mappers]
        except InputError as error:
            return str(error)


def read_ahead(
    records: Sequence[dict[str, Any]], mappers: Sequence[Mapper], workers: int
) -> Iterator[list[dict[str, Any]] | str]:
    """Yields what :class:`ImageReader` gives for each image, in order.

    Args:
        records: Dicts with the `file_name` of each image.
        mappers: What reads an image.
        workers: Number of processes that read images.
    """
    yield from DataLoader(
        ImageReader(records, mappers),
        batch_size=None,
        num_workers=workers,
        collate_fn=pass_on,
        worker_init_fn=ignore_signals,
    )


def pass_on(item: Any) -> Any:
    """Returns an item of the reader as it is, which torch would otherwise convert."""
    return item
