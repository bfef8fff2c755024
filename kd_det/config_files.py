"""Finds config files by path or by name, and names the folder of a run after them."""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from detectron2 import model_zoo
from detectron2.config import get_cfg

from kd_det.errors import InputError
from kd_det.fetching import fetch, is_url


def kd_det_configs() -> Path:
    """Returns the folder of kd_det's own configs: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else (package.parent / "configs").resolve()


def zoo_configs() -> Path:
    """Returns the folder of the configs of Detectron2's model zoo."""
    return Path(model_zoo.__file__).resolve().parent / "configs"


def find_config(path: str, key: str = "--config-file") -> str:
    """Returns the path of a config file, or of the config of that name in Detectron2's model zoo or in kd_det.

    Args:
        path: A file, a URL, or a name such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml or recipes/reviewkd.yaml.
        key: The key or argument that names the file, for messages.

    Raises:
        InputError: If no such file or config exists, or the URL cannot be fetched.
    """
    path = os.path.expanduser(path)
    if path.endswith(".py"):
        raise InputError(f"{key}: {path} is a LazyConfig (.py); only YAML configs are read.")
    if is_url(path):
        fetch(path, key)
        return path  # Its bases are relative to it.
    # The zoo comes first, so that its names mean what they mean in Detectron2.
    places = [Path(path), zoo_configs() / path, kd_det_configs() / path]
    for place in places:
        if place.is_file():
            return path if place == places[0] else str(place)
    raise InputError(
        f"{key}: there is no such file, and {path} is not the name of a config of Detectron2's model zoo "
        f"({zoo_configs()}) or of kd_det ({kd_det_configs()})."
    )


def is_zoo_name(path: str) -> bool:
    """Returns whether :func:`find_config` finds a config by its name in Detectron2's model zoo."""
    return find_config(path) == str(zoo_configs() / path) != path


def default_output_dir(sources: Sequence[str], heads: Sequence[str] | None = None) -> str:
    """Returns the folder that a run writes into if neither a config nor an override sets ``OUTPUT_DIR``.

    It is ``output/BCCD/student`` for kd_det's config of this name, ``output/NAME`` for another file NAME.yaml, and
    ``output/BCCD/student-reviewkd`` for this config with a second one, such as ``recipes/reviewkd.yaml``.

    Args:
        sources: The run's config files, as :func:`find_config` takes them; without any, it is Detectron2's default.
        heads: Config keys of the distillation heads that the command line names; None if it names none.

    Raises:
        InputError: If a config does not exist.
    """
    if not sources:
        return get_cfg().OUTPUT_DIR
    first, *others = map(find_config, sources)
    place = Path(first).resolve()
    folder = kd_det_configs()
    name = str(place.relative_to(folder).with_suffix("")) if folder in place.parents else _stem(first)
    named = [key.lower() for key in heads] or ["plain"] if heads is not None else []
    return os.path.join("output", "-".join([name, *map(_stem, others), *named]))


def _stem(path: str) -> str:
    return Path(urlsplit(path).path if is_url(path) else path).stem
