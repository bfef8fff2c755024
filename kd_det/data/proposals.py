"""Reads files of precomputed proposals, for models with ``MODEL.LOAD_PROPOSALS``."""

import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from kd_det.errors import InputError, reason
from kd_det.fetching import fetch
from kd_det.unpickling import load_arrays

# Names of the two lists in Detectron2's files and in those of its predecessor.
IDS, LOGITS = ("ids", "indexes"), ("objectness_logits", "scores")


@contextmanager
def proposal_files(cfg: CfgNode, split: str, names: list[str]) -> Iterator[list[str] | None]:
    """Rewrites the proposal files of data sets so that they hold only numbers, because Detectron2 unpickles them.

    Args:
        cfg: The run's config.
        split: "TRAIN" or "TEST".
        names: Names of data sets of DATASETS.TRAIN or DATASETS.TEST.

    Yields:
        Paths of the rewritten files, for Detectron2's ``get_detection_dataset_dicts``; None without
        MODEL.LOAD_PROPOSALS.

    Raises:
        InputError: If there is no file for a data set, the file does not hold proposals, or it lacks an image.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        yield None
        return
    key, datasets = f"DATASETS.PROPOSAL_FILES_{split}", list(cfg.DATASETS[split])
    files = cfg.DATASETS[f"PROPOSAL_FILES_{split}"]
    if len(files) != len(datasets):
        raise InputError(f"{key}: {len(files)} files for the {len(datasets)} data sets of DATASETS.{split}.")
    with tempfile.TemporaryDirectory() as folder:
        copies = []
        for i, name in enumerate(names):
            path = files[datasets.index(name)]
            copies.append(str(Path(folder, f"{i}.pkl")))
            Path(copies[-1]).write_bytes(pickle.dumps(read_proposals(path, key)))
        try:
            yield copies
        except KeyError as error:
            raise InputError(
                f"{key}: {', '.join(files)}: there are no proposals for the image with id {error}."
            ) from error


def read_proposals(path: str, key: str) -> dict[str, Any]:
    """Reads a file in Detectron2's format without running code in it.

    Args:
        path: A path or URL.
        key: The config key that names it, for messages.

    Returns:
        "ids"; "boxes", an array (N, 4) for each id; "objectness_logits", an array (N,) for each id; and "bbox_mode" if
        the file has it.

    Raises:
        InputError: If it is not such a file.
    """
    local = fetch(path, key)
    try:
        data = load_arrays(local)
        ids, logits = (next(data[name] for name in names if name in data) for names in (IDS, LOGITS))
        boxes = [np.asarray(x, np.float32).reshape(-1, 4) for x in data["boxes"]]
        logits = [np.asarray(x, np.float32).reshape(len(box)) for x, box in zip(logits, boxes, strict=True)]
        ids = [str(x) for x, _ in zip(ids, boxes, strict=True)]
        mode = {"bbox_mode": int(data["bbox_mode"])} if "bbox_mode" in data else {}
    except Exception as error:  # A broken or malicious file may cause any error.
        raise InputError(
            f"{key}: {path}: not a file of proposals, a pickle of ids, boxes and objectness_logits: "
            f"{type(error).__name__}: {reason(error)}"
        ) from error
    return {"ids": ids, "boxes": boxes, "objectness_logits": logits, **mode}
