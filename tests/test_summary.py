"""Tests the summary that is logged before a run starts."""

import re

import pytest
import torch
from children import same
from classification.models import classifier_cfg
from detectron2.utils import comm
from helpers import WIDE, attached, build, distilled_cfg, save_teacher, tiny_cfg, with_data, write_yaml

from kd_det.data import register_datasets
from kd_det.engine import Trainer, summary
from kd_det.engine.flops import count_gflops
from kd_det.engine.stages import train
from kd_det.engine.summary import image_side, log_summary
from kd_det.heads.head_table import describe_schedule
from kd_det.schedules import WeightSchedule

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def uncounted(monkeypatch):
    """For tests in which operations do not matter, as they take the longest to count."""
    monkeypatch.setattr(summary, "count_gflops", lambda model, image: 1.0)


@pytest.fixture
def told(caplog):
    """Makes the rows of the tables of a summary: first cell to the cells behind it; an empty one takes none."""
    caplog.set_level("INFO", "kd_det.engine.summary")

    def read(index=-1):
        found = [message for message in caplog.messages if message.startswith("Summary of the run:")]
        lines = [re.split(r"\s{2,}", line) for line in found[index].splitlines() if line]
        return {line[0]: line[1:] for line in lines}, len(found)

    return read


def trainer_of(cfg, *, resume=False):
    register_datasets(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    return trainer


@pytest.fixture
def distilled(tmp_path, coco_folder):
    """A student that begins from some of its weights, and a teacher of another channel order and precision."""
    teacher = save_teacher(tmp_path, tiny_cfg(options=WIDE | {"INPUT.FORMAT": "RGB"}))
    options = teacher | {"KD.TEACHER.DTYPE": "bfloat16", "KD.HINT.WEIGHT": 0.5, "KD.HINT.SCHEDULE.WARMUP": 3}
    cfg = distilled_cfg(options, ["HintHead", "SoftTargetHead"])
    state = build(tiny_cfg()).state_dict()
    backbone = {key: value for key, value in state.items() if key.startswith("backbone")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "backbone.pth")
    return with_data(cfg, coco_folder, tmp_path)


def test_table_of_networks(distilled, told, tmp_path):
    trainer = trainer_of(distilled)
    log_summary(trainer)
    rows, _ = told()
    student, teacher = trainer.plain_model.student, trainer.plain_model.teacher.model
    assert rows["architecture"] == ["GeneralizedRCNN build_basic_resnet_fpn_backbone DEPTH 10"] * 2
    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (student, teacher)]
    assert rows["parameters"] == [f"{sizes[0]:.2f} M, {sizes[0]:.2f} M trained", f"{sizes[1]:.2f} M, 0.00 M trained"]
    operations = [count_gflops(model.eval(), {"image": torch.zeros(3, 64, 64)}) for model in (student, teacher)]
    assert rows["GFLOPs, 64 x 64"] == [f"{x:.2f}" for x in operations]
    own, other = ([key for key in model.state_dict() if "num_batches" not in key] for model in (student, teacher))
    backbone = [key for key in own if key.startswith("backbone")]
    assert rows["weights"][0] == f"{tmp_path}/backbone.pth: {len(backbone)} of {len(own)} keys"
    assert rows["weights"][1] == f"{tmp_path}/teacher.pth: {len(other)} of {len(other)} keys"
    assert rows["images"] == ["BGR", "RGB, channels flipped"]
    assert rows["pixel std"] == ["57.375, 57.12, 58.395"] * 2
    assert rows["precision"] == ["float32", "bfloat16"]


@pytest.mark.usefixtures("uncounted")
def test_table_of_heads(distilled, told):
    log_summary(trainer_of(distilled))
    rows, _ = told()
    pair = ["p2: 16 channels, stride 4", "p2: 24 channels, stride 4"]
    assert rows["HintHead"] == ["0.5", "warm-up 3, constant", *pair]
    assert rows[""][-2:] == ["p5: 16 channels, stride 32", "p5: 24 channels, stride 32"]
    assert rows["SoftTargetHead"] == ["1", "constant", "roi_logits: 4 channels", "roi_logits: 4 channels"]


def test_summary_has_no_side_effects(distilled):
    trainer = trainer_of(distilled)
    model, numbers = trainer.plain_model.train(), torch.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    log_summary(trainer)
    assert all(module.training for module in model.modules())
    assert same(before, dict(model.state_dict()))
    assert attached(model) == attached(model.teacher.model) == {}
    assert torch.equal(numbers, torch.get_rng_state())


def test_network_that_cannot_be_traced_is_still_trained(distilled, told, monkeypatch):
    def fail(*_):
        raise RuntimeError("made up")

    monkeypatch.setattr(summary, "count_gflops", fail)
    log_summary(trainer_of(distilled))
    assert told()[0]["GFLOPs, 64 x 64"] == ["-", "-"]


def test_other_processes_are_silent(distilled, caplog, monkeypatch):
    trainer = trainer_of(distilled)
    caplog.set_level("INFO", "kd_det.engine.summary")
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    log_summary(trainer)
    assert "Summary of the run" not in caplog.text


@pytest.mark.usefixtures("uncounted")
def test_resumed_run_names_its_checkpoint(distilled, told):
    trainer = trainer_of(distilled)
    trainer.checkpointer.save("model_0000000", iteration=0)
    log_summary(trainer_of(distilled, resume=True))
    path, _, count = told()[0]["weights"][0].partition(": ")
    assert path == f"{distilled.OUTPUT_DIR}/model_0000000.pth"
    assert re.fullmatch(r"(\d+) of \1 keys", count)


@pytest.mark.usefixtures("uncounted")
def test_stage_and_main_run(coco_folder, teacher, tmp_path, told):
    """Each begins with its own summary; in the stage only the head is trained."""
    options = {"KD.PRETRAIN.MAX_ITER": 1, "SOLVER.MAX_ITER": 1, "KD.FACTOR_TRANSFER.IN_FEATURES": ["p3"]}
    cfg = with_data(distilled_cfg(teacher, ["FactorTransferHead"], options), coco_folder, tmp_path)
    cfg.KD.FACTOR_TRANSFER.IN_FEATURES = ["p3"]
    cfg.DATASETS.TEST = ()
    register_datasets(cfg)
    train(cfg, resume=False)
    (stage, count), (run, _) = told(0), told(1)
    assert count == 2
    assert [rows["parameters"][0].endswith(", 0.00 M trained") for rows in (stage, run)] == [True, False]
    assert [rows["FactorTransferHead"][-1] for rows in (stage, run)] == ["p3: 24 channels, stride 8"] * 2
    line = f"The pre-training stage has trained {tmp_path}/pretrain/model_final.pth."
    assert [line in rows for rows in (stage, run)] == [False, True]


@pytest.mark.usefixtures("uncounted")
def test_head_that_acts_only_in_its_stage(teacher, coco_folder, tmp_path, told):
    options = {"KD.HINT.STAGES": 2, "KD.PRETRAIN.MAX_ITER": 1}
    log_summary(trainer_of(with_data(distilled_cfg(teacher, ["HintHead"], options), coco_folder, tmp_path)))
    assert told()[0]["HintHead"][1:3] == ["in the pre-training stage only", "p2: 16 channels, stride 4"]


@pytest.mark.usefixtures("uncounted")
def test_mutual_students(tmp_path, told):
    options = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8, "MODEL.CIFAR.NAME": "resnet20"}
    torch.save({"model": build(classifier_cfg(options=options)).state_dict()}, tmp_path / "peer.pth")
    options["MODEL.WEIGHTS"] = str(tmp_path / "peer.pth")
    peer = write_yaml(tmp_path / "peer.yaml", classifier_cfg(options=options | {"INPUT.FORMAT": "BGR"}))
    options |= {"KD.MUTUAL.PEERS": [peer], "KD.MUTUAL.SOURCE": "cls", "MODEL.META_ARCHITECTURE": "MutualStudents"}
    options |= {"MODEL.CIFAR.NAME": "resnet8", "MODEL.WEIGHTS": "", "KD.STUDENT_ARCHITECTURE": "ImageClassifier"}
    options["KD.MUTUAL.SEQUENTIAL"] = True
    cfg = classifier_cfg(options=options | {"OUTPUT_DIR": str(tmp_path)})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ()
    log_summary(trainer_of(cfg))
    rows, _ = told()
    assert rows["architecture"] == [f"ImageClassifier build_cifar_backbone NAME {x}" for x in ("resnet8", "resnet20")]
    assert rows["weights"] == ["random", str(tmp_path / "peer.pth")]
    assert rows["images"] == ["RGB", "BGR, channels flipped"]
    assert "They teach each other logits, one after the other, weight 1 (dml)." in rows


@pytest.mark.usefixtures("uncounted")
def test_plain_run(coco_folder, tmp_path, told):
    log_summary(trainer_of(with_data(tiny_cfg(), coco_folder, tmp_path)))
    rows, _ = told()
    assert rows["weights"] == ["random"]
    assert "head" not in rows


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"INPUT.MIN_SIZE_TEST": 800, "MODEL.DEVICE": "cuda"}, 800),
        ({"INPUT.MIN_SIZE_TEST": 800}, 320),
        ({"INPUT.MIN_SIZE_TEST": 64}, 64),
        ({"INPUT.MIN_SIZE_TEST": 0, "INPUT.MIN_SIZE_TRAIN": (64, 96)}, 96),
    ],
)
def test_size_of_the_image_for_counting_operations(options, expected):
    assert image_side(tiny_cfg(options=options)) == expected
    assert image_side(classifier_cfg(options=options | {"INPUT.CLASSIFICATION.SIZE": 48})) == 48


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (WeightSchedule(), "constant"),
        (WeightSchedule(start=5, warmup=10, stop=90, decay="cosine"), "from 5, warm-up 10, cosine until 90"),
        (WeightSchedule(stop=7), "constant until 7"),
    ],
)
def test_descriptions_of_schedules(schedule, expected):
    assert describe_schedule(schedule) == expected
