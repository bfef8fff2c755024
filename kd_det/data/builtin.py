"""Registers, when imported, data sets for image classification that need no definition in the config."""

import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from torchvision.datasets import CIFAR10, CIFAR100, MNIST

from kd_det.data.image_folder import ImageFolder
from kd_det.data.paths import data_root
from kd_det.errors import InputError, reason


@dataclass(frozen=True)
class Cifar:
    """Loads CIFAR-10 or CIFAR-100 from its official files; a function for the DatasetCatalog.

    Attributes:
        name: Name of the data set.
        reader: torchvision's reader, which checks the files against their checksums.
        train: Whether to load the training images instead of the test images.
    """

    name: str
    reader: type[CIFAR10]
    train: bool

    def __call__(self) -> list[dict[str, Any]]:
        """Returns dicts with the `image` (H, W, 3) as uint8 RGB, its `label`, and a `file_name` for messages.

        Raises:
            InputError: If a file is missing or is not the official one.
        """
        return _records(self.name, *self._read()[:2])

    def metadata(self) -> dict[str, Any]:
        return {"evaluator_type": "classification"}

    def check_files(self) -> None:
        if not os.path.isdir(self._folder):
            raise InputError(f"{self._folder}: folder not found, but {self.name!r} lies there; {self._advice}.")

    @property
    def classes(self) -> list[str]:
        return self._read()[2]

    @property
    def _folder(self) -> str:
        return os.path.join(data_root(), self.reader.base_folder)

    @property
    def _advice(self) -> str:
        return f"download {self.reader.url} and unpack it in {data_root()}"

    def _read(self) -> tuple[np.ndarray, list[int], list[str]]:
        self.check_files()
        try:
            return _read_cifar(self.reader, data_root(), self.train)  # type: ignore[arg-type]  # torchvision has no types.
        except RuntimeError as error:
            raise InputError(
                f"{self._folder}: a file is missing or differs from the official one; {self._advice}."
            ) from error


@dataclass(frozen=True)
class Mnist:
    """Loads the handwritten digits of MNIST, 28 x 28 pixels, from its official files, unpacked.

    Attributes:
        name: Name of the data set.
        train: Whether to load the training images instead of the test images.
    """

    name: str
    train: bool

    def __call__(self) -> list[dict[str, Any]]:
        """Returns dicts like those of :class:`Cifar`; the three channels of the grey images are equal.

        Raises:
            InputError: If a file is missing or damaged.
        """
        self.check_files()
        try:
            grey, labels = _read_mnist(data_root(), self.train)
        except (AssertionError, EOFError, IndexError, KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"{self._folder}: a file is damaged: {reason(error)} {self._advice}.") from error
        if len(grey) != len(labels):
            raise InputError(f"{self._folder}: {len(grey)} images, but {len(labels)} labels; {self._advice}.")
        return _records(self.name, np.repeat(grey[..., None], 3, axis=3), labels)

    def metadata(self) -> dict[str, Any]:
        return {"evaluator_type": "classification"}

    def check_files(self) -> None:
        files = [os.path.join(self._folder, name.removesuffix(".gz")) for name, _ in MNIST.resources]
        missing = [path for path in files if not os.path.isfile(path)]
        if missing:
            raise InputError(f"{missing[0]}: file not found, but {self.name!r} lies there; {self._advice}.")

    @property
    def classes(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    @property
    def _folder(self) -> str:
        return os.path.join(data_root(), "MNIST", "raw")

    @property
    def _advice(self) -> str:
        names = ", ".join(name for name, _ in MNIST.resources)
        return f"download {names} from {MNIST.mirrors[0]} and unpack them there"


@dataclass(frozen=True)
class Digits:
    """Loads scikit-learn's handwritten digits, 8 x 8 pixels, which come with that library and need no download.

    Every fifth image of each class is a test image.

    Attributes:
        name: Name of the data set.
        train: Whether to load the training images instead of the test images.
    """

    name: str
    train: bool

    def __call__(self) -> list[dict[str, Any]]:
        """Returns dicts like those of :class:`Cifar`.

        Raises:
            InputError: If scikit-learn is not installed.
        """
        self.check_files()
        from sklearn.datasets import load_digits

        digits = load_digits()
        is_test = np.zeros(len(digits.target), dtype=bool)
        for digit in range(10):
            is_test[np.flatnonzero(digits.target == digit)[4::5]] = True
        chosen = is_test != self.train
        grey = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # White is 16 in these images.
        return _records(self.name, np.repeat(grey[..., None], 3, axis=3), digits.target[chosen].tolist())

    def metadata(self) -> dict[str, Any]:
        return {"evaluator_type": "classification"}

    def check_files(self) -> None:
        if importlib.util.find_spec("sklearn") is None:
            raise InputError(f"data set {self.name!r}: scikit-learn is not installed; run pip install scikit-learn.")

    @property
    def classes(self) -> list[str]:
        return [str(digit) for digit in range(10)]


BUILTIN = {
    dataset.name: dataset
    for split in ("train", "test")
    for dataset in (
        Cifar(f"cifar10_{split}", CIFAR10, split == "train"),
        Cifar(f"cifar100_{split}", CIFAR100, split == "train"),
        Mnist(f"mnist_{split}", split == "train"),
        Digits(f"digits_{split}", split == "train"),
    )
} | {name: ImageFolder(name, name.replace("_", "/")) for name in ("imagenet_train", "imagenet_val")}


@cache  # Every evaluation loads the test set again.
def _read_cifar(reader: type[CIFAR10], root: str, train: bool) -> tuple[np.ndarray, list[int], list[str]]:
    dataset = reader(root, train)
    return np.ascontiguousarray(dataset.data), dataset.targets, dataset.classes


@cache
def _read_mnist(root: str, train: bool) -> tuple[np.ndarray, list[int]]:
    dataset = MNIST(root, train)
    return dataset.data.numpy(), dataset.targets.tolist()


def _records(name: str, images: np.ndarray, labels: list[int]) -> list[dict[str, Any]]:
    return [
        {"image": image, "label": label, "file_name": f"{name}[{i}]"}
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


for _name, _dataset in BUILTIN.items():
    if _name not in DatasetCatalog:  # Other code may have registered this name.
        DatasetCatalog.register(_name, _dataset)
        MetadataCatalog.get(_name).set(**_dataset.metadata())
