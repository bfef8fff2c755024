"""Config files: found by name, merged in order, and what follows from their names."""

import re
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from helpers import WIDE, distilled_cfg, parse, tiny_cfg, with_data

from kd_det import InputError, build_teacher
from kd_det.config import read_config
from kd_det.config_files import default_output_dir, find_config, kd_det_configs
from kd_det.engine import setup
from kd_det.engine.run_config import make_config, warn_of_idle_heads
from kd_det.teacher import load_teacher_config

ZOO = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
STUDENT = "BCCD/student.yaml"
RECIPE = "KD: {HEADS: [HintHead], HINT: {WEIGHT: 0.25}}"


@pytest.fixture
def write(tmp_path):
    def write(text, name="recipe.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


# ---- The command line ----
@pytest.mark.parametrize(
    ("arguments", "files", "opts"),
    [
        ("", [], []),
        ("--config-file a.yaml", ["a.yaml"], []),
        ("--config-file a.yaml KEY VALUE", ["a.yaml"], ["KEY", "VALUE"]),
        ("--config-file a.yaml b.yml --resume KEY b.yaml", ["a.yaml", "b.yml"], ["KEY", "b.yaml"]),
        ("--config-file=a.yaml b.yaml KEY c.yaml d.yaml", ["a.yaml", "b.yaml"], ["KEY", "c.yaml", "d.yaml"]),
        ("--config-file a.yaml --resume --config-file b.yaml c.yaml", ["a.yaml", "b.yaml", "c.yaml"], []),
        ("--config-file no_suffix b.yaml --teacher t.yaml KEY 1", ["no_suffix", "b.yaml"], ["KEY", "1"]),
        ("--teacher t.yaml other.yaml", [], ["other.yaml"]),
    ],
)
def test_files_end_where_overrides_begin(arguments, files, opts):
    args = parse(*arguments.split())
    assert (args.config_file, args.opts) == (files, opts)
    assert args.resume == ("--resume" in arguments)
    assert parse().config_file == []


# ---- Names ----
def test_kd_dets_configs_have_names_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(STUDENT) == str(kd_det_configs() / STUDENT)
    assert find_config(ZOO) == model_zoo.get_config_file(ZOO)
    (tmp_path / "BCCD").mkdir()
    (tmp_path / STUDENT).touch()
    assert find_config(STUDENT) == STUDENT


def test_an_installed_package_brings_its_configs(tmp_path, monkeypatch):
    (tmp_path / "kd_det" / "configs").mkdir(parents=True)
    monkeypatch.setattr("kd_det.config_files.__file__", str(tmp_path / "kd_det" / "config_files.py"))
    assert kd_det_configs() == tmp_path / "kd_det" / "configs"


def test_a_name_of_nothing():
    with pytest.raises(InputError) as error:
        make_config(parse("--config-file", STUDENT, "recipes/no_such_method.yaml"))
    message = str(error.value)
    assert message.startswith(
        "--config-file: there is no such file, and recipes/no_such_method.yaml is not the name of"
    )
    assert str(kd_det_configs()) in message
    assert str(Path(model_zoo.get_config_file(ZOO)).parents[1]) in message
    assert "\n" not in message


# ---- The output folder ----
@pytest.mark.parametrize(
    ("sources", "heads", "expected"),
    [
        ([], None, "./output"),
        ([STUDENT], None, "output/BCCD/student"),
        ([f"{kd_det_configs()}/{STUDENT}"], None, "output/BCCD/student"),
        ([STUDENT, "BCCD/teacher.yaml", ZOO], None, "output/BCCD/student-teacher-retinanet_R_50_FPN_1x"),
        ([ZOO], None, "output/retinanet_R_50_FPN_1x"),
        ([ZOO], ["REVIEW", "SOFT_TARGET"], "output/retinanet_R_50_FPN_1x-review-soft_target"),
        ([STUDENT], [], "output/BCCD/student-plain"),
    ],
)
def test_the_output_folder_is_named_after_the_files(sources, heads, expected):
    assert default_output_dir(sources, heads) == expected


def test_files_and_overrides_set_another_output_folder(write):
    names = "--kd-heads", "HintHead", "--teacher", "t.yaml"
    assert make_config(parse("--config-file", ZOO, *names)).OUTPUT_DIR == "output/retinanet_R_50_FPN_1x-hint"
    assert make_config(parse("--config-file", ZOO, *names, "OUTPUT_DIR", "x")).OUTPUT_DIR == "x"
    assert make_config(parse("--config-file", ZOO, write("OUTPUT_DIR: ./output"))).OUTPUT_DIR == "./output"
    assert make_config(parse()).OUTPUT_DIR == "./output"


# ---- Recipes ----
def test_later_files_win(write):
    files = [write("SEED: 1\nSOLVER: {MAX_ITER: 5, BASE_LR: 0.5}", "a.yaml"), write("SEED: 2\nSOLVER: {MAX_ITER: 7}")]
    cfg = read_config(files, options=["SEED", "3"])
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (3, 7, 0.5)
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"


@pytest.mark.parametrize("named", [["--teacher", "t.yaml"], ["KD.TEACHER.CONFIG_FILE", "t.yaml"]])
def test_a_recipe_makes_a_plain_student_a_distilled_one(write, named):
    cfg = make_config(parse("--config-file", ZOO, write(RECIPE), *named))
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.KD.STUDENT_ARCHITECTURE) == ("TeacherStudent", "RetinaNet")
    assert (cfg.KD.HEADS, cfg.KD.HINT.WEIGHT, cfg.KD.TEACHER.CONFIG_FILE) == (["HintHead"], 0.25, "t.yaml")
    assert cfg.KD.HINT.IN_FEATURES == ["p3", "p4", "p5", "p6", "p7"]


def test_the_recommended_heads_are_those_of_the_recipe():
    named = make_config(parse("--config-file", STUDENT, "--kd-heads", "recommended"))
    assert named == make_config(parse("--config-file", STUDENT, "recipes/recommended.yaml"))
    assert named.KD.HEADS == ["PearsonHead", "SoftTargetHead", "BoxTargetHead"]
    with pytest.raises(InputError, match=r"KD\.TEACHER\.CONFIG_FILE: .* names no teacher for PearsonHead"):
        make_config(parse("--config-file", ZOO, "--kd-heads", "recommended"))


def test_the_students_file_names_its_teacher(write):
    student = write("KD: {TEACHER: {CONFIG_FILE: t.yaml, WEIGHTS: t.pth}, HINT: {IN_FEATURES: [res4]}}", "student.yaml")
    assert make_config(parse("--config-file", student)).MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    cfg = make_config(parse("--config-file", student, write(RECIPE)))
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.KD.TEACHER.WEIGHTS) == ("TeacherStudent", "t.pth")
    assert cfg.KD.HINT.IN_FEATURES == ["res4"]
    cfg = make_config(
        parse("--config-file", student, write(RECIPE), "--teacher", "other.yaml", "--kd-heads", "ReviewKDHead")
    )
    assert (cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.WEIGHTS) == ("other.yaml", "")
    assert cfg.KD.HEADS == ["ReviewKDHead"]


def test_a_single_file_with_heads_is_as_plain_as_it_says(write, caplog):
    cfg = make_config(parse("--config-file", write(RECIPE)))
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    warn_of_idle_heads(cfg)
    assert "KD.HEADS: the run does not use HintHead, because MODEL.META_ARCHITECTURE is GeneralizedRCNN" in caplog.text


@pytest.mark.parametrize("architecture", ["TeacherStudent", "MutualStudents"])
def test_a_recipe_that_names_the_architecture(write, architecture):
    recipe = write(f"MODEL: {{META_ARCHITECTURE: {architecture}}}")
    cfg = make_config(parse("--config-file", ZOO, recipe, write("SEED: 1", "more.yaml")))
    assert (architecture, "RetinaNet") == (cfg.MODEL.META_ARCHITECTURE, cfg.KD.STUDENT_ARCHITECTURE)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (RECIPE, "KD.TEACHER.CONFIG_FILE: {zoo} with {recipe} names no teacher for HintHead; name one with --teacher."),
        ("KD: {HEADS: [HintHead", "{recipe}, line 1: not a safe YAML file: "),
        ("just text", "{recipe}: something else stands where a mapping of keys belongs"),
        ("KD: {HEAD: [HintHead]}", "{recipe}: Non-existent config key: KD.HEAD"),
    ],
)
def test_recipes_that_cannot_be(write, recipe, message):
    path = write(recipe)
    with pytest.raises(InputError, match=f"^{re.escape(message.format(zoo=ZOO, recipe=path))}") as error:
        make_config(parse("--config-file", ZOO, path))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("in_process")
def test_a_run_of_several_files_and_its_config_alone(teacher, coco_folder, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = with_data(tiny_cfg(options=dict(teacher)), coco_folder, tmp_path)
    plain.KD.HINT.IN_FEATURES = ["p2"]
    student = write(re.sub(r"OUTPUT_DIR: .*\n", "", plain.dump()), "student.yaml")
    recipe = write(RECIPE)
    cfg = setup(parse("--config-file", student, recipe))
    log = Path("output/student-recipe/log.txt").read_text(encoding="utf-8")
    assert cfg.OUTPUT_DIR == "output/student-recipe"
    assert f"Config files, each of which overrides those before it: {student}, {recipe}" in log
    assert make_config(parse("--config-file", "output/student-recipe/config.yaml")) == cfg


# ---- The teacher's weights ----
@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """Options that name a teacher with the default OUTPUT_DIR, and the path where its training writes the weights."""
    monkeypatch.chdir(tmp_path)
    text = re.sub(r"OUTPUT_DIR: .*\n", "", tiny_cfg(options=WIDE).dump())
    (tmp_path / "wide.yaml").write_text(text, encoding="utf-8")
    return {"KD.TEACHER.CONFIG_FILE": str(tmp_path / "wide.yaml")}, Path("output/wide/model_final.pth")


def test_a_teachers_weights_are_those_of_its_training(teacher, untrained):
    named, trained = untrained
    trained.parent.mkdir(parents=True)
    trained.write_bytes(Path(teacher["KD.TEACHER.WEIGHTS"]).read_bytes())
    assert build_teacher(distilled_cfg(named, ["HintHead"])).source.endswith(f"wide.yaml with {trained}")
    for options, expected in (
        ({"KD.TEACHER.OPTS": ["MODEL.WEIGHTS", "chosen.pth"]}, "chosen.pth"),
        ({"KD.TEACHER.WEIGHTS": "named.pth"}, "named.pth"),
        ({"KD.TEACHER.OPTS": ["OUTPUT_DIR", "elsewhere", "MODEL.WEIGHTS", "start.pkl"]}, "start.pkl"),
    ):
        assert load_teacher_config(distilled_cfg(named | options, ["HintHead"]))[1] == expected


def test_an_untrained_teacher_is_to_be_trained_first(untrained):
    named, _ = untrained
    command = f"kd-det train --config-file {named['KD.TEACHER.CONFIG_FILE']}"
    with pytest.raises(InputError, match=rf"wide\.yaml is empty; train this teacher first: {command}$"):
        build_teacher(distilled_cfg(named, ["HintHead"]))
    torch.save({"model": {"backbone.bottom_up.stem.conv1.weight": torch.zeros(8, 3, 7, 7)}}, "start.pth")
    options = {"KD.TEACHER.OPTS": ["MODEL.WEIGHTS", "start.pth"]}
    told = rf"does not fit the config's .* If this teacher is not trained yet: {command} MODEL.WEIGHTS start.pth$"
    with pytest.raises(InputError, match=told):
        build_teacher(distilled_cfg(named | options, ["HintHead"]))
