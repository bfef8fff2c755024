"""Weights as other projects name and store them."""

import pickle
import re
from typing import Any


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers, the contents of the zoos' files, and nothing else."""

    def find_class(self, module: str, name: str):
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) in {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "scalar"),
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),
        }:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_zoo_pickle(filename: str) -> dict[str, Any]:
    """Read a ``.pkl`` of Detectron2's or Caffe2's zoo: "model", and what the checkpointer needs to match it."""
    with open(filename, "rb") as file:
        data = _ArrayUnpickler(file, encoding="latin1").load()
    if "model" in data and "__author__" in data:
        return data
    blobs = data.get("blobs", data)
    model = {key: value for key, value in blobs.items() if not key.endswith("_momentum")}
    return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}


def rename_torchvision_resnet(state: dict[str, Any]) -> dict[str, Any]:
    """Give torchvision's ResNet weights our names: ``layer1.0.bn1.weight`` to ``res2.0.conv1.norm.weight``."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        key = re.sub(r"bn(\d)", r"conv\1.norm", key)
        key = re.sub(r"^fc", "linear", key)
        renamed[key if key.startswith(("res", "linear")) else f"stem.{key}"] = value
    return renamed


def backbone_of_classifier(state: dict[str, Any]) -> dict[str, Any]:
    """The backbone's weights of an image classifier, named so that those of a detector's backbone match them."""
    return {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
