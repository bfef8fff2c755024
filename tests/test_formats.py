"""Tests weights as other projects store them: they are loaded, or refused in one line that says what to do."""

import argparse
import pathlib
import re
from collections import OrderedDict

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from children import same
from helpers import STOCK_R18, build, tiny_cfg
from huggingface_hub.errors import LocalEntryNotFoundError

from kd_det import InputError
from kd_det.checkpoint import KDCheckpointer, load_strictly


@pytest.fixture
def plain():
    return build(tiny_cfg(), seed=5)


def prefixed(state, *prefixes):
    return OrderedDict((prefix + key, value) for prefix in prefixes for key, value in state.items())


def save(path, content):
    torch.save(content, path)
    return str(path)


def run_command(message, monkeypatch, folder):
    """Runs the command in a message."""
    monkeypatch.chdir(folder)
    exec(re.search(r'python -c "(.*)"$', message)[1], {})
    return str(folder / "weights.pth")


# ---- Containers and wrappers ----
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model_state_dict": state, "epoch": 3, "optimizer_state_dict": {}},
        lambda state: {"state_dict": {"model": state}},
        lambda state: prefixed(state, "module."),
        lambda state: {"model": prefixed(state, "_orig_mod.")},
        lambda state: {"model": prefixed(state, "module._orig_mod.")},
        lambda state: OrderedDict((key.replace("backbone.", "backbone._orig_mod."), x) for key, x in state.items()),
        lambda state: {"state_dict": prefixed(state, "model.") | {"metric.count": torch.ones(1)}, "epoch": 3},
        lambda state: {"model": prefixed(state, "modelTeacher.")},
        lambda state: prefixed(state, "a.b."),
    ],
    ids=["container", "nested", "ddp", "compiled", "both", "compiled part", "lightning", "one of two", "anything"],
)
@pytest.mark.parametrize("strictly", [True, False])
def test_wrappers_are_stripped(plain, tmp_path, wrap, strictly):
    path = save(tmp_path / "a.pth", wrap(plain.state_dict()))
    model = build(tiny_cfg())
    if strictly:
        load_strictly(model, path, key="K")
    else:
        KDCheckpointer(model).load(path)
    assert same(model.state_dict(), plain.state_dict())


def test_a_file_with_two_networks_is_refused(plain, tmp_path, monkeypatch):
    state = prefixed(plain.state_dict(), "modelTeacher.", "modelStudent.")
    path = save(tmp_path / "a.pth", {"model": state, "iteration": 3})
    with pytest.raises(
        InputError, match=r"holds 2 networks, whose keys begin with modelTeacher\., modelStudent\.;"
    ) as e:
        KDCheckpointer(plain).load(path)
    model = build(tiny_cfg())
    load_strictly(model, run_command(str(e.value), monkeypatch, tmp_path), key="K")
    assert same(model.state_dict(), plain.state_dict())


def test_keys_of_the_model_itself_are_left_alone(plain, tmp_path):
    """As in files of ReviewKD, where a teacher lies beside the student."""
    path = save(tmp_path / "a.pth", {"model": plain.state_dict() | prefixed(plain.state_dict(), "teacher.")})
    KDCheckpointer(build(tiny_cfg())).load(path)
    with pytest.raises(InputError, match=r"\d+ unexpected: teacher\."):
        load_strictly(plain, path, key="K")


def test_weights_of_a_part_are_loaded_into_it(plain, tmp_path):
    path = save(tmp_path / "a.pth", plain.backbone.bottom_up.state_dict())
    model = build(tiny_cfg())
    KDCheckpointer(model).load(path)
    assert same(model.backbone.bottom_up.state_dict(), plain.backbone.bottom_up.state_dict())


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pkl_file_may_be_written_by_torch(plain, tmp_path, legacy):
    path = str(tmp_path / "a.pkl")
    torch.save({"model": plain.state_dict()}, path, _use_new_zipfile_serialization=not legacy)
    model = build(tiny_cfg())
    load_strictly(model, path, key="K")
    assert same(model.state_dict(), plain.state_dict())


def test_safetensors(plain, tmp_path):
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "a.safetensors")
    model = build(tiny_cfg())
    load_strictly(model, str(tmp_path / "a.safetensors"), key="K")
    assert same(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("extra", [argparse.Namespace(lr=1), pathlib.PurePosixPath("/a")], ids=["namespace", "path"])
def test_a_file_with_objects_is_refused(plain, tmp_path, monkeypatch, extra):
    path = save(tmp_path / "a.pth", {"model": plain.state_dict(), "args": extra})
    with pytest.raises(
        InputError, match=rf"it holds {type(extra).__module__}\.\w+, which could run code\. If you"
    ) as e:
        load_strictly(plain, path, key="K")
    assert "add_safe_globals" not in str(e.value)
    model = build(tiny_cfg())
    load_strictly(model, run_command(str(e.value), monkeypatch, tmp_path), key="K")
    assert same(model.state_dict(), plain.state_dict())


# ---- ResNets of torchvision and timm, networks of timm ----
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "encoder."])
@pytest.mark.parametrize("create", [torchvision.models.resnet18, lambda: timm.create_model("resnet18")])
def test_resnets_of_other_libraries_are_renamed(tmp_path, create, prefix):
    source = create().state_dict()
    path = save(tmp_path / "a.pth", {"state_dict": prefixed(source, prefix)})
    model = build(tiny_cfg(options=STOCK_R18))
    KDCheckpointer(model).load(path)
    state = model.backbone.bottom_up.state_dict()
    for own, theirs in {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.bias": "bn1.bias",
        "res3.0.shortcut.norm.weight": "layer2.0.downsample.1.weight",
        "res5.1.conv2.weight": "layer4.1.conv2.weight",
    }.items():
        assert torch.equal(state[own], source[theirs]), own


@pytest.mark.parametrize(("name", "found"), [("resnet18d", r"conv1\.0\.weight"), ("seresnet18", r"layer1\.0\.se\.fc1")])
def test_resnets_that_detectron2_lacks_are_refused(tmp_path, name, found):
    path = save(tmp_path / "a.pth", timm.create_model(name).state_dict())
    with pytest.raises(
        InputError, match=rf"a\.pth: a ResNet of another kind than Detectron2's: it has {found}.*TIMM"
    ) as e:
        KDCheckpointer(build(tiny_cfg(options=STOCK_R18))).load(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "own", "theirs"),
    [
        ("resnet18", "layer1.0.conv1.weight", "layer1.0.conv1.weight"),
        ("mobilenetv3_small_050", "blocks.1.0.conv_pw.weight", "blocks.1.0.conv_pw.weight"),
        ("convnext_atto", "stages_2.blocks.1.conv_dw.weight", "stages.2.blocks.1.conv_dw.weight"),
    ],
)
def test_networks_of_timm_start_from_timms_files(tmp_path, name, own, theirs):
    options = {"MODEL.TIMM.NAME": name, "MODEL.TIMM.PRETRAINED": False, "MODEL.TIMM.NORM": "BN"}
    model = build(tiny_cfg(options=options | {"MODEL.BACKBONE.NAME": "build_timm_fpn_backbone"}))
    source = timm.create_model(name).state_dict()
    KDCheckpointer(model).load(save(tmp_path / "a.pth", source))
    assert torch.equal(model.backbone.bottom_up.net.state_dict()[own], source[theirs])


NETWORKS = {
    "build_timm_fpn_backbone": {},
    "build_timm_classifier_backbone": {"MODEL.META_ARCHITECTURE": "ImageClassifier"},
}


@pytest.mark.parametrize("backbone", NETWORKS)
def test_timms_weights_that_cannot_be_fetched_are_reported(monkeypatch, backbone):
    def offline(name, pretrained, **_):
        raise LocalEntryNotFoundError("An error happened.\nCheck your connection.")

    monkeypatch.setattr(timm, "create_model", offline)
    options = {"MODEL.BACKBONE.NAME": backbone, "MODEL.TIMM.NAME": "resnet18", **NETWORKS[backbone]}
    with pytest.raises(
        InputError, match=r"^MODEL\.TIMM\.PRETRAINED: .* cannot be fetched: An error happened\. Set"
    ) as e:
        build(tiny_cfg(options=options))
    assert "\n" not in str(e.value)


def test_a_file_with_several_resnets_is_refused(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    path = save(tmp_path / "a.pth", {"state_dict": prefixed(state, "encoder_q.", "encoder_k.")})
    with pytest.raises(InputError, match=r"holds 2 networks, whose keys begin with encoder_q\., encoder_k\.;"):
        KDCheckpointer(build(tiny_cfg(options=STOCK_R18))).load(path)


# ---- Types ----
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool])
@pytest.mark.parametrize("strictly", [True, False])
def test_weights_that_are_not_floating_point_are_refused(plain, tmp_path, dtype, strictly):
    state = plain.state_dict()
    key = "roi_heads.box_head.fc1.weight"
    state[key] = state[key].to(dtype)
    path = save(tmp_path / "a.pth", {"model": state})
    with pytest.raises(InputError, match=rf"1 weights are of another type: {key} is {dtype} instead of torch.float32"):
        load_strictly(plain, path, key="K") if strictly else KDCheckpointer(plain).load(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted_and_logged(plain, tmp_path, caplog, dtype):
    state = {key: x.to(dtype) if x.is_floating_point() else x for key, x in plain.state_dict().items()}
    model = build(tiny_cfg())
    with caplog.at_level("INFO"):
        load_strictly(model, save(tmp_path / "a.pth", {"model": state}), key="K")
    assert f"Weights in {dtype} are converted to torch.float32." in caplog.messages
    assert same(model.state_dict(), {key: x.to(plain.state_dict()[key].dtype) for key, x in state.items()})


# ---- Counters of batch norms ----
@pytest.mark.parametrize(("theirs", "own"), [("BN", "FrozenBN"), ("FrozenBN", "BN")])
@pytest.mark.parametrize("versions", [True, False])
def test_frozen_and_trainable_batch_norms_are_interchangeable(tmp_path, theirs, own, versions):
    source = build(tiny_cfg(options={"MODEL.RESNETS.NORM": theirs}), seed=5).state_dict()
    path = save(tmp_path / "a.pth", {"model": source if versions else dict(source)})
    model = build(tiny_cfg(options={"MODEL.RESNETS.NORM": own}))
    load_strictly(model, path, key="K")
    state = model.state_dict()
    assert all(torch.equal(state[key], x) for key, x in source.items() if key in state)
    assert {key.rsplit(".", 1)[1] for key in state.keys() ^ source.keys()} == {"num_batches_tracked"}


def test_missing_statistics_are_reported(tmp_path):
    options = {"MODEL.RESNETS.NORM": "FrozenBN"}
    state = build(tiny_cfg(options=options)).state_dict()
    del state["backbone.bottom_up.stem.conv1.norm.running_mean"]
    with pytest.raises(InputError, match=r"1 missing: backbone\.bottom_up\.stem\.conv1\.norm\.running_mean"):
        load_strictly(build(tiny_cfg(options=options)), save(tmp_path / "a.pth", {"model": state}), key="K")
