"""How alike the two halves of students' channels and their teacher's features are: linear CKA on a test set.

IE-KD (Huang et al., CVPR 2021, https://arxiv.org/abs/2107.00181) draws one half to the teacher and pushes the other
away from it; a student that was trained without it tells how alike they are anyway.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from torch import Tensor
from tqdm import tqdm

from kd_det.analysis.cka import linear_cka
from kd_det.analysis.runs import Run, load_runs
from kd_det.analysis.table import summarise
from kd_det.checkpoint_files import read_checkpoint
from kd_det.engine import Trainer
from kd_det.errors import InputError
from kd_det.export import find_run
from kd_det.taps import build_tap

# Below so many examples the plain estimate of CKA is too high.
FEW = 100


def compare_halves(
    teacher: str, runs: Sequence[tuple[str, str]], feature: str, *, dataset: str | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure the CKA of each student's halves with each other and with the teacher.

    An example is the mean over cells: of a map for each image, of ``roi_features`` for each labelled box.

    Args:
        teacher: Its output folder, or "CONFIG:WEIGHTS".
        runs: Name and source of each student likewise. Runs of equal names are averaged.
        feature: A signal of teacher and students, (N, C, H, W), such as ``res4``, ``p4`` or ``roi_features``.
        dataset: Name of the test set; the teacher's DATASETS.TEST if None.

    Returns:
        Name, then pair ("inherit, teacher", "explore, teacher", "inherit, explore"), then mean and std over runs.

    Raises:
        InputError: If a model cannot be read, or lacks the feature or an even number of channels.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset, (guide, *students) = load_runs([("teacher", teacher), *runs], dataset, device, whole_chains=False)
    for run in (guide, *students):
        channels = check_feature(run, feature)
        if run is not guide and channels % 2:
            raise InputError(
                f"--feature: {feature} of {run.name!r} has {channels} channels; their number must be even."
            )
    target, found = read_examples(guide, dataset, feature), []
    for run in students:
        inherit, explore = divide(run, read_examples(run, dataset, feature), feature)
        pairs = {"inherit, teacher": (inherit, target), "explore, teacher": (explore, target)}
        pairs["inherit, explore"] = inherit, explore
        few = len(target) < FEW
        found.append({pair: linear_cka(*sides, unbiased=few).item() for pair, sides in pairs.items()})
    return summarise([run.name for run in students], found)


def check_feature(run: Run, feature: str, others: Collection[str] = ("roi_features",)) -> int:
    """Check that a model has a feature: a map, or one of `others`; returns the number of its channels."""
    known = {name: shape for name, shape in build_tap(run.model).spec().items() if shape.stride or name in others}
    if feature not in known:
        raise InputError(f"--feature: {feature!r} is no feature of {run.name!r}, which has {', '.join(known)}.")
    return known[feature].channels


@torch.no_grad()
def read_examples(run: Run, dataset: str, feature: str) -> Tensor:
    """The mean over cells of a feature: of each image, or of each labelled box, (examples, C)."""
    records = {record["file_name"]: record for record in DatasetCatalog.get(dataset)} if "roi" in feature else {}
    tap, rows = build_tap(run.model), []
    for batch in tqdm(Trainer.build_test_loader(run.cfg, dataset), desc=run.name, unit="batch", disable=None):
        boxes = labelled_boxes([records[x["file_name"]] for x in batch], batch) if records else torch.empty(0, 5)
        signals = tap.compute(batch, {feature}, {"roi_boxes": boxes.to(run.model.device)})
        rows.append(signals[feature].mean(dim=(2, 3)).double().cpu())
    return torch.cat(rows)


def labelled_boxes(records: list[dict], batch: list[dict]) -> Tensor:
    """The boxes of objects that a data set's records name, without crowds, in pixels of the batch's images.

    Returns:
        (R, 5): image, x0, y0, x1, y1.
    """
    boxes = [torch.empty(0, 5)]
    for i, (record, image) in enumerate(zip(records, batch, strict=True)):
        height, width = image["image"].shape[-2:]
        scale = torch.tensor([width / image["width"], height / image["height"]]).repeat(2)
        for annotation in record["annotations"]:
            if annotation.get("iscrowd", 0):
                continue
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            boxes.append(torch.cat([torch.tensor([float(i)]), torch.tensor(box) * scale])[None])
    return torch.cat(boxes).float()


def divide(run: Run, examples: Tensor, feature: str) -> tuple[Tensor, Tensor]:
    """The inheriting and the exploring half of (examples, C), by the division that the run drew, if it drew one."""
    order = None
    if Path(run.source).is_dir():
        checkpoint = read_checkpoint(find_run(run.source)[1])
        order = checkpoint.get("kd_heads", {}).get(f"InheritExploreHead.order_{feature}")
    return (examples if order is None else examples[:, order]).chunk(2, dim=1)
