"""Tests losses of labels with scores, against numbers by hand and the stock losses."""

import copy
import json
import math

import pytest
import torch
from children import same
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from helpers import build, distilled_cfg, interrupted_at, step, tiny_cfg, tiny_inputs, with_data

from kd_det import InputError
from kd_det.data import register_datasets
from kd_det.engine import Trainer
from kd_det.engine.stages import train
from kd_det.score_weights import scores_of, weigh_by_scores, weighted_datasets

CLASSIFICATION = ("loss_cls", "loss_rpn_cls")
FAMILIES = ("mask_rcnn", "c4", "cascade")


def scored(score, **options):
    """A batch whose objects have a score; the second image has none."""
    batch = tiny_inputs(**options)
    instances = batch[0]["instances"]
    instances.gt_scores = torch.full((len(instances),), float(score))
    return batch


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    """A detector, and its copy whose losses are weighted."""
    stock = build(tiny_cfg(request.param))
    weighted = copy.deepcopy(stock)
    weigh_by_scores(weighted, ["x"])
    return stock, weighted


def losses_of(model, batch):
    return {key: value.item() for key, value in step(copy.deepcopy(model), batch).items()}


def test_scores_of_one_change_no_bit(models):
    stock, weighted = models
    expected = losses_of(stock, tiny_inputs())
    assert losses_of(weighted, tiny_inputs()) == expected
    assert losses_of(weighted, scored(1)) == expected
    # Without the weights, scores have no effect.
    assert losses_of(stock, scored(0.5)) == expected
    assert stock.state_dict().keys() == weighted.state_dict().keys()


def test_a_score_of_a_half_halves_what_a_box_adds(models):
    """The classification losses are linear in the score; all others do not depend on it."""
    whole, half, none = (losses_of(models[1], scored(score)) for score in (1, 0.5, 0))
    for key in whole:
        if key.startswith(CLASSIFICATION):
            assert none[key] < whole[key]
            assert half[key] == pytest.approx((whole[key] + none[key]) / 2, rel=1e-5)
        else:
            assert whole[key] == half[key] == none[key]


def test_regions_by_hand():
    """Equal logits of three classes and the background give a cross-entropy of ln 4 for each region."""
    model = build(tiny_cfg())
    weigh_by_scores(model, ["x"])
    predictor = model.roi_heads.box_predictor
    regions = Instances((64, 64))
    regions.proposal_boxes = regions.gt_boxes = Boxes(torch.tensor([[0.0, 0, 8, 8]] * 4))
    regions.gt_classes = torch.tensor([0, 2, 3, 3])
    regions.gt_scores = torch.tensor([0.5, 0.25, 0.5, 0.0])  # Two regions are background.
    plain = Instances((64, 64))
    plain.proposal_boxes, plain.gt_classes = regions.proposal_boxes[:1], torch.tensor([3])
    logits, deltas = torch.zeros(5, 4), torch.zeros(5, 12)

    def loss():
        with EventStorage():
            return predictor.losses((logits, deltas), [regions, plain])["loss_cls"].item()

    assert loss() == pytest.approx((0.5 + 0.25 + 1 + 1 + 1) * math.log(4) / 5)
    predictor.loss_weight["loss_cls"] = 3.0
    assert loss() == pytest.approx(3 * (0.5 + 0.25 + 1 + 1 + 1) * math.log(4) / 5)
    predictor.loss_weight["loss_cls"], predictor.use_sigmoid_ce = 1.0, True
    # Each of the three classes has a binary cross-entropy of ln 2.
    assert loss() == pytest.approx((0.5 + 0.25 + 1 + 1 + 1) * 3 * math.log(2) / 5)


def test_anchors_by_hand(monkeypatch):
    """Of four anchors two belong to objects, one to the background, and one is ignored."""
    model = build(tiny_cfg())
    weigh_by_scores(model, ["x"])
    rpn = model.proposal_generator
    places = torch.tensor([[0.0, 0, 8, 8], [16, 16, 24, 24]])
    objects = Instances((64, 64))
    objects.gt_boxes, objects.gt_scores = Boxes(places), torch.tensor([0.25, 0.5])
    labels, boxes = torch.tensor([1, 0, 1, -1]), places[[1, 0, 0, 1]]
    monkeypatch.setattr(type(rpn), "label_and_sample_anchors", lambda *_: ([labels], [boxes]))
    anchors = [Boxes(places[[1, 0, 0, 1]])]
    with EventStorage():
        found = rpn.label_and_sample_anchors(anchors, [objects])
        losses = rpn.losses(anchors, [torch.zeros(1, 4)], found[0], [torch.zeros(1, 4, 4)], found[1])
    expected = (0.5 + 0.25 + 1) * math.log(2) / rpn.batch_size_per_image
    assert losses["loss_rpn_cls"].item() == pytest.approx(expected)
    assert not [name for name in vars(rpn) if name.startswith("_weights")]


def test_scores_of_boxes():
    objects = Instances((64, 64))
    objects.gt_boxes = Boxes(torch.tensor([[0.0, 0, 8, 8], [1, 0, 8, 8], [1, 0, 8, 8]]))
    objects.gt_scores = torch.tensor([0.125, 0.25, 0.75])
    assert scores_of(objects.gt_boxes.tensor[[1, 0, 0]], objects).tolist() == [0.75, 0.125, 0.125]
    assert scores_of(torch.zeros(0, 4), objects).shape == (0,)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("retinanet", {}, "'weight' is for R-CNNs, whose regions and anchors are weighted, got RetinaNet"),
        ("mask_rcnn", {"use_fed_loss": True}, "'weight' is not possible with a federated loss"),
    ],
)
def test_models_without_such_losses(family, options, message):
    model = build(tiny_cfg(family))
    for name, value in options.items():
        setattr(model.roi_heads.box_predictor, name, value)
    with pytest.raises(InputError, match=f"^DATASETS.COCO_FORMAT.x.SCORES: {message}"):
        weigh_by_scores(model, ["x"])


@pytest.fixture
def make(tmp_path, coco_folder):
    """Makes the config of a run on two data sets, labels and labels with scores, and registers them."""

    def make(name, score, *, mode="weight", teacher=None):
        data = json.loads((coco_folder / "instances.json").read_text())
        for item in data["annotations"]:
            item["score"] = score
        folder = tmp_path / name
        folder.mkdir()
        (folder / "scored.json").write_text(json.dumps(data))
        cfg = distilled_cfg(teacher, ["HintHead"]) if teacher else tiny_cfg()
        with_data(cfg, coco_folder, folder)
        entry = {"JSON": str(folder / "scored.json"), "IMAGE_ROOT": str(coco_folder / "images"), "SCORES": mode}
        cfg.DATASETS.COCO_FORMAT[f"{name}_scored"] = CfgNode(entry)
        cfg.DATASETS.MIX = CfgNode({cfg.DATASETS.TRAIN[0]: 1, f"{name}_scored": 1})
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (*cfg.DATASETS.TRAIN, f"{name}_scored"), ()
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 3, 1
        register_datasets(cfg)
        return cfg

    return make


def first_losses(cfg):
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    batch = next(iter(trainer.data_loader))
    return step(trainer.model, batch)


@pytest.mark.usefixtures("in_process")
def test_a_plain_run_reads_scores(make):
    one, half, ignored = (
        first_losses(make(f"{mode}_{score}".replace(".", ""), score, mode=mode))
        for score, mode in ((1.0, "weight"), (0.5, "weight"), (0.5, "ignore"))
    )
    assert same(one, ignored)
    assert half["loss_cls"] < one["loss_cls"]
    assert half["loss_rpn_cls"] < one["loss_rpn_cls"]
    assert torch.equal(half["loss_mask"], one["loss_mask"])


@pytest.mark.usefixtures("in_process")
def test_a_distilled_run_that_is_resumed(make, teacher, tmp_path):
    cfg = make("whole", 0.5, teacher=teacher)
    train(cfg, resume=False)
    whole = torch.load(tmp_path / "whole" / "model_final.pth", weights_only=True)
    cfg.OUTPUT_DIR = str(tmp_path / "cut")
    with interrupted_at(2):
        train(cfg, resume=False)
    train(cfg, resume=True)
    resumed = torch.load(tmp_path / "cut" / "model_final.pth", weights_only=True)
    assert same(whole["model"], resumed["model"])
    assert same(whole["kd_heads"], resumed["kd_heads"])
    assert weighted_datasets(cfg) == ["whole_scored"]
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    with pytest.raises(InputError, match=r"^DATALOADER.SAMPLER_TRAIN: must be TrainingSampler with DATASETS.MIX, got"):
        Trainer(cfg)
