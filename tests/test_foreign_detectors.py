"""Detectors of other frameworks teach by an adapter in one file: the examples of the docs."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import EventStorage
from helpers import (
    ROOT,
    build,
    distilled_cfg,
    save_teacher,
    step,
    tiny_cfg,
    tiny_inputs,
    with_data,
    write_yaml,
)
from test_teacher_classes import named
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from kd_det import TAP_REGISTRY, InputError
from kd_det.benchmarking import Row, Setup, case
from kd_det.data import register_datasets
from kd_det.engine import import_plugin
from kd_det.engine.teacher_check import check_teacher
from kd_det.taps import build_tap

HEADS = ("PearsonHead", "SoftTargetHead")
EXAMPLES = ROOT / "docs" / "examples"
PLUGIN = EXAMPLES / "torchvision_detector.py"


def create_small(*, num_classes, **_):
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return FasterRCNN(backbone, num_classes=num_classes, min_size=64, max_size=96)


@pytest.fixture
def cfg(monkeypatch):
    """The config of a small torchvision detector with random weights."""
    import_plugin(str(PLUGIN))
    architecture = META_ARCH_REGISTRY.get("TorchvisionDetector")
    monkeypatch.setitem(architecture.__init__.__globals__, "CREATE", create_small)
    yield tiny_cfg(options={"MODEL.META_ARCHITECTURE": "TorchvisionDetector", "INPUT.FORMAT": "RGB"})
    META_ARCH_REGISTRY._obj_map.pop("TorchvisionDetector")
    TAP_REGISTRY._obj_map.pop("TorchvisionDetectorTap")


def test_a_torchvision_detector_teaches(cfg, tmp_path):
    student = build(distilled_cfg(save_teacher(tmp_path, cfg), list(HEADS)))
    losses = step(student, tiny_inputs())
    assert student.teacher.flip_channels
    assert losses["loss_kd_pearson"] > 0
    assert losses["loss_kd_soft_target_roi"] > 0


def test_its_logits_are_those_that_torchvision_computes(cfg):
    """Boxes are given to torchvision's own RoI heads, whose background comes first."""
    model = build_model(cfg).eval()
    tap, boxes = build_tap(model), torch.tensor([[0, 8.0, 8, 40, 32], [1, 0.0, 0, 64, 48]])
    with torch.no_grad():
        logits = tap.compute(tiny_inputs(), {"roi_logits"}, {"roi_boxes": boxes})["roi_logits"]
        images = [(x["image"] / 255) for x in tiny_inputs()]
        normalised = [model.net.transform.normalize(x) for x in images]
        batch = torch.zeros(2, 3, 64, 96)
        for i, x in enumerate(normalised):
            batch[i, :, : x.shape[1], : x.shape[2]] = x
        pooled = model.net.roi_heads.box_roi_pool(
            model.net.backbone(batch), [boxes[:1, 1:], boxes[1:, 1:]], [(64, 96)] * 2
        )
        expected = model.net.roi_heads.box_predictor(model.net.roi_heads.box_head(pooled))[0]
    torch.testing.assert_close(logits, expected[:, [1, 2, 3, 0]], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("in_process")
def test_a_torchvision_detector_is_checked(cfg, coco_folder, tmp_path, caplog):
    caplog.set_level("INFO", "kd_det.engine.teacher_check")
    teacher = save_teacher(tmp_path, cfg) | {"KD.TEACHER.SANITY_CHECK": 2}
    run = with_data(distilled_cfg(teacher, ["SoftTargetHead"]), coco_folder, tmp_path)
    register_datasets(run)
    check_teacher(run)
    assert caplog.messages[0].startswith("Checking the teacher on 2 images of ")
    assert caplog.messages[1].startswith("The teacher's box AP on these images: ")


def measured(teacher, heads, plugin, monkeypatch):
    """Returns the losses of a step that kd-det benchmark measures, with a tiny student."""
    monkeypatch.setattr(case, "detector_config", lambda depth: tiny_cfg(options={"MODEL.ROI_HEADS.NUM_CLASSES": 6}))
    setup = Setup(depths=(18, 34), batch=1, size=64, rounds=1, teacher=teacher, plugins=(str(plugin),))
    row = Row("a", heads)
    with EventStorage():
        one = case.Case(row, setup, *case.build_all_networks(row, setup))
        one.teacher_forward()
        return one.distilled(one.batch)


def test_benchmark_of_a_torchvision_detector(cfg, tmp_path, monkeypatch):
    """It has random weights; the student predicts six classes, and so does it."""
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 6
    config = write_yaml(tmp_path / "teacher.yaml", cfg)
    losses = measured((config, "KD.PEARSON.IN_FEATURES", "['p2', 'p3']"), HEADS, PLUGIN, monkeypatch)
    assert {"loss_kd_pearson", "loss_kd_soft_target_roi"} <= losses.keys()


@pytest.mark.slow
def test_it_detects_in_the_pixels_of_the_original_image(cfg):
    model = build_model(cfg).eval()
    with torch.no_grad():
        found = model(tiny_inputs())[1]["instances"]
    assert found.image_size == (tiny_inputs()[1]["height"], tiny_inputs()[1]["width"])
    assert set(found.pred_classes.tolist()) <= {0, 1, 2}


# ---- TorchScript ----
class CellDetector(nn.Module):
    """Predicts classes and boxes at the cells of two maps, of strides 8 and 16, in a file of TorchScript."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, stride=8)
        self.down = nn.Conv2d(16, 16, 2, stride=2)
        self.classes = nn.Conv2d(16, 3, 1)

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        first = self.stem(images)
        maps = [first, self.down(first.relu())]
        logits = torch.cat([self.classes(x).flatten(2).transpose(1, 2) for x in maps], dim=1)
        places = torch.arange(logits.shape[1], device=images.device)[None, :, None].float()
        boxes = (places + torch.tensor([0.0, 0.0, 9.0, 9.0])).expand(len(images), -1, -1)
        return maps, logits, boxes


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """The network, and the keys of KD.TEACHER that name its file."""
    folder = tmp_path_factory.mktemp("scripted")
    torch.manual_seed(3)
    network = CellDetector().eval()
    torch.jit.script(network).save(folder / "detector.pt")
    cfg = tiny_cfg(options={"MODEL.META_ARCHITECTURE": "TorchScriptTeacher", "INPUT.FORMAT": "RGB"})
    cfg.MODEL.WEIGHTS = str(folder / "detector.pt")
    return network, {"KD.TEACHER.CONFIG_FILE": write_yaml(folder / "scripted.yaml", cfg)}


@pytest.fixture
def scripted_cfg(scripted):
    """Makes the config of a RetinaNet with one square anchor per cell that learns from the TorchScript module."""
    import_plugin(str(EXAMPLES / "torchscript_teacher.py"))
    cells = {
        "MODEL.RETINANET.IN_FEATURES": ["p3", "p4"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16]],
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5,
        "MODEL.RETINANET.NUM_CLASSES": 2,
        "KD.PEARSON.IN_FEATURES": ["p3", "p4"],
        "KD.SOFT_TARGET.SOURCES": ["dense"],
    }

    def make(options=None, names=("car", "dog")):
        return named(distilled_cfg(scripted[1], list(HEADS), cells | (options or {}), "retinanet"), names)

    yield make
    META_ARCH_REGISTRY._obj_map.pop("TorchScriptTeacher")
    TAP_REGISTRY._obj_map.pop("TorchScriptTeacherTap")


def test_a_torchscript_module_teaches(scripted, scripted_cfg):
    """Its images are RGB in [0, 1], normalised; its class list says that only cars are shared."""
    network, _ = scripted
    cfg = scripted_cfg()
    model, inputs, seen = build(cfg), tiny_inputs(), {}
    classes = model.teacher.classes
    assert (classes.shared, classes.only_teacher) == (("car",), ("person", "bicycle"))
    forwards = model._forwards

    def recorded(*args):
        losses, student, teachers = forwards(*args)
        seen.update(teachers["teacher"])
        return losses, student, teachers

    model._forwards = recorded
    losses = step(model, [{**x, "instances": car(x["instances"])} for x in inputs])
    assert losses["loss_kd_pearson"] > 0
    assert losses["loss_kd_soft_target_dense"].isfinite()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    batch = torch.zeros(2, 3, 64, 96)
    for i, x in enumerate(inputs):
        image = (x["image"].flip(0) / 255 - mean) / std
        batch[i, :, : image.shape[1], : image.shape[2]] = image
    with torch.no_grad():
        maps, logits, _ = network(batch)
    torch.testing.assert_close(seen["p4"], maps[1])
    torch.testing.assert_close(seen["dense_logits"], logits)


def car(instances):
    instances.gt_classes[:] = 0
    return instances


@pytest.mark.usefixtures("in_process")
def test_a_torchscript_module_is_checked_and_summarised(scripted_cfg, coco_folder, tmp_path, caplog):
    caplog.set_level("INFO", "kd_det.engine.teacher_check")
    cfg = scripted_cfg({"KD.TEACHER.SANITY_CHECK": 2, "MODEL.RETINANET.NUM_CLASSES": 3})
    cfg.KD.TEACHER.SYNONYMS.car = "bar"
    cfg = with_data(cfg, coco_folder, tmp_path)
    register_datasets(cfg)
    check_teacher(cfg)
    assert caplog.messages[0].startswith("Checking the teacher on 2 images of ")
    assert caplog.messages[1].startswith("The teacher's box AP on these images: ")
    model = build(cfg)
    _, network = model.networks(cfg)
    assert network.weights.endswith("detector.pt")
    assert "1  bar (the teacher's car)" in model.describe(cfg)[1]


@pytest.mark.usefixtures("scripted_cfg")
def test_benchmark_of_a_torchscript_module(scripted, monkeypatch):
    """Its weights are in the file that has its code."""
    named = (scripted[1]["KD.TEACHER.CONFIG_FILE"], "KD.PEARSON.IN_FEATURES", "['p3', 'p4']")
    assert "loss_kd_pearson" in measured(named, HEADS[:1], EXAMPLES / "torchscript_teacher.py", monkeypatch)


def test_files_that_are_not_torchscript(scripted_cfg, tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"PK no module")
    with pytest.raises(InputError, match=r"TorchScriptTeacher cannot be built: RuntimeError: ") as error:
        build(scripted_cfg({"KD.TEACHER.WEIGHTS": str(tmp_path / "broken.pt")}))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"^KD.TEACHER.WEIGHTS: there is no file /no/such.pt\.$"):
        build(scripted_cfg({"KD.TEACHER.WEIGHTS": "/no/such.pt"}))


@pytest.mark.parametrize("name", ["torchvision_detector.py", "torchscript_teacher.py"])
def test_an_adapter_has_at_most_sixty_lines(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 60
