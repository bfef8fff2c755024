"""Tests checkpoints: they hold the plain student key for key, and loading one runs no code."""

import errno
import os
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from children import same
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from helpers import LEVELS, STOCK_R18, WIDE, build, distilled_cfg, save_teacher, tiny_cfg

from kd_det import InputError
from kd_det.checkpoint import KDCheckpointer, load_strictly
from kd_det.checkpoint_files import read_checkpoint

HEADS = ["ReviewKDHead", "HintHead"]


@pytest.fixture
def model(teacher):
    return build(distilled_cfg(teacher, HEADS))


@pytest.fixture
def plain():
    """The stock model, with other weights than those of `model`."""
    return build(tiny_cfg(), seed=5)


def checkpointer(model, folder=""):
    return KDCheckpointer(model.student, str(folder), kd_heads=model.heads)


def filled(state, value):
    return {key: torch.full_like(tensor, value) for key, tensor in state.items()}


# ---- What is written ----
def test_model_is_the_stock_student_key_for_key(model, plain, tmp_path):
    checkpointer(model, tmp_path).save("model_0000001", iteration=1)
    data = torch.load(tmp_path / "model_0000001.pth", weights_only=True)
    assert data.keys() == {"model", "kd_heads", "iteration"}
    assert data["kd_heads"].keys() == model.heads.state_dict().keys()
    plain.load_state_dict(data["model"], strict=True)
    assert same(plain.state_dict(), model.student.state_dict())
    assert list(data["model"]) == list(plain.state_dict())


def test_stock_detectron2_reads_it(model, plain, tmp_path):
    checkpointer(model, tmp_path).save("model_final")
    found = DetectionCheckpointer(plain)._load_model(torch.load(tmp_path / "model_final.pth", weights_only=True))
    assert [found.missing_keys, found.unexpected_keys, found.incorrect_shapes] == [[], [], []]


def test_a_failed_write_leaves_the_previous_file(model, tmp_path, monkeypatch):
    own = checkpointer(model, tmp_path)
    own.save("model_final")
    before = (tmp_path / "model_final.pth").read_bytes()

    def half(_, file):
        file.write(b"half")
        raise KeyError("a defect")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyError, match="a defect"):
        own.save("model_final")
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_final.pth"]


def test_a_full_disk_leaves_the_previous_checkpoint(model, tmp_path, monkeypatch):
    own = checkpointer(model, tmp_path)
    own.save("model_0000001")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(
        InputError, match=rf"^{tmp_path}/model_0000003.pth: cannot be written: No space left on device;"
    ):
        own.save("model_0000003")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
    assert own.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")


# ---- Which stay, and which is resumed from ----
def save_four(model, folder, keep=0):
    """Checkpoints of iterations 1, 3, 5, 7, each with its own weights, and which are the last two that stay."""
    own = checkpointer(model, folder)
    own.keep = keep
    for iteration in (1, 3, 5, 7):
        model.student.load_state_dict(filled(model.student.state_dict(), iteration))
        own.save(f"model_{iteration:07d}", iteration=iteration)
    return own


@pytest.mark.parametrize("keep", [0, 1, 2, 9])
def test_only_the_newest_checkpoints_are_kept(model, tmp_path, keep):
    own = checkpointer(model, tmp_path)
    own.save("model_final")
    own.write("model_best")
    # Of a longer run before, in the same folder: older, whatever its name.
    (tmp_path / "model_0000099.pth").write_bytes(b"old")
    os.utime(tmp_path / "model_0000099.pth", (1, 1))
    save_four(model, tmp_path, keep)
    names = sorted(path.stem for path in tmp_path.glob("*.pth"))
    periodic = ["model_0000001", "model_0000003", "model_0000005", "model_0000007"]
    expected = (periodic[-keep:] if keep < 5 else periodic) if keep else periodic
    assert names == expected + ([] if 0 < keep < 5 else ["model_0000099"]) + ["model_best", "model_final"]


def test_the_best_checkpoint_is_not_resumed_from(model, tmp_path):
    own = save_four(model, tmp_path)
    own.write("model_best", iteration=99)
    assert own.resume_or_load("", resume=True)["iteration"] == 7


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone"])
@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_checkpoint_is_skipped(model, tmp_path, caplog, damage, damaged):
    own = save_four(model, tmp_path)
    newest = [tmp_path / f"model_{iteration:07d}.pth" for iteration in (7, 5, 3)]
    for path in newest[:damaged]:
        content = path.read_bytes()
        path.unlink()
        if damage != "gone":
            path.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    with caplog.at_level("WARNING"):
        found = own.resume_or_load("", resume=True)
    assert found["iteration"] == 7 - 2 * damaged
    assert all((x == 7 - 2 * damaged).all() for x in model.student.state_dict().values())
    warnings = [record.getMessage() for record in caplog.records if "Going on" in record.getMessage()]
    assert len(warnings) == 1
    assert str(newest[0]) in warnings[0]
    assert warnings[0].endswith(f"Going on with the checkpoint before, {newest[damaged]}.")


def test_the_newest_checkpoint_replaces_a_damaged_final_one(model, tmp_path):
    own = save_four(model, tmp_path)
    own.save("model_final", iteration=8)
    (tmp_path / "model_final.pth").write_bytes(b"")
    assert own.resume_or_load("", resume=True)["iteration"] == 7


def test_no_checkpoint_is_newer_than_the_last(model, tmp_path):
    """A run that began anew in the folder of another one does not go on with the other one's."""
    own = save_four(model, tmp_path)
    own.tag_last_checkpoint("model_0000005.pth")
    (tmp_path / "model_0000005.pth").unlink()
    assert own.resume_or_load("", resume=True)["iteration"] == 3


def test_a_run_does_not_begin_anew_if_all_checkpoints_are_damaged(model, tmp_path):
    own = save_four(model, tmp_path)
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(b"")
    message = r"^--resume: .*model_0000007.pth: not a .*: the file is empty; .*model_0000001.pth: .* No checkpoint"
    with pytest.raises(InputError, match=message):
        own.resume_or_load("", resume=True)


def test_a_checkpoint_without_heads_is_not_skipped(model, plain, tmp_path):
    own = save_four(model, tmp_path)
    torch.save({"model": plain.state_dict()}, tmp_path / "model_0000007.pth")
    with pytest.raises(InputError, match=r"model_0000007.pth: cannot be resumed: it has model, .*but no kd_heads\.$"):
        own.resume_or_load("", resume=True)


# ---- Which run they belong to ----
def save_as(run, model, folder, *iterations):
    """Checkpoints as a trainer writes them, whose weights are their iteration, negative for run "b"."""
    trainer = SimpleNamespace(state_dict=lambda: {"run": run}, load_state_dict=lambda state: None)
    own = KDCheckpointer(model.student, str(folder), kd_heads=model.heads, trainer=trainer)
    own.run = run
    for iteration in iterations:
        value = -iteration if run == "b" else iteration
        model.student.load_state_dict(filled(model.student.state_dict(), value))
        own.save(f"model_{iteration:07d}", iteration=iteration)
    return own


def flip(path, share=0.5):
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_another_runs_checkpoints_are_never_resumed_from(model, tmp_path, damage):
    """Although one of them is nearer to the damaged one than this run's own."""
    save_as("a", model, tmp_path, 1, 3, 5, 7, 9)
    own = save_as("b", model, tmp_path, 1, 7)
    last = tmp_path / "model_0000007.pth"
    if damage == "flipped":
        flip(last)
    else:
        last.write_bytes(last.read_bytes()[:5000]) if damage == "truncated" else last.unlink()
    assert own.resume_or_load("", resume=True)["iteration"] == 1
    assert all((x == -1).all() for x in model.student.state_dict().values())


def test_a_run_does_not_begin_anew_if_only_another_runs_checkpoints_are_left(model, tmp_path):
    save_as("a", model, tmp_path, 1, 3)
    own = save_as("b", model, tmp_path, 5)
    (tmp_path / "model_0000005.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"model_0000005.pth: not a .*\. No checkpoint of this run is left; without"):
        own.resume_or_load("", resume=True)


def test_the_newest_checkpoint_has_the_latest_iteration(model, tmp_path):
    """Not the one whose file is the newest, as after a copy of the folder in another order."""
    own = save_as("a", model, tmp_path, 1, 3, 5, 7)
    for i in range(4):
        os.utime(tmp_path / f"model_{7 - 2 * i:07d}.pth", (i, i))
    flip(tmp_path / "model_0000007.pth")
    assert own.resume_or_load("", resume=True)["iteration"] == 5
    own.keep = 2
    own.save("model_0000009", iteration=9)
    assert sorted(path.stem for path in tmp_path.glob("*.pth")) == ["model_0000007", "model_0000009"]


def test_a_run_can_resume_from_the_final_checkpoint_of_a_shorter_one(model, tmp_path):
    own = save_as("a", model, tmp_path)
    own.save("model_final", iteration=4)
    own.save("model_0000007", iteration=7)
    flip(tmp_path / "model_0000007.pth")
    assert own.resume_or_load("", resume=True)["iteration"] == 4


def test_a_run_id_may_end_with_a_line_break(model, tmp_path):
    own = save_as("a", model, tmp_path, 1, 3)
    (tmp_path / "run_id").write_text("a\n")
    (tmp_path / "model_0000003.pth").write_bytes(b"")
    assert own.resume_or_load("", resume=True)["iteration"] == 1


def test_an_empty_tag_is_handled(model, tmp_path, caplog):
    """As a crash of a machine may leave it."""
    own = save_as("a", model, tmp_path, 1, 3)
    (tmp_path / "last_checkpoint").write_bytes(b"")
    assert own.resume_or_load("", resume=True)["iteration"] == 3
    assert f"{tmp_path}/, which last_checkpoint names, is no file. Going on with" in caplog.text


def test_the_files_identify_a_run_without_run_id(model, tmp_path):
    """As in folders of earlier versions; not where they disagree."""
    own = save_as("a", model, tmp_path, 1, 3, 5)
    (tmp_path / "run_id").unlink()
    (tmp_path / "model_0000005.pth").write_bytes(b"")
    assert own.resume_or_load("", resume=True)["iteration"] == 3
    save_as("b", model, tmp_path, 2)
    (tmp_path / "run_id").unlink()
    own.tag_last_checkpoint("model_0000005.pth")
    (tmp_path / "run_id").unlink()
    with pytest.raises(InputError, match=r"^--resume: .*5.pth cannot be read, and .* has checkpoints of 2 runs; write"):
        own.resume_or_load("", resume=True)


def test_another_runs_checkpoints_are_kept(model, tmp_path):
    save_as("a", model, tmp_path, 2, 4, 9)
    own = save_as("b", model, tmp_path, 1, 3)
    own.keep = 1
    own.save("model_0000005", iteration=5)
    assert sorted(path.stem[-1] for path in tmp_path.glob("*.pth")) == ["2", "4", "5", "9"]


def test_checkpoints_after_the_current_iteration_are_deleted_first(model, tmp_path):
    """It may be damaged, or come from other options; the last checkpoint itself stays in any case."""
    own = save_as("a", model, tmp_path, 1, 3, 5, 7)
    own.keep = 2
    own.save("model_0000004", iteration=4)
    assert sorted(path.stem[-1] for path in tmp_path.glob("*.pth")) == ["3", "4"]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["a folder", "no text"])
def test_a_tag_that_is_not_a_text_file_is_refused(model, tmp_path, content):
    own = save_four(model, tmp_path)
    tag = tmp_path / "last_checkpoint"
    tag.unlink()
    tag.mkdir() if content is None else tag.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{tag}: must be a text file with the name of a checkpoint, but cannot be"):
        own.resume_or_load("", resume=True)


def test_a_tag_that_is_a_dangling_link(model, tmp_path):
    """It named a checkpoint once, so the run does not begin anew."""
    checkpointer = save_four(model, tmp_path)
    tag = tmp_path / "last_checkpoint"
    tag.unlink()
    tag.symlink_to("elsewhere")
    with pytest.raises(InputError, match=rf"^{tag}: must be a text file with the name .* No such file") as error:
        checkpointer.resume_or_load("", resume=True)
    assert "\n" not in str(error.value)


# ---- Damage to the numbers ----
def load_resumed(model, path):
    own = KDCheckpointer(model, str(path.parent))
    own.tag_last_checkpoint(path.name)
    own.resume_or_load("", resume=True)


@pytest.mark.parametrize(
    "load",
    [
        lambda model, path: KDCheckpointer(model).load(str(path)),
        lambda model, path: load_strictly(model, str(path), key="KD.TEACHER.WEIGHTS"),
        load_resumed,
        lambda model, path: read_checkpoint(path),
    ],
    ids=["weights", "teacher", "resumed", "read"],
)
@pytest.mark.parametrize("damage", ["flipped", "zeroed"])
def test_damage_inside_a_tensor_is_found(plain, tmp_path, load, damage):
    """torch itself loads such a file without a word."""
    path = tmp_path / "model_0000001.pth"
    torch.save({"model": plain.state_dict(), "iteration": 1}, path)
    if damage == "flipped":
        flip(path)
    else:
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[: middle - 512] + bytes(1024) + content[middle + 512 :])
    assert not same(torch.load(path, weights_only=True)["model"], plain.state_dict())
    with pytest.raises(InputError, match=r"model_0000001.pth: not a .*the checksum of .* is wrong"):
        load(plain, path)


@pytest.mark.parametrize("kind", ["pkl", "legacy"])
def test_a_file_without_checksums_is_loaded_and_logged(plain, tmp_path, caplog, kind):
    path = tmp_path / ("a.pkl" if kind == "pkl" else "a.pth")
    if kind == "pkl":
        arrays = {key: value.numpy() for key, value in plain.state_dict().items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}))
    else:
        torch.save(plain.state_dict(), path, _use_new_zipfile_serialization=False)
    own = build(tiny_cfg())
    with caplog.at_level("INFO"):
        load_strictly(own, str(path), key="K")
    assert same(own.state_dict(), plain.state_dict())
    assert f"{path} has no checksums" in caplog.text


# ---- Weights that are not finite ----
@pytest.mark.parametrize("part", ["student", "heads"])
def test_weights_that_are_not_finite_are_not_saved(model, tmp_path, part):
    own = save_four(model, tmp_path)
    name, weight = next(getattr(model, part).named_parameters())
    torch.nn.init.constant_(weight.data.flatten()[-1:], torch.inf)
    with pytest.raises(FloatingPointError, match=rf"^1 of the weights' tensors are not finite: \w+.{name}$"):
        own.save("model_0000009", iteration=9)
    assert own.get_checkpoint_file() == str(tmp_path / "model_0000007.pth")
    assert not (tmp_path / "model_0000009.pth").exists()


@pytest.mark.parametrize(
    ("limit", "begun", "last"), [(7, True, "7"), (6, True, "5"), (1, False, "1"), (0, False, "7"), (0, True, None)]
)
def test_retreat_to_an_earlier_checkpoint(model, tmp_path, limit, begun, last):
    own = save_as("a", model, tmp_path, 1, 3, 5, 7)
    own.retreat(limit, begun=begun)
    assert own.has_checkpoint() == (last is not None)
    assert last is None or own.get_checkpoint_file() == str(tmp_path / f"model_000000{last}.pth")


# ---- What a student starts from ----
@pytest.mark.parametrize("wrapped", [True, False], ids=["model", "bare"])
def test_starts_from_a_plain_detector(model, plain, tmp_path, wrapped):
    state = plain.state_dict()
    torch.save({"model": state} if wrapped else state, tmp_path / "plain.pth")
    checkpointer(model).load(str(tmp_path / "plain.pth"), checkpointables=[])
    assert same(model.student.state_dict(), state)


def caffe2_resnet(depth_blocks=(3, 4, 6, 3), stem=8, res2=16):
    """A Caffe2 ResNet-50 as ``ImageNetPretrained/MSRA/R-50.pkl`` has it: its names, arrays, momentum, classifier."""
    rng = np.random.default_rng(0)

    def conv(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def norm(name, channels):
        return {f"{name}_s": conv(channels), f"{name}_b": conv(channels)}

    blobs = {"conv1_w": conv(stem, 3, 7, 7), **norm("res_conv1_bn", stem), "fc1000_w": conv(10, 8 * res2)}
    inputs = stem
    for stage, blocks in enumerate(depth_blocks, 2):
        out = res2 * 2 ** (stage - 2)
        inner = 4 * 2 ** (stage - 2)
        for block in range(blocks):
            name = f"res{stage}_{block}"
            for branch, shape in {
                "branch2a": (inner, inputs, 1, 1),
                "branch2b": (inner, inner, 3, 3),
                "branch2c": (out, inner, 1, 1),
            }.items():
                blobs |= {f"{name}_{branch}_w": conv(*shape), **norm(f"{name}_{branch}_bn", shape[0])}
            if block == 0:
                blobs |= {f"{name}_branch1_w": conv(out, inputs, 1, 1), **norm(f"{name}_branch1_bn", out)}
            inputs = out
    return blobs | {"conv1_w_momentum": conv(1)}


@pytest.mark.parametrize("protocol", [2, 4])
def test_starts_from_caffe2s_imagenet_weights(tmp_path, protocol):
    """Numpy arrays under Caffe2's names; a C4 detector has res2 to res4 in its backbone and res5 in its ROI heads."""
    blobs = caffe2_resnet()
    with open(tmp_path / "R-50.pkl", "wb") as file:
        pickle.dump({"blobs": blobs}, file, protocol=protocol)
    model = build(tiny_cfg("c4", {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.RESNETS.RES2_OUT_CHANNELS": 16}))
    KDCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    state = model.state_dict()
    for own, theirs in {
        "backbone.stem.conv1.weight": "conv1_w",
        "backbone.stem.conv1.norm.weight": "res_conv1_bn_s",
        "backbone.res2.0.shortcut.weight": "res2_0_branch1_w",
        "backbone.res4.5.conv2.weight": "res4_5_branch2b_w",
        "backbone.res4.5.conv3.norm.bias": "res4_5_branch2c_bn_b",
        "roi_heads.res5.2.conv3.weight": "res5_2_branch2c_w",
    }.items():
        assert np.array_equal(state[own].numpy(), blobs[theirs]), own


@pytest.mark.parametrize("protocol", [2, 4])
def test_starts_from_a_zoo_pickle(model, plain, tmp_path, protocol):
    arrays = {key: value.numpy() for key, value in plain.state_dict().items()}
    with open(tmp_path / "model_final.pkl", "wb") as file:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, file, protocol=protocol)
    checkpointer(model).load(str(tmp_path / "model_final.pkl"), checkpointables=[])
    assert same(model.student.state_dict(), plain.state_dict())


def test_starts_from_torchvisions_resnet(tmp_path):
    """A ResNet-18 as ``torchvision.models.resnet18().state_dict()`` comes, without conversion."""
    source = torchvision.models.resnet18().state_dict()
    for i, value in enumerate(source.values()):
        value.fill_(i)  # each tensor another number
    torch.save(source, tmp_path / "resnet18.pth")
    cfg = tiny_cfg(options=STOCK_R18 | {"MODEL.RPN.IN_FEATURES": LEVELS})
    model = build_model(cfg)
    KDCheckpointer(model).load(str(tmp_path / "resnet18.pth"))
    state = model.backbone.bottom_up.state_dict()
    for own, theirs in {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.conv1.weight": "layer1.0.conv1.weight",
        "res3.0.shortcut.weight": "layer2.0.downsample.0.weight",
        "res3.0.shortcut.norm.bias": "layer2.0.downsample.1.bias",
        "res5.1.conv2.norm.running_mean": "layer4.1.bn2.running_mean",
    }.items():
        assert torch.equal(state[own], source[theirs]), own
    loaded = {float(value.flatten()[0]) for value in state.values() if value.unique().numel() == 1}
    assert len(loaded) == len(state) == len(source) - 2  # all but torchvision's classifier


# ---- A file that does not fit ----
def test_a_checkpoint_without_any_matching_key_is_refused(model, tmp_path):
    torch.save({"model": {"a": torch.zeros(1), "b": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"^.*\.pth: the checkpoint has none of the \d+ keys of .*; it has a, b\.$"):
        checkpointer(model).load(str(tmp_path / "other.pth"), checkpointables=[])


def test_missing_file_is_reported(model):
    with pytest.raises(InputError, match=r"^MODEL.WEIGHTS: there is no file /no/such.pth\.$"):
        checkpointer(model).load("/no/such.pth")


def test_a_plain_checkpoint_cannot_be_resumed_with_heads(model, plain, tmp_path):
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    with pytest.raises(InputError, match=r"plain.pth: cannot be resumed: it has model, .*but no kd_heads\.$"):
        checkpointer(model).load(str(tmp_path / "plain.pth"))


@pytest.mark.parametrize("name", ["truncated.pth", "truncated.pkl", "empty.pth", "text.pth"])
def test_a_file_that_is_not_a_checkpoint_is_refused(model, plain, tmp_path, name):
    path = tmp_path / name
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps({"model": {}, "__author__": "x"})[:-9])
    else:
        torch.save({"model": plain.state_dict()}, path)
        content = {"truncated.pth": path.read_bytes()[:3000], "empty.pth": b"", "text.pth": b"<html>404</html>"}[name]
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: not a checkpoint that can be loaded safely: ") as e:
        checkpointer(model).load(str(path), checkpointables=[])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "content", [[1, 2], {"weights": {"weight": torch.zeros(1)}}, {"state_dict": [1]}, {"model": None}]
)
def test_a_file_of_other_data_is_refused(model, tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a.pth: not a checkpoint: neither it nor its 'model' maps names to tensors"):
        checkpointer(model).load(str(tmp_path / "a.pth"), checkpointables=[])


# ---- Strict loading: a teacher ----
def test_strict_loading_lists_the_keys_that_do_not_match(plain, tmp_path):
    state = plain.state_dict()
    keys = [key for key in state if not key.endswith("num_batches_tracked")]  # torch fills these in
    missing, reshaped = "backbone.fpn_output2.weight", "roi_heads.box_predictor.cls_score.weight"
    del state[missing]
    state[reshaped] = torch.zeros(9, 24)
    state["surplus.weight"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "teacher.pth")
    with pytest.raises(InputError) as error:
        load_strictly(build_model(tiny_cfg()), str(tmp_path / "teacher.pth"), key="KD.TEACHER.WEIGHTS")
    share = f"{len(keys) - 2} of {len(keys)} keys ({(len(keys) - 2) / len(keys):.0%}) match"
    assert str(error.value) == (
        f"KD.TEACHER.WEIGHTS: {tmp_path / 'teacher.pth'} does not fit the config's GeneralizedRCNN: {share}; "
        f"1 missing: {missing}; 1 unexpected: surplus.weight; "
        f"1 of another shape: {reshaped} (9, 24) instead of (4, 24)."
    )


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_strict_loading_accepts_no_difference(plain, tmp_path, change):
    state = plain.state_dict()
    key = "roi_heads.box_head.fc1.bias"
    if change == "missing":
        del state[key]
    else:
        state[key if change == "shape" else "surplus"] = torch.zeros(3)
    torch.save({"model": state}, tmp_path / "teacher.pth")
    with pytest.raises(InputError, match=key if change != "unexpected" else "surplus"):
        load_strictly(build_model(tiny_cfg()), str(tmp_path / "teacher.pth"), key="K")


def test_strict_loading_needs_no_pixel_statistics_and_no_anchors(plain, tmp_path):
    """Old files of the zoo hold these; they come from the config."""
    state = plain.state_dict() | {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    state["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(1, 4)
    torch.save({"model": state}, tmp_path / "old.pth")
    model = build_model(tiny_cfg())
    load_strictly(model, str(tmp_path / "old.pth"), key="K")
    assert same(model.state_dict(), plain.state_dict())


def test_weights_of_another_architecture_are_refused(tmp_path):
    named = save_teacher(tmp_path, tiny_cfg("retinanet", {"MODEL.FPN.OUT_CHANNELS": 24}))
    with pytest.raises(InputError, match=r"^KD.TEACHER.WEIGHTS: .* does not fit the config's GeneralizedRCNN: \d+ of"):
        load_strictly(build_model(tiny_cfg(options=WIDE)), named["KD.TEACHER.WEIGHTS"], key="KD.TEACHER.WEIGHTS")
