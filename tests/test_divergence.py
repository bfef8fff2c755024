"""Tests diverged trainings: one line reports the losses and the remedies, and --resume continues from before it."""

import re

import pytest
import torch
from children import same
from helpers import distilled_cfg, tiny_cfg, with_data

from kd_det.data import register_datasets
from kd_det.engine import Trainer
from kd_det.engine.divergence import last_sound_iteration
from kd_det.engine.stages import train

pytestmark = pytest.mark.usefixtures("in_process")
RATE = r"lower SOLVER\.BASE_LR, now \S+"
REMEDY = (
    rf"; {RATE}, clip the gradients \(SOLVER\.CLIP_GRADIENTS\.ENABLED\) or add a norm to the FPN \(MODEL\.FPN\.NORM\)"
)


@pytest.fixture
def run(coco_folder, tmp_path):
    """Makes the config of a run of six iterations that saves each one."""

    def make(cfg=None, **options):
        options = {"SOLVER.MAX_ITER": 6, "SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.WARMUP_ITERS": 0} | options
        cfg = with_data(cfg or tiny_cfg(), coco_folder, tmp_path / "run")
        cfg.merge_from_list([part for pair in options.items() for part in pair])
        cfg.DATASETS.TEST = ()
        register_datasets(cfg)
        return cfg

    return make


def diverge(cfg):
    """Train, which must end in one line; returns it and what the run would be resumed from."""
    with pytest.raises(FloatingPointError) as error:
        train(cfg, resume=False)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("rate", [1e30, 1e4])
@pytest.mark.parametrize("family", ["mask_rcnn", "cascade", "retinanet"])
def test_far_too_high_rate_ends_in_one_line(run, tmp_path, family, rate):
    """Whoever of Detectron2 meets it. With a sane one the run then begins anew, as its first weights were bad."""
    told = diverge(run(tiny_cfg(family), **{"SOLVER.BASE_LR": rate}))
    assert re.search(r"iteration\W\d", told)
    assert re.search(r"loss_\w+'?:? ", told)
    assert re.search(REMEDY + "$", told)
    train(run(tiny_cfg(family)), resume=True)
    assert torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["iteration"] == 5


@pytest.mark.parametrize(
    "message", ["Box tensor contains infinite or NaN!", "Input boxes to Box2BoxTransform are not valid!"]
)
def test_assertion_of_a_diverged_training_counts_as_divergence(run, monkeypatch, message):
    step = Trainer.run_step

    def run_step(trainer):
        with monkeypatch.context() as patch:
            if trainer.iter == 3:
                patch.setattr(trainer._trainer, "run_step", lambda: (_ for _ in ()).throw(AssertionError(message)))
            step(trainer)

    monkeypatch.setattr(Trainer, "run_step", run_step)
    told = diverge(run())
    values = r"the losses of iteration 2 were (\w+ [\d.e-]+, )*loss_cls [\d.e-]+, "
    assert re.search(rf"^iteration 3: {re.escape(message)}; {values}", told)


def test_other_assertions_are_defects(run, monkeypatch):
    def breach():
        raise AssertionError("a defect")

    trainer = Trainer(run())
    monkeypatch.setattr(trainer._trainer, "run_step", breach)
    with pytest.raises(AssertionError, match="a defect"):
        trainer.train()


def test_resume_continues_before_the_divergence(run, tmp_path, monkeypatch, caplog):
    """Of iteration 2: that of iteration 3 has weights that are finite, but far too large."""
    step, folder = Trainer.run_step, tmp_path / "run"

    def run_step(trainer):
        step(trainer)
        if trainer.iter == 3:
            for parameter in trainer.student.parameters():
                parameter.data *= 1e20

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_step", run_step)
        told = diverge(run())
    assert re.search(r"iteration\W4", told)
    assert (folder / "last_checkpoint").read_text() == "model_0000002.pth"
    assert f"diverged at {folder}/model_0000003.pth: --resume continues from model_0000002.pth." in caplog.text
    train(run(), resume=True)
    resumed = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    train(run(), resume=False)
    assert same(resumed, torch.load(folder / "model_final.pth", weights_only=True)["model"])


def test_checkpoint_of_non_finite_weights_ends_the_run(run, tmp_path, monkeypatch):
    """Also the final one, behind which no loss could show them."""
    step = Trainer.run_step

    def run_step(trainer):
        step(trainer)
        if trainer.iter == 5:
            torch.nn.init.constant_(trainer.student.roi_heads.box_predictor.bbox_pred.bias, torch.nan)

    monkeypatch.setattr(Trainer, "run_step", run_step)
    told = diverge(run())
    expected = r"^iteration 5: 1 of the weights' tensors are not finite: model\.\S+; the losses of iteration 5 were"
    assert re.search(expected, told)
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000004.pth"


def test_diverged_distilled_run(run, teacher, tmp_path):
    cfg = distilled_cfg(teacher, ["HintHead"], {"MODEL.FPN.NORM": "BN"})
    told = diverge(run(cfg, **{"SOLVER.BASE_LR": 1e30}))
    assert re.search(r"iteration \d", told)
    assert re.search(RATE, told)
    assert not (tmp_path / "run" / "last_checkpoint").exists()


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], 8),
        ([3.0], 9),
        ([3.0, 10.0], 9),
        ([1.0] * 90 + [7.0] * 60, 158),
        ([3.0, 5.0, 2.0], 11),
        ([3.0, 5.0, 2.0, 90.0, 1e6, 1e20], 9),
        ([1.0] * 90 + [90.0, 1e6, 1e20], 88),
        ([-3.0] * 90 + [-90.0], 88),
    ],
)
def test_the_last_sound_iteration(losses, expected):
    """The run began with iteration 10; after the last of these losses, one was not finite."""
    assert last_sound_iteration([(loss, i) for i, loss in enumerate(losses, 10)], 10) == expected
