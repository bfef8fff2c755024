"""The models of a comparison, and what their inference costs."""

import contextlib
import io
import itertools
import logging
import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.structures import Instances
from torch import Tensor, nn
from tqdm import tqdm

from kd_det.analysis.ensemble import Ensemble
from kd_det.data import check_files, check_num_classes, register_datasets
from kd_det.engine import Trainer, is_classifier
from kd_det.engine.evaluation import check_evaluator
from kd_det.errors import InputError
from kd_det.export import find_run, load_student, read_student_config

logger = logging.getLogger(__name__)
TIMED_ROUNDS = 5


@dataclass
class Run:
    """A trained model.

    Attributes:
        name: Its title. Runs of one name are the seeds of one experiment.
        source: Where it comes from, as the user said.
        cfg: Config of the student alone.
        model: In evaluation mode.
    """

    name: str
    source: str
    cfg: CfgNode
    model: nn.Module

    @property
    def networks(self) -> list[nn.Module]:
        """The model, or those that an ensemble joins."""
        return list(self.model.models) if isinstance(self.model, Ensemble) else [self.model]

    @torch.no_grad()
    def predict(self, image: dict[str, Any]) -> Instances | Tensor:
        """What a detector finds in an image, or the scores (K,) that a classifier gives it, on the CPU."""
        output = self.model([image])[0]
        return output["instances" if "instances" in output else "scores"].to("cpu")

    def evaluate(self, dataset: str, evaluator: DatasetEvaluator) -> dict[str, Any]:
        """What an evaluator says of the predictions on a data set; what it prints is kept back."""
        loader = Trainer.build_test_loader(self.cfg, dataset)
        progress = tqdm(loader, desc=f"{self.name}: {dataset}", unit="batch", disable=None)
        with contextlib.redirect_stdout(io.StringIO()):
            return inference_on_dataset(self.model, progress, evaluator)


def split_run(text: str) -> tuple[str, str]:
    """Name and source of a run, given as NAME=SOURCE.

    Raises:
        InputError: If one is missing.
    """
    name, _, source = text.partition("=")
    if not (name and source):
        raise InputError(f"--run: got {text!r}; NAME=FOLDER or NAME=CONFIG:WEIGHTS is needed.")
    return name, source


def load_runs(
    runs: Sequence[tuple[str, str]], dataset: str | None, device: str, *, whole_chains: bool = True
) -> tuple[str, list[Run]]:
    """The name of the test set, and the runs, their configs checked before any model is built.

    Args:
        runs: Name and source of each.
        dataset: Name of the test set; the first run's DATASETS.TEST if None.
        device: Where the models are built.
        whole_chains: Whether the output folder of a chain (``KD.GENERATIONS``) becomes a run for each generation and
            one for their ensemble; else it is refused.

    Raises:
        InputError: If a source, a data set, or a file of weights is wrong, or the runs are of different kinds.
    """
    chains = [find_generations(*run) for run in runs]
    for (name, source), chain in zip(runs, chains, strict=True):
        if chain and not whole_chains:
            raise InputError(
                f"{name}={source}: is a chain of generations; name one of them, such as {source}/gen_{len(chain)}."
            )
    given, runs = runs, [one for run, chain in zip(runs, chains, strict=True) for one in chain or [run]]
    cfgs, weights = [], []
    for name, source in runs:
        if not os.path.isdir(source) and ":" not in source:
            raise InputError(f"{name}={source}: neither an output folder nor CONFIG:WEIGHTS.")
        config_file, path = find_run(source) if os.path.isdir(source) else source.split(":", 1)
        cfgs.append(read_student_config(config_file, f"{name}={source}"))
        weights.append(path)
        register_datasets(cfgs[-1])
    classifiers = {is_classifier(cfg): name for (name, _), cfg in zip(runs, cfgs, strict=True)}
    if len(classifiers) > 1:
        raise InputError(
            f"--run: {classifiers[True]!r} is an image classifier, {classifiers[False]!r} is a detector; all runs of a "
            "comparison must be of one kind."
        )
    if not dataset and not cfgs[0].DATASETS.TEST:
        raise InputError(f"--dataset: none is given, and DATASETS.TEST of {runs[0][1]} is empty.")
    dataset = dataset or cfgs[0].DATASETS.TEST[0]
    for cfg in cfgs:
        cfg.DATASETS.TEST = (dataset,)
        check_files(cfg, train=False)
        check_num_classes(cfg, train=False)
    check_evaluator(dataset)
    parts = zip(runs, cfgs, weights, strict=True)
    models = iter([Run(*run, cfg, load_student(cfg, path, device)) for run, cfg, path in parts])
    loaded = []
    for (name, source), chain in zip(given, chains, strict=True):
        loaded += itertools.islice(models, len(chain) or 1)
        if chain:
            loaded.append(join(f"{name} ensemble", source, loaded[-len(chain) :]))
    return dataset, loaded


def find_generations(name: str, source: str) -> list[tuple[str, str]]:
    """Name and folder of each generation, the first one first; none where the source is no chain of them.

    Raises:
        InputError: If the config of the chain cannot be read.
    """
    paths = [path for path in Path(source).glob("gen_*") if re.fullmatch(r"gen_[1-9]\d*", path.name)]
    folders = {int(path.name.removeprefix("gen_")): path for path in paths}
    config = Path(source, "config.yaml")
    if folders and config.is_file():  # A longer chain may have been there before.
        last = read_student_config(str(config), f"{name}={source}").KD.GENERATIONS
        folders = {i: path for i, path in folders.items() if i <= last}
        if len(folders) < last:
            there = f"of {last} generations only {len(folders)} are there"
            logger.warning("%s=%s: the chain is not finished, %s.", name, source, there)
    return [(f"{name} gen {i}", str(folders[i])) for i in sorted(folders)]


def join(name: str, source: str, runs: Sequence[Run]) -> Run:
    """The ensemble of a chain's generations, which all read images the same way."""
    cfg = runs[-1].cfg.clone()
    cfg.MODEL.MASK_ON = False  # Masks are not fused.
    return Run(name, source, cfg, Ensemble([run.model for run in runs]))


def measure_times(runs: list[Run], samples: list[list[dict[str, Any]]]) -> list[float]:
    """Median time of each run's inference on an image, in ms; the runs take turns, so all meet the same load."""
    times: list[list[float]] = [[] for _ in runs]
    for round_ in tqdm(range(TIMED_ROUNDS + 1), desc="speed", unit="round", disable=None):
        for turn in zip(*samples, strict=True):
            for own, run, image in zip(times, runs, turn, strict=True):
                start = time.perf_counter()
                run.predict(image)
                if round_ > 0:  # The first one warms up.
                    own.append(1000 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]
