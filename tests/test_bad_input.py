"""A user's mistakes end a run with status 1 and one line that names the key or the file, and no traceback."""

import json
import shutil

import pytest
from children import Task
from helpers import distilled_cfg, run_train_net, save_teacher, tiny_cfg, train_net, with_data, write_yaml

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def run(teacher, coco_folder, tmp_path):
    """Runs the tool in this process with a distilled config; gives the line that it ends with."""

    def run(options=None, *, heads=("HintHead",), data=coco_folder, family="mask_rcnn", text="", arguments=()):
        cfg = distilled_cfg(teacher, list(heads), options, family)
        path = write_yaml(tmp_path / "config.yaml", with_data(cfg, data, tmp_path / "output"))
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
        with pytest.raises(SystemExit) as end:
            train_net("--config-file", path, *arguments)
        assert isinstance(end.value.code, str)  # Python prints it on stderr and exits with status 1
        assert end.value.code.startswith("error: ")
        assert "\n" not in end.value.code
        return end.value.code.removeprefix("error: ")

    return run


@pytest.fixture
def own_data(coco_folder, tmp_path):
    """A copy of the data set, and a function that changes its annotations."""
    root = tmp_path / "data"
    shutil.copytree(coco_folder, root)

    def change(function):
        data = json.loads((root / "instances.json").read_text())
        function(data)
        (root / "instances.json").write_text(json.dumps(data))
        return root

    return change


# ---- The config ----
@pytest.mark.parametrize(
    ("options", "heads", "told"),
    [
        ({"KD.HINT.WEIGHT": -1.0}, ["HintHead"], "KD.HINT.WEIGHT: must be finite and 0 or more, got -1.0"),
        ({"KD.HINT.WEIGHT": 1e38}, ["HintHead"], "iteration 0: loss_kd_hint is inf"),
        ({"KD.TEACHER.OPTS": [1, 2]}, ["HintHead"], "KD.TEACHER.OPTS: must be KEY VALUE KEY VALUE ..., got [1, 2]."),
        (
            {"KD.TEACHER.OPTS": ["MODEL.PIXEL_STD", [0.0, 1.0, 1.0]]},
            ["HintHead"],
            "teacher.yaml with KD.TEACHER.OPTS: MODEL.PIXEL_STD: must be finite and above 0, got [0.0, 1.0, 1.0].",
        ),
        (
            {"MODEL.ROI_HEADS.IN_FEATURES": ["p9"]},
            ["HintHead"],
            "GeneralizedRCNN cannot be built: KeyError: p9; see MODEL.ROI_HEADS.IN_FEATURES (the backbone gives p2",
        ),
        ({"TEST.AUG.ENABLED": True, "MODEL.KEYPOINT_ON": True}, [], "TEST.AUG.ENABLED: must be False for "),
        ({"DATALOADER.SAMPLER_TRAIN": "RandomSubsetTrainingSampler"}, [], "DATALOADER.SAMPLER_TRAIN: got "),
        ({"MODEL.DEVICE": "gpu"}, [], "MODEL.DEVICE: 'gpu' is not a device such as cuda, cuda:1 or cpu."),
        ({"MODEL.DEVICE": "meta"}, [], "MODEL.DEVICE: 'meta' is not a device such as cuda, cuda:1 or cpu."),
        (
            {"MODEL.BACKBONE.NAME": "resnet18"},
            [],
            "config.yaml with the overrides: MODEL.BACKBONE.NAME is 'resnet18', ",
        ),
        ({"MODEL.META_ARCHITECTURE": "Student"}, [], "MODEL.META_ARCHITECTURE is 'Student', which nothing registers "),
        (
            {"KD.TEACHER.OPTS": ["MODEL.BACKBONE.NAME", "resnet101"]},
            ["HintHead"],
            "teacher.yaml with KD.TEACHER.OPTS: MODEL.BACKBONE.NAME is 'resnet101', ",
        ),
    ],
)
def test_values_that_cannot_be(run, options, heads, told):
    assert told in run(options, heads=heads)


@pytest.mark.parametrize(
    ("text", "arguments", "told"),
    [
        ("\nKD_HEADS: [HintHead]", [], "Non-existent config key: KD_HEADS"),
        ("", ["KD.HINT.WEIGTH", "2"], "command line: Non-existent key: KD.HINT.WEIGTH"),
        ("", ["OUTPUT_DIR", ""], "OUTPUT_DIR: must name a folder, got ''."),
        ("", ["--kd-heads", "HintHead, SoftHead"], "KD.HEADS: 'SoftHead' is not a distillation head"),
        ("", ["--plugin", "no_such.py"], "--plugin: there is no file no_such.py."),
        ("", ["--plugin", "config.yaml"], "--plugin: config.yaml is not a Python file; its name must end in .py."),
        (
            "",
            ["OUTPUT_DIR", "x", "--resume"],
            "command line: --resume must come before the overrides, OUTPUT_DIR x ...",
        ),
    ],
)
def test_keys_and_files_that_cannot_be(run, tmp_path, monkeypatch, text, arguments, told):
    monkeypatch.chdir(tmp_path)
    assert told in run(text=text, arguments=arguments)


def test_a_panoptic_model_without_segmentations(run):
    options = {
        "KD.STUDENT_ARCHITECTURE": "PanopticFPN",
        "MODEL.SEM_SEG_HEAD.NORM": "",
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 8,
    }
    told = run(options, heads=[])
    assert told.startswith("DATASETS.TRAIN: PanopticFPN learns from semantic segmentations, which ")


# ---- The teacher ----
def other_teacher(tmp_path, options=None, family="mask_rcnn"):
    return save_teacher(tmp_path / "other", tiny_cfg(family, options))


def test_teacher_that_lacks_a_feature(run, tmp_path):
    other = other_teacher(tmp_path, family="c4")
    told = run(other | {"KD.HINT.IN_FEATURES": ["p2"]})
    assert told == (
        "KD.HINT.IN_FEATURES: 'p2' is not a signal of the teacher, which has res4, res4_preact, rpn_logits, "
        "rpn_deltas, roi_features, roi_box_features, roi_logits, roi_deltas, mask_logits."
    )


def test_teacher_that_is_not_there(run):
    assert run({"KD.TEACHER.WEIGHTS": "/no/such.pth"}) == "KD.TEACHER.WEIGHTS: there is no file /no/such.pth."


def test_teacher_that_is_truncated(run, teacher, tmp_path):
    path = tmp_path / "half.pth"
    with open(teacher["KD.TEACHER.WEIGHTS"], "rb") as file:
        path.write_bytes(file.read()[: 20 * 1024])
    told = run({"KD.TEACHER.WEIGHTS": str(path)})
    assert told.startswith(f"KD.TEACHER.WEIGHTS: {path}: not a checkpoint that can be loaded safely: ")


def test_teacher_of_another_architecture(run, tmp_path):
    other = other_teacher(tmp_path, family="retinanet")
    told = run({"KD.TEACHER.WEIGHTS": other["KD.TEACHER.WEIGHTS"]})
    assert told.startswith("KD.TEACHER.WEIGHTS: ")
    assert "does not fit the config's GeneralizedRCNN: " in told
    assert " missing: " in told
    assert " unexpected: " in told


# ---- The data ----
def set_box(box):
    return lambda data: data["annotations"][2].update(bbox=box)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (set_box([90, 10, 40, 20]), "1 boxes are empty or leave their image, the first is [90, 10, 40, 20]"),
        (set_box([-9, 10, 40, 20]), "1 boxes are empty or leave their image, the first is [-9, 10, 40, 20]"),
        (set_box([9, 10, 0, 20]), "1 boxes are empty or leave their image, the first is [9, 10, 0, 20]"),
        (
            lambda data: data["annotations"][0].update(category_id=9),
            "annotation 1 has category_id 9; categories has 1, 2, 3",
        ),
        (
            lambda data: data["categories"].append({"id": 4, "name": "x"}),
            "MODEL.ROI_HEADS.NUM_CLASSES: 3 found, but data",
        ),
        (lambda data: data["images"][0].update(file_name="gone.png"), "1 of 4 image files not found, the first is "),
    ],
)
def test_annotations_that_cannot_be(run, own_data, change, told):
    assert told in run(data=own_data(change))


def test_image_folder_that_is_not_there(run, own_data):
    root = own_data(lambda data: None)
    shutil.rmtree(root / "images")
    assert f"{root / 'images'}: folder not found; DATASETS.COCO_FORMAT." in run(data=root)


def test_image_that_is_corrupt(run, own_data):
    root = own_data(lambda data: None)
    for image in (root / "images").iterdir():
        image.write_bytes(image.read_bytes()[:100])
    told = run(data=root)
    assert told.startswith(str(root / "images"))
    assert ".png: not an image that can be read: " in told


def test_images_without_objects_train_on(teacher, own_data, tmp_path):
    """Every second image has none: with two images per batch, every batch has one."""
    root = own_data(lambda data: data.update(annotations=[x for x in data["annotations"] if x["image_id"] % 2]))
    heads = ["ReviewKDHead", "AttentionTransferHead", "HintHead", "SoftTargetHead", "BoxTargetHead"]
    options = {"KD.SOFT_TARGET.SOURCES": ["roi", "rpn", "mask"], "KD.BOX_TARGET.SOURCES": ["roi", "rpn"]}
    cfg = with_data(distilled_cfg(teacher, heads, options), root, tmp_path / "output")
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    train_net("--config-file", write_yaml(tmp_path / "config.yaml", cfg))
    assert (tmp_path / "output" / "model_final.pth").is_file()


# ---- In a process of its own ----
@pytest.mark.slow
def test_unknown_head_in_a_process(teacher, coco_folder, tmp_path):
    cfg = with_data(distilled_cfg(teacher, ["NoSuchHead"]), coco_folder, tmp_path / "output")
    task = Task(write_yaml(tmp_path / "config.yaml", cfg), tmp_path)
    assert task.run("output") == 1
    assert task.error("output").startswith("KD.HEADS: 'NoSuchHead' is not a distillation head; registered are ")


def test_corrupt_image_in_a_worker_of_a_process(teacher, own_data, tmp_path):
    root = own_data(lambda data: None)
    for image in (root / "images").iterdir():
        image.write_bytes(b"")
    cfg = with_data(distilled_cfg(teacher, ["HintHead"], {"DATALOADER.NUM_WORKERS": 1}), root, tmp_path / "output")
    task = Task(write_yaml(tmp_path / "config.yaml", cfg), tmp_path)
    assert task.run("output") == 1
    assert ".png: not an image that can be read: " in task.error("output")


PLUGIN = """
import torch
from kd_det import KD_HEAD_REGISTRY


@KD_HEAD_REGISTRY.register()
class NanHead(torch.nn.Module):
    signals = ("p2",)

    def __init__(self, cfg, student_spec, teacher_spec):
        super().__init__()

    def forward(self, student, teacher, batch):
        return {"loss_kd_nan": student["p2"].float().mean() * float("nan")}
"""


@pytest.mark.slow
def test_loss_that_is_not_a_number_in_a_process(teacher, coco_folder, tmp_path):
    (tmp_path / "nan.py").write_text(PLUGIN, encoding="utf-8")
    cfg = with_data(tiny_cfg(), coco_folder, tmp_path / "output")
    arguments = ["--teacher", teacher["KD.TEACHER.CONFIG_FILE"], "--teacher-weights", teacher["KD.TEACHER.WEIGHTS"]]
    arguments += ["--plugin", tmp_path / "nan.py", "--kd-heads", "NanHead"]
    process = run_train_net("--config-file", write_yaml(tmp_path / "config.yaml", cfg), *arguments)
    assert process.returncode == 1
    assert process.stderr.count("error: ") == 1
    assert process.stderr.splitlines()[-1].startswith("error: iteration 0: loss_kd_nan is nan; lower SOLVER.BASE_LR")
    assert "Traceback" not in process.stderr + process.stdout
    assert not (tmp_path / "output" / "model_final.pth").exists()
