"""Runs that are killed, or that meet a full disk, a broken image or a loss that is no number: they go on, or tell."""

import errno
import random
import resource
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import cv2
import pytest
import torch
from children import Event, Task, end, final_state, same, two_ranks
from classification.models import classifier_cfg
from helpers import distilled_cfg, run_train_net, save_teacher, tiny_cfg, with_data, write_yaml

from kd_det import files
from kd_det.engine import Trainer

ITERATIONS = 8
STAGE, RUN = "PretrainingTrainer", "Trainer"
REMEDY = (
    "lower SOLVER.BASE_LR, now 0.001, clip the gradients (SOLVER.CLIP_GRADIENTS.ENABLED) or add a norm to the FPN "
    "(MODEL.FPN.NORM)"
)
OPTIONS = {"SOLVER.MAX_ITER": ITERATIONS, "SOLVER.CHECKPOINT_PERIOD": 2, "SOLVER.CHECKPOINT_KEEP": 2}


def detection(teacher, data, folder, **options):
    """Heads with and without a stage, which trains the paraphraser of factor transfer."""
    options = OPTIONS | {"KD.PRETRAIN.MAX_ITER": ITERATIONS, "KD.REVIEW.SCHEDULE.WARMUP": 5} | options
    cfg = with_data(distilled_cfg(teacher, ["ReviewKDHead", "FactorTransferHead"], options), data, folder)
    cfg.DATASETS.TEST = ()
    return Task(write_yaml(folder / "config.yaml", cfg), folder)


def classification(_, __, folder):
    """A stage that trains the student, and images read by a worker."""
    size = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8}
    cfg = classifier_cfg(options=size)
    options = OPTIONS | save_teacher(folder / "teacher", classifier_cfg(teacher=True, options=size))
    options |= {"KD.HEADS": ["HintHead", "SoftTargetHead"], "KD.HINT.STAGES": 2, "KD.HINT.IN_FEATURES": ["res3"]}
    options |= {"KD.PRETRAIN.MAX_ITER": ITERATIONS, "KD.STUDENT_ARCHITECTURE": "ImageClassifier", "SEED": 3}
    options |= {"MODEL.META_ARCHITECTURE": "TeacherStudent", "DATALOADER.NUM_WORKERS": 1, "SOLVER.BASE_LR": 0.05}
    cfg.merge_from_list([part for pair in options.items() for part in pair])
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ()
    return Task(write_yaml(folder / "config.yaml", cfg), folder)


@pytest.fixture
def task(teacher, coco_folder, tmp_path):
    return detection(teacher, coco_folder, tmp_path)


@pytest.fixture
def main_run(teacher, coco_folder, tmp_path):
    """Without a stage."""
    options = OPTIONS | {"SOLVER.CHECKPOINT_KEEP": 0}
    cfg = with_data(distilled_cfg(teacher, ["HintHead"], options), coco_folder, tmp_path)
    cfg.DATASETS.TEST = ()
    return Task(write_yaml(tmp_path / "config.yaml", cfg), tmp_path)


# ---- Kills ----
def random_kills(seed):
    """In the stage and in the main run four at random, one during the write of a checkpoint, and one right after it.

    They hit the workers of the data loader, too, which outlive the training for some seconds otherwise.
    """
    rng = random.Random(seed)
    kills = []
    for trainer in (STAGE, RUN):
        phases = rng.choices(["before", "backward", "update", "anytime"], k=4)
        own = [
            Event(trainer, rng.randrange(ITERATIONS), phase, delay=rng.uniform(0, 0.1), group=True) for phase in phases
        ]
        own += [Event(trainer, rng.randrange(1, ITERATIONS, 2), phase, group=True) for phase in ("write", "tag")]
        # What comes first in an iteration must not save its checkpoint.
        kills += sorted(own, key=lambda event: (event.iteration, event.phase == "tag"))
    return kills


@pytest.mark.slow
@pytest.mark.parametrize("make", [detection, classification])
def test_killed_again_and_again_a_run_gives_the_weights_of_an_uninterrupted_one(teacher, coco_folder, tmp_path, make):
    task = make(teacher, coco_folder, tmp_path)
    assert task.run("whole") == 0
    kills = random_kills(make.__name__)
    for kill in kills:
        assert task.run("cut", prepare=(kill,), resume=True) == -signal.SIGKILL, kill
    assert task.run("cut", resume=True) == 0
    assert len(kills) == 12
    for folder in ("", "pretrain"):
        whole, cut = (final_state(tmp_path / name / folder) for name in ("whole", "cut"))
        assert cut["iteration"] == ITERATIONS - 1
        assert same(cut, whole)
        assert len(list((tmp_path / "cut" / folder).glob("model_0*.pth"))) == 2
    assert not list((tmp_path / "cut").rglob("*.partial"))


def test_a_killed_rank_of_two(main_run, tmp_path):
    """The other one ends with an error, without a launcher that would end it; resumed, both give the same weights."""
    whole = [main_run.start("whole", prepare=(rank,)) for rank in two_ranks()]
    assert end(*whole) == [0, 0]
    ranks = two_ranks()
    kill = Event(RUN, 5)
    cut = [main_run.start("cut", prepare=(ranks[0],)), main_run.start("cut", prepare=(ranks[1], kill))]
    assert end(*cut) == [1, -signal.SIGKILL]
    resumed = [main_run.start("cut", prepare=(rank,), resume=True) for rank in two_ranks()]
    assert end(*resumed) == [0, 0]
    assert same(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))


KILL_RANK_1 = """
import os, signal
from kd_det.engine import Trainer

step = Trainer.run_step

def run_step(trainer):
    if trainer.iter == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    step(trainer)

Trainer.run_step = run_step
"""


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_is_lost(main_run, tmp_path):
    (tmp_path / "kill.py").write_text(KILL_RANK_1, encoding="utf-8")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = ["--config-file", main_run.config, "--plugin", tmp_path / "kill.py", "OUTPUT_DIR", tmp_path / "output"]
    done = run_train_net(*arguments, launcher=launcher)
    assert done.returncode == 1
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert (tmp_path / "output" / "last_checkpoint").read_text() == "model_0000001.pth"


# ---- Disks ----
def test_a_truncated_checkpoint(task, tmp_path):
    assert task.run("whole") == 0
    assert task.run("cut", prepare=(Event(RUN, 6),)) == -signal.SIGKILL
    newest = tmp_path / "cut" / "model_0000005.pth"
    newest.write_bytes(newest.read_bytes()[:-5000])
    assert task.run("cut", resume=True) == 0
    printed = (tmp_path / "cut.txt").read_text()
    assert f"Going on with the checkpoint before, {tmp_path}/cut/model_0000003.pth." in printed
    assert same(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))


def test_when_no_checkpoint_can_be_read_the_run_does_not_begin_anew(main_run, tmp_path):
    assert main_run.run("cut", prepare=(Event(RUN, 6),)) == -signal.SIGKILL
    for path in (tmp_path / "cut").glob("*.pth"):
        path.write_bytes(path.read_bytes()[:5000])
    assert main_run.run("cut", resume=True) == 1
    assert main_run.error("cut").startswith(f"--resume: {tmp_path}/cut/model_0000005.pth: not a checkpoint that can be")


@dataclass(frozen=True)
class FullDisk:
    """The disk is full when the checkpoint of iteration 5 is written, at its end or in the middle."""

    output: Path
    at_once: bool

    def __call__(self):
        step = Trainer.run_step

        def run_step(trainer):
            if trainer.iter == 5 and self.at_once:
                files.os.fsync = fail_for_want_of_space
            elif trainer.iter == 5:
                size = (self.output / "model_0000003.pth").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, resource.RLIM_INFINITY))
            step(trainer)

        Trainer.run_step = run_step


def fail_for_want_of_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("at_once", "reason"),
    [
        (True, "No space left on device; make room on the disk"),
        (False, "File too large; raise the limit of file sizes (ulimit -f)"),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(main_run, tmp_path, at_once, reason):
    assert main_run.run("cut", prepare=(FullDisk(tmp_path / "cut", at_once),)) == 1
    told = f"{tmp_path}/cut/model_0000005.pth: cannot be written: {reason}. What was saved before is still there."
    assert main_run.error("cut") == told
    assert not list((tmp_path / "cut").glob("*.partial"))
    assert (tmp_path / "cut" / "last_checkpoint").read_text() == "model_0000003.pth"
    assert main_run.run("cut", resume=True) == 0
    assert main_run.run("whole") == 0
    assert same(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))


# ---- Images and losses ----
@dataclass(frozen=True)
class BreakImages:
    """From iteration 5 on no image can be read."""

    root: Path

    def __call__(self):
        step = Trainer.run_step

        def run_step(trainer):
            if trainer.iter == 5:
                for path in (self.root / "images").iterdir():
                    path.write_bytes(path.read_bytes()[:100])
            step(trainer)

        Trainer.run_step = run_step


def test_an_image_that_cannot_be_read_any_more(teacher, coco_folder, tmp_path):
    shutil.copytree(coco_folder, tmp_path / "data")
    task = detection(teacher, tmp_path / "data", tmp_path, **{"KD.PRETRAIN.MAX_ITER": 2})
    assert task.run("cut", prepare=(BreakImages(tmp_path / "data"),)) == 1
    told = task.error("cut")
    named = Path(told.split(": not an image that can be read: ")[0])
    assert named.parent == tmp_path / "data" / "images"
    assert (tmp_path / "cut" / "last_checkpoint").read_text() == "model_0000003.pth"
    for path in (coco_folder / "images").iterdir():
        shutil.copy(path, tmp_path / "data" / "images")
    assert cv2.imread(str(named)) is not None
    assert task.run("cut", resume=True) == 0
    assert task.run("whole") == 0
    assert same(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))


def break_weight():
    """In iteration 5 a bias of the box predictor is not a number."""
    step = Trainer.run_step

    def run_step(trainer):
        if trainer.iter == 5:
            model = getattr(trainer.plain_model, "student", trainer.plain_model)
            torch.nn.init.constant_(model.roi_heads.box_predictor.bbox_pred.bias, torch.nan)
        step(trainer)

    Trainer.run_step = run_step


def test_a_loss_that_is_not_a_number(main_run, tmp_path):
    assert main_run.run("cut", prepare=(break_weight,)) == 1
    assert main_run.error("cut") == f"iteration 5: loss_box_reg is nan; {REMEDY}"
    assert sorted(path.name for path in (tmp_path / "cut").glob("*.pth")) == ["model_0000001.pth", "model_0000003.pth"]


def test_a_loss_that_is_not_a_number_of_a_plain_run(coco_folder, tmp_path):
    cfg = with_data(tiny_cfg(options=OPTIONS), coco_folder, tmp_path)
    task = Task(write_yaml(tmp_path / "config.yaml", cfg), tmp_path)
    assert task.run("cut", prepare=(break_weight,)) == 1
    told = task.error("cut")
    assert "at iteration=5! loss_dict = " in told
    assert "'loss_box_reg': " in told
    assert "nan" in told.split("'loss_box_reg': ")[1].split(",")[0]
    assert (tmp_path / "cut" / "last_checkpoint").read_text() == "model_0000003.pth"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_a_number_of_two_ranks(main_run, rank):
    """One of them finds it, and tells; the other one ends, too."""
    ranks: list[tuple] = [(x,) for x in two_ranks()]
    ranks[rank] += (break_weight,)
    statuses = end(*[main_run.start("cut", prepare=x, log=f"rank{i}") for i, x in enumerate(ranks)])
    assert statuses == [1, 1]
    assert "iteration 5: loss_box_reg is nan" in main_run.error(f"rank{rank}")
