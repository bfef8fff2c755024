"""Several teachers: which head learns from which, averaged probabilities, and what is refused in one line."""

import re

import pytest
import torch
from classification.models import classifier_cfg, classifier_inputs
from detectron2.config import CfgNode
from helpers import (
    CLASSES,
    WIDE,
    build,
    distilled_cfg,
    save_teacher,
    step,
    tiny_cfg,
    tiny_inputs,
    train_net,
    with_data,
    write_yaml,
)
from test_teacher_classes import named

from kd_det import InputError
from kd_det.analysis.ensemble import Ensemble
from kd_det.checkpoint_folder import FINAL
from kd_det.config import merge_file, merge_list, read_config
from kd_det.config_checks import check_run_values
from kd_det.data import register_datasets
from kd_det.engine.run_config import make_config, warn_of_idle_heads
from kd_det.engine.stages import Pretraining, generation_config, train_generations
from kd_det.engine.teacher_check import check_class_order, check_teacher
from kd_det.losses import soft_target_loss
from kd_det.teacher_choices import TeacherChoice, choose_teachers, used_teachers

ROI = "KD.SOFT_TARGET.TEACHERS"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Maps names to the keys of teachers: a and b of the student's classes, more of five, other of another network."""
    folder = tmp_path_factory.mktemp("teachers")
    configs = {
        "a": tiny_cfg(options=WIDE),
        "b": tiny_cfg(options=WIDE | {"INPUT.FORMAT": "RGB"}),
        "more": tiny_cfg(options={"MODEL.ROI_HEADS.NUM_CLASSES": 5}),
    }
    found = {}
    for seed, (name, cfg) in enumerate(configs.items()):
        options = save_teacher(folder / name, cfg, seed=seed)
        found[name] = {key.rpartition(".")[2]: value for key, value in options.items()}
    return found


@pytest.fixture
def make_cfg(saved, tmp_path):
    """Makes the config of a student with named teachers, which a file defines as a user's does."""

    def make(teachers, heads=("SoftTargetHead",), options=None, *, unnamed=None, **more):
        """`teachers` maps names to those of `saved`, `more` to further keys; `unnamed` is that of KD.TEACHER."""
        cfg = distilled_cfg({f"KD.TEACHER.{key}": x for key, x in saved.get(unnamed, {}).items()}, list(heads))
        nodes = {name: CfgNode(saved[kind] | more.get(name, {})) for name, kind in teachers.items()}
        (tmp_path / "teachers.yaml").write_text(CfgNode({"KD": {"TEACHERS": nodes}}).dump())
        merge_file(cfg, str(tmp_path / "teachers.yaml"))
        merge_list(cfg, [part for pair in (options or {}).items() for part in pair], "options")
        return cfg

    return make


def distilled(losses):
    return {key: x.item() for key, x in losses.items() if key.startswith("loss_kd")}


def record(model):
    """Returns a dict that the next step fills with the logits of the student and of each teacher."""
    seen, forwards = {}, model._forwards

    def recorded(*args):
        losses, student, teachers = forwards(*args)
        seen.update(teachers, student=student)
        return losses, student, teachers

    model._forwards = recorded
    return seen


# ---- Averaged probabilities ----
@pytest.mark.parametrize("average", ["arithmetic", "geometric"])
def test_loss_is_that_of_the_averaged_probabilities(make_cfg, average):
    """The probabilities of both teachers are softened, averaged and normalised; then T^2 KL, mean over boxes."""
    options = {ROI: ["a", "b"], "KD.SOFT_TARGET.AVERAGE": average, "KD.SOFT_TARGET.TEMPERATURE": 2.0}
    model = build(make_cfg({"a": "a", "b": "b"}, options=options))
    seen = record(model)
    loss = step(model, tiny_inputs())["loss_kd_soft_target_roi"]
    assert seen.keys() == {"student", "a", "b"}
    q, p, r = ((seen[name]["roi_logits"].detach() / 2).softmax(dim=1) for name in ("student", "a", "b"))
    mean = (p + r) / 2 if average == "arithmetic" else (p * r).sqrt() / (p * r).sqrt().sum(dim=1, keepdim=True)
    expected = 4 * (mean * (mean / q).log()).sum(dim=1).mean()
    assert not torch.allclose(p, r, atol=1e-3)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("average", ["arithmetic", "geometric"])
def test_two_equal_teachers_are_one(make_cfg, average):
    options = {
        "KD.SOFT_TARGET.SOURCES": ["roi", "rpn", "mask"],
        "KD.SOFT_TARGET.AVERAGE": average,
        "KD.BORN_AGAIN.AVERAGE": average,
    }
    heads = ["SoftTargetHead", "BornAgainHead"]
    found = []
    for names in (["a", "twin"], ["a"]):
        chosen = {f"KD.{head}.TEACHERS": names for head in ("SOFT_TARGET", "BORN_AGAIN")}
        found.append(distilled(step(build(make_cfg({"a": "a", "twin": "a"}, heads, options | chosen)), tiny_inputs())))
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6)


def test_teachers_of_other_classes_are_averaged_over_those_of_the_student(make_cfg):
    """One knows two classes more, which for the student are background."""
    more = {"CLASSES": ["disc", "bar", "square", "ring", "triangle"]}
    cfg = named(make_cfg({"a": "a", "b": "more"}, options={ROI: ["a", "b"]}, b=more), CLASSES)
    model = build(cfg)
    seen = record(model)
    loss = step(model, tiny_inputs())["loss_kd_soft_target_roi"]
    q, p, r = (seen[name]["roi_logits"].detach().softmax(dim=1) for name in ("student", "a", "b"))
    assert r.shape[1] == 6
    r = torch.stack([r[:, 2], r[:, 4], r[:, 1], r[:, 0] + r[:, 3] + r[:, 5]], dim=1)
    mean = (p + r) / 2
    torch.testing.assert_close(loss.detach(), (mean * (mean / q).log()).sum(dim=1).mean(), rtol=1e-4, atol=1e-7)
    assert "Teacher b:\ncompared classes" in "\n".join(model.describe(cfg))


def test_generations_teach_as_their_ensemble(tmp_path):
    """The teachers are named by the folders of a chain; their mean is that of Furlanello et al."""
    cfg = classifier_cfg(options={"KD.HEADS": ["SoftTargetHead"], "KD.STUDENT_ARCHITECTURE": "ImageClassifier"})
    lines, models = [], []
    for i in (1, 2):
        generation = classifier_cfg(options={"OUTPUT_DIR": str(tmp_path / f"gen_{i}")})
        model = build(generation, seed=i).eval()
        (tmp_path / f"gen_{i}").mkdir()
        write_yaml(tmp_path / f"gen_{i}/config.yaml", generation)
        torch.save({"model": model.state_dict()}, tmp_path / f"gen_{i}" / FINAL)
        models.append(model)
        lines.append(f"gen_{i}: {{CONFIG_FILE: gen_{i}/config.yaml}}")
    (tmp_path / "chain.yaml").write_text(f"KD: {{TEACHERS: {{{', '.join(lines)}}}}}")
    cfg.MODEL.META_ARCHITECTURE = "TeacherStudent"
    merge_file(cfg, str(tmp_path / "chain.yaml"))
    cfg.KD.SOFT_TARGET.TEACHERS = ["gen_1", "gen_2"]
    student, inputs = build(cfg), classifier_inputs()
    seen = record(student)
    loss = step(student, inputs)["loss_kd_soft_target_cls"]
    ensemble = torch.stack([x["scores"] for x in Ensemble(models)(inputs)])
    expected = soft_target_loss(seen["student"]["logits"].detach(), ensemble.log(), temperature=1)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-7)


# ---- Who teaches whom ----
def test_each_teacher_computes_what_its_heads_ask_for(make_cfg):
    """The unnamed one teaches a head of maps, a one of boxes; b teaches none and is not built."""
    heads = ["HintHead", "SoftTargetHead"]
    model = build(make_cfg({"a": "a", "b": "b"}, heads, {ROI: ["a"]}, unnamed="b"))
    assert list(model.teachers) == ["teacher", "a"]
    calls = []
    for name, teacher in model.teachers.items():
        for part in ("backbone", "roi_heads.box_head", "roi_heads.box_predictor", "proposal_generator"):
            module = teacher.model.get_submodule(part)
            module.register_forward_hook(lambda *_, call=f"{name} {part}": calls.append(call))
    losses = step(model, tiny_inputs())
    assert calls == ["teacher backbone", "a backbone", "a roi_heads.box_head", "a roi_heads.box_predictor"]
    assert {"loss_kd_hint", "loss_kd_soft_target_roi"} <= losses.keys()


def test_unnamed_teacher_is_the_same_by_its_name(make_cfg):
    """To the last digit, and it need not be named; a named one sees the images in its own channel order."""
    plain, by_name, copy, other = (
        distilled(step(build(make_cfg({"c": "b"}, ["SoftTargetHead", "HintHead"], x, unnamed=y)), tiny_inputs()))
        for x, y in (
            ({}, "b"),
            ({ROI: ["teacher"]}, "b"),
            ({ROI: ["c"], "KD.HINT.TEACHERS": ["c"]}, None),
            ({ROI: ["c"]}, "a"),
        )
    )
    assert plain == by_name == copy
    assert plain["loss_kd_soft_target_roi"] == other["loss_kd_soft_target_roi"]
    assert plain["loss_kd_hint"] != other["loss_kd_hint"]


def test_stage_of_a_head_uses_its_teacher(make_cfg, monkeypatch):
    heads = ["FactorTransferHead", "SoftTargetHead"]
    options = {"KD.FACTOR_TRANSFER.TEACHERS": ["a"], "KD.PRETRAIN.MAX_ITER": 1}
    cfg = make_cfg({"a": "a"}, heads, options, unnamed="b")
    torch.manual_seed(0)
    model = Pretraining(cfg).train()
    assert model.checkpointables.keys() == {"kd_heads", "kd_teacher_a"}
    calls = []
    for name, teacher in model.teachers.items():
        teacher.model.backbone.register_forward_hook(lambda *_, name=name: calls.append(name))
    assert all(x.isfinite() for x in step(model, tiny_inputs()).values())
    assert calls == ["a"]


def test_a_generation_takes_the_place_of_the_unnamed_teacher_alone(make_cfg):
    cfg = make_cfg({"a": "a"}, options={ROI: ["a", "teacher"]}, unnamed="b")
    second = generation_config(cfg, 2)
    assert second.KD.TEACHER.CONFIG_FILE.endswith("gen_1/config.yaml")
    assert second.KD.TEACHERS == cfg.KD.TEACHERS


# ---- Its config ----
def test_teachers_are_read_as_they_were_written(make_cfg, tmp_path):
    cfg = make_cfg({"a": "a"}, options={"KD.TEACHERS.a.SCALE": 1.5, ROI: ["a"]}, a={"FEATURES": {"p3": "res3"}})
    assert cfg.KD.TEACHERS.a.keys() == cfg.KD.TEACHER.keys()
    assert read_config(write_yaml(tmp_path / "config.yaml", cfg)).KD == cfg.KD
    (tmp_path / "more.yaml").write_text("KD: {TEACHERS: {a: {DTYPE: bfloat16}, b: {CONFIG_FILE: beside.yaml}}}")
    (tmp_path / "beside.yaml").write_text("VERSION: 2")
    merge_file(cfg, str(tmp_path / "more.yaml"))
    assert (cfg.KD.TEACHERS.a.SCALE, cfg.KD.TEACHERS.a.DTYPE) == (1.5, "bfloat16")
    assert str(tmp_path / "beside.yaml") == cfg.KD.TEACHERS.b.CONFIG_FILE


def test_choices(make_cfg):
    cfg = make_cfg({"a": "a", "b": "b"}, ["HintHead", "SoftTargetHead"], {ROI: ["b", "teacher"]})
    assert choose_teachers(cfg) == {"HintHead": TeacherChoice(), "SoftTargetHead": TeacherChoice(("b", "teacher"))}
    assert used_teachers(cfg) == ["teacher", "b"]


def test_python_code_of_a_named_teacher_runs_only_if_the_command_line_names_it(make_cfg, tmp_path):
    (tmp_path / "lazy.py").write_text("x = 1")
    config = write_yaml(tmp_path / "config.yaml", make_cfg({"a": "a"}, options={ROI: ["a"]}))
    key = "KD.TEACHERS.a.CONFIG_FILE"
    for allowed in (False, True):
        cfg = make_config(
            __import__("helpers").parse("--config-file", config, *[key, str(tmp_path / "lazy.py")] * allowed)
        )
        cfg.KD.TEACHERS.a.CONFIG_FILE = str(tmp_path / "lazy.py")
        told = "describes no model" if allowed else rf"is Python code, .*: {key} {tmp_path}/lazy.py"
        with pytest.raises(InputError, match=rf"^{key}: .*{told}"):
            build(cfg)


# ---- Summary and checks ----
def test_summary_names_every_teacher(make_cfg):
    cfg = make_cfg({"a": "a", "b": "b"}, ["HintHead", "SoftTargetHead"], {ROI: ["a", "b"]}, unnamed="a")
    model = build(cfg)
    networks = model.networks(cfg)
    assert [x.title for x in networks] == ["student", "teacher", "teacher a", "teacher b"]
    assert [x.flip_channels for x in networks] == [False, False, False, True]
    table = model.describe(cfg)[0]
    assert "learns from" in table
    assert re.search(r"SoftTargetHead .* arithmetic mean of a, b", table)


@pytest.mark.usefixtures("in_process")
def test_sanity_check_evaluates_each(make_cfg, coco_folder, tmp_path, caplog):
    caplog.set_level("INFO", "kd_det.engine.teacher_check")
    check = {"SANITY_CHECK": 1}
    cfg = make_cfg({"a": "a", "b": "b", "idle": "b"}, options={ROI: ["a", "b"]}, a=check, idle=check)
    cfg = with_data(cfg, coco_folder, tmp_path)
    register_datasets(cfg)
    check_teacher(cfg)
    assert caplog.messages[0].startswith("Checking teacher a on 1 images of ")
    assert caplog.messages[1].startswith("Teacher a's box AP on these images: ")
    assert caplog.messages[2].startswith("KD.TEACHERS.a.SANITY_CHECK: teacher a has learned next to nothing about ")
    assert "Likely causes: KD.TEACHERS.a.WEIGHTS belongs" in caplog.messages[2]
    assert len(caplog.messages) == 3


def test_names_of_classes_are_compared_for_each(make_cfg, tmp_path, caplog):
    """b has the student's classes in another order, and a other ones."""
    configs = {"a": ["square", "disc", "bar"], "b": ["bar", "square", "triangle"]}
    more = {}
    for name, classes in configs.items():
        config = write_yaml(tmp_path / f"{name}.yaml", named(tiny_cfg(options=WIDE), classes, name))
        more[name] = {"CONFIG_FILE": config}
    cfg = named(make_cfg({"a": "a", "b": "b"}, options={ROI: ["a", "b"]}, **more), CLASSES)
    register_datasets(cfg)
    heads = build(cfg).named_heads
    with pytest.raises(InputError, match=r"^KD\.TEACHERS\.b\.CONFIG_FILE: .* list the same classes in another order"):
        check_class_order(cfg, heads)
    assert "KD.TEACHERS.a.CONFIG_FILE: the data sets of " in caplog.text


def test_idle_teachers_cause_a_warning(make_cfg, caplog):
    warn_of_idle_heads(make_cfg({"a": "a", "b": "b"}, options={ROI: ["b"]}))
    assert "KD.TEACHERS: no head learns from a; " in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_run_is_summarised_and_resumed(make_cfg, coco_folder, tmp_path):
    """With overrides on the command line, which the saved config keeps."""
    options = {ROI: ["a", "b"], "KD.HINT.TEACHERS": ["b"]}
    cfg = with_data(
        make_cfg({"a": "a", "b": "b"}, ["SoftTargetHead", "HintHead"], options), coco_folder, tmp_path / "run"
    )
    train_net("--config-file", write_yaml(tmp_path / "config.yaml", cfg), "KD.TEACHERS.b.SCALE", 2.0)
    train_net("--config-file", tmp_path / "run/config.yaml", "--resume", "SOLVER.MAX_ITER", 3)
    log = (tmp_path / "run/log.txt").read_text()
    assert "Starting training from iteration 2" in log
    assert log.count("teacher a ") >= 2
    assert log.count("Teacher b:\nThe teacher is aligned with the student: images x 2; p2: resampled") == 2


# ---- Mistakes ----
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: {SCALE: 2.0}, a: {SCALE: 3.0}}", "KD.TEACHERS: two teachers have one name, 'a'."),
        ("{teacher: {SCALE: 2.0}}", "KD.TEACHERS: two teachers have one name: 'teacher' is the one that KD.TEACHER"),
        ("{a b: {SCALE: 2.0}}", "KD.TEACHERS: a name has letters, digits, - and _ alone, got 'a b'."),
        ("{a: x.yaml}", "KD.TEACHERS.a: must be a mapping of keys of KD.TEACHER, got 'x.yaml'."),
        ("{a: {WEIGHT: x.pth}}", "KD.TEACHERS.a: Non-existent config key: WEIGHT"),
        ("{a: {SCALE: big}}", "KD.TEACHERS.a: Type mismatch"),
        ("{a: {CLASSES: [1]}}", "KD.TEACHERS.a.CLASSES: each element: must be text, got 1."),
        ("", "KD.TEACHERS: got None where a mapping of keys belongs"),
    ],
)
def test_teachers_that_cannot_be(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(f"KD:\n  TEACHERS: {text}\n")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_config(str(path))
    assert "\n" not in str(error.value)


def test_bounds_hold_for_named_teachers(make_cfg):
    cfg = make_cfg({"a": "a"}, a={"SCALE": 0.0})
    with pytest.raises(InputError, match=r"^KD\.TEACHERS\.a\.SCALE: must be finite and above 0, got 0\.0\.$"):
        check_run_values(cfg)


FEATURES = "KD.HINT.TEACHERS: names 2 teachers, a, b, but HintHead compares p2, p3, p4, p5; only the probabilities of"


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        (
            {ROI: ["c"]},
            {},
            "KD.SOFT_TARGET.TEACHERS: 'c' is not a teacher; in KD.TEACHERS there are a, b, and 'teacher' is",
        ),
        ({ROI: ["a", "a"]}, {}, "KD.SOFT_TARGET.TEACHERS: 'a' is named twice; a teacher may stand there once."),
        (
            {ROI: ["a", "b"], "KD.SOFT_TARGET.AVERAGE": "median"},
            {},
            "KD.SOFT_TARGET.AVERAGE: 'median' is not one of arithm",
        ),
        ({"KD.HEADS": ["HintHead"], "KD.HINT.TEACHERS": ["a", "b"]}, {}, FEATURES),
        ({ROI: ["a", "teacher"]}, {}, "KD.TEACHER.CONFIG_FILE: no teacher is named"),
        ({ROI: ["a", "b"]}, {"b": {"CONFIG_FILE": ""}}, "KD.TEACHERS.b.CONFIG_FILE: no teacher is named"),
        ({ROI: ["a", "b"]}, {"b": {"DTYPE": "int8"}}, "KD.TEACHERS.b.DTYPE: got 'int8'; allowed are"),
        ({ROI: ["a", "b"]}, {"b": {"FEATURES": {"p9": "p2"}}}, "KD.TEACHERS.b.FEATURES: 'p9' is not a feature map of"),
        (
            {ROI: ["a", "b"]},
            {"b": {"CONFIG_FILE": "more"}},
            "KD.TEACHERS.b.WEIGHTS: ",
        ),
        (
            {ROI: ["a", "b"]},
            {"b": "more"},
            "KD.SOFT_TARGET.TEACHERS: SoftTargetHead cannot average a and b, whose roi_logits have 4 and 6 channels; ",
        ),
        (
            {ROI: ["a", "b"]},
            {"b": {"CLASSES": ["bar", "disc", "ring"]}},
            "KD.SOFT_TARGET.TEACHERS: SoftTargetHead cannot average a and b, which share other classes with the "
            "student: all; and bar.",
        ),
        (
            {ROI: ["a", "b"], "KD.SOFT_TARGET.SOURCES": ["roi", "keypoint"]},
            {},
            "KD.SOFT_TARGET.SOURCES: 'keypoint_logits' is not a signal of the student",
        ),
        ({ROI: ["a", "b"], "KD.GENERATIONS": 2}, {}, "KD.GENERATIONS: got 2, but no head learns from KD.TEACHER"),
    ],
)
def test_choices_that_cannot_be(make_cfg, saved, options, more, message):
    more, kinds = dict(more), {"a": "a", "b": "b"}
    if more.get("b") == "more":
        kinds["b"] = more.pop("b")
    if more.get("b") == {"CONFIG_FILE": "more"}:
        more["b"] = {"CONFIG_FILE": saved["more"]["CONFIG_FILE"]}
    cfg = named(make_cfg(kinds, options=options, **more), CLASSES)
    with pytest.raises(InputError, match=f"^{re.escape(message)}") as error:
        train_generations(cfg, resume=False, begin=lambda: None) if cfg.KD.GENERATIONS else build(cfg)
    assert "\n" not in str(error.value)
