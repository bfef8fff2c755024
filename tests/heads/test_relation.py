"""Relational distillation: distances, angles, Gram matrices and cosines between boxes or images."""

import pytest
import torch
from detectron2.layers import ShapeSpec

from kd_det import Batch, InputError, build_kd_heads
from kd_det.config import default_config
from kd_det.heads import RelationHead

TWO_IMAGES = Batch([], [(8, 8), (8, 8)])


def boxes_of(*images):
    return torch.tensor([[i, 0.0, 0.0, 8.0, 8.0] for i in images])


def compare(head, s, t, images, batch=TWO_IMAGES):
    student = {"roi_box_features": torch.tensor(s), "roi_boxes": boxes_of(*images)}
    losses = head(student, {"roi_box_features": torch.tensor(t)}, batch)
    return {key.removeprefix("loss_kd_relation"): loss.item() for key, loss in losses.items()}


def test_distances_and_angles_of_three_boxes():
    """Distances 1, 1, 2 and 2, 1, 3, whose means are 4/3 and 2, differ by 1/4, 1/4 and 0; all angles are the same."""
    losses = compare(RelationHead(), [[0.0], [1.0], [2.0]], [[0.0], [2.0], [3.0]], (0, 0, 0), Batch([], [(8, 8)]))
    assert losses["_distance"] == pytest.approx(25 * 4 * (0.5 * 0.25**2) / 9)
    assert losses["_angle"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["rkd", "sp", "cosine"])
def test_relations_are_those_within_an_image_and_averaged_over_images(kind):
    head, one = RelationHead(kind=kind), Batch([], [(8, 8)])
    s, t = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0)).tolist()
    both = compare(head, s, t, (0, 0, 0, 1, 1, 1, 1))
    parts = compare(head, s[:3], t[:3], (0,) * 3, one), compare(head, s[3:], t[3:], (0,) * 4, one)
    assert both == {key: pytest.approx((parts[0][key] + parts[1][key]) / 2, rel=1e-5) for key in both}


def test_only_the_first_boxes_of_an_image_count():
    s, t = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).tolist()
    images = (0, 0, 0, 1, 1, 1)
    first = compare(RelationHead(kind="cosine", boxes=2), s, t, images)
    alone = compare(RelationHead(kind="cosine"), s[:2] + s[3:5], t[:2] + t[3:5], (0, 0, 1, 1))
    assert first == pytest.approx(alone)


def test_cosines_ignore_the_length_of_rows_and_the_width_of_features():
    s = [[1.0, 0.0], [0.0, 2.0]]
    t = [[0.0, 3.0, 0.0], [0.0, 0.0, 0.5]]
    assert compare(RelationHead(kind="cosine"), s, t, (0, 0)) == {"": 0.0}


def build(spec, **options):
    cfg = default_config()
    cfg.KD.HEADS = ["RelationHead"]
    for key, value in options.items():
        cfg.KD.RELATION[key] = value
    return build_kd_heads(cfg, spec, spec)["RelationHead"]


CLASSIFIER = {
    "res4": ShapeSpec(channels=2, stride=16),
    "pooled": ShapeSpec(channels=2),
    "logits": ShapeSpec(channels=3),
}


@pytest.mark.parametrize("feature", ["pooled", "res4"])
def test_the_images_of_a_classifiers_batch_are_the_rows(feature):
    s = torch.randn(4, 2, 3, 3) if feature == "res4" else torch.randn(4, 2)
    head = build(CLASSIFIER, IN_FEATURE=feature, KIND="sp")
    loss = head({feature: s}, {feature: torch.randn_like(s)}, Batch([], [(8, 8)] * 4))["loss_kd_relation"]
    assert loss > 0
    assert head({feature: s}, {feature: 5 * s}, TWO_IMAGES)["loss_kd_relation"].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"KIND": "crd"}, r"KD\.RELATION\.KIND: 'crd' is not one of rkd, sp, cosine"),
        ({"BOXES": 1}, r"KD\.RELATION\.BOXES: must be 2 or more.*got 1"),
        ({"ANGLE_WEIGHT": -1.0}, r"KD\.RELATION\.ANGLE_WEIGHT: must be 0 or more, got -1"),
        ({"IN_FEATURE": "logits"}, r"KD\.RELATION\.IN_FEATURE: 'logits' is not one of res4, pooled"),
        ({"IN_FEATURE": "p9"}, r"KD\.RELATION\.IN_FEATURE: 'p9' is not a signal of the student"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        build(CLASSIFIER, **{"IN_FEATURE": "pooled"} | options)
