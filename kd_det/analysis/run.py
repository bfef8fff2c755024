"""Describes a trained model of a comparison, which predicts and is evaluated."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.structures import Instances
from torch import Tensor, nn
from tqdm import tqdm

from kd_det.analysis.ensemble import Ensemble
from kd_det.engine import Trainer
from kd_det.errors import InputError
from kd_det.export import ExportedModel


@dataclass
class Run:
    """Holds a trained model.

    Attributes:
        name: Name of the experiment; runs with the same name are its seeds.
        source: Source of the model, as the user wrote it.
        cfg: Config of the student alone.
        model: The model, in evaluation mode.
        seed: Seed that the training began with, that of the whole chain for a generation; None if it had none.
    """

    name: str
    source: str
    cfg: CfgNode
    model: nn.Module
    seed: int | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def networks(self) -> list[nn.Module]:
        """Returns the model, or the models of an ensemble; there is none in an exported file."""
        if isinstance(self.model, ExportedModel):
            return []
        return list(self.model.models) if isinstance(self.model, Ensemble) else [self.model]

    @torch.no_grad()
    def predict(self, image: dict[str, Any]) -> Instances | Tensor:
        """Predicts the instances of a detector, or the scores (K,) of a classifier, for one image; on the CPU."""
        output = self.model([image])[0]
        return output["instances" if "instances" in output else "scores"].to("cpu")

    def evaluate(self, dataset: str, evaluator: DatasetEvaluator) -> dict[str, Any]:
        """Evaluates the predictions on a data set; hides what the evaluator prints."""
        loader = Trainer.build_test_loader(self.cfg, dataset)
        progress = tqdm(loader, desc=f"{self.name}: {dataset}", unit="batch", disable=None)
        with contextlib.redirect_stdout(io.StringIO()):
            return inference_on_dataset(self.model, progress, evaluator)


def split_run(text: str) -> tuple[str, str]:
    """Splits NAME=SOURCE into the name and the source of a run.

    Raises:
        InputError: If one is missing.
    """
    name, _, source = text.partition("=")
    if not (name and source):
        raise InputError(f"--run: got {text!r}; NAME=FOLDER or NAME=CONFIG:WEIGHTS is needed.")
    return name, source
