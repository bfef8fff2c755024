"""Tests Trainer: runs resume exactly, are evaluated without a teacher, and equal Detectron2's if they are plain."""

import multiprocessing

import pytest
import torch
from children import same
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from helpers import build, distilled_cfg, interrupted_at, tiny_cfg, train_net, with_data, write_yaml

from kd_det import InputError
from kd_det.data import register_datasets
from kd_det.data.loader import seed_everything
from kd_det.engine import Trainer

HEADS = ["ReviewKDHead", "HintHead"]
pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def run(teacher, coco_folder, tmp_path):
    """Makes the config of a distilled run of two iterations."""

    def make(output="output", heads=HEADS, **options):
        cfg = with_data(distilled_cfg(teacher, heads, options), coco_folder, tmp_path / output)
        (tmp_path / output).mkdir(exist_ok=True)
        return cfg

    return make


def start(cfg, kind=Trainer):
    """A trainer as ``tools/train_net.py`` makes it."""
    register_datasets(cfg)
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else None)
    return kind(cfg)


def state(trainer):
    """All that a run goes on from, beside the iteration."""
    model = trainer._trainer.model
    return {
        "student": dict(model.student.state_dict()),
        "heads": dict(model.heads.state_dict()),
        "optimizer": trainer._trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
    }


# ---- Resuming ----
def test_resume_restores_everything(run):
    first = start(run())
    first.resume_or_load(resume=False)
    first.train()
    assert first._trainer.optimizer.state  # momentum

    second = start(run(**{"SOLVER.MAX_ITER": 4}))
    assert not same(state(first)["heads"], state(second)["heads"])
    second.resume_or_load(resume=True)
    saved, restored = state(first), state(second)
    for key in saved:
        assert same(saved[key], restored[key]), key
    assert second.start_iter == 2
    second.train()
    assert (tag := torch.load(f"{second.cfg.OUTPUT_DIR}/model_final.pth", weights_only=True))["iteration"] == 3
    assert not same(saved["student"], tag["model"])


@pytest.mark.parametrize(("workers", "other_workers"), [(0, 0), (2, 2), (0, 2)])
def test_resumed_run_has_the_weights_of_an_uninterrupted_one(run, workers, other_workers):
    """Bit for bit, whoever reads the images: their order, augmentation, sampled boxes, momentum, schedules."""
    heads = ["HintHead", "SoftTargetHead"]
    options = {"SOLVER.MAX_ITER": 5, "SOLVER.CHECKPOINT_PERIOD": 2, "KD.HINT.SCHEDULE.WARMUP": 3}
    processes = set(multiprocessing.active_children())
    whole = start(run("whole", heads, **options, **{"DATALOADER.NUM_WORKERS": workers}))
    whole.train()
    assert processes.issuperset(multiprocessing.active_children())
    cut = start(run("cut", heads, **options, **{"DATALOADER.NUM_WORKERS": other_workers}))
    with interrupted_at(3):
        cut.train()
    assert processes.issuperset(multiprocessing.active_children())  # After an interruption, too.
    resumed = start(run("cut", heads, **options, **{"DATALOADER.NUM_WORKERS": other_workers}))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    for key, value in state(whole).items():
        assert same(value, state(resumed)[key]), key


def test_run_without_a_seed_resumes_with_its_drawn_seed(run):
    options = {"SEED": -1, "SOLVER.MAX_ITER": 3, "SOLVER.CHECKPOINT_PERIOD": 1}
    first = start(run(**options))
    first.train()
    second = start(run(**options))
    assert second.seed != first.seed
    second.resume_or_load(resume=True)
    assert second.seed == second._trainer.data_loader.batch_sampler.seed == first.seed


def test_resume_of_a_run_that_never_started_starts_it(run):
    trainer = start(run())
    before = {key: value.clone() for key, value in trainer._trainer.model.state_dict().items()}
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 0
    assert same(before, dict(trainer._trainer.model.state_dict()))


def test_checkpoint_holds_the_plain_student(run):
    trainer = start(run())
    trainer.train()
    data = torch.load(f"{trainer.cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)
    assert data.keys() == {"model", "kd_heads", "trainer", "iteration"}
    stock = build_model(tiny_cfg())
    stock.load_state_dict(data["model"], strict=True)
    assert same(dict(stock.state_dict()), dict(trainer._trainer.model.student.state_dict()))


def test_optimizer_has_no_parameter_of_the_teacher(run):
    trainer = start(run())
    model = trainer._trainer.model
    trained = {id(p) for group in trainer._trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for part in (model.student, model.heads) for p in part.parameters()}
    assert trained.isdisjoint(id(p) for p in model.teacher.model.parameters())


# ---- The same entry point trains a plain detector ----
class StockTrainer(DefaultTrainer):
    """Detectron2's, which is given the same images and random numbers."""

    @classmethod
    def build_train_loader(cls, cfg):
        loader = Trainer.build_train_loader(cfg)
        loader.batch_sampler.seed = cfg.SEED
        return loader

    def run_step(self):
        seed_everything(self.cfg.SEED, self.iter, 0)
        super().run_step()


def test_plain_run_equals_that_of_detectron2(coco_folder, tmp_path):
    """The same weights as DefaultTrainer's after two iterations, bit for bit."""
    weights = []
    for kind in (Trainer, StockTrainer):
        (tmp_path / kind.__name__).mkdir()
        trainer = start(with_data(tiny_cfg(), coco_folder, tmp_path / kind.__name__), kind)
        untrained = build(tiny_cfg(), seed=7).state_dict()
        trainer.train()
        weights.append(dict(trainer._trainer.model.state_dict()))
        assert not same(weights[-1], dict(untrained))
    assert same(*weights)


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        (["ReviewKDHead"], {}),
        (HEADS, {"KD.REVIEW.MID_CHANNELS": 4}),
        (HEADS, {"MODEL.BACKBONE.FREEZE_AT": 5}),
        (HEADS, {"MODEL.ROI_HEADS.NUM_CLASSES": 7}),
        (HEADS, {"SOLVER.AMP.ENABLED": True}),
    ],
)
def test_resume_with_another_config_is_refused(run, heads, options):
    start(run()).train()
    other = start(run(heads=heads, **options))
    with pytest.raises(InputError, match=r"^--resume: .* was written by a run with another config"):
        other.resume_or_load(resume=True)


# ---- Evaluation ----
def test_evaluation_needs_no_teacher(teacher, run, tmp_path):
    """Neither its config nor its weights are there any more, and the heads are not registered."""
    gone = {key: str(tmp_path / "gone") for key in teacher}
    trained = start(run())
    trained.train()
    config = run("evaluated", ["NoSuchHead"], **gone)
    path = write_yaml(tmp_path / "config.yaml", config)
    weights = f"{trained.cfg.OUTPUT_DIR}/model_final.pth"
    train_net("--config-file", path, "--eval-only", "MODEL.WEIGHTS", weights)
    assert (tmp_path / "evaluated" / "inference" / "coco_instances_results.json").is_file()


def test_evaluation_preserves_the_config_of_the_run(run, tmp_path):
    trained = start(run())
    trained.train()
    kept = tmp_path / "output" / "config.yaml"
    kept.write_text("# that of the run")
    config = write_yaml(tmp_path / "config.yaml", run())
    train_net("--config-file", config, "--eval-only", "--resume", "TEST.DETECTIONS_PER_IMAGE", "7")
    assert kept.read_text() == "# that of the run"


def test_evaluation_skips_a_damaged_checkpoint_like_resuming(run, tmp_path):
    start(run(**{"SOLVER.CHECKPOINT_PERIOD": 1})).train()
    (tmp_path / "output" / "model_final.pth").write_bytes(b"")
    config = write_yaml(tmp_path / "config.yaml", run())
    train_net("--config-file", config, "--eval-only", "--resume")
    assert (tmp_path / "output" / "inference" / "coco_instances_results.json").is_file()


@pytest.mark.parametrize("weights", ["", "backbone"])
def test_evaluation_of_incomplete_weights_is_refused(run, tmp_path, weights):
    """Random weights have an AP, too."""
    path = tmp_path / "backbone.pth"
    state = build(tiny_cfg()).state_dict()
    torch.save({"model": {key: x for key, x in state.items() if key.startswith("backbone.")}}, path)
    config = write_yaml(tmp_path / "config.yaml", run())
    with pytest.raises(SystemExit, match=r"^error: MODEL.WEIGHTS: (is empty|.* does not fit)"):
        train_net("--config-file", config, "--eval-only", "MODEL.WEIGHTS", str(path) if weights else "")


def test_diverged_plain_run_names_the_iteration(coco_folder, tmp_path, monkeypatch):
    cfg = with_data(tiny_cfg(options={"SOLVER.MAX_ITER": 1}), coco_folder, tmp_path / "output")
    monkeypatch.setattr(
        "detectron2.modeling.roi_heads.fast_rcnn.cross_entropy", lambda *a, **k: torch.tensor(torch.nan)
    )
    with pytest.raises(SystemExit, match=r"^error: .*at iteration=0! loss_dict = .*'loss_cls': .*nan") as end:
        train_net("--config-file", write_yaml(tmp_path / "config.yaml", cfg))
    assert "\n" not in end.value.code
