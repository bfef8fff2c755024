"""The config: every head has its node, and what is read runs no code."""

import re

import pytest
from detectron2 import model_zoo
from detectron2.config import get_cfg
from torch import nn

from kd_det import KD_HEAD_REGISTRY, InputError, add_kd_config
from kd_det.config import merge_file, merge_list, read_config, student_config
from kd_det.config_files import find_config
from kd_det.registry import config_key


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_kd_config(cfg)
    return cfg


def write(folder, text, name="config.yaml"):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize(
    ("head", "key"),
    [
        ("ReviewKDHead", "REVIEW"),
        ("AttentionTransferHead", "ATTENTION_TRANSFER"),
        ("HintHead", "HINT"),
        ("Head", "HEAD"),
        ("Plain", "PLAIN"),
        ("MyV2Head", "MY_V2"),
        ("PKDHead", "PKD"),
        ("DKDHead", "DKD"),
    ],
)
def test_config_keys(head, key):
    assert config_key(head) == key


def test_every_head_has_weight_and_schedule(cfg):
    for name, _ in KD_HEAD_REGISTRY:
        node = cfg.KD[config_key(name)]
        assert node.WEIGHT > 0
        assert dict(node.SCHEDULE) == {"START": 0, "WARMUP": 0, "STOP": -1, "DECAY": "constant", "GRADIENT_SHARE": 0}


def test_a_head_of_a_user_has_its_own_defaults():
    @KD_HEAD_REGISTRY.register()
    class UsersOwnHead(nn.Module):
        config = {"WEIGHT": 3.0, "POWER": 2}  # noqa: RUF012

    try:
        cfg = get_cfg()
        add_kd_config(cfg)
        assert (cfg.KD.USERS_OWN.WEIGHT, cfg.KD.USERS_OWN.POWER, cfg.KD.USERS_OWN.SCHEDULE.STOP) == (3.0, 2, -1)
        assert UsersOwnHead.config == {"WEIGHT": 3.0, "POWER": 2}
    finally:
        KD_HEAD_REGISTRY._obj_map.pop("UsersOwnHead")


@pytest.mark.parametrize("name", ["TeacherHead", "PretrainHead", "MutualHead", "ReviewHead"])
def test_a_head_whose_node_is_taken(name):
    KD_HEAD_REGISTRY._do_register(name, nn.Module)
    try:
        with pytest.raises(InputError, match=rf"^KD.{config_key(name)}: is taken, so \w+ cannot have it"):
            add_kd_config(get_cfg())
    finally:
        KD_HEAD_REGISTRY._obj_map.pop(name)


def test_configs_share_no_node(cfg):
    cfg.KD.HINT.SCHEDULE.START = 5
    other = get_cfg()
    add_kd_config(other)
    assert other.KD.HINT.SCHEDULE.START == cfg.KD.ATTENTION_TRANSFER.SCHEDULE.START == 0


def test_the_students_config_is_a_plain_detectors(cfg):
    cfg.MODEL.META_ARCHITECTURE, cfg.KD.STUDENT_ARCHITECTURE = "TeacherStudent", "RetinaNet"
    cfg.freeze()
    assert student_config(cfg).MODEL.META_ARCHITECTURE == "RetinaNet"
    assert cfg.MODEL.META_ARCHITECTURE == "TeacherStudent"
    cfg = student_config(cfg)
    assert student_config(cfg).MODEL.META_ARCHITECTURE == "RetinaNet"


@pytest.mark.parametrize(
    "text",
    ["OUTPUT_DIR: !!python/object/apply:os.mkdir [{canary}]", "X: !!python/name:os.system", "X: !!python/tuple [1, 2]"],
)
def test_a_config_runs_no_code(cfg, tmp_path, text):
    canary = tmp_path / "canary"
    path = write(tmp_path, text.format(canary=canary))
    with pytest.raises(InputError, match=r"config.yaml, line 1: not a safe YAML file: could not determine") as error:
        merge_file(cfg, path)
    assert not canary.exists()
    assert "\n" not in str(error.value)


def test_a_value_of_the_command_line_runs_no_code(cfg, tmp_path):
    canary = tmp_path / "canary"
    merge_list(cfg, ["OUTPUT_DIR", f"!!python/object/apply:os.mkdir [{canary}]"], "command line")
    assert not canary.exists()


@pytest.mark.parametrize("below", [False, True])
def test_detectron2s_own_files_may_have_tags(cfg, tmp_path, below):
    """Its Base-RetinaNet.yaml computes the anchors' sizes with !!python/object/apply:eval."""
    path = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    merge_file(cfg, write(tmp_path, f"_BASE_: {path}") if below else path)
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0][0] == 32


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("KD: {HEAD: [HintHead]}", "Non-existent config key: KD.HEAD"),
        ("KD: {HINT: {WEIGTH: 1.0}}", "Non-existent config key: KD.HINT.WEIGTH"),
        ("KD: {HINT: {WEIGHT: heavy}}", "Type mismatch"),
        ("KD: [1", "not a safe YAML file"),
        ("MODEL: 3", "config.yaml: MODEL: got 3 where a mapping of keys belongs"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml"),
        ("_BASE_: config.yaml", "lead back to themselves"),
        ("- a\n- b", "something else stands where a mapping of keys belongs"),
        ("", "something else stands where a mapping of keys belongs"),
    ],
)
def test_files_that_cannot_be(cfg, tmp_path, text, told):
    with pytest.raises(InputError, match=re.escape(told)) as error:
        merge_file(cfg, write(tmp_path, text))
    assert "config.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "start", "part"),
    [
        (["KD.HINT.WEIGTH", "2"], "K: Non-existent key: KD.HINT.WEIGTH", ""),
        (["KD.HINT.WEIGHT", "heavy"], "K: Type mismatch", ""),
        (["KD.HINT.WEIGHT"], "K: Override list has odd length", ""),
        (["KD", "2"], "K: KD: got 2 where a mapping of keys belongs", ""),
        (["KD.HEADS.X", "2"], "K: Non-existent key: KD.HEADS.X", ""),
        (["DATASETS.TEST", "('x')"], "K: ", "a list of one is ['x'], or ('x',) with a comma"),
        (["SOLVER.STEPS", "(5)"], "K: ", "a list of one is ['x'], or ('x',) with a comma"),
        (["SOLVER.GAMMA", "1"], "K: ", "SOLVER.GAMMA; write it with a point, such as 1.0"),
        (["SOLVER.MAX_ITER", "1e4"], "K: ", "SOLVER.MAX_ITER; write a whole number without a point or an exponent"),
        (["MODEL.MASK_ON", "true"], "K: ", "MODEL.MASK_ON; write True or False"),
        ([1, 2], "K: must be KEY VALUE KEY VALUE ..., got [1, 2].", ""),
        (["OUTPUT_DIR", "-" * 200000 + "1"], "K: a value is nested too deeply.", ""),
        (["OUTPUT_DIR", ["x"] * 9999], "K: Type mismatch", ""),
    ],
)
def test_overrides_that_do_not_fit_are_refused_in_one_short_line(cfg, options, start, part):
    with pytest.raises(InputError, match=f"^{re.escape(start)}.*{re.escape(part)}") as error:
        merge_list(cfg, options, "K")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


# ---- Bases, versions and other files that a file names ----
@pytest.mark.parametrize("bases", ["a.yaml", "[b.yaml, a.yaml]", "b.yaml"])
def test_bases_that_lead_back_are_told_at_once(cfg, tmp_path, bases):
    write(tmp_path, "_BASE_: a.yaml\nSEED: 1" if bases == "b.yaml" else "SEED: 1", "b.yaml")
    with pytest.raises(InputError, match=r"/a\.yaml: its bases \(_BASE_\) lead back to themselves: .*/a\.yaml ->"):
        merge_file(cfg, write(tmp_path, f"_BASE_: {bases}", "a.yaml"))


def test_two_files_may_have_the_same_base(cfg, tmp_path):
    write(tmp_path, "SEED: 3", "c.yaml")
    write(tmp_path, "_BASE_: c.yaml", "b.yaml")
    merge_file(cfg, write(tmp_path, "_BASE_: [b.yaml, c.yaml]", "a.yaml"))
    assert cfg.SEED == 3


def test_aliases_of_aliases(cfg, tmp_path):
    lines = ["A0: &a0 {x: 1, y: 2}"] + [f"A{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 40)]
    with pytest.raises(InputError, match="stand for more than 1000000 values"):
        merge_file(cfg, write(tmp_path, "\n".join(lines)))


def test_an_old_version_is_upgraded(cfg, tmp_path):
    path = write(tmp_path, "VERSION: 1\nMODEL: {WEIGHT: old.pth, RPN: {NMS_TEST: 0.5}}\nKD: {HEADS: [HintHead]}")
    with pytest.raises(InputError, match=r"Non-existent config key: MODEL\.RPN\.NMS_TEST"):
        merge_file(cfg, path)
    merge_file(cfg, write(tmp_path, "VERSION: 1\nMODEL: {WEIGHT: old.pth}\nKD: {HEADS: [HintHead]}"))
    assert (cfg.MODEL.WEIGHTS, cfg.VERSION, cfg.KD.HEADS) == ("old.pth", 2, ["HintHead"])


@pytest.mark.parametrize("name", ["lazy.py", "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"])
def test_lazy_configs_are_told_as_such(cfg, tmp_path, name):
    (tmp_path / "lazy.py").write_text("model = 1")
    with pytest.raises(InputError, match=r"^KD.TEACHER.CONFIG_FILE: .*\.py is a LazyConfig \(\.py\); only YAML"):
        find_config(str(tmp_path / name) if name == "lazy.py" else name, "KD.TEACHER.CONFIG_FILE")
    with pytest.raises(InputError, match=r"config\.yaml: .*lazy\.py is a LazyConfig"):
        merge_file(cfg, write(tmp_path, "_BASE_: lazy.py"))


def test_configs_beside_the_file_that_names_them_are_found(cfg, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    for name in ("base/teacher.yaml", "peer.yaml", "here.yaml"):
        write(tmp_path, "SEED: 1", name)
    write(tmp_path, "KD: {TEACHER: {CONFIG_FILE: teacher.yaml}}", "base/base.yaml")
    path = write(tmp_path, "_BASE_: base/base.yaml\nKD: {MUTUAL: {PEERS: [peer.yaml, zoo.yaml]}}")
    merge_file(cfg, path)
    assert str(tmp_path / "base/teacher.yaml") == cfg.KD.TEACHER.CONFIG_FILE
    assert [str(tmp_path / "peer.yaml"), "zoo.yaml"] == cfg.KD.MUTUAL.PEERS
    monkeypatch.chdir(tmp_path)
    merge_file(cfg, path)
    assert cfg.KD.MUTUAL.PEERS[0] == "peer.yaml"  # As it is, where it is found so.


# ---- Keys that were removed ----
BOXES = "KD: {{SOFT_TARGET: {{WEIGHT: 2.0, BOX_REGRESSION: {}}}}}"
ADVICE = r"KD.SOFT_TARGET.BOX_REGRESSION was removed; write KD.HEADS: \[..., BoxTargetHead\] instead"


def test_a_removed_key_that_asked_for_nothing_is_read(cfg, tmp_path):
    before = cfg.KD.SOFT_TARGET.clone()
    write(tmp_path, BOXES.format(False), "base.yaml")
    merge_file(cfg, write(tmp_path, "_BASE_: base.yaml"))
    assert before | {"WEIGHT": 2.0} == cfg.KD.SOFT_TARGET


def test_a_removed_key_that_asked_for_something_says_what_to_write(cfg, tmp_path):
    path = write(tmp_path, BOXES.format(True))
    with pytest.raises(InputError, match=f"^{path}: {ADVICE}"):
        merge_file(cfg, path)
    with pytest.raises(InputError, match=f"^command line: {ADVICE}"):  # Even False would change a recipe with the head.
        merge_list(cfg, ["KD.SOFT_TARGET.BOX_REGRESSION", "False"], "command line")
    assert "BOX_REGRESSION" not in read_config(path, other_heads=True).KD.SOFT_TARGET  # Such as that of a teacher.


def test_home_is_expanded(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    merge_file(cfg, write(tmp_path, "MODEL: {WEIGHTS: ~/a.pth}\nOUTPUT_DIR: ~/output"))
    merge_list(cfg, ["KD.TEACHER.WEIGHTS", "~/b.pth"], "K")
    assert (f"{tmp_path}/a.pth", f"{tmp_path}/output") == (cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR)
    assert f"{tmp_path}/b.pth" == cfg.KD.TEACHER.WEIGHTS
    assert find_config("~/config.yaml") == f"{tmp_path}/config.yaml"
