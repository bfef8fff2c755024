"""Runs: resumed where they ended, evaluated without a teacher, and any Detectron2 config distilled as it is."""

import multiprocessing
import re

import pytest
import torch
from children import same
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from helpers import build, distilled_cfg, interrupted_at, parse, step, tiny_cfg, train_net, with_data, write_yaml

from kd_det import InputError, add_kd_config
from kd_det.config import merge_file, student_config
from kd_det.config_files import find_config
from kd_det.data import register_datasets
from kd_det.data.loader import seed_everything
from kd_det.engine import Trainer, import_plugin, run_tool, setup
from kd_det.engine.run_config import make_config

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
def test_an_interrupted_run_gives_the_weights_of_an_uninterrupted_one(run, workers, other_workers):
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


def test_without_a_seed_the_run_goes_on_with_the_one_it_had(run):
    options = {"SEED": -1, "SOLVER.MAX_ITER": 3, "SOLVER.CHECKPOINT_PERIOD": 1}
    first = start(run(**options))
    first.train()
    second = start(run(**options))
    assert second.seed != first.seed
    second.resume_or_load(resume=True)
    assert second.seed == second._trainer.data_loader.batch_sampler.seed == first.seed


def test_a_run_that_was_not_begun_is_not_resumed(run):
    trainer = start(run())
    before = {key: value.clone() for key, value in trainer._trainer.model.state_dict().items()}
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 0
    assert same(before, dict(trainer._trainer.model.state_dict()))


def test_the_checkpoint_of_a_run_is_the_plain_student(run):
    trainer = start(run())
    trainer.train()
    data = torch.load(f"{trainer.cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)
    assert data.keys() == {"model", "kd_heads", "trainer", "iteration"}
    stock = build_model(tiny_cfg())
    stock.load_state_dict(data["model"], strict=True)
    assert same(dict(stock.state_dict()), dict(trainer._trainer.model.student.state_dict()))


def test_the_optimizer_has_no_parameter_of_the_teacher(run):
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


def test_a_plain_run_is_detectron2s(coco_folder, tmp_path):
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


def test_evaluation_leaves_the_runs_config_as_it_is(run, tmp_path):
    trained = start(run())
    trained.train()
    kept = tmp_path / "output" / "config.yaml"
    kept.write_text("# that of the run")
    config = write_yaml(tmp_path / "config.yaml", run())
    train_net("--config-file", config, "--eval-only", "--resume", "TEST.DETECTIONS_PER_IMAGE", "7")
    assert kept.read_text() == "# that of the run"


def test_evaluation_passes_over_a_damaged_checkpoint_as_resuming_does(run, tmp_path):
    start(run(**{"SOLVER.CHECKPOINT_PERIOD": 1})).train()
    (tmp_path / "output" / "model_final.pth").write_bytes(b"")
    config = write_yaml(tmp_path / "config.yaml", run())
    train_net("--config-file", config, "--eval-only", "--resume")
    assert (tmp_path / "output" / "inference" / "coco_instances_results.json").is_file()


@pytest.mark.parametrize("weights", ["", "backbone"])
def test_evaluation_of_weights_that_are_not_all_there_is_refused(run, tmp_path, weights):
    """Random weights have an AP, too."""
    path = tmp_path / "backbone.pth"
    state = build(tiny_cfg()).state_dict()
    torch.save({"model": {key: x for key, x in state.items() if key.startswith("backbone.")}}, path)
    config = write_yaml(tmp_path / "config.yaml", run())
    with pytest.raises(SystemExit, match=r"^error: MODEL.WEIGHTS: (is empty|.* does not fit)"):
        train_net("--config-file", config, "--eval-only", "MODEL.WEIGHTS", str(path) if weights else "")


@pytest.mark.parametrize("key", ["SOLVER.CHECKPOINT_KEEP", "KD.GENERATIONS"])
def test_counts_below_zero(run, tmp_path, key):
    config = write_yaml(tmp_path / "config.yaml", run())
    with pytest.raises(SystemExit, match=f"^error: {key}: must be 0 or more, got -1.$"):
        train_net("--config-file", config, key, "-1")


# ---- Any config becomes a distillation run ----
ZOO = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def applied(*arguments, config=ZOO):
    return make_config(parse("--config-file", config, *arguments))


def test_without_the_arguments_a_config_stays_as_it_is():
    plain = get_cfg()
    add_kd_config(plain)
    plain.OUTPUT_DIR = "output/retinanet_R_50_FPN_1x"
    merge_file(plain, find_config(ZOO))
    assert applied() == plain
    assert plain.MODEL.META_ARCHITECTURE == "RetinaNet"


def test_a_zoo_config_with_teacher_and_heads():
    cfg = applied("--teacher", "t.yaml", "--teacher-weights", "t.pth", "--kd-heads", "ReviewKDHead,SoftTargetHead")
    assert cfg.MODEL.META_ARCHITECTURE == "TeacherStudent"
    assert cfg.KD.STUDENT_ARCHITECTURE == "RetinaNet"
    assert (cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.WEIGHTS) == ("t.yaml", "t.pth")
    assert cfg.KD.HEADS == ["ReviewKDHead", "SoftTargetHead"]
    assert cfg.KD.REVIEW.IN_FEATURES == ["p3", "p4", "p5", "p6", "p7"]
    assert cfg.KD.SOFT_TARGET.SOURCES == ["dense"]
    # beside them it is the config that it was
    assert student_config(cfg).MODEL == applied().MODEL


def test_an_rcnn_keeps_the_levels_of_the_heads():
    cfg = applied(
        "--teacher", "t.yaml", "--kd-heads", "ReviewKDHead", config="COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    )
    assert cfg.KD.REVIEW.IN_FEATURES == ["p2", "p3", "p4", "p5", "p6"]
    assert cfg.KD.SOFT_TARGET.SOURCES == ["roi"]


R_CNN, C4 = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
CLASSIFIER = "Classification/digits_teacher.yaml"
PYRAMID = ["p3", "p4", "p5", "p6", "p7"]


@pytest.mark.parametrize(
    ("head", "config", "expected"),
    [
        ("OverhaulHead", R_CNN, {"OVERHAUL.IN_FEATURES": ["res2", "res3", "res4", "res5"]}),
        ("OverhaulHead", ZOO, {"OVERHAUL.IN_FEATURES": ["res3", "res4", "res5"]}),
        ("OverhaulHead", C4, {"OVERHAUL.IN_FEATURES": ["res4"]}),
        ("ActivationBoundaryHead", CLASSIFIER, {"ACTIVATION_BOUNDARY.IN_FEATURES": ["res2", "res3", "res4"]}),
        ("FactorTransferHead", R_CNN, {"FACTOR_TRANSFER.IN_FEATURES": ["roi_features"]}),
        ("FactorTransferHead", ZOO, {"FACTOR_TRANSFER.IN_FEATURES": PYRAMID}),
        ("InheritExploreHead", CLASSIFIER, {"INHERIT_EXPLORE.IN_FEATURES": ["res2", "res3", "res4"]}),
        ("HintHead", R_CNN, {"HINT.IN_FEATURES": ["p2", "p3", "p4", "p5"]}),
        ("SoftmaxRegressionHead", R_CNN, {"SOFTMAX_REGRESSION.IN_FEATURE": "roi_box_features"}),
        ("SoftmaxRegressionHead", CLASSIFIER, {"SOFTMAX_REGRESSION.IN_FEATURE": "res4"}),
        ("BornAgainHead", CLASSIFIER, {"BORN_AGAIN.SOURCE": "cls"}),
        ("BornAgainHead", R_CNN, {"BORN_AGAIN.SOURCE": "roi"}),
    ],
)
def test_every_heads_defaults_name_what_the_student_has(head, config, expected):
    cfg = applied("--teacher", "t.yaml", "--kd-heads", head, config=config)
    for key, value in expected.items():
        node, option = key.split(".")
        assert cfg.KD[node][option] == value


def test_what_a_config_says_of_a_head_stays(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"_BASE_: {find_config(R_CNN)}\nKD: {{HINT: {{IN_FEATURES: [res9]}}}}\n")
    cfg = applied("--teacher", "t.yaml", "--kd-heads", "HintHead", config=str(path))
    assert cfg.KD.HINT.IN_FEATURES == ["res9"]


def test_a_c4_model_has_one_level():
    cfg = applied("--teacher", "t.yaml", "--kd-heads", "HintHead", config="COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")
    assert cfg.KD.HINT.IN_FEATURES == ["res4"]


def test_arguments_change_a_config_that_distils(teacher, tmp_path):
    config = write_yaml(tmp_path / "config.yaml", distilled_cfg(teacher, ["HintHead"]))
    cfg = applied("--kd-heads", "ReviewKDHead", config=config)
    assert cfg.KD.HEADS == ["ReviewKDHead"]
    assert teacher["KD.TEACHER.WEIGHTS"] == cfg.KD.TEACHER.WEIGHTS
    cfg = applied("--teacher", "other.yaml", config=config)
    assert (cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.WEIGHTS) == ("other.yaml", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "t.yaml"], f"KD.HEADS: {ZOO} names no distillation heads; name some with --kd-heads"),
        (["--teacher-weights", "x"], f"KD.HEADS: {ZOO} names no distillation heads; name some with --kd-heads"),
        (["--kd-heads", "HintHead"], f"KD.TEACHER.CONFIG_FILE: {ZOO} names no teacher for HintHead; name one with"),
    ],
)
def test_one_argument_without_the_other(arguments, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        applied(*arguments)


def test_a_zoo_config_trains(coco_folder, tmp_path, inputs):
    """The zoo's RetinaNet on a data set of one's own, made small from the command line; its twin is the teacher."""
    small = ["MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.FPN.OUT_CHANNELS", 16]
    small += ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CONVS", 1]
    small += ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
    twin = get_cfg()
    merge_file(twin, find_config(ZOO))
    twin.merge_from_list(small)
    torch.save(build_model(twin).state_dict(), tmp_path / "twin.pth")

    register_coco_instances("own_data", {}, str(coco_folder / "instances.json"), str(coco_folder / "images"))
    overrides = ["DATASETS.TRAIN", "('own_data',)", "DATASETS.TEST", "('own_data',)", "OUTPUT_DIR", tmp_path / "output"]
    overrides += ["KD.REVIEW.MID_CHANNELS", 8, "KD.TEACHER.OPTS", small, "SEED", 1]
    teacher = ["--teacher", ZOO, "--teacher-weights", tmp_path / "twin.pth"]
    heads = ["--kd-heads", "ReviewKDHead,SoftTargetHead"]
    cfg = setup(parse("--config-file", ZOO, *teacher, *heads, *small, *overrides))
    losses = step(build(cfg), inputs)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_kd_review", "loss_kd_soft_target_dense"}


# ---- Set-up, and how a tool ends ----
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("KD.X: got 1; allowed is 2."), "error: KD.X: got 1; allowed is 2."),
        # as a worker of a data loader passes it on
        (
            InputError("Caught InputError in worker 0.\nTraceback:\nkd_det.errors.InputError: a.png: broken"),
            "error: a.png: broken",
        ),
        # as Detectron2 tells of a plain detector's loss
        (
            FloatingPointError("NaN at iteration=3!\nloss_dict = {'a': nan}"),
            "error: NaN at iteration=3! loss_dict = {'a': nan}",
        ),
    ],
)
def test_a_users_mistake_ends_a_tool_with_one_line(error, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_tool(main)
    assert end.value.code == line


def test_a_defect_keeps_its_traceback():
    def main():
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run_tool(main)


def test_a_diverged_plain_run_tells_the_iteration(coco_folder, tmp_path, monkeypatch):
    cfg = with_data(tiny_cfg(options={"SOLVER.MAX_ITER": 1}), coco_folder, tmp_path / "output")
    monkeypatch.setattr(
        "detectron2.modeling.roi_heads.fast_rcnn.cross_entropy", lambda *a, **k: torch.tensor(torch.nan)
    )
    with pytest.raises(SystemExit, match=r"^error: .*at iteration=0! loss_dict = .*'loss_cls': .*nan") as end:
        train_net("--config-file", write_yaml(tmp_path / "config.yaml", cfg))
    assert "\n" not in end.value.code


def test_a_machine_without_gpu_goes_on_with_the_cpu(coco_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = write_yaml(tmp_path / "c.yaml", with_data(tiny_cfg(options={"MODEL.DEVICE": "cuda"}), coco_folder, tmp_path))
    assert setup(parse("--config-file", path)).MODEL.DEVICE == "cpu"


def test_files_that_are_not_there():
    with pytest.raises(InputError, match=r"^--config-file: there is no such file, and no/such.yaml is not the name"):
        find_config("no/such.yaml")
    with pytest.raises(InputError, match=r"^--plugin: there is no file no/such.py\.$"):
        import_plugin("no/such.py")
