"""Networks of timm as teachers of feature maps: what they compute, where their weights come from, what is refused."""

import re

import pytest
import timm
import torch
from detectron2.modeling import build_model
from helpers import LEVELS, build, distilled_cfg, parse, step, tiny_cfg, tiny_inputs, train_net, with_data, write_yaml

from kd_det import InputError, Teacher, build_teacher
from kd_det.engine.run_config import make_config
from kd_det.engine.teacher_check import check_teacher
from kd_det.taps import build_tap
from kd_det.timm_teachers import TimmFeatures

NETS = {"vit": "test_vit", "convnext": "test_convnext"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Maps a kind to the options that name a network of timm and its random weights."""
    folder, options = tmp_path_factory.mktemp("timm"), {}
    for kind, name in NETS.items():
        torch.manual_seed(1)
        torch.save(timm.create_model(name).state_dict(), folder / f"{kind}.pth")
        options[kind] = {"KD.TEACHER.CONFIG_FILE": f"timm:{name}", "KD.TEACHER.WEIGHTS": str(folder / f"{kind}.pth")}
    return options


def original(saved, kind):
    net = timm.create_model(NETS[kind], **({"dynamic_img_size": True} if kind == "vit" else {})).eval()
    net.load_state_dict(torch.load(saved[kind]["KD.TEACHER.WEIGHTS"], weights_only=True))
    return net


# ---- What it computes ----
@pytest.mark.parametrize("kind", NETS)
def test_it_teaches_and_stays_as_it_is(saved, kind):
    model = build(distilled_cfg(saved[kind], ["PearsonHead", "ReviewKDHead"]))
    before = model.teacher.fingerprint()
    for i in range(2):
        losses = step(model, tiny_inputs(), iteration=i)
    assert losses["loss_kd_pearson"] > 0
    sum(losses.values()).backward()
    assert all(x.weight.grad.abs().sum() > 0 for x in model.heads["PearsonHead"].align.values())
    assert set(model.heads["PearsonHead"].align) == set(LEVELS)
    assert model.teacher.fingerprint() == before
    assert not any(x.requires_grad or x.grad is not None for x in model.teacher.model.parameters())


def test_a_transformer_gives_the_normalised_tokens_of_its_patches(saved):
    """The student's images are BGR; timm's normalisation is of RGB images in [0, 1]."""
    net, inputs = original(saved, "vit"), tiny_inputs(((64, 96),))
    teacher = build_teacher(distilled_cfg(saved["vit"], ["PearsonHead"]))
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    image = (inputs[0]["image"].flip(0) / 255 - mean) / std
    with torch.no_grad():
        tokens = net.forward_features(image[None])
    assert tokens.shape[1] == 1 + 4 * 6
    expected = tokens[:, 1:].transpose(1, 2).view(1, 64, 4, 6)
    given = teacher(inputs, {"block5"}, {})
    torch.testing.assert_close(given["block5"], expected, rtol=1e-4, atol=1e-4)


def test_only_the_blocks_that_are_needed_run(saved):
    teacher, calls = build_teacher(distilled_cfg(saved["vit"], ["PearsonHead"])), []
    for block in teacher.model.backbone.net.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    assert teacher(tiny_inputs(), {"block2"}, {}).keys() == {"block2"}
    assert len(calls) == 3


def aligned_teacher(name, **options):
    """A teacher with random weights beside a tiny student."""
    student = build_tap(build_model(tiny_cfg()))
    teacher = Teacher(TimmFeatures(timm.create_model(name, **options).eval()))
    teacher.align_with(student)
    return teacher


@pytest.mark.parametrize(
    ("name", "options", "maps"),
    [
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, ["block11"] * 5),
        ("convnext_atto", {}, ["res2", "res3", "res4", "res5", "res5"]),
    ],
)
def test_each_level_takes_the_deepest_map_of_the_nearest_stride(name, options, maps):
    teacher = aligned_teacher(name, **options)
    assert [teacher.alignment.own_name(level) for level in (*LEVELS, "p6")] == maps
    assert [teacher.spec()[level].stride for level in LEVELS] == [4, 8, 16, 32]


def test_patches_of_14_pixels_are_resampled_onto_the_students_grid(monkeypatch):
    """Images are padded to a multiple of 14, and a map that rises linearly keeps its values at the centres of cells."""
    teacher = aligned_teacher("test_vit", patch_size=14, img_size=140, dynamic_img_size=True)
    rising = ((torch.arange(7.0) + 0.5) * 14).expand(2, 64, 5, 7)
    seen = []
    monkeypatch.setattr(teacher.model.backbone, "_compute", lambda images, _: seen.append(images) or [rising])
    aligned = teacher(tiny_inputs(), {"p4"}, {})["p4"]
    assert seen[0].shape == (2, 3, 70, 98)
    assert aligned.shape == (2, 64, 4, 6)
    torch.testing.assert_close(aligned[1, 5, 2], (torch.arange(6.0) + 0.5) * 16)


def test_the_user_chooses_other_maps(saved):
    cfg = distilled_cfg(saved["vit"], ["PearsonHead"])
    cfg.KD.TEACHER.FEATURES.p3 = "block1"
    teacher = build(cfg).teacher
    assert (teacher.alignment.own_name("p3"), teacher.alignment.own_name("p4")) == ("block1", "block5")


# ---- Where its weights come from ----
def test_weights_load_strictly(saved):
    with pytest.raises(InputError, match=r"^KD\.TEACHER\.WEIGHTS: .* \d+ of \d+ keys .*match; .* missing: "):
        build_teacher(distilled_cfg(saved["vit"] | {"KD.TEACHER.CONFIG_FILE": "timm:test_vit2"}, ["PearsonHead"]))
    with pytest.raises(InputError, match=r"^KD\.TEACHER\.WEIGHTS: .*convnext\.pth"):
        build_teacher(distilled_cfg(saved["convnext"] | {"KD.TEACHER.CONFIG_FILE": "timm:test_vit"}, ["PearsonHead"]))


def test_a_resnet_of_timm_keeps_its_names(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "x.pth")
    options = {"KD.TEACHER.CONFIG_FILE": "timm:test_resnet", "KD.TEACHER.WEIGHTS": str(tmp_path / "x.pth")}
    assert "res5" in build_teacher(distilled_cfg(options, ["PearsonHead"])).tap.features


def test_a_classifier_of_other_classes(tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "x.pth")
    options = {"KD.TEACHER.CONFIG_FILE": "timm:test_vit", "KD.TEACHER.WEIGHTS": str(tmp_path / "x.pth")}
    with pytest.raises(InputError, match=r"2 of another shape: head\."):
        build_teacher(distilled_cfg(options, ["PearsonHead"]))
    build_teacher(distilled_cfg(options | {"KD.TEACHER.OPTS": ["num_classes", 3]}, ["PearsonHead"]))


def test_without_network_the_message_says_what_to_do(monkeypatch):
    def create(name, **options):
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(timm, "create_model", create)
    told = (
        r"^KD\.TEACHER\.WEIGHTS: timm's weights of 'test_vit' cannot be fetched: the hub .* Give their file there; .*"
    )
    with pytest.raises(InputError, match=told) as error:
        build_teacher(distilled_cfg({"KD.TEACHER.CONFIG_FILE": "timm:test_vit"}, ["PearsonHead"]))
    assert "\n" not in str(error.value)


# ---- What is refused ----
@pytest.mark.parametrize(
    ("options", "heads", "told"),
    [
        (
            {"CONFIG_FILE": "timm:test_vitt"},
            ["PearsonHead"],
            "timm has no network 'test_vitt'; similar names: test_vit",
        ),
        ({"CONFIG_FILE": "timm:test_vit.foo"}, ["PearsonHead"], "CONFIG_FILE: 'test_vit.foo': Invalid pretrained tag"),
        ({"CONFIG_FILE": "timm:hf-hub:a/b"}, ["PearsonHead"], "timm has no network 'hf-hub:a/b'"),
        ({"OPTS": ["img_size", 64]}, ["PearsonHead"], "KD.TEACHER.OPTS: must be empty for a teacher of timm, or"),
        (
            {"FEATURES": {"p3": "block9"}},
            ["PearsonHead"],
            "'block9' (for p3) is not a feature map of the teacher, which",
        ),
        (
            {},
            ["SoftTargetHead"],
            "KD.SOFT_TARGET.SOURCES: 'roi_logits' is not a signal of the teacher, which has block0",
        ),
    ],
)
def test_refusals(saved, options, heads, told):
    cfg = distilled_cfg(saved["vit"], heads)
    for key, value in options.items():
        if isinstance(value, dict):
            cfg.KD.TEACHER[key].update(value)
        else:
            cfg.KD.TEACHER[key] = value
    with pytest.raises(InputError, match=re.escape(told)) as error:
        build(cfg)
    assert "\n" not in str(error.value)


def test_a_network_for_images_of_one_size(saved):
    with pytest.raises(InputError, match=r"^KD\.TEACHER\.CONFIG_FILE: 'test_vit_relpos' does not take images of"):
        build_teacher(distilled_cfg(saved["vit"] | {"KD.TEACHER.CONFIG_FILE": "timm:test_vit_relpos"}, ["PearsonHead"]))


def test_there_is_nothing_to_evaluate(saved):
    cfg = distilled_cfg(saved["vit"], ["PearsonHead"], {"KD.TEACHER.SANITY_CHECK": 2, "DATASETS.TEST": ("x",)})
    with pytest.raises(
        InputError, match=r"^KD\.TEACHER\.SANITY_CHECK: got 2, but timm:test_vit teaches by its feature"
    ):
        check_teacher(cfg)


# ---- Commands ----
def test_training_from_the_command_line(saved, coco_folder, tmp_path, in_process):
    cfg = with_data(tiny_cfg(), coco_folder, tmp_path / "output")
    teacher = ["--teacher", "timm:test_vit", "--teacher-weights", saved["vit"]["KD.TEACHER.WEIGHTS"]]
    train_net("--config-file", write_yaml(tmp_path / "plain.yaml", cfg), "recipes/pearson.yaml", *teacher)
    log = (tmp_path / "output" / "log.txt").read_text()
    assert "TimmFeatures timm NAME test_vit" in log
    assert "p4: the teacher's block5" in log
    assert (tmp_path / "output" / "model_final.pth").is_file()
    resumed = make_config(parse("--config-file", str(tmp_path / "output" / "config.yaml"), "--resume"))
    assert resumed.KD.TEACHER.CONFIG_FILE == "timm:test_vit"
