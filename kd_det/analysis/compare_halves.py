"""Compares the two halves of students' channels with their teacher's features, by linear CKA on a test set.

IE-KD (Huang et al., CVPR 2021, https://arxiv.org/abs/2107.00181) pulls one half towards the teacher and pushes the
other away from it. A student that was trained without IE-KD shows how similar the halves are anyway.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog
from torch import Tensor
from tqdm import tqdm

from kd_det.analysis.cka import linear_cka
from kd_det.analysis.probing import check_feature, labelled_boxes
from kd_det.analysis.run import Run
from kd_det.analysis.runs import load_runs
from kd_det.analysis.table import Summary, summarise
from kd_det.checkpoint_files import read_checkpoint
from kd_det.engine import Trainer
from kd_det.errors import InputError, reason
from kd_det.export import find_run
from kd_det.heads import InheritExploreHead
from kd_det.taps import build_tap

# With fewer examples than this, the biased estimate of CKA is too high.
FEW = 100
PARTS = ("inherit", "explore")


def compare_halves(
    teacher: str, runs: Sequence[tuple[str, str]], feature: str, *, dataset: str | None = None, swap: bool = False
) -> Summary:
    """Measures the CKA of each student's halves with each other and with the teacher.

    With `swap`, it instead measures the CKA of the teacher's factor with the factor of each half by each encoder of the
    run, its own and that of the other half. If the inheriting encoder makes either half resemble the teacher, then the
    resemblance is the encoder's work and not that of the half.

    Features are averaged over their cells. An example is an image, or for ``roi_features`` a labelled box.

    Args:
        teacher: Its output folder, or "CONFIG:WEIGHTS".
        runs: Name and source of each student, in the same form. Runs with the same name are averaged.
        feature: A signal of teacher and students, (N, C, H, W), such as ``res4``, ``p4`` or ``roi_features``.
        dataset: Name of the test set; None is the teacher's DATASETS.TEST.
        swap: Whether to compare factors; all runs must be output folders of IE-KD with this teacher.

    Returns:
        Mean and std over runs, by name and by pair ("inherit, teacher", "explore, teacher", "inherit, explore"); with
        `swap` by half and encoder ("inherit by inherit", "explore by inherit", ...).

    Raises:
        InputError: If a model cannot be read, lacks the feature or an even number of channels, or with `swap` has no
            encoders that fit.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset, (teacher_run, *students) = load_runs([("teacher", teacher), *runs], dataset, device, whole_chains=False)
    check_feature(teacher_run, feature)
    for run in students:
        channels = check_feature(run, feature)
        if channels % 2:
            raise InputError(
                f"--feature: {feature} of {run.name!r} has {channels} channels; their number must be even."
            )
    if swap:
        heads = [load_head(run, teacher_run, feature) for run in students]
        swapped = [
            measure_swapped(run, head, teacher_run, dataset, feature) for run, head in zip(students, heads, strict=True)
        ]
        return summarise([run.name for run in students], swapped)
    target = read_examples(teacher_run, dataset, feature)
    similarities = [measure_student(run, target, dataset, feature) for run in students]
    return summarise([run.name for run in students], similarities)


def measure_student(run: Run, target: Tensor, dataset: str, feature: str) -> dict[str, float]:
    """Measures one student; see :func:`compare_halves`.

    Args:
        target: The teacher's examples.
    """
    inherit, explore = divide(run, read_examples(run, dataset, feature), feature)
    pairs = {
        "inherit, teacher": (inherit, target),
        "explore, teacher": (explore, target),
        "inherit, explore": (inherit, explore),
    }
    return {pair: linear_cka(x, y, unbiased=len(target) < FEW).item() for pair, (x, y) in pairs.items()}


def load_head(run: Run, teacher: Run, feature: str) -> InheritExploreHead:
    """Loads the head of a run of IE-KD, with the encoders of its halves and of the teacher's feature.

    Raises:
        InputError: If the run has no such encoders, or they were trained for another teacher.
    """
    prefix = f"{InheritExploreHead.__name__}."
    saved = read_checkpoint(find_run(run.source)[1]).get("kd_heads", {}) if Path(run.source).is_dir() else {}
    state = {key.removeprefix(prefix): x for key, x in saved.items() if key.startswith(prefix)}
    if not all(any(key.startswith(f"encoders.{part}.{feature}.") for key in state) for part in PARTS):
        raise InputError(
            f"--swap: {run.name!r} is not the output folder of a run of IE-KD that has encoders of both halves of "
            f"{feature}."
        )
    head = InheritExploreHead(run.cfg, build_tap(run.model).spec(), build_tap(teacher.model).spec())
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"--swap: the encoders of {run.name!r} are for another teacher: {reason(error)}") from error
    return head.to(run.device).eval()


def measure_swapped(run: Run, head: InheritExploreHead, teacher: Run, dataset: str, feature: str) -> dict[str, float]:
    """Measures one student with its halves in their own and in each other's encoder; see :func:`compare_halves`."""
    order = head.get_buffer(f"order_{feature}")
    encoders = {part: head.encoders.get_submodule(f"{part}.{feature}") for part in PARTS}

    def encode_halves(x: Tensor) -> Tensor:
        halves = (x if order is None else x[:, order]).chunk(2, dim=1)
        return torch.cat([encoders[part](half) for part in PARTS for half in halves], dim=1)

    factors = read_examples(run, dataset, feature, encode_halves).chunk(4, dim=1)
    target = read_examples(teacher, dataset, feature, head.auto_encoders.get_submodule(f"{feature}.encoder"))
    names = [f"{half} by {part}" for part in PARTS for half in PARTS]
    unbiased = len(target) < FEW
    return {name: linear_cka(x, target, unbiased=unbiased).item() for name, x in zip(names, factors, strict=True)}


@torch.no_grad()
def read_examples(run: Run, dataset: str, feature: str, function: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Computes the mean of a feature over its cells for each image or labelled box, (examples, C).

    Args:
        function: Maps the feature of a batch to what is averaged; None leaves it as it is.
    """
    records = {record["file_name"]: record for record in DatasetCatalog.get(dataset)} if "roi" in feature else {}
    tap, rows = build_tap(run.model), []
    for batch in tqdm(Trainer.build_test_loader(run.cfg, dataset), desc=run.name, unit="batch", disable=None):
        boxes = labelled_boxes([records[x["file_name"]] for x in batch], batch) if records else torch.empty(0, 5)
        signals = tap.compute(batch, {feature}, {"roi_boxes": boxes.to(run.device)})
        x = signals[feature] if function is None else function(signals[feature])
        rows.append(x.mean(dim=(2, 3)).double().cpu())
    return torch.cat(rows)


def divide(run: Run, examples: Tensor, feature: str) -> tuple[Tensor, Tensor]:
    """Splits examples (examples, C) into the inheriting and the exploring half of the channels."""
    order = channel_order(run, feature)
    inherit, explore = (examples if order is None else examples[:, order]).chunk(2, dim=1)
    return inherit, explore


def channel_order(run: Run, feature: str) -> Tensor | None:
    """Reads the order in which a student of IE-KD drew the channels of a feature, the inheriting half first.

    Returns:
        Indices of the channels; None for any other student, whose channels are taken in their own order.
    """
    if not Path(run.source).is_dir():
        return None
    checkpoint = read_checkpoint(find_run(run.source)[1])
    return checkpoint.get("kd_heads", {}).get(f"InheritExploreHead.order_{feature}")
