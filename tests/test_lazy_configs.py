"""Teachers that LazyConfigs describe: what is read from them, whose code runs, and what is refused in one line."""

import builtins
import re
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from helpers import (
    LEVELS,
    build,
    distilled_cfg,
    parse,
    step,
    tiny_cfg,
    tiny_inputs,
    train_net,
    with_data,
    write_yaml,
)

from kd_det import InputError, build_teacher, lazy_configs
from kd_det.benchmarking import Row, Setup, case
from kd_det.data import register_datasets
from kd_det.engine import Trainer, summary
from kd_det.engine.run_config import make_config
from kd_det.engine.teacher_check import check_teacher
from kd_det.lazy_configs import allow_lazy_config, load_lazy_config
from kd_det.teacher import load_teacher_config

LSJ = "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"
# A narrow Mask R-CNN with a ResNet-18, made of the zoo's as its own configs are made of each other.
TINY = """
from pathlib import Path

from detectron2 import model_zoo

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
stages = model.backbone.bottom_up.stages
stages.depth = 18
del stages.stride_in_1x1
stages.norm = model.backbone.bottom_up.stem.norm = {bottom_up!r}
model.backbone.norm = {fpn!r}
model.backbone.out_channels = model.proposal_generator.head.in_channels = 16
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
model.proposal_generator.anchor_generator.aspect_ratios = [1.0]
model.proposal_generator.head.num_anchors = 1
heads = model.roi_heads
heads.num_classes = 3
heads.box_head.input_shape.channels = heads.mask_head.input_shape.channels = 16
heads.box_head.fc_dims = [24]
heads.box_predictor.input_shape.channels = 24
heads.mask_head.conv_dims = [8, 8]
model.input_format = "RGB"
model.pixel_mean, model.pixel_std = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
resize = {{"short_edge_length": 64, "max_size": 96}}
dataloader = {{"test": {{"mapper": {{"augmentations": [resize]}}}}}}
Path(__file__).with_suffix(".ran").touch()
"""


@pytest.fixture(autouse=True)
def _nothing_is_allowed(monkeypatch):
    monkeypatch.setattr(lazy_configs, "_allowed", set())


def write_lazy(folder, text=TINY, *, bottom_up="BN", fpn="BN"):
    folder.mkdir(exist_ok=True)
    path = folder / "lazy.py"
    path.write_text(text.format(bottom_up=bottom_up, fpn=fpn), encoding="utf-8")
    return path


def save_lazy(folder, *, seed=1, **norms):
    """Write ``lazy.py`` and its weights, allow the file, and return the options that name them."""
    path = write_lazy(folder, **norms)
    allow_lazy_config(str(path))
    torch.manual_seed(seed)
    model = instantiate(load_lazy_config(str(path), "K", options_key="O").model)
    torch.save({"model": model.state_dict()}, folder / "lazy.pth")
    return {"KD.TEACHER.CONFIG_FILE": str(path), "KD.TEACHER.WEIGHTS": str(folder / "lazy.pth")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_lazy(tmp_path_factory.mktemp("lazy"))


@pytest.fixture
def named(saved):
    """Options that name a LazyConfig, which is allowed, and its weights."""
    allow_lazy_config(saved["KD.TEACHER.CONFIG_FILE"])
    return saved


def lazy_cfg(named, heads, options=None):
    sizes = {"MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]], "MODEL.RPN.IN_FEATURES": [*LEVELS, "p6"]}
    return distilled_cfg(named, heads, sizes | (options or {}))


# ---- What it computes ----
@pytest.mark.parametrize(("bottom_up", "fpn"), [("BN", "SyncBN"), ("FrozenBN", "LN")])
def test_a_lazy_teacher_teaches_and_stays_as_it_is(tmp_path, bottom_up, fpn):
    named = save_lazy(tmp_path, bottom_up=bottom_up, fpn=fpn)
    options = {"KD.SOFT_TARGET.SOURCES": ["roi", "rpn"]}
    model = build(lazy_cfg(named, ["HintHead", "SoftTargetHead"], options))
    saved = torch.load(named["KD.TEACHER.WEIGHTS"], weights_only=True)["model"]
    for i in range(2):
        losses = step(model, tiny_inputs(), iteration=i)
    assert {"loss_kd_hint", "loss_kd_soft_target_rpn"} <= losses.keys()
    assert all(torch.equal(saved[key], x) for key, x in model.teacher.model.state_dict().items())
    assert not any(module.training for module in model.teacher.model.modules())
    assert not any(x.requires_grad for x in model.teacher.model.parameters())


def test_channel_order_and_statistics_are_those_of_the_model(named):
    teacher = build_teacher(lazy_cfg(named, ["HintHead"]))
    assert teacher.flip_channels
    assert (teacher.cfg.INPUT.FORMAT, teacher.cfg.MODEL.PIXEL_MEAN) == ("RGB", [1.0, 2.0, 3.0])
    assert teacher.cfg.MODEL.BACKBONE.NAME == "FPN(ResNet)"
    alone, inputs = teacher.model, tiny_inputs()
    with torch.no_grad():
        expected = alone.backbone(alone.preprocess_image([{"image": x["image"].flip(0)} for x in inputs]).tensor)
    assert torch.equal(teacher(inputs, {"p3"}, {})["p3"], expected["p3"])


def test_a_zoo_name_has_the_zoos_weights_and_data_sets():
    cfg, weights = load_teacher_config(lazy_cfg({"KD.TEACHER.CONFIG_FILE": LSJ}, ["HintHead"]))
    assert weights.endswith("42073830/model_final_f96b26.pkl")
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.DATASETS.TEST, cfg.INPUT.FORMAT) == (
        "GeneralizedRCNN",
        ("coco_2017_val",),
        "BGR",
    )


def test_overrides_have_the_syntax_of_lazy_configs(named):
    named = named | {"KD.TEACHER.OPTS": ["model.pixel_std=[2,2,2]", "+model.vis_period=0"]}
    assert build_teacher(lazy_cfg(named, ["HintHead"])).model.pixel_std.flatten().tolist() == [2.0, 2.0, 2.0]


# ---- Whose code runs ----
def test_a_file_that_a_yaml_names_is_not_run(saved, tmp_path):
    ran = Path(saved["KD.TEACHER.CONFIG_FILE"]).with_suffix(".ran")
    ran.unlink()
    config = write_yaml(tmp_path / "config.yaml", lazy_cfg(saved, ["HintHead"]))
    for arguments in (["--config-file", config], ["--config-file", config, "--resume"]):
        cfg = make_config(parse(*arguments))
        with pytest.raises(
            InputError, match=rf"lazy.py is Python code, .*: --teacher {saved['KD.TEACHER.CONFIG_FILE']}"
        ):
            build_teacher(cfg)
    assert not ran.exists()


@pytest.mark.parametrize("how", ["--teacher", "KD.TEACHER.CONFIG_FILE"])
def test_the_command_line_allows_a_file_and_keeps_what_the_run_says_of_it(saved, tmp_path, how):
    options = {"KD.TEACHER.OPTS": ["model.pixel_std=[2,2,2]"]}
    config = write_yaml(tmp_path / "config.yaml", lazy_cfg(saved | options, ["HintHead"]))
    cfg = make_config(parse("--config-file", config, how, saved["KD.TEACHER.CONFIG_FILE"]))
    assert saved["KD.TEACHER.WEIGHTS"] == cfg.KD.TEACHER.WEIGHTS
    assert build_teacher(cfg).model.pixel_std.flatten().tolist() == [2.0, 2.0, 2.0]


def test_a_link_out_of_the_zoo_and_a_local_file_with_a_zoo_name_are_not_the_zoos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / LSJ).parent.mkdir()
    (tmp_path / LSJ).write_text("raise SystemError('ran')")
    with pytest.raises(InputError, match="is Python code, which runs with all your rights"):
        build_teacher(lazy_cfg({"KD.TEACHER.CONFIG_FILE": LSJ}, ["HintHead"]))


# ---- What is refused ----
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1", "describes no model: it must set model"),
        ("import no_such_package", "fails: ModuleNotFoundError: No module named 'no_such_package'"),
        ("model = (", "fails: SyntaxError"),
        (
            "from detectron2.config import LazyCall as L\nmodel = L(str)(object=1)",
            "model must describe a torch.nn.Module",
        ),
        ("from detectron2.config import LazyCall as L\nmodel = L(str)(a=1)", "the model cannot be built: TypeError: "),
        (
            "from detectron2.config import LazyCall as L\nfrom torch import nn\nmodel = L(nn.Identity)()",
            "the order of the channels is unknown",
        ),
    ],
)
def test_files_that_describe_no_teacher(tmp_path, text, told):
    path = tmp_path / "lazy.py"
    path.write_text(text)
    allow_lazy_config(str(path))
    original = builtins.__import__
    named = {"KD.TEACHER.CONFIG_FILE": str(path), "KD.TEACHER.WEIGHTS": "x.pth"}
    with pytest.raises(InputError, match=re.escape(told)) as error:
        build_teacher(lazy_cfg(named, ["HintHead"]))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert builtins.__import__ is original


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"CONFIG_FILE": "no/such.py"},
            "KD.TEACHER.CONFIG_FILE: there is no such file, and no/such.py is not the name",
        ),
        ({"CONFIG_FILE": "https://a.b/c.py"}, "KD.TEACHER.CONFIG_FILE: https://a.b/c.py is Python code at a URL"),
        ({"WEIGHTS": ""}, "KD.TEACHER.WEIGHTS: no file is named, and "),
        ({"OPTS": ["MODEL.WEIGHTS", "x"]}, "KD.TEACHER.OPTS: must be overrides of a LazyConfig, such as ['model."),
        ({"OPTS": [3]}, "KD.TEACHER.OPTS: must be overrides of a LazyConfig, such as ['model."),
        (
            {"OPTS": ["model.roi_heads.clases=3"]},
            "KD.TEACHER.OPTS: the config has no 'model.roi_heads.clases'; write +m",
        ),
        ({"OPTS": ["model.pixel_mean=[1,"]}, "KD.TEACHER.OPTS: 'model.pixel_mean=[1,': "),
        ({"OPTS": ["model._target_=os.system"]}, "KD.TEACHER.OPTS: 'model._target_=os.system' is refused"),
        ({"OPTS": ["model.x={_target_: os.abort}"]}, "KD.TEACHER.OPTS: 'model.x={_target_: os.abort}' is refused"),
        ({"OPTS": ["+model.x=${oc.env:HOME}"]}, "KD.TEACHER.OPTS: '+model.x=${oc.env:HOME}' is refused"),
    ],
)
def test_a_lazy_teacher_that_cannot_be(named, options, message):
    named = named | {f"KD.TEACHER.{key}": value for key, value in options.items()}
    with pytest.raises(InputError, match=f"^{re.escape(message)}") as error:
        build_teacher(lazy_cfg(named, ["HintHead"]))
    assert "\n" not in str(error.value)


def test_weights_of_another_architecture(named, teacher):
    named = named | {"KD.TEACHER.WEIGHTS": teacher["KD.TEACHER.WEIGHTS"]}
    with pytest.raises(InputError, match=r"^KD.TEACHER.WEIGHTS: .* keys \(\d+%\) match; \d+ missing: backbone"):
        build_teacher(lazy_cfg(named, ["HintHead"]))


# ---- In a run ----
@pytest.mark.usefixtures("in_process")
def test_the_sanity_check_and_the_summary_know_a_lazy_teacher(named, coco_folder, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(summary, "count_gflops", lambda model, image: 1.0)
    options = {"KD.TEACHER.SANITY_CHECK": 1, "KD.TEACHER.SCALE": 2.0}
    cfg = with_data(lazy_cfg(named, ["HintHead"], options), coco_folder, tmp_path)
    register_datasets(cfg)
    check_teacher(cfg)
    assert any(message.startswith("The teacher's box AP on these images: ") for message in caplog.messages)
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    summary.log_summary(trainer)
    for told in (
        "GeneralizedRCNN FPN(ResNet)",
        "RGB, channels flipped",
        "1, 2, 3",
        "images x 2; p2: resampled from stride 2; p3: ",
    ):
        assert told in caplog.messages[-1]


def test_benchmark_of_a_lazy_teacher(saved, monkeypatch):
    """The command line has named it, so that it is allowed."""
    monkeypatch.setattr(case, "detector_config", lambda depth: tiny_cfg(options={"MODEL.ROI_HEADS.NUM_CLASSES": 6}))
    teacher = (saved["KD.TEACHER.CONFIG_FILE"], "KD.HINT.IN_FEATURES", "['p3']")
    setup, row = Setup(depths=(18, 34), batch=1, size=64, rounds=1, teacher=teacher), Row("a", ("HintHead",))
    with EventStorage():
        one = case.Case(row, setup, *case.build_all_networks(row, setup))
        assert "loss_kd_hint" in one.distilled(one.batch)
    assert one.teacher.weights == "random"


def test_an_image_of_the_test_has_the_size_of_the_config(named):
    cfg, _ = load_teacher_config(lazy_cfg(named, ["HintHead"]))
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.DATASETS.TEST) == (64, 96, ())


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_run_is_resumed_with_the_name_of_the_file(saved, coco_folder, tmp_path):
    student = write_yaml(tmp_path / "student.yaml", with_data(tiny_cfg(), coco_folder, tmp_path / "run"))
    file, weights = saved["KD.TEACHER.CONFIG_FILE"], saved["KD.TEACHER.WEIGHTS"]
    options = ("--kd-heads", "HintHead", "DATASETS.TEST", "()", "KD.HINT.IN_FEATURES", "['p3']")
    train_net("--config-file", student, "--teacher", file, "--teacher-weights", weights, *options)
    lazy_configs._allowed.clear()
    resumed = ("--config-file", tmp_path / "run" / "config.yaml", "--resume")
    with pytest.raises(SystemExit, match=f"name it on the command line: --teacher {file}"):
        train_net(*resumed, "SOLVER.MAX_ITER", 3)
    train_net(*resumed, "--teacher", file, "SOLVER.MAX_ITER", 3)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "Starting training from iteration 2" in log
    assert log.count(f"Teacher: {file}, weights {weights}") == 2
