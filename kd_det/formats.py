"""Reads weights as other projects store and name them, without running code in a file."""

import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import MAGIC_NUMBER

from kd_det.checkpoint_files import CONTAINERS, check_damage, conversion, load_safely, readable
from kd_det.errors import InputError
from kd_det.unpickling import load_arrays

# Every ResNet of torchvision and timm has this key.
RESNET_KEY = "layer1.0.conv1.weight"
# The first and the last layer of every VGG and AlexNet of torchvision without batch norms.
FULLY_CONNECTED_KEYS = ("features.0.weight", "classifier.6.weight")
# Parts of the blocks that Detectron2's ResNets have, too.
RESNET_PARTS = re.compile(r"layer\d\.\d+\.(?:conv\d|bn\d|downsample\.[01])\.")


# ---- Reading ----
def read_weights(path: str) -> dict[str, Any]:
    """Reads a file of weights without running code in it.

    Args:
        path: A local file: anything that ``torch.save`` wrote, ``.safetensors``, a ``.pkl`` of Detectron2's or Caffe2's
            zoo, or a ``.pyth`` of pycls.

    Returns:
        "model", which maps names to tensors; the rest of the file's content; and Detectron2's hints on how to match the
        names, "__author__" and "matching_heuristics".

    Raises:
        UnreadableError: If the file is damaged, or holds anything but arrays and plain containers.
        InputError: If it contains no weights.
    """
    check_damage(path)
    with readable(path):
        loaded = _read_zoo_pickle(path) if path.endswith(".pkl") and not _is_torch_file(path) else _read_torch(path)
    model = loaded["model"]
    for _ in CONTAINERS:
        model = next((model[key] for key in CONTAINERS if isinstance(model, dict) and key in model), model)
    return loaded | {"model": plain_state(model, path)}


def plain_state(state: Any, path: str) -> OrderedDict[str, Tensor]:
    """Rebuilds a state dict from nothing but its names, its numbers and the versions of its modules.

    A file can give containers and tensors attributes that hide their methods.

    Args:
        state: The content of the file.
        path: The file, for messages.

    Raises:
        InputError: If it does not map names to dense tensors or arrays.
    """
    items = list(dict.items(state)) if isinstance(state, dict) else []
    if not items or not all(isinstance(key, str) and isinstance(value, Tensor | np.ndarray) for key, value in items):
        raise InputError(f"{path}: not a checkpoint: neither it nor its 'model' maps names to tensors.")
    plain: dict[str, Tensor] = {}
    for key, value in items:
        try:
            plain[key] = Tensor.detach(value) if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        except TypeError as error:  # Torch lacks this type of numbers.
            raise InputError(f"{path}: {key} has numbers of a type that cannot be loaded, {value.dtype}.") from error
        if plain[key].layout != torch.strided or plain[key].device.type != "cpu" or plain[key].is_quantized:
            raise InputError(f"{path}: {key} is a sparse, quantized or empty (meta) tensor; it must be a dense one.")
    versions = getattr(state, "_metadata", None)
    return _state_dict(
        plain,
        {
            key: {"version": node["version"]}
            for key, node in (dict.items(versions) if isinstance(versions, dict) else ())
            if isinstance(key, str) and isinstance(node, dict) and isinstance(node.get("version"), int)
        },
    )


def _state_dict(weights: dict[str, Tensor], versions: dict[str, dict[str, Any]]) -> OrderedDict[str, Tensor]:
    """Makes a state dict with the versions of its modules, as ``nn.Module.state_dict`` gives it."""
    state = OrderedDict(weights)
    state._metadata = versions  # type: ignore[attr-defined]  # This attribute is torch's.
    return state


def _is_torch_file(path: str) -> bool:
    """Returns whether ``torch.save`` wrote a file, in today's format or the one before torch 1.6."""
    with open(path, "rb") as file:
        return file.read(64).startswith((b"PK\x03\x04", pickle.dumps(MAGIC_NUMBER, protocol=2)))


def _read_torch(path: str) -> dict[str, Any]:
    loaded = load_safely(path)
    if path.endswith(".pyth"):  # A file of pycls, whose names Detectron2 matches.
        return {"model": loaded["model_state"], "__author__": "pycls", "matching_heuristics": True}
    if isinstance(loaded, dict) and "model" in loaded:
        return dict(dict.items(loaded))
    return {"model": loaded}


def _read_zoo_pickle(path: str) -> dict[str, Any]:
    data = load_arrays(path)
    if "model" in data and "__author__" in data:
        return dict(dict.items(data))
    blobs = dict.items(data.get("blobs", data))
    model = {key: value for key, value in blobs if not str(key).endswith("_momentum")}
    return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}


# ---- Naming ----
def fit_names(loaded: dict[str, Any], model_keys: Collection[str], path: str) -> dict[str, Any]:
    """Adapts the names of weights from :func:`read_weights` to a model.

    Args:
        loaded: The content of the file.
        model_keys: The model's keys.
        path: The file, for messages.

    Returns:
        The same content, with names that differ from the model's replaced.

    Raises:
        InputError: If the file holds several networks, or a ResNet that Detectron2 does not have.
    """
    if loaded.get("matching_heuristics"):
        return loaded
    state = strip_wrappers(loaded["model"], set(model_keys), path)
    if RESNET_KEY in state and not any(f".{key}".endswith(f".{RESNET_KEY}") for key in model_keys):
        return loaded | {"model": rename_torchvision_resnet(state, path), "matching_heuristics": True}
    own = any(key.startswith("backbone.classifier.") for key in model_keys)
    if own and all(key in state for key in FULLY_CONNECTED_KEYS):
        return loaded | {"model": rename_torchvision_layers(state)}
    if "linear.weight" in state and "linear.weight" not in model_keys:
        return loaded | {"model": backbone_of_classifier(state), "matching_heuristics": True}
    part = name_part(state, model_keys)
    return loaded | ({"model": part, "matching_heuristics": True} if part else {"model": state})


def name_part(state: dict[str, Tensor], model_keys: Collection[str]) -> dict[str, Tensor]:
    """Renames the weights of a part of a model, such as its backbone, to the model's; {} if most fit no such part.

    timm's feature extractors write ``stages_0`` for ``stages.0``.
    """
    ends = {(end := key[i + 1 :]).replace("_", "."): end for key in model_keys for i, x in enumerate(key) if x == "."}
    named = {ends.get(key.replace("_", "."), key): value for key, value in state.items()}
    few = len(named.keys() & set(ends.values())) <= len(state) / 2
    return {} if few or not state.keys().isdisjoint(model_keys) else named


def strip_wrappers(state: dict[str, Tensor], model_keys: Collection[str], path: str) -> dict[str, Tensor]:
    """Removes the prefix that a wrapper such as DDP, ``torch.compile`` or Lightning added to the model's keys.

    Args:
        state: A state dict.
        model_keys: The model's keys.
        path: The file, for messages.

    Raises:
        InputError: If the state dict holds several networks.
    """
    state = _rename(state, lambda key: key.replace("_orig_mod.", "").removeprefix("module."))
    prefixes = Counter(prefix for prefix in (_wrapper(key, model_keys) for key in state) if prefix is not None)
    if "" in prefixes or RESNET_KEY in state:
        return state
    most = [prefix for prefix, count in prefixes.items() if count >= min(len(model_keys), len(state)) / 2]
    most = most or [key.removesuffix(RESNET_KEY) for key in state if key.endswith(f".{RESNET_KEY}")]
    if len(most) > 1:
        choose = "p = '" + most[0] + "'; torch.save({k[len(p):]: d[k] for k in d if k.startswith(p)}, 'weights.pth')"
        raise InputError(
            f"{path}: holds {len(most)} networks, whose keys begin with {', '.join(most)}; take one of them out: "
            f"{conversion(path, choose, safe=True)}"
        )
    if not most:
        return state
    return _rename(state, lambda key: key.removeprefix(most[0]) if key.startswith(most[0]) else None)


def _wrapper(key: str, model_keys: Collection[str]) -> str | None:
    """Returns the prefix of a key that ends with one of the model's keys; None if it ends with none of them."""
    parts = key.split(".", maxsplit=8)
    starts = (i for i in range(len(parts)) if ".".join(parts[i:]) in model_keys)
    return next(("".join(f"{part}." for part in parts[:i]) for i in starts), None)


def _rename(state: dict[str, Tensor], change: Callable[[str], str | None]) -> OrderedDict[str, Tensor]:
    """Renames the keys of a state dict and of its modules' versions; keys that become None are left out."""
    renamed = {new: value for key, value in state.items() if (new := change(key)) is not None}
    versions = {change(f"{key}."): node for key, node in getattr(state, "_metadata", {}).items()}
    return _state_dict(renamed, {key[:-1]: node for key, node in versions.items() if key is not None})


def rename_torchvision_resnet(state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Renames the weights of a torchvision or timm ResNet to Detectron2's names.

    ``layer1.0.bn1.weight`` becomes ``res2.0.conv1.norm.weight``.

    Raises:
        InputError: If the ResNet has parts that Detectron2's ResNets lack, such as those of ResNet-D.
    """
    unknown = [
        key for key in state if re.match(r"conv1\.\d", key) or (key.startswith("layer") and not RESNET_PARTS.match(key))
    ]
    if unknown:
        raise InputError(
            f"{path}: a ResNet of another kind than Detectron2's: it has {unknown[0]}; take it as a backbone of timm "
            "(MODEL.BACKBONE.NAME build_timm_fpn_backbone, MODEL.TIMM.NAME)."
        )
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        key = re.sub(r"bn(\d)", r"conv\1.norm", key)
        key = re.sub(r"^fc", "linear", key)
        renamed[key if key.startswith(("res", "linear")) else f"stem.{key}"] = value
    return renamed


def rename_torchvision_layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of torchvision's VGG or AlexNet to those of an image classifier with this backbone."""
    return _rename(state, lambda key: f"backbone.{key}".replace("backbone.classifier.6.", "linear."))


def backbone_of_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the backbone weights of an image classifier, with names that match a detector's backbone."""
    return {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
