"""Maps that are replaced while a model runs: all later layers see the new values, and nothing remains attached."""

import pytest
import torch
from classification.models import PAIRS, classifier_cfg, classifier_inputs
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from helpers import attached, build, tiny_cfg, tiny_inputs
from torch import nn

from kd_det import InputError
from kd_det.taps import BackboneTap, build_tap


@torch.no_grad()
def read_maps(tap, inputs) -> dict[str, torch.Tensor]:
    """Returns copies of all signals that can be replaced."""
    names = set(tap.replaceable)
    return {name: x.clone() for name, x in tap.compute(inputs, names, {}).items() if name in names}


def find_changed(tap, inputs, name: str) -> set[str]:
    """Names the signals that change when one of them grows."""
    before = read_maps(tap, inputs)
    with tap.replace(name, lambda x: x + 1, inputs):
        after = read_maps(tap, inputs)
    assert not attached(tap.model)
    assert before.keys() == after.keys()
    return {key for key, x in before.items() if not torch.equal(x, after[key])}


@pytest.mark.parametrize("family", ["mask_rcnn", "retinanet", "semantic"])
def test_maps_of_an_fpn(family):
    tap, inputs = build_tap(build(tiny_cfg(family)).eval()), tiny_inputs()
    assert tap.replaceable == ["res2", "res3", "res4", "res5", "p2", "p3", "p4", "p5", "p6"]
    pyramid = {"p2", "p3", "p4", "p5", "p6"}
    assert find_changed(tap, inputs, "res3") == {"res3", "res4", "res5"} | pyramid
    assert find_changed(tap, inputs, "res5") == {"res5"} | pyramid
    assert find_changed(tap, inputs, "p4") == {"p4"}
    # The top level is subsampled from the one before it, by a function that is no module.
    assert find_changed(tap, inputs, "p5") == {"p5", "p6"}
    assert find_changed(tap, inputs, "p6") == {"p6"}


@pytest.mark.parametrize("family", PAIRS)
def test_maps_of_classifiers(family):
    inputs = classifier_inputs(64, 2)
    tap = build_tap(build(classifier_cfg(family)).eval())
    *maps, last = tap.replaceable
    assert last == "pooled"
    assert len(maps) >= 3
    for i, name in enumerate(maps):
        changed = find_changed(tap, inputs, name)
        assert {*maps[i:]} <= changed
        assert changed.isdisjoint(maps[:i])
    expected = tap.model.linear(read_maps(tap, inputs)["pooled"] + 1)
    with tap.replace("pooled", lambda x: x + 1, inputs):
        assert torch.equal(tap.compute(inputs, {"logits"}, {})["logits"], expected)
    assert not attached(tap.model)


def test_later_stages_compute_with_the_new_map():
    tap, inputs = build_tap(build(classifier_cfg()).eval()), classifier_inputs()
    res2 = read_maps(tap, inputs)["res2"]
    with torch.no_grad():
        expected = tap.model.backbone.res3(-res2)
    with tap.replace("res2", torch.neg, inputs):
        assert torch.equal(read_maps(tap, inputs)["res3"], expected)


def test_nothing_remains_after_an_error():
    tap, inputs = build_tap(build(tiny_cfg()).eval()), tiny_inputs()

    def fail(_):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), tap.replace("res4", fail, inputs):
        tap.model(inputs)
    assert not attached(tap.model)


class Doubling(Backbone):
    """Computes each map from the one before it by a function that is no module."""

    def forward(self, x):
        return {"res2": 2 * x, "res3": 4 * x}

    def output_shape(self):
        return {name: ShapeSpec(channels=3, stride=1) for name in ("res2", "res3")}


def test_a_map_that_no_module_returns_alone_is_refused():
    model = nn.Module()
    model.backbone = Doubling()
    model.preprocess_image = lambda batch: torch.stack([x["image"] for x in batch])
    message = r"^res2: cannot be changed while Doubling runs, since none of its modules returns this map alone\.$"
    with pytest.raises(InputError, match=message), BackboneTap(model).replace("res2", torch.neg, classifier_inputs()):
        pass
    assert not attached(model.backbone)
