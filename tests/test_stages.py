"""Tests pre-training and generations: finished ones stay, interrupted ones continue, each has its teacher."""

from pathlib import Path

import pytest
import torch
import yaml
from children import same
from classification.models import classifier_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import WIDE, distilled_cfg, interrupted_at, save_teacher, tiny_cfg, with_data

import kd_det.teacher_kinds
from kd_det import InputError
from kd_det.data import register_datasets
from kd_det.engine import Trainer
from kd_det.engine.stages import FINAL, Pretraining, PretrainingTrainer, seed, train
from kd_det.registry import config_key

pytestmark = pytest.mark.usefixtures("in_process")
STAGE = {"KD.PRETRAIN.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2}


@pytest.fixture
def run(teacher, coco_folder, tmp_path):
    """Makes the config of a detector's run whose heads have a stage."""

    def make(output="output", heads=("FactorTransferHead",), **options):
        cfg = with_data(distilled_cfg(teacher, list(heads), STAGE | options), coco_folder, tmp_path / output)
        cfg.DATASETS.TEST = ()
        register_datasets(cfg)
        Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
        return cfg

    return make


def go(cfg, *, resume=False):
    train(cfg, resume=resume)
    return weights(cfg.OUTPUT_DIR)


def weights(folder, name=FINAL):
    checkpoint = torch.load(Path(folder, name), weights_only=True)
    return {**checkpoint["model"], **{f"heads.{key}": x for key, x in checkpoint["kd_heads"].items()}}


# ---- The stage of the heads ----
def test_run_starts_with_the_weights_of_the_stage(run):
    final = go(run())
    stage = weights(Path(run().OUTPUT_DIR, "pretrain"))
    fresh = Pretraining(run()).state_dict()
    paraphraser = [key for key in stage if ".paraphrasers." in key]
    assert paraphraser
    assert all(torch.equal(stage[key], final[key]) for key in paraphraser), "frozen in the main run"
    assert any(not torch.equal(stage[key], fresh[key]) for key in paraphraser), "trained in the stage"
    translator = [key for key in stage if ".translators." in key]
    assert any(not torch.equal(stage[key], final[key]) for key in translator), "trained in the main run"


def test_student_does_not_run_for_an_adapter_of_the_teacher(run):
    model = Pretraining(run()).train()
    runs = []
    model.student.backbone.register_forward_hook(lambda *_: runs.append("student"))
    model.teacher.model.backbone.register_forward_hook(lambda *_: runs.append("teacher"))
    trainer_inputs = next(iter(PretrainingTrainer.build_train_loader(run())))
    with EventStorage():
        losses = model(trainer_inputs)
    assert runs == ["teacher"]
    assert list(losses) == ["loss_kd_factor_transfer_reconstruct"]
    sum(losses.values()).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".paraphrasers." in name}


@pytest.mark.parametrize(
    ("head", "feature", "idle"),
    [
        ("FactorTransferHead", "roi_features", ["roi_heads.box_head", "roi_heads.box_predictor"]),
        ("FactorTransferHead", "res3", ["backbone.fpn_output5", "proposal_generator"]),
        ("ActivationBoundaryHead", "res3", ["backbone.fpn_output5", "proposal_generator"]),
    ],
)
def test_only_what_the_stage_needs_runs(run, head, feature, idle):
    model = Pretraining(run(heads=[head], **{f"KD.{config_key(head)}.IN_FEATURES": [feature]})).train()
    runs = []
    for network in (model.teacher.model, model.student):
        for name in idle:
            network.get_submodule(name).register_forward_hook(lambda *_, name=name: runs.append(name))
    with EventStorage():
        model(next(iter(PretrainingTrainer.build_train_loader(run()))))
    assert runs == []


@pytest.mark.parametrize("head", ["ActivationBoundaryHead", "HintHead"])
def test_stage_may_train_the_students_backbone(run, head):
    """And nothing behind it: not the RPN, not the ROI heads; their weights are those that the run began with."""
    options = {"KD.HINT.STAGES": 2, "KD.HINT.IN_FEATURES": ["res4"]}
    options |= {"KD.ACTIVATION_BOUNDARY.IN_FEATURES": ["res3", "res4"]}
    cfg = run(heads=[head], **options)
    seed(cfg)
    before = {key: x.clone() for key, x in Pretraining(cfg).student.state_dict().items()}
    go(cfg)
    after = torch.load(Path(cfg.OUTPUT_DIR, "pretrain", FINAL), weights_only=True)["model"]
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert any(key.startswith("backbone.bottom_up.res4") for key in changed)
    assert not {key for key in changed if not key.startswith("backbone.")}


@pytest.mark.parametrize("place", ["stage", "run"])
def test_resumed_stage_gives_the_weights_of_an_uninterrupted_run(run, place):
    options = {"SOLVER.MAX_ITER": 4}
    whole = go(run("whole", **options))
    cut = run("cut", **options)
    with interrupted_at(3, PretrainingTrainer if place == "stage" else Trainer):
        go(cut)
    assert Path(cut.OUTPUT_DIR, "pretrain", FINAL).exists() == (place == "run")
    assert same(go(cut, resume=True), whole)


def test_finished_stage_is_not_repeated(run):
    cfg = run()
    go(cfg)
    path = Path(cfg.OUTPUT_DIR, "pretrain", FINAL)
    time = path.stat().st_mtime_ns
    Path(cfg.OUTPUT_DIR, "last_checkpoint").unlink()
    go(cfg, resume=True)
    assert path.stat().st_mtime_ns == time


def test_new_run_does_not_resume_from_earlier_files(run):
    """Neither the stage nor the main run of the one before, although both were finished."""
    go(run())
    options = {"SEED": 8}
    whole = go(run("whole", **options))
    with interrupted_at(1, PretrainingTrainer):
        go(run(**options))
    assert same(go(run(**options), resume=True), whole)


def test_failing_start_leaves_earlier_files(run, tmp_path):
    """The run can still be resumed, and its config is that of its checkpoints."""
    cfg = run()
    go(cfg)
    tags = [Path(cfg.OUTPUT_DIR, name, "last_checkpoint") for name in (".", "pretrain")]
    config = Path(cfg.OUTPUT_DIR, "config.yaml").read_text()
    wrong = run(**{"KD.TEACHER.WEIGHTS": str(tmp_path / "no.pth")})
    assert wrong.OUTPUT_DIR == cfg.OUTPUT_DIR
    with pytest.raises(InputError, match="there is no file"):
        go(wrong)
    assert [tag.read_text() for tag in tags] == [FINAL, FINAL]
    assert Path(cfg.OUTPUT_DIR, "config.yaml").read_text() == config


def test_stage_of_other_heads_is_refused(run):
    first = run("first")
    go(first)
    stage = str(Path(first.OUTPUT_DIR, "pretrain", FINAL))
    options = {"KD.PRETRAIN.MAX_ITER": 0, "KD.PRETRAIN.WEIGHTS": stage}
    second = run("second", heads=["FactorTransferHead", "InheritExploreHead"], **options)
    told = rf"^KD.PRETRAIN.WEIGHTS: {stage} was written by a run with another config \(.*: Missing .*InheritExploreHead"
    with pytest.raises(InputError, match=told):
        go(second)


def test_stage_of_another_run_can_be_used(run):
    first = run("first")
    go(first)
    stage = Path(first.OUTPUT_DIR, "pretrain", FINAL)
    second = run("second", **{"KD.PRETRAIN.MAX_ITER": 0, "KD.PRETRAIN.WEIGHTS": str(stage)})
    assert same(go(second), weights(first.OUTPUT_DIR))
    assert not Path(second.OUTPUT_DIR, "pretrain").exists()


def test_stage_with_another_teacher_is_refused(run, tmp_path):
    first = run("first")
    go(first)
    other = save_teacher(tmp_path / "other", tiny_cfg(options=WIDE), seed=5)
    stage = str(Path(first.OUTPUT_DIR, "pretrain", FINAL))
    second = run("second", **other, **{"KD.PRETRAIN.MAX_ITER": 0, "KD.PRETRAIN.WEIGHTS": stage})
    told = rf"^KD.PRETRAIN: the stage was trained with another teacher, .*teacher.pth, not with {tmp_path}/other/.*pth;"
    with pytest.raises(InputError, match=told):
        go(second)


def test_run_cannot_resume_with_another_teacher_than_its_stage(run, tmp_path):
    with interrupted_at(3):
        go(run(**{"SOLVER.MAX_ITER": 4}))
    other = save_teacher(tmp_path / "other", tiny_cfg(options=WIDE), seed=5)
    with pytest.raises(InputError, match=r"^KD.PRETRAIN: the stage was trained with another teacher, .*other"):
        go(run(**other, **{"SOLVER.MAX_ITER": 4}), resume=True)


def test_resumed_run_does_not_need_the_file_of_its_stage(run, caplog):
    go(run("first"))
    stage = Path(run("first").OUTPUT_DIR, "pretrain", FINAL)
    second = run("second", **{"KD.PRETRAIN.MAX_ITER": 0, "KD.PRETRAIN.WEIGHTS": str(stage), "SOLVER.MAX_ITER": 4})
    with interrupted_at(3):
        go(second)
    stage.unlink()
    go(second, resume=True)
    assert f"{stage} is gone, so it is not checked whether the teacher is still that of the stage." in caplog.text


def test_stage_that_trained_another_student_is_refused(run):
    options = {"KD.ACTIVATION_BOUNDARY.IN_FEATURES": ["res3", "res4"]}
    first = run("first", heads=["ActivationBoundaryHead"], **options)
    go(first)
    stage = str(Path(first.OUTPUT_DIR, "pretrain", FINAL))
    options |= {"KD.PRETRAIN.MAX_ITER": 0, "KD.PRETRAIN.WEIGHTS": stage, "MODEL.FPN.NORM": "BN"}
    with pytest.raises(
        InputError, match=r"^KD.PRETRAIN.WEIGHTS: .* a stage with another student: \d+ of the student's"
    ):
        go(run("second", heads=["ActivationBoundaryHead"], **options))


@pytest.mark.parametrize(
    ("heads", "iterations", "told"),
    [
        (["FactorTransferHead", "SoftTargetHead"], 0, "MAX_ITER: FactorTransferHead must be trained before the main"),
        (["SoftTargetHead"], 4, r": got 4, but no head of KD.HEADS, SoftTargetHead, has anything to train before"),
    ],
)
def test_missing_or_unneeded_stage_is_refused(run, heads, iterations, told):
    with pytest.raises(InputError, match=f"^KD.PRETRAIN.?{told}"):
        go(run(heads=heads, **{"KD.PRETRAIN.MAX_ITER": iterations}))


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "MutualStudents"])
@pytest.mark.parametrize(("key", "value"), [("MAX_ITER", 4), ("WEIGHTS", "stage.pth")])
def test_stage_without_a_teacher_is_refused(run, architecture, key, value):
    cfg = run(**{"KD.PRETRAIN.MAX_ITER": 0, "MODEL.META_ARCHITECTURE": architecture, f"KD.PRETRAIN.{key}": value})
    with pytest.raises(InputError, match=f"^KD.PRETRAIN: got {value}, but MODEL.META_ARCHITECTURE is {architecture};"):
        go(cfg)


def test_stage_is_refused_if_its_teacher_was_retrained(run, tmp_path):
    cfg = run("first", **save_teacher(tmp_path / "own", tiny_cfg(options=WIDE)))
    go(cfg)
    stage = str(Path(cfg.OUTPUT_DIR, "pretrain", FINAL))
    other = save_teacher(tmp_path / "own", tiny_cfg(options=WIDE), seed=5)
    with pytest.raises(
        InputError, match=r"^KD.PRETRAIN: .* another teacher, .*teacher.pth, whose weights have changed"
    ):
        go(run("second", **other, **{"KD.PRETRAIN.MAX_ITER": 0, "KD.PRETRAIN.WEIGHTS": stage}))


# ---- Generations ----
@pytest.fixture
def digits(tmp_path):
    """A chain of classifiers on digits."""
    teacher = classifier_cfg(options={"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8})

    def make(output="output"):
        cfg = classifier_cfg(options={"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8})
        options = save_teacher(tmp_path / "teacher", teacher)
        options |= {"KD.HEADS": ["BornAgainHead"], "KD.BORN_AGAIN.SOURCE": "cls", "KD.GENERATIONS": 3, "SEED": 4}
        options |= {"SOLVER.MAX_ITER": 2, "SOLVER.BASE_LR": 0.1, "OUTPUT_DIR": str(tmp_path / output)}
        cfg.KD.STUDENT_ARCHITECTURE, cfg.MODEL.META_ARCHITECTURE = "ImageClassifier", "TeacherStudent"
        cfg.merge_from_list([part for pair in options.items() for part in pair])
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ()
        return cfg

    return make


def test_each_generation_is_taught_by_the_previous_one(digits, tmp_path, monkeypatch):
    teachers = []
    load = kd_det.teacher_kinds.load_strictly
    monkeypatch.setattr(
        "kd_det.teacher_kinds.load_strictly",
        lambda model, path, key: teachers.append(path) or load(model, path, key=key),
    )
    train(digits(), resume=False)
    folders = [tmp_path / "output" / f"gen_{i}" for i in (1, 2, 3)]
    assert teachers == [str(tmp_path / "teacher/teacher.pth"), *(str(x / FINAL) for x in folders[:2])]
    states = [torch.load(x / FINAL, weights_only=True)["model"] for x in folders]
    for state in states:
        build_model(classifier_cfg(options={"MODEL.CLASSIFIER.NUM_CLASSES": 10})).load_state_dict(state)
    assert not same(states[0], states[1])
    assert [yaml.safe_load((x / "config.yaml").read_text())["SEED"] for x in folders] == [5, 6, 7]


def test_interrupted_generations_continue(digits, tmp_path, monkeypatch):
    train(digits("whole"), resume=False)
    step, generations = Trainer.run_step, []

    def run_step(self):
        generations.append(Path(self.cfg.OUTPUT_DIR).name)
        if len(generations) == 4:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_step", run_step)
        with pytest.raises(KeyboardInterrupt):
            train(digits("cut"), resume=False)
    done = len(generations)
    train(digits("cut"), resume=True)
    assert done == 4
    for i in (1, 2, 3):
        cut, whole = (
            torch.load(tmp_path / x / f"gen_{i}" / FINAL, weights_only=True)["model"] for x in ("cut", "whole")
        )
        assert same(cut, whole)


def test_new_generations_do_not_resume_from_earlier_files(digits, tmp_path):
    def with_seed(name):
        cfg = digits(name)
        cfg.SEED, cfg.KD.GENERATIONS = 9, 2
        return cfg

    train(digits("cut"), resume=False)
    train(with_seed("whole"), resume=False)
    with interrupted_at(1):
        train(with_seed("cut"), resume=False)
    train(with_seed("cut"), resume=True)
    for i in (1, 2):
        cut, whole = (
            torch.load(tmp_path / x / f"gen_{i}" / FINAL, weights_only=True)["model"] for x in ("cut", "whole")
        )
        assert same(cut, whole)


def test_different_network_of_the_first_teacher_causes_a_warning(digits, tmp_path, caplog):
    other = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "MODEL.CIFAR.NAME": "resnet14"}
    cfg = digits()
    cfg.merge_from_list(
        [x for pair in save_teacher(tmp_path / "o", classifier_cfg(options=other)).items() for x in pair]
    )
    cfg.KD.GENERATIONS = 1
    train(cfg, resume=False)
    assert "the first teacher is a different network from the student; they differ in MODEL.CIFAR." in caplog.text


def test_generations_cannot_share_a_stage(digits):
    cfg = digits()
    cfg.KD.PRETRAIN.WEIGHTS = "stage.pth"
    with pytest.raises(InputError, match=r"^KD.PRETRAIN.WEIGHTS: must be empty for KD.GENERATIONS 3, got stage.pth"):
        train(cfg, resume=False)


def test_generations_without_a_teacher_are_refused(digits):
    cfg = digits()
    cfg.KD.HEADS = []
    with pytest.raises(InputError, match=r"^KD.GENERATIONS: got 3, but there is no teacher: .*KD.HEADS \[\]; Teacher"):
        train(cfg, resume=False)
