"""Tests kd-det noise, which measures how much models suffer from noise in a feature."""

import json
import math
import re
from statistics import NormalDist

import cv2
import pytest
import torch
from classification.models import classifier_cfg, classifier_inputs
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from helpers import attached, build, tiny_cfg, tiny_inputs, with_data
from torch import nn

from kd_det.analysis.compare_noise import Accuracy, compare_noise, measure_run, measure_setting
from kd_det.analysis.evaluation_losses import build_labelled_mapper, compute_losses, propose
from kd_det.analysis.feature_noise import FeatureNoise, draw_noise, measure_std
from kd_det.analysis.run import Run
from kd_det.data import DetectionMapper, register_datasets
from kd_det.errors import InputError
from kd_det.taps import build_tap

pytestmark = pytest.mark.usefixtures("in_process")

DIGITS = {
    "MODEL.CLASSIFIER.NUM_CLASSES": 10,
    "INPUT.CLASSIFICATION.SIZE": 8,
    "DATASETS.TEST": ("digits_test",),
    "SOLVER.IMS_PER_BATCH": 32,
}
NORMS = nn.modules.batchnorm._BatchNorm


@pytest.fixture
def classifiers(tmp_path, save_run):
    cfg = classifier_cfg(options=DIGITS)
    return [save_run(tmp_path / str(seed), cfg, seed=seed) for seed in (0, 1)]


def make_model(family: str):
    """Returns a model in evaluation mode, a feature of it and a batch with labels."""
    if family == "classifier":
        return build(classifier_cfg()).eval(), "res3", classifier_inputs()
    return build(tiny_cfg(family)).eval(), "res4", tiny_inputs(((64, 96),))


def flatten(outputs: list[dict]) -> list[torch.Tensor]:
    """Lists all tensors of a model's results."""
    found = []
    for output in outputs:
        for value in output.values():
            fields = value.get_fields().values() if hasattr(value, "get_fields") else [value]
            found += [getattr(x, "tensor", x) for x in fields]
    return found


@pytest.mark.parametrize("family", ["mask_rcnn", "c4", "retinanet", "classifier"])
def test_strength_zero_changes_nothing(family):
    model, feature, batch = make_model(family)
    with torch.no_grad():
        expected = flatten(model(batch))
    losses = compute_losses(model, batch, 3)
    tap = build_tap(model)
    channels = tap.spec()[feature].channels
    noise = FeatureNoise(torch.full((channels,), 5.0), 0)
    noise.images = range(len(batch))
    with torch.no_grad(), tap.replace(feature, noise, batch):
        assert all(map(torch.equal, flatten(model(batch)), expected))
        assert compute_losses(model, batch, 3) == losses
        noise.strength = 1.0
        assert compute_losses(model, batch, 3) != losses


@pytest.mark.parametrize("family", ["mask_rcnn", "c4", "cascade", "panoptic", "classifier"])
def test_losses_are_those_of_training_with_the_statistics_of_evaluation(family):
    model, _, batch = make_model(family)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    losses = compute_losses(model, batch, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert compute_losses(model, batch, 3, propose(model, batch, 3)) == losses
    assert not any(module.training for module in model.modules())
    assert not attached(model)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())

    model.train()
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()
    torch.manual_seed(3)
    with EventStorage(1):
        assert losses == {name: loss.item() for name, loss in model(batch).items()}


@pytest.mark.parametrize("family", ["mask_rcnn", "c4"])
def test_losses_under_noise_are_those_of_the_boxes_without_noise(family):
    model, feature, batch = make_model(family)
    tap = build_tap(model)
    proposals = propose(model, batch, 3)
    noise = FeatureNoise(torch.ones(tap.spec()[feature].channels), 0)
    noise.images = (0,)
    boxes = []
    for noise.strength, given in ((0.0, None), (5.0, proposals), (5.0, None)):
        with tap.replace(feature, noise, batch), tap.record({"roi_logits"}) as signals:
            compute_losses(model, batch, 3, given)
        boxes.append(signals["roi_boxes"])
    assert torch.equal(boxes[0], boxes[1])
    assert not torch.equal(boxes[0], boxes[2])


def test_losses_of_a_dense_detector_do_not_depend_on_the_images_before():
    model, _, batch = make_model("retinanet")
    nn.init.normal_(model.head.cls_score.weight, std=0.3)
    first = compute_losses(model, batch, 0)
    compute_losses(model, tiny_inputs(((96, 64),), seed=1), 0)
    assert compute_losses(model, batch, 0) == first
    assert not attached(model)
    assert not hasattr(model, "loss_normalizer")
    # In training, the first normaliser is 0.9 * 100 + 0.1 * positives.
    with build_tap(model.train()).record({"dense_logits"}) as signals, EventStorage(1):
        for module in model.modules():
            if isinstance(module, NORMS):
                module.eval()
        stock = model(batch)["loss_cls"].item()
    positives = int(((signals["dense_labels"] >= 0) & (signals["dense_labels"] < 3)).sum())
    assert first["loss_cls"] == pytest.approx(stock * (90 + 0.1 * positives) / positives, rel=1e-5)


def test_modes_are_restored_after_an_error():
    model, _, batch = make_model("retinanet")
    with pytest.raises(KeyError):
        compute_losses(model, [{"image": batch[0]["image"], "instances": {}}, {}], 0)
    assert not any(module.training for module in model.modules())
    assert not attached(model)


def test_images_are_those_of_the_evaluation(coco_folder, tmp_path):
    cfg = with_data(tiny_cfg(), coco_folder, tmp_path)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.CROP.ENABLED = [40], True
    register_datasets(cfg)
    record = DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]
    labelled, plain = build_labelled_mapper(cfg)(record), DetectionMapper(cfg, is_train=False)(record)
    assert torch.equal(labelled["image"], plain["image"])
    # The test image has the size of the data set's, 96 x 64.
    assert labelled["instances"].gt_boxes.tensor.tolist() == [[4, 6, 28, 30], [50, 10, 86, 50]]


class Regressor(nn.Module):
    """Predicts a number from the mean of a map by a linear function; its loss is the squared error."""

    class Network(Backbone):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return {"res2": self.layer(x)}

        def output_shape(self):
            return {"res2": ShapeSpec(channels=4, stride=1)}

    def __init__(self):
        super().__init__()
        self.backbone = self.Network()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0]))

    def preprocess_image(self, batch):
        return ImageList.from_tensors([x["image"] / 255 for x in batch])

    def forward(self, batch):
        found = self.backbone(self.preprocess_image(batch).tensor)["res2"].mean(dim=(2, 3)) @ self.weight
        target = torch.tensor([float(x["label"]) for x in batch])
        return {"loss": (found - target).square().mean()} if self.training else [{"scores": x} for x in found]


class Nothing:
    """Computes no metrics."""

    def reset(self):
        pass

    def process(self, inputs, outputs):
        pass

    def evaluate(self):
        return {}


def test_the_loss_of_a_linear_model_grows_as_computed_by_hand():
    torch.manual_seed(0)
    model = Regressor().eval()
    images = classifier_inputs(2, 40)
    with torch.no_grad():
        maps = model.backbone(model.preprocess_image(images).tensor)["res2"]
        images = [image | {"label": x["scores"] + 0.1} for image, x in zip(images, model(images), strict=True)]
    batches = [(range(i, i + 8), images[i : i + 8]) for i in range(0, 40, 8)]
    strengths, draws = (0.0, 0.5, 1.0), 20
    measured = measure_run(
        Run("a", "", None, model), "res2", batches, Nothing(), strengths=strengths, draws=draws, seed=0
    )
    assert not attached(model)

    variance = maps.transpose(0, 1).flatten(1).var(dim=1, correction=0)
    # The error gains a normal number with this variance, because the noise of 2 x 2 cells is averaged.
    gained = (model.weight.square() * variance).sum().item() / 4
    (plain,) = [x["metrics"]["loss"] for x in measured if x["strength"] == 0]
    for strength in strengths[1:]:
        losses = torch.tensor([x["metrics"]["loss"] for x in measured if x["strength"] == strength])
        assert len(losses) == draws
        error = losses.std().item() / math.sqrt(draws)
        assert plain == pytest.approx(0.1**2, rel=1e-4)
        assert abs(losses.mean().item() - (plain + strength**2 * gained)) < 3 * error
        assert error < 0.2 * strength**2 * gained


def test_the_accuracy_of_a_linear_classifier_falls_as_computed_by_hand():
    """Of two classes, noise swaps the larger logit with the probability that a normal number exceeds the margin."""
    model = build(classifier_cfg(options={"MODEL.CLASSIFIER.NUM_CLASSES": 2})).eval()
    images = [image | {"label": i % 2} for i, image in enumerate(classifier_inputs(8, 32))]
    batches = [(range(32), images)]
    run = Run("linear", "", None, model)
    with torch.no_grad():
        pooled = build_tap(model).compute(images, {"pooled"}, {})["pooled"]
        model.linear.bias.sub_(model.linear(pooled).mean(dim=0))  # Both classes are predicted.
        model.linear.weight.requires_grad_(False)
        logits = model.linear(pooled)
    weight = model.linear.weight[1] - model.linear.weight[0]
    spread = (weight * pooled.std(dim=0, correction=0)).norm().item()
    margins = [(x[image["label"]] - x[1 - image["label"]]).item() for x, image in zip(logits, images, strict=True)]
    draws = 40
    measured = measure_run(run, "pooled", batches, Accuracy("digits_test"), strengths=(0.5, 1.0), draws=draws, seed=1)
    for strength in (0.5, 1.0):
        chances = [NormalDist().cdf(margin / (strength * spread)) for margin in margins]
        found = [x["metrics"]["top1"] / 100 for x in measured if x["strength"] == strength]
        error = math.sqrt(sum(p * (1 - p) for p in chances) / len(chances) ** 2 / draws)
        assert abs(sum(found) / draws - sum(chances) / len(chances)) < 3 * error


def test_noise_depends_on_seed_image_and_draw_alone():
    one = draw_noise((4, 3), 0, 1, 2)
    torch.rand(7)
    assert torch.equal(draw_noise((4, 3), 0, 1, 2), one)
    others = [draw_noise((4, 3), *numbers) for numbers in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (1, 0, 2))]
    assert not any(torch.equal(x, one) for x in others)

    noise = FeatureNoise(torch.tensor([1.0, 0.0, 2.0]), 0)
    noise.strength, noise.draw, features = 0.5, 4, torch.zeros(3, 3, 2, 2)
    noise.images = (5, 9, 7)
    together = noise(features)
    assert torch.equal(together[1, 2], draw_noise((3, 2, 2), 0, 9, 4)[2])  # 0.5 times a deviation of 2.
    assert not together[:, 1].any()
    for row, noise.images in enumerate(((5,), (9,), (7,))):
        assert torch.equal(noise(features[:1])[0], together[row])


def test_metrics_do_not_depend_on_the_batch():
    model, _, images = make_model("classifier")
    run = Run("a", "", None, model)
    std = measure_std(run, "res3", [images])
    assert torch.allclose(measure_std(run, "res3", [images[:1], images[1:]]), std, rtol=1e-5)
    noise = FeatureNoise(std, 0)
    noise.strength = 1.0
    singly = [((i,), [image]) for i, image in enumerate(images)]
    with build_tap(model).replace("res3", noise, images):
        found = [
            measure_setting(model, noise, x, [None] * len(x), Accuracy("digits_test"))
            for x in ([(range(4), images)], singly)
        ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_deviation_of_each_channel():
    model, _, images = make_model("classifier")
    with torch.no_grad():
        features = build_tap(model).compute(images, {"res3"}, {})["res3"]
    expected = features.transpose(0, 1).flatten(1).std(dim=1, correction=0)
    assert torch.allclose(measure_std(Run("a", "", None, model), "res3", [images[:3], images[3:]]), expected, rtol=1e-4)


def test_a_feature_that_is_not_finite_is_refused():
    model, _, images = make_model("classifier")
    nn.init.constant_(model.backbone.stem.conv1.weight, math.inf)
    with pytest.raises(InputError, match=r"^--feature: res3 of 'a' has values that are not finite\.$"):
        measure_std(Run("a", "", None, model), "res3", [images])


def test_detectors(coco_folder, tmp_path, save_run, run_tool, capsys):
    cfg = with_data(tiny_cfg(), coco_folder, tmp_path)
    folders = [save_run(tmp_path / str(seed), cfg, seed=seed) for seed in (0, 1)]
    output = tmp_path / "noise"
    runs = ["--run", f"a={folders[0]}", "--run", f"_$b$={folders[0]}", "--run", f"_$b$={folders[1]}"]
    run_tool("noise", "--feature", "res3", *runs, "--strengths", 2, 0, "--draws", 2, "--images", 2, "--output", output)

    results = json.loads((output / "noise.json").read_text())
    assert results["images"] == 2
    first, twin, _ = results["runs"]
    assert first["measurements"] == twin["measurements"]  # The noise is the same for all runs.
    assert [(x["strength"], x["draw"]) for x in first["measurements"]] == [(0, 0), (2, 0), (2, 1)]
    losses = [x["metrics"]["loss"] for x in first["measurements"]]
    assert len(set(losses)) == 3
    parts = {name: x for name, x in first["measurements"][0]["metrics"].items() if name.startswith("loss_")}
    assert {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"} == parts.keys()
    assert losses[0] == pytest.approx(sum(parts.values()))
    assert {"bbox AP", "bbox AP50", "segm AP"} <= first["measurements"][0]["metrics"].keys()
    curve = results["summary"]["_$b$"]
    assert [(point["strength"], point["count"]) for point in curve] == [(0, 2), (2, 4)]
    assert results["summary"]["a"][1]["metrics"]["loss"]["mean"] == pytest.approx((losses[1] + losses[2]) / 2)

    text = (output / "noise.md").read_text()
    assert text in capsys.readouterr().out + "\n"
    assert [line for line in text.splitlines() if line.endswith(":")] == ["Task loss:", "AP of boxes:", "AP of masks:"]
    assert "| strength   | a" in text
    assert "_$b$ (2 runs)" in text
    height, width, _ = cv2.imread(str(output / "noise.png")).shape
    assert (height, width) == (400, 1500)


def test_classifiers(classifiers, tmp_path):
    runs = [("a", folder) for folder in classifiers]
    options = {"strengths": [0, 1], "draws": 2, "images": 12}
    results = compare_noise(runs, "pooled", str(tmp_path / "one"), **options)
    assert compare_noise(runs, "pooled", str(tmp_path / "two"), **options) == results
    plain, noisy = results["summary"]["a"]
    assert {"loss", "top1", "top5"} <= plain["metrics"].keys()
    assert plain["metrics"]["loss"]["mean"] != noisy["metrics"]["loss"]["mean"]
    assert "Top-1 accuracy (%):" in results["table"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--feature", "res9"], "'res9' is no feature of 'a' that noise can be added to; it has res2, res3, res4, poo"),
        (["--strengths", "0", "-0.5"], "--strengths: must be finite and at least 0, got -0.5."),
        (["--strengths", "nan"], "--strengths: must be finite and at least 0, got nan."),
        (["--strengths", "inf"], "--strengths: must be finite and at least 0, got inf."),
        (["--draws", "0"], "--draws: must be at least 1, got 0."),
        (["--images", "0"], "--images: must be at least 1, got 0."),
        (["--seed", "-1"], "--seed: must be at least 0, got -1."),
        (["--run", "b"], "--run: got 'b'; NAME=FOLDER or NAME=CONFIG:WEIGHTS is needed."),
    ],
)
def test_wrong_arguments(arguments, message, classifiers, run_tool, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(message)):
        run_tool("noise", "--feature", "res3", "--run", f"a={classifiers[0]}", "--output", tmp_path / "x", *arguments)
    assert not (tmp_path / "x").exists()


def test_models_of_different_kinds(classifiers, coco_folder, tmp_path, save_run):
    detector = save_run(tmp_path / "detector", with_data(tiny_cfg(), coco_folder, tmp_path))
    with pytest.raises(InputError, match="'a' is an image classifier, 'b' is a detector; all runs of a comparison"):
        compare_noise([("a", classifiers[0]), ("b", detector)], "res3", str(tmp_path / "x"))


def test_a_model_without_instances_is_refused(coco_folder, tmp_path, save_run):
    cfg = with_data(
        tiny_cfg(options={"MODEL.META_ARCHITECTURE": "ProposalNetwork", "MODEL.MASK_ON": False}), coco_folder, tmp_path
    )
    folder = save_run(tmp_path / "rpn", cfg)
    with pytest.raises(InputError, match="--run a: its model gives proposals; only detectors"):
        compare_noise([("a", folder)], "res3", str(tmp_path / "x"), images=1)
