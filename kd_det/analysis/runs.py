"""Loads the trained models of a comparison."""

import itertools
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from detectron2.config import CfgNode
from torch import nn

from kd_det.analysis.ensemble import Ensemble
from kd_det.analysis.run import Run
from kd_det.data import check_files, check_num_classes, register_datasets
from kd_det.engine import is_classifier
from kd_det.engine.evaluation import KINDS, check_evaluator
from kd_det.errors import InputError
from kd_det.export import ExportedModel, find_run, is_exported, load_student, read_student_config

logger = logging.getLogger(__name__)


def load_runs(
    runs: Sequence[tuple[str, str]],
    dataset: str | None,
    device: str,
    *,
    whole_chains: bool = True,
    exported: bool = False,
) -> tuple[str, list[Run]]:
    """Loads the models of runs, after a check of all configs.

    Args:
        runs: Name and source of each run.
        dataset: Name of the test set; None is the first run's DATASETS.TEST.
        device: Device of the models.
        whole_chains: Whether the output folder of a chain (``KD.GENERATIONS``) becomes a run for each generation and
            one for their ensemble; otherwise it is refused.
        exported: Whether a run may be an exported file, ONNX or TorchScript; otherwise it is refused.

    Returns:
        The name of the test set, and the runs.

    Raises:
        InputError: If a source, a data set, or a file of weights is wrong, or the runs are of different kinds.
    """
    chains = [find_generations(*run) for run in runs]
    for (name, source), chain in zip(runs, chains, strict=True):
        if chain and not whole_chains:
            raise InputError(
                f"{name}={source}: is a chain of generations; name one of them, such as {source}/gen_{len(chain)}."
            )
    singles = [single for run, chain in zip(runs, chains, strict=True) for single in chain or [run]]
    files = [find_files(*single) for single in singles]
    for single, (_, weights) in zip(singles, files, strict=True):
        if is_exported(weights) and not exported:
            raise InputError(f"{'='.join(single)}: is an exported file; only kd-det compare takes these.")
    cfgs = [read_student_config(path, "=".join(single)) for single, (path, _) in zip(singles, files, strict=True)]
    dataset = prepare_dataset(singles, cfgs, dataset)
    models = (
        Run(*single, cfg, load_model(cfg, weights, device, "=".join(single)), seed_of(cfg))
        for single, cfg, (_, weights) in zip(singles, cfgs, files, strict=True)
    )
    loaded: list[Run] = []
    for (name, source), chain in zip(runs, chains, strict=True):
        members = list(itertools.islice(models, len(chain) or 1))
        if chain:
            config = chain_config(source)
            seed = seed_of(read_student_config(config, f"{name}={source}")) if os.path.isfile(config) else None
            members = [replace(run, seed=seed) for run in members]
            members.append(join(f"{name} ensemble", source, members))
        loaded += members
    return dataset, loaded


def load_model(cfg: CfgNode, weights: str, device: str, key: str) -> nn.Module:
    """Loads a student from its checkpoint, or from an exported file, which runs on the CPU.

    Args:
        cfg: Config of the student alone.
        weights: The checkpoint or the exported file.
        device: Device of a student from a checkpoint.
        key: The run, for messages.
    """
    return ExportedModel(weights, cfg, key) if is_exported(weights) else load_student(cfg, weights, device)


def seed_of(cfg: CfgNode) -> int | None:
    """Returns the seed of a run; None if it drew one at random."""
    return cfg.SEED if cfg.SEED >= 0 else None


def chain_config(source: str) -> str:
    """Returns the path of the config of a chain of generations."""
    return os.path.join(source, "config.yaml")


def find_files(name: str, source: str) -> tuple[str, str]:
    """Finds the config and the weights of a run; beside an exported file without a config lies its student.yaml.

    Raises:
        InputError: If the source is neither a folder with both, nor CONFIG:WEIGHTS, nor an exported file.
    """
    if os.path.isdir(source):
        return find_run(source)
    config_file, colon, weights = source.partition(":")
    if not colon and is_exported(source):
        return os.path.join(os.path.dirname(source), "student.yaml"), source
    if not colon:
        raise InputError(f"{name}={source}: neither an output folder nor CONFIG:WEIGHTS.")
    return config_file, weights


def prepare_dataset(runs: Sequence[tuple[str, str]], cfgs: Sequence[CfgNode], dataset: str | None) -> str:
    """Makes one test set that of all configs, and checks that it fits them.

    Args:
        runs: Name and source of each run, for messages.
        cfgs: The config of each run.
        dataset: Name of the test set; None is the first run's DATASETS.TEST.

    Returns:
        The name of the test set.

    Raises:
        InputError: If the data set is wrong, or the runs are of different kinds.
    """
    for cfg in cfgs:
        register_datasets(cfg)
    kinds = {is_classifier(cfg): name for (name, _), cfg in zip(runs, cfgs, strict=True)}
    if len(kinds) > 1:
        raise InputError(
            f"--run: {kinds[True]!r} is an image classifier, {kinds[False]!r} is a detector; all runs of a "
            "comparison must be of one kind."
        )
    if not dataset and not cfgs[0].DATASETS.TEST:
        raise InputError(f"--dataset: none is given, and DATASETS.TEST of {runs[0][1]} is empty.")
    dataset = dataset or cfgs[0].DATASETS.TEST[0]
    for cfg in cfgs:
        cfg.DATASETS.TEST = (dataset,)
        check_files(cfg, train=False)
        check_num_classes(cfg, train=False)
    check_evaluator(dataset, (*KINDS, "coco_panoptic_seg"))
    return dataset


def find_generations(name: str, source: str) -> list[tuple[str, str]]:
    """Returns the name and folder of each generation, in order; an empty list if the source is not a chain of them.

    Raises:
        InputError: If the config of the chain cannot be read.
    """
    paths = [path for path in Path(source).glob("gen_*") if re.fullmatch(r"gen_[1-9]\d*", path.name)]
    folders = {int(path.name.removeprefix("gen_")): path for path in paths}
    config = chain_config(source)
    if folders and os.path.isfile(config):  # The folder may also hold generations of an earlier, longer chain.
        last = read_student_config(config, f"{name}={source}").KD.GENERATIONS
        folders = {i: path for i, path in folders.items() if i <= last}
        if len(folders) < last:
            there = f"of {last} generations only {len(folders)} are there"
            logger.warning("%s=%s: the chain is not finished, %s.", name, source, there)
    return [(f"{name} gen {i}", str(folders[i])) for i in sorted(folders)]


def join(name: str, source: str, runs: Sequence[Run]) -> Run:
    """Makes the ensemble of a chain's generations, which all read images in the same way."""
    cfg = runs[-1].cfg.clone()
    cfg.MODEL.MASK_ON = False  # Masks are not fused.
    return Run(name, source, cfg, Ensemble([run.model for run in runs]), runs[-1].seed)
