"""A folder with one folder of images per class as a Detectron2 data set."""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from kd_det.data.paths import data_root, resolve
from kd_det.errors import InputError


@dataclass(frozen=True)
class ImageFolder:
    """The data set as a function for the DatasetCatalog: calling it looks for the images, but reads none.

    Attributes:
        name: Name of the data set.
        root: Folder with one folder per class; where it is relative, it is resolved when the data set is used.
    """

    name: str
    root: str

    def __str__(self) -> str:
        return f"the image folder {self.root}"

    def __call__(self) -> list[dict[str, Any]]:
        """Dicts with the `file_name` and the `label` of all images, sorted by class and by name.

        Raises:
            InputError: If the folder is missing, has no folders of classes, or one of these has no image.
        """
        indices = {name: index for index, name in enumerate(self.classes)}
        try:
            images = make_dataset(resolve(self.root), indices, IMG_EXTENSIONS)
        except FileNotFoundError as error:
            raise InputError(f"{resolve(self.root)}: {error}") from error
        return [{"file_name": path, "label": label} for path, label in images]

    def metadata(self) -> dict[str, Any]:
        return {"evaluator_type": "classification"}

    def check_files(self) -> None:
        folder = resolve(self.root)
        if not os.path.isdir(folder):
            raise InputError(
                f"{folder}: folder not found; it is the ROOT of the data set {self.name!r}. DETECTRON2_DATASETS is "
                f"{data_root()!r}; datasets/README.md shows what belongs there."
            )

    @cached_property
    def classes(self) -> list[str]:
        """Names of the folders of classes, sorted."""
        self.check_files()
        try:
            return find_classes(resolve(self.root))[0]
        except FileNotFoundError as error:
            raise InputError(
                f"{resolve(self.root)}: it has no folders; one folder of images per class is needed."
            ) from error
