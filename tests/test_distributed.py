"""Two ranks with gloo on the CPU: the students stay the same, and what one process gives, without unused parameters."""

import copy
import json
import math

import pytest
import torch
from children import Task, end, run_processes, two_ranks
from classification.models import classifier_cfg
from detectron2.config import get_cfg
from detectron2.engine import create_ddp_model
from detectron2.evaluation.testing import flatten_results_dict
from helpers import (
    ROOT,
    build,
    distilled_cfg,
    parse,
    run_train_net,
    save_teacher,
    step,
    tiny_inputs,
    train_net,
    with_data,
    write_yaml,
)

from kd_det.checkpoint import KDCheckpointer
from kd_det.config import add_kd_config, merge_file, student_config
from kd_det.data import register_datasets
from kd_det.data.shapes_folder import write_shapes
from kd_det.engine import Trainer, setup, trainer
from kd_det.engine.stages import Pretraining, PretrainingTrainer
from kd_det.meta_arch import TeacherStudent

HEADS = ["ReviewKDHead", "HintHead", "AttentionTransferHead", "SoftTargetHead"]
# HintHead is idle in step 0, ReviewKDHead in step 2.
OPTIONS = {"KD.HINT.SCHEDULE.START": 1, "KD.REVIEW.SCHEDULE.STOP": 2, "KD.SOFT_TARGET.SOURCES": ["roi", "rpn", "mask"]}
STEPS = 3
# Heads of a run, and of the stage before it, that are tried for nothing but this: that the ranks stay the same.
OTHERS = {
    TeacherStudent: [
        "FactorTransferHead",
        "InheritExploreHead",
        "OverhaulHead",
        "SoftmaxRegressionHead",
        "BornAgainHead",
        "BoxTargetHead",
    ],
    Pretraining: ["FactorTransferHead", "InheritExploreHead", "ActivationBoundaryHead", "HintHead"],
}
STAGES = ["res2", "res3", "res4", "res5"]
OTHER_OPTIONS = {
    "KD.PRETRAIN.MAX_ITER": 1,
    "KD.HINT.STAGES": 2,
    "KD.HINT.IN_FEATURES": STAGES[:3],
    "KD.OVERHAUL.IN_FEATURES": STAGES,
    "KD.ACTIVATION_BOUNDARY.IN_FEATURES": STAGES,
    # The number of objects, by which this divides, is that of both ranks.
    "KD.BOX_TARGET.KIND": "giou",
    "KD.BOX_TARGET.SOURCES": ["roi", "rpn"],
}


def train_all(rank, teacher, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/init", world_size=2, rank=rank)
    train(rank, teacher, folder)
    for kind in OTHERS:
        train_others(rank, teacher, folder, kind)
    torch.distributed.destroy_process_group()


def train(rank, teacher, folder):
    """Three steps on a rank's own data, from its own random weights; DDP hands out those of rank 0."""
    cfg = distilled_cfg(teacher, HEADS, OPTIONS)
    model = create_ddp_model(build(cfg, seed=rank), broadcast_buffers=False, device_ids=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    history = []
    for iteration in range(STEPS):
        # of one rank's batches one has no objects: its mask and box losses are zero
        inputs = tiny_inputs(seed=10 * rank + iteration, empty=(0, 1) if (rank, iteration) == (1, 1) else ())
        losses = step(model, inputs, iteration=iteration)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({key: loss.detach() for key, loss in losses.items()})
    results = {
        "parameters": {key: p.detach() for key, p in model.module.named_parameters()},
        "losses": history,
        "tensors_in_buckets": model._get_ddp_logging_data()["num_parameter_tensors"],
    }
    torch.save(results, f"{folder}/{rank}.pth")


def train_others(rank, teacher, folder, kind):
    """The same with other heads, of a run or of a stage; two steps, the states before and behind them saved."""
    torch.manual_seed(rank)
    model = kind(distilled_cfg(teacher, OTHERS[kind], OTHER_OPTIONS)).train()
    parallel = create_ddp_model(
        model, broadcast_buffers=False, device_ids=None, find_unused_parameters=kind is not TeacherStudent
    )
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    for iteration in range(2):
        losses = step(parallel, tiny_inputs(seed=10 * rank + iteration), iteration=iteration)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    torch.save([before, model.state_dict()], f"{folder}/{kind.__name__}_{rank}.pth")


@pytest.fixture(scope="module")
def trained(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_processes(train_all, teacher, str(folder))
    found = [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]
    others = {
        x: [torch.load(folder / f"{x.__name__}_{rank}.pth", weights_only=True) for rank in range(2)] for x in OTHERS
    }
    return found, others


@pytest.fixture
def ranks(trained):
    return trained[0]


def test_ranks_saw_different_data(ranks):
    assert ranks[0]["losses"][0]["loss_kd_review"] != ranks[1]["losses"][0]["loss_kd_review"]


def test_weights_are_equal_after_the_steps(ranks, teacher):
    first, second = (rank["parameters"] for rank in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    start = dict(build(distilled_cfg(teacher, HEADS, OPTIONS), seed=0).named_parameters())
    for part in ("student.backbone.", "heads.ReviewKDHead.", "heads.HintHead."):
        assert any(not torch.equal(first[key], start[key]) for key in first if key.startswith(part)), part


@pytest.mark.parametrize(("kind", "head"), [(kind, head) for kind, heads in OTHERS.items() for head in heads])
def test_every_head_is_the_same_on_both_ranks(trained, kind, head):
    (before, first), (_, second) = trained[1][kind]
    # Running statistics are each rank's own until they are evaluated or saved.
    own = [key for key in first if key.startswith(f"heads.{head}.") and "running_" not in key]
    learned = [key for key in own if not torch.equal(before[key], first[key])]
    assert learned or head in ("BornAgainHead", "BoxTargetHead")  # These have no weights.
    assert all(torch.equal(first[key], second[key]) for key in own)
    student = [key for key in first if key.startswith("student.") and "running_" not in key]
    assert all(torch.equal(first[key], second[key]) for key in student)


def test_heads_were_idle(ranks):
    for losses in (rank["losses"] for rank in ranks):
        assert ["loss_kd_idle" in x for x in losses] == [True, False, True]
        assert ["loss_kd_hint" in x for x in losses] == [False, True, True]
        assert ["loss_kd_review" in x for x in losses] == [True, True, False]


@pytest.mark.parametrize(("kind", "looked_for"), [(Trainer, False), (PretrainingTrainer, True)])
def test_unused_parameters_are_looked_for_in_a_stage_alone(
    teacher, coco_folder, tmp_path, monkeypatch, kind, looked_for
):
    found, wrap = [], trainer.create_ddp_model
    monkeypatch.setattr(trainer, "create_ddp_model", lambda *args, **options: found.append(options) or wrap(*args))
    cfg = with_data(distilled_cfg(teacher, ["FactorTransferHead"], {"KD.PRETRAIN.MAX_ITER": 1}), coco_folder, tmp_path)
    register_datasets(cfg)
    kind(cfg)
    assert found[0]["find_unused_parameters"] is looked_for
    # Otherwise DDP copies each image on its own, and each gradient twice.
    assert found[0]["device_ids"] is None
    assert found[0]["gradient_as_bucket_view"] is True


def test_buckets_hold_the_student_and_the_heads(ranks):
    assert {rank["tensors_in_buckets"] for rank in ranks} == {len(ranks[0]["parameters"])}
    assert {key.split(".")[0] for key in ranks[0]["parameters"]} == {"student", "heads"}


# ---- What one process gives ----
def evaluate(config, folder, weights):
    """What one process finds in the test set."""
    cfg = student_config(setup(parse("--config-file", config, "--eval-only", "OUTPUT_DIR", folder)))
    model = Trainer.build_model(cfg)
    KDCheckpointer(model).load(str(weights))
    return flatten_results_dict(Trainer.test(cfg, model))


def told(folder):
    """The scalars that a run told last: of its last iteration, then of the evaluation."""
    lines = (folder / "metrics.json").read_text().splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_two_ranks_give_what_one_process_gives(tmp_path):
    """Each image has the same augmentation, whoever reads it, and no batch norm makes images meet."""
    size = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8}
    size |= {"SOLVER.MAX_ITER": 3, "SOLVER.BASE_LR": 0.01, "SEED": 1}
    options = save_teacher(tmp_path / "teacher", classifier_cfg("detectron2", options=size))
    options |= {"MODEL.META_ARCHITECTURE": "TeacherStudent", "KD.STUDENT_ARCHITECTURE": "ImageClassifier"}
    options |= {"KD.HEADS": ["HintHead", "SoftTargetHead"], "MODEL.RESNETS.NORM": "GN", "SOLVER.WARMUP_ITERS": 0}
    cfg = classifier_cfg("detectron2", options=size | options)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ("digits_test",)
    task = Task(write_yaml(tmp_path / "config.yaml", cfg), tmp_path)
    assert end(*[task.start("two", prepare=(rank,)) for rank in two_ranks()]) == [0, 0]
    assert task.run("one") == 0

    one, two = told(tmp_path / "one"), told(tmp_path / "two")
    losses = [key for key in one if "loss" in key]
    assert sorted(losses) == ["loss_cls", "loss_kd_hint", "loss_kd_soft_target_cls", "total_loss"]
    assert [two[key] for key in losses] == pytest.approx([one[key] for key in losses], rel=1e-4)
    found = evaluate(task.config, tmp_path / "evaluation", tmp_path / "two" / "model_final.pth")
    assert {key: two[key] for key in found} == found


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_torchrun_trains_the_quickstart_as_one_process_does(tmp_path, monkeypatch):
    """Within 15 % of each loss: each rank draws boxes of its own, and its batch norms see half of the images."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.chdir(ROOT)
    write_shapes(tmp_path / "shapes", train=32, test=2)
    teacher = get_cfg()
    add_kd_config(teacher)
    merge_file(teacher, str(ROOT / "configs/quickstart/teacher.yaml"))
    teacher.MODEL.DEVICE = "cpu"
    options = save_teacher(tmp_path / "teacher", teacher) | {"SOLVER.MAX_ITER": 4, "DATASETS.TEST": "()", "SEED": 1}
    arguments = [
        "--config-file",
        ROOT / "configs/quickstart/distilled.yaml",
        *(x for pair in options.items() for x in pair),
    ]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_train_net(*arguments, "OUTPUT_DIR", tmp_path / "two", launcher=launcher)
    assert done.returncode == 0, done.stderr
    train_net(*arguments, "OUTPUT_DIR", tmp_path / "one")
    one, two = told(tmp_path / "one"), told(tmp_path / "two")
    losses = {key: value for key, value in one.items() if "loss" in key}
    assert {"loss_kd_soft_target_roi", "loss_kd_soft_target_rpn", "loss_rpn_cls", "loss_cls"} < losses.keys()
    assert {key: two[key] for key in losses} == pytest.approx(losses, rel=0.15)
    assert two["loss_rpn_cls"] == pytest.approx(one["loss_rpn_cls"], rel=0.01)
    assert (tmp_path / "two" / "log.txt.rank1").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_detector_evaluated_by_two_ranks(teacher, coco_folder, tmp_path):
    cfg = with_data(distilled_cfg(teacher, ["ReviewKDHead"]), coco_folder, tmp_path)
    task = Task(write_yaml(tmp_path / "config.yaml", cfg), tmp_path)
    assert end(*[task.start("two", prepare=(rank,)) for rank in two_ranks()]) == [0, 0]
    found = evaluate(task.config, tmp_path / "one", tmp_path / "two" / "model_final.pth")
    assert "segm/AP" in found
    found = {key: None if math.isnan(value) else value for key, value in found.items()}
    assert {key: told(tmp_path / "two")[key] for key in found} == found
    boxes = [tmp_path / name / "inference" / "coco_instances_results.json" for name in ("one", "two")]
    one, two = (sorted(json.loads(path.read_text()), key=json.dumps) for path in boxes)
    assert len(one) > 0
    assert one == two
