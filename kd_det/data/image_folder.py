"""Makes a Detectron2 data set of a folder with one folder of images per class."""

import os
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, make_dataset

from kd_det.data.paths import data_root, resolve
from kd_det.errors import InputError


@dataclass(frozen=True)
class ImageFolder:
    """Lists the images of the data set without reading them; a function for the DatasetCatalog.

    Attributes:
        name: Name of the data set.
        root: Folder with one folder per class; a relative path is resolved when the data set is used.
    """

    name: str
    root: str

    def __str__(self) -> str:
        return f"the image folder {self.root}"

    def __call__(self) -> list[dict[str, Any]]:
        """Returns dicts with the `file_name` and the `label` of all images, sorted by class and by name.

        Raises:
            InputError: For the reasons of :attr:`classes` and :meth:`check_files`.
        """
        indices = {name: index for index, name in enumerate(self.classes)}
        self.check_files()
        root = resolve(self.root)
        images = make_dataset(root, indices, is_valid_file=partial(_is_image, root))
        return [{"file_name": path, "label": label} for path, label in images]

    def metadata(self) -> dict[str, Any]:
        return {"evaluator_type": "classification"}

    def check_files(self) -> None:
        root = resolve(self.root)
        empty = [name for name in self._find_classes() if not _has_image(root, name)]
        if empty:
            raise InputError(
                f"{root}: Found no valid file for the classes {', '.join(empty)}. Each folder in it is a class, with "
                f"images that end in {', '.join(IMG_EXTENSIONS)}."
            )

    @cached_property
    def classes(self) -> list[str]:
        """Returns the sorted names of the class folders, without hidden folders such as `.ipynb_checkpoints`.

        Raises:
            InputError: If the folder is missing or has no class folders.
        """
        classes = self._find_classes()
        if not classes:
            raise InputError(f"{resolve(self.root)}: it has no folders; one folder of images per class is needed.")
        return classes

    def _find_classes(self) -> list[str]:
        root = resolve(self.root)
        if not os.path.isdir(root):
            raise InputError(
                f"{root}: folder not found; it is the ROOT of the data set {self.name!r}. DETECTRON2_DATASETS is "
                f"{data_root()!r}; datasets/README.md shows what belongs there."
            )
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _has_image(root: str, name: str) -> bool:
    walk = os.walk(os.path.join(root, name), followlinks=True)  # Like make_dataset, this follows links.
    return any(_is_image(root, os.path.join(folder, file)) for folder, _, files in walk for file in files)


def _is_image(root: str, path: str) -> bool:
    """Returns whether a file is named like an image, and neither it nor a folder between it and the root is hidden."""
    return f"{os.sep}." not in path.removeprefix(root) and has_file_allowed_extension(path, IMG_EXTENSIONS)
