"""Tests ensembles: the mean of class probabilities, and fused boxes."""

import sys

import pytest
import torch
from classification.models import classifier_cfg, classifier_inputs
from detectron2.structures import Boxes, Instances
from helpers import build, distilled_cfg, tiny_cfg, tiny_inputs
from torch import nn

from kd_det import InputError
from kd_det.analysis.ensemble import Ensemble, fuse_instances, load_boxes_fusion

SIZE = (50, 100)


def detections(boxes, scores, classes, size=SIZE):
    found = Instances(size)
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes, dtype=torch.int64)
    return found


@pytest.fixture
def ensemble():
    """Returns a function that fuses the given detections of several detectors."""

    def join(*found, **options):
        models = [build(tiny_cfg("retinanet")) for _ in found]
        for model, instances in zip(models, found, strict=True):
            model.forward = lambda batched_inputs, x=instances: [{"instances": x} for _ in batched_inputs]
        return Ensemble(models, **options)([{}])[0]["instances"]

    return join


def test_classifiers_by_hand():
    models = [build(classifier_cfg(), seed=seed) for seed in (0, 1, 2)]
    ensemble, inputs = Ensemble(models), classifier_inputs()
    assert not any(model.training for model in models)
    each = [torch.stack([x["scores"] for x in model(inputs)]) for model in models]
    scores = torch.stack([x["scores"] for x in ensemble(inputs)])
    torch.testing.assert_close(scores, (each[0] + each[1] + each[2]) / 3)
    assert not scores.requires_grad
    ensemble.train()
    assert not any(module.training for module in ensemble.modules())


def test_boxes_by_hand(ensemble):
    """Two models detect one object, with scores 0.9 and 0.3; two other boxes match nothing, by class or place."""
    joined = ensemble(
        detections([[10, 10, 30, 40], [60, 10, 90, 40]], [0.9, 0.8], [1, 0]),
        detections([[14, 10, 30, 40], [10, 10, 30, 40]], [0.3, 0.2], [1, 2]),
    )
    assert joined.image_size == SIZE
    # Corners are weighted 3 to 1, and scores are averaged. An object that only one of two models found has half its
    # score.
    expected = [[11, 10, 30, 40], [60, 10, 90, 40], [10, 10, 30, 40]]
    order = joined.scores.argsort(descending=True)
    assert order.tolist() == [0, 1, 2]
    torch.testing.assert_close(joined.pred_boxes.tensor, torch.tensor(expected).float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(joined.scores, torch.tensor([0.6, 0.4, 0.1]))
    assert joined.pred_classes.tolist() == [1, 0, 2]
    assert joined.pred_classes.dtype == torch.int64


def test_threshold_and_number_of_detections(ensemble):
    found = [detections([[10, 10, 30, 40]], [score], [1]) for score in (0.9, 0.3)]
    found[1].pred_boxes.tensor[0, 0] = 14  # The boxes overlap by 16 / 20.
    assert len(ensemble(*found, iou_threshold=0.79)) == 1
    assert len(ensemble(*found, iou_threshold=0.81)) == 2
    best = ensemble(*found, iou_threshold=0.81, detections_per_image=1)
    assert best.scores.tolist() == pytest.approx([0.45])


def test_images_without_detections(ensemble):
    nothing = detections([], [], [])
    joined = ensemble(nothing, nothing)
    assert len(joined) == 0
    assert joined.pred_boxes.tensor.shape == (0, 4)
    assert ensemble(nothing, detections([[0, 0, 100, 50]], [0.5], [0])).scores.tolist() == pytest.approx([0.25])


@pytest.mark.parametrize("family", ["mask_rcnn", "retinanet"])
def test_an_ensemble_of_one_model_finds_what_the_model_finds(family):
    """Boxes are in pixels of the output image, which is twice as large as the input here; masks are dropped."""
    inputs = [{**x, "height": 2 * x["height"], "width": 2 * x["width"]} for x in tiny_inputs()]
    options = {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0}
    model = build(tiny_cfg(family, options)).eval()
    for alone, joined in zip(model(inputs), Ensemble([model], iou_threshold=0.999)(inputs), strict=True):
        alone, joined = alone["instances"], joined["instances"]
        assert joined.image_size == alone.image_size
        assert len(joined) == len(alone) > 0
        assert set(joined.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
        for key in ("scores", "pred_classes"):
            torch.testing.assert_close(getattr(joined, key), getattr(alone, key))
        torch.testing.assert_close(joined.pred_boxes.tensor, alone.pred_boxes.tensor, atol=1e-3, rtol=0)


def test_different_detectors_can_be_combined():
    models = [build(tiny_cfg()), build(tiny_cfg("retinanet")), build(distilled_cfg({}, []))]
    found = Ensemble(models)(tiny_inputs())
    assert [x["instances"].image_size for x in found] == [(64, 96), (56, 80)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (list, "it needs at least one model, got none"),
        (
            lambda: [build(tiny_cfg()), build(tiny_cfg(options={"MODEL.ROI_HEADS.NUM_CLASSES": 5}))],
            "must all be alike, but they are detector of 3 classes, detector of 5 classes",
        ),
        (
            lambda: [build(classifier_cfg()), build(tiny_cfg("retinanet"))],
            "they are image classifier of 3 classes, detector of 3 classes",
        ),
    ],
    ids=["none", "classes", "kinds"],
)
def test_models_that_do_not_fit_are_refused(make, message):
    with pytest.raises(InputError, match=f"^Ensemble: .*{message}"):
        Ensemble(make())


def test_fused_masks_by_hand():
    """Each fused box has the mask of the detection of its class that overlaps it most; one without any is left out."""
    first = detections([[10, 10, 30, 40], [60, 10, 90, 40]], [0.9, 0.8], [1, 0])
    second = detections([[16, 10, 30, 40], [10, 10, 30, 40]], [0.3, 0.2], [1, 2])
    second.pred_masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    second.pred_masks[0, 5] = second.pred_masks[1, 7] = True
    fuse = load_boxes_fusion()
    joined = fuse_instances(fuse, [first, second], masks=True)
    # The object that only the first model, which has no masks, found is left out.
    assert joined.pred_classes.tolist() == [1, 2]
    torch.testing.assert_close(joined.pred_boxes.tensor[0], torch.tensor([11.5, 10, 30, 40]), atol=1e-4, rtol=0)
    assert torch.equal(joined.pred_masks, second.pred_masks)
    first.pred_masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    first.pred_masks[0, 1] = first.pred_masks[1, 2] = True
    joined = fuse_instances(fuse, [first, second], masks=True)
    assert joined.pred_classes.tolist() == [1, 0, 2]
    # The fused box of class 1 is nearer to the first model's.
    assert torch.equal(joined.pred_masks, torch.cat([first.pred_masks, second.pred_masks[1:]]))
    nothing = fuse_instances(fuse, [detections([], [], []), first[:0]], masks=True)
    assert nothing.pred_masks.shape == (0, *SIZE)


def test_missing_package_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "ensemble_boxes", None)
    with pytest.raises(InputError, match=r"^Ensemble: detectors need ensemble-boxes .*: pip install ensemble-boxes\."):
        Ensemble([build(tiny_cfg("retinanet"))])
    assert isinstance(Ensemble([build(classifier_cfg())]), nn.Module)
