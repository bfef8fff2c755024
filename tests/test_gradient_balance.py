"""Weights that are steered by the heads' shares of the gradient in the student's backbone."""

import json
import math
import re

import pytest
import torch
from children import Task, end, final_state, same, two_ranks
from classification.models import classifier_cfg, classifier_inputs
from detectron2.utils.events import EventStorage
from helpers import (
    build,
    distilled_cfg,
    interrupted_at,
    save_teacher,
    tiny_cfg,
    tiny_inputs,
    train_net,
    write_yaml,
)
from torch import nn

from kd_det import InputError, Teacher, TeacherStudent
from kd_det.gradient_balance import DEFAULT_PERIOD, GradientBalance, build_gradient_balance
from kd_det.gradients import gradient_shares
from kd_det.registry import config_key
from kd_det.schedules import WeightSchedule

HINT, SOFT, BOTH = ["HintHead"], ["SoftTargetHead"], ["HintHead", "SoftTargetHead"]
# What 1 unit of weight of each head, and the task with the heads that are not steered, give in the tests of arithmetic.
UNITS, REST = {"A": 0.5, "B": 20.0}, {"task": 3.0, "other": 1.0}


def steered(heads, period=1):
    """Options of a config in which each head has a share of 0.3."""
    nodes = [f"KD.{config_key(name)}" for name in heads]
    return {f"{node}.SCHEDULE.GRADIENT_SHARE": 0.3 for node in nodes} | {"KD.GRADIENT_SHARES": period}


def classifier(tmp_path, heads, options):
    """Config of a tiny classifier with a teacher."""
    own = {"MODEL.META_ARCHITECTURE": "TeacherStudent", "KD.STUDENT_ARCHITECTURE": "ImageClassifier", "KD.HEADS": heads}
    return classifier_cfg(options=save_teacher(tmp_path, classifier_cfg(teacher=True)) | own | options)


def measure(balance, iteration=0, units=UNITS, rest=REST):
    """Make a measurement of heads whose gradient is known; returns their shares with the new weights."""
    active = {name: weight for name, weight in balance.weights(iteration).items() if weight > 0}
    balance.update(rest | {name: weight * units[name] for name, weight in active.items()}, iteration)
    return shares(balance, iteration, units, rest)


def shares(balance, iteration=0, units=UNITS, rest=REST):
    norms = {name: weight * units[name] for name, weight in balance.weights(iteration).items()}
    return {name: norm / (sum(norms.values()) + sum(rest.values())) for name, norm in norms.items()}


# ---- Arithmetic ----
@pytest.mark.parametrize("start", [0.01, 1.0, 100.0])
def test_one_measurement_gives_a_head_its_share(start):
    """0.3 / 0.7 of the others' 4, at 0.5 per unit of weight."""
    balance = GradientBalance({"A": 0.3}, {"A": WeightSchedule(start)})
    assert balance.weights(0) == {"A": start}
    assert measure(balance) == pytest.approx({"A": 0.3})
    assert balance.weights(0) == pytest.approx({"A": 0.3 / 0.7 * 4 / 0.5})


def test_several_heads_are_solved_together():
    balance = GradientBalance({"A": 0.2, "B": 0.5}, {"A": WeightSchedule(7.0), "B": WeightSchedule(1e-3)})
    assert measure(balance) == pytest.approx({"A": 0.2, "B": 0.5})


def test_the_schedule_multiplies_the_share():
    schedules = {
        "A": WeightSchedule(start=2, warmup=3, stop=10, decay="linear"),
        "B": WeightSchedule(5.0),
    }
    balance = GradientBalance({"A": 0.4, "B": 0.3}, schedules)
    assert measure(balance, 0) == pytest.approx({"A": 0, "B": 0.3})
    assert not balance.is_due(1)
    assert balance.is_due(2)
    assert measure(balance, 2) == pytest.approx({"A": 0.1, "B": 0.3})
    assert [shares(balance, i)["A"] for i in range(12)] == pytest.approx([0.4 * schedules["A"](i) for i in range(12)])
    assert [shares(balance, i)["B"] for i in range(12)] == pytest.approx([0.3] * 12)


def test_the_mean_of_the_logarithms():
    """The second ratio counts 2 / 3, the third a half; from the seventh on each counts a quarter."""
    balance = GradientBalance({"A": 0.5})
    logarithms = []
    for rest in (1.0, 2.0, 1.0, *[1.5] * 9):
        measure(balance, units={"A": 1.0}, rest={"task": rest})
        logarithms.append(math.log(balance.weights(0)["A"]) / math.log(2))
    assert logarithms[:3] == pytest.approx([0, 2 / 3, 1 / 3])
    distances = [abs(x - math.log2(1.5)) for x in logarithms]
    assert distances[10] / distances[9] == pytest.approx(0.75)


def test_updates_after_the_first_are_bounded():
    balance = GradientBalance({"A": 0.5})
    weights = []
    for rest in (1e4, 1e-9, 1e9):
        measure(balance, units={"A": 1.0}, rest={"task": rest})
        weights.append(balance.weights(0)["A"])
    assert weights == pytest.approx([1e4, 0.5e4, 1e4])


@pytest.mark.parametrize("norms", [(4.0, 0.0), (4.0, math.inf), (4.0, math.nan), (math.inf, 1.0), (math.nan, 1.0)])
def test_a_gradient_that_cannot_be_measured_changes_nothing(norms):
    balance = GradientBalance({"A": 0.3}, {"A": WeightSchedule(2.0)})
    balance.update({"task": norms[0], "A": norms[1]}, 0)
    assert balance.weights(1) == {"A": 2.0}
    assert not balance.is_due(1)
    assert measure(balance, 1) == pytest.approx({"A": 0.3})
    before = balance.state_dict()
    balance.update({"task": norms[0], "A": norms[1]}, 2)
    assert balance.state_dict() == before


def test_the_state():
    first, second = (GradientBalance({"A": 0.3, "B": 0.2}) for _ in range(2))
    measure(first)
    second.load_state_dict(first.state_dict() | {"Gone": [3, 0.5]})
    assert second.weights(0) == first.weights(0)
    assert second.state_dict() == first.state_dict()
    assert not second.is_due(0)


@pytest.mark.parametrize("state", [{"A": [1, math.nan]}, {"A": [-1, 0.5]}, {"A": [1.5, 0.5]}, {"A": [1, 2]}])
def test_states_that_cannot_be(state):
    with pytest.raises(ValueError, match="the measured gradient of A is"):
        GradientBalance({"A": 0.3}).load_state_dict(state)


# ---- Training ----
@pytest.mark.parametrize("start", [0.01, 100.0])
@pytest.mark.parametrize("heads", [HINT, SOFT, BOTH], ids="+".join)
@pytest.mark.parametrize("family", ["detector", "classifier"])
def test_the_share_is_reached(teacher, tmp_path, family, heads, start):
    """The share after the third measurement is measured once more, from the losses that the student gets."""
    options = steered(heads)
    for name in heads:
        options[f"KD.{config_key(name)}.WEIGHT"] = start
    if family == "detector":
        model, inputs = build(distilled_cfg(teacher, heads, options)), tiny_inputs()
    else:
        model, inputs = build(classifier(tmp_path, heads, options)), classifier_inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for iteration in range(3):
        with EventStorage(iteration) as storage:
            losses = model(inputs)
        if iteration == 2:
            groups = {"task": [x for key, x in losses.items() if "_kd_" not in key]}
            groups |= {x: [losses[key] for key in losses if config_key(x).lower() in key] for x in heads}
            measured = gradient_shares(model.student.backbone, groups)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    for name in heads:
        assert measured[name] == pytest.approx(0.3, abs=0.05)
        assert storage.latest()[f"kd/gradient/{name}"][0] == pytest.approx(measured[name], abs=1e-4)


def test_the_first_step_already_has_the_share(teacher, inputs):
    """And the weight that is logged, once, is the one that its losses have."""
    plain = build(distilled_cfg(teacher, HINT))
    model = build(distilled_cfg(teacher, HINT, steered(HINT) | {"KD.HINT.WEIGHT": 50.0}))
    found = []
    for each in (plain, model):
        torch.manual_seed(0)
        with EventStorage(0) as storage:
            found.append((each(inputs), storage.history("kd/weight/HintHead").values(), torch.get_rng_state()))
    (losses, _, state), (steered_losses, weights, steered_state) = found
    assert len(weights) == 1
    assert steered_losses["loss_kd_hint"].item() == pytest.approx(weights[0][0] * losses["loss_kd_hint"].item())
    assert {k: v.item() for k, v in steered_losses.items() if "_kd_" not in k} == {
        k: v.item() for k, v in losses.items() if "_kd_" not in k
    }
    assert torch.equal(state, steered_state)


def test_a_head_is_measured_at_its_start(teacher, inputs):
    options = steered(BOTH) | {"KD.GRADIENT_SHARES": 10, "KD.HINT.SCHEDULE.START": 3}
    model = build(distilled_cfg(teacher, BOTH, options))
    found = {}
    for iteration in (0, 1, 3, 4):
        torch.manual_seed(0)
        with EventStorage(iteration) as storage:
            model(inputs)
        found[iteration] = {key: value for key, (value, _) in storage.latest().items() if key.startswith("kd/")}
    assert [("kd/gradient/task" in found[i]) for i in found] == [True, False, True, False]
    assert "kd/gradient/HintHead" not in found[0]
    assert found[0]["kd/gradient/SoftTargetHead"] == pytest.approx(0.3)
    assert found[3]["kd/gradient/HintHead"] == pytest.approx(0.3)
    assert found[4]["kd/weight/HintHead"] == found[3]["kd/weight/HintHead"] > 0 == found[0]["kd/weight/HintHead"]


def test_mixed_precision(teacher, inputs):
    model = build(distilled_cfg(teacher, BOTH, steered(BOTH)))
    with torch.autocast("cpu", dtype=torch.bfloat16), EventStorage(0) as storage:
        model(inputs)
    for name in BOTH:
        assert storage.latest()[f"kd/gradient/{name}"][0] == pytest.approx(0.3)


def test_large_gradients_in_half_precision():
    """They overflow float16 with the usual factor, and are measured with a smaller one."""
    module = nn.Linear(1, 1, bias=False)
    passed = module.weight.half().float().sum()
    assert gradient_shares(module, {"a": [3000 * passed], "b": [1000 * passed]}) == {"a": 0.75, "b": 0.25}


def test_the_period_without_one(teacher):
    model = build(distilled_cfg(teacher, HINT, steered(HINT) | {"KD.GRADIENT_SHARES": 0}))
    assert model.gradient_shares.period == DEFAULT_PERIOD
    assert build(distilled_cfg(teacher, HINT)).gradient_shares.period == 0


def test_the_summary_names_the_share(teacher):
    cfg = distilled_cfg(teacher, BOTH, steered(HINT) | {"KD.SOFT_TARGET.WEIGHT": 0.5})
    rows = [line.split() for line in build(cfg).describe(cfg)[0].splitlines()]
    assert {row[0]: row[1:3] for row in rows if row[0] in BOTH} == {
        "HintHead": ["share", "0.3"],
        "SoftTargetHead": ["0.5", "constant"],
    }


# ---- Runs ----
@pytest.fixture
def run(tmp_path):
    """The config of five iterations of a classifier on digits, measured at 0, 2 and 4, with checkpoints of 0 to 4."""
    size = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8}
    own = {"MODEL.META_ARCHITECTURE": "TeacherStudent", "KD.STUDENT_ARCHITECTURE": "ImageClassifier", "SEED": 4}
    own |= {"KD.HEADS": [*BOTH, "MaskedGenerationHead"], "KD.MASKED_GENERATION.IN_FEATURES": ["res3"]}
    own |= {"SOLVER.MAX_ITER": 5, "SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.WARMUP_ITERS": 0}
    options = size | own | steered(BOTH, period=2)
    teacher = save_teacher(tmp_path / "teacher", classifier_cfg(teacher=True, options=size))
    cfg = classifier_cfg(options=teacher | options)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ()
    return write_yaml(tmp_path / "config.yaml", cfg)


AMP = ["SOLVER.ACCUMULATE", 2, "SOLVER.AMP.ENABLED", True, "SOLVER.EMA_DECAY", 0.9]


@pytest.mark.parametrize(("cut", "options"), [(2, []), (3, AMP)], ids=["before", "between"])
@pytest.mark.usefixtures("in_process")
def test_a_resumed_run_is_an_uninterrupted_one(run, tmp_path, cut, options):
    """Bit for bit: killed before a measurement, and between two in mixed precision, in parts and with an average."""
    train_net("--config-file", run, "OUTPUT_DIR", tmp_path / "whole", *options)
    arguments = ["--config-file", run, "OUTPUT_DIR", tmp_path / "cut", *options]
    with interrupted_at(cut):
        train_net(*arguments)
    train_net("--resume", *arguments)
    whole = final_state(tmp_path / "whole")
    assert same(final_state(tmp_path / "cut"), whole)
    assert {name: count for name, (count, _) in whole["kd_gradient_balance"].items()} == dict.fromkeys(BOTH, 3)


@pytest.mark.usefixtures("in_process")
def test_a_run_without_shares_goes_on_with_them(run, tmp_path):
    arguments = ["--config-file", run, "OUTPUT_DIR", tmp_path / "run"]
    off = [x for name in BOTH for x in (f"KD.{config_key(name)}.SCHEDULE.GRADIENT_SHARE", 0.0)]
    with interrupted_at(3):
        train_net(*arguments, *off)
    assert "kd_gradient_balance" not in torch.load(tmp_path / "run" / "model_0000002.pth", weights_only=True)
    train_net("--resume", *arguments)
    counts = {name: count for name, (count, _) in final_state(tmp_path / "run")["kd_gradient_balance"].items()}
    assert counts == dict.fromkeys(BOTH, 2)  # At once, in iteration 3, and in 4.


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_two_ranks_have_the_same_weights(run, tmp_path):
    task = Task(run, tmp_path)
    assert end(*[task.start("two", prepare=(rank,)) for rank in two_ranks()]) == [0, 0]
    logs = [(tmp_path / "two" / name).read_text() for name in ("log.txt", "log.txt.rank1")]
    for line in (r"Weights for these shares: (.*)", r"gradient in the backbone at iteration \d: (.*)"):
        first, second = (re.findall(line, log) for log in logs)
        assert len(first) == 3
        assert first == second
    told = json.loads((tmp_path / "two" / "metrics.json").read_text().splitlines()[-1])
    assert told["kd/weight/HintHead"] > 0


# ---- Mistakes ----
class Aside(nn.Module):
    """A head whose loss does not depend on the student."""

    signals = ("p2",)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, student, teacher, batch):
        return {"loss_kd_aside": self.scale * teacher["p2"].float().mean()}


def test_a_gradient_that_does_not_reach_the_backbone(inputs):
    parts = {
        "student": build(tiny_cfg()),
        "teacher": Teacher(build(tiny_cfg(), seed=1)),
        "heads": {"AsideHead": Aside()},
    }
    model = TeacherStudent(**parts, gradient_balance=GradientBalance({"AsideHead": 0.3})).train()
    message = "KD.ASIDE.SCHEDULE.GRADIENT_SHARE: got 0.3, but the gradient of AsideHead does not reach the student's"
    with EventStorage(0), pytest.raises(InputError, match=f"^{re.escape(message)}"):
        model(inputs)


def test_nothing_besides_has_a_gradient(tmp_path):
    """The head takes the place of a classifier's only loss."""
    options = steered(["BornAgainHead"]) | {"KD.BORN_AGAIN.SOURCE": "cls"}
    model = build(classifier(tmp_path, ["BornAgainHead"], options))
    with EventStorage(0), pytest.raises(InputError, match=r"^KD.BORN_AGAIN.SCHEDULE.GRADIENT_SHARE: got 0.3, but noth"):
        model(classifier_inputs())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"KD.HINT.SCHEDULE.GRADIENT_SHARE": 1.0},
            "KD.HINT.SCHEDULE.GRADIENT_SHARE: must be 0 (off) or more and below",
        ),
        ({"KD.HINT.SCHEDULE.GRADIENT_SHARE": -0.1}, "KD.HINT.SCHEDULE.GRADIENT_SHARE: must be 0 (off) or more and"),
        (
            {"KD.HINT.SCHEDULE.GRADIENT_SHARE": 0.5, "KD.SOFT_TARGET.SCHEDULE.GRADIENT_SHARE": 0.5},
            "KD.*.SCHEDULE.GRADIENT_SHARE: the shares must sum to less than 1, which leaves the rest to the student's "
            "own losses; got HintHead 0.5, SoftTargetHead 0.5.",
        ),
        (steered(HINT) | {"KD.HINT.WEIGHT": 0.0}, "KD.HINT.WEIGHT: must be above 0 with SCHEDULE.GRADIENT_SHARE 0.3"),
        (
            steered(BOTH) | {"KD.TASK_WEIGHT": 0.0},
            "KD.HINT.SCHEDULE.GRADIENT_SHARE: got 0.3, but with KD.TASK_WEIGHT 0",
        ),
        (
            steered(HINT) | {"KD.HINT.STAGES": 2},
            "KD.HINT.SCHEDULE.GRADIENT_SHARE: got 0.3, but HintHead acts in the pre",
        ),
    ],
)
def test_shares_that_cannot_be(teacher, options, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        build(distilled_cfg(teacher, BOTH, options))


def test_a_frozen_backbone():
    cfg = classifier_cfg(options=steered(SOFT))
    student = nn.ModuleDict({"backbone": nn.Linear(1, 1).requires_grad_(False)})
    message = "KD.SOFT_TARGET.SCHEDULE.GRADIENT_SHARE: got 0.3, but the student's backbone is frozen; allowed is 0."
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        build_gradient_balance(cfg, student, {"SoftTargetHead": nn.Identity()}, {"SoftTargetHead": WeightSchedule()})


def test_students_that_teach_each_other_have_none(tmp_path):
    options = {"KD.MUTUAL.PEERS": [write_yaml(tmp_path / "peer.yaml", tiny_cfg())], "KD.MUTUAL.METHOD": "ie_dml"}
    options |= {"MODEL.META_ARCHITECTURE": "MutualStudents", "KD.INHERIT_EXPLORE.SCHEDULE.GRADIENT_SHARE": 0.3}
    with pytest.raises(InputError, match=r"^KD.INHERIT_EXPLORE.SCHEDULE.GRADIENT_SHARE: got 0.3, but all students"):
        build(tiny_cfg(options=options))
