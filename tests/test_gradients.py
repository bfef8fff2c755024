"""What is told of the losses during a run: the heads' weights, and their shares of the gradient in the student."""

import json
import re

import pytest
import torch
from children import Task, end, final_state, same, two_ranks
from classification.models import classifier_cfg
from detectron2.utils.events import EventStorage
from helpers import build, distilled_cfg, tiny_cfg, train_net, with_data, write_yaml
from torch import nn

from kd_det import InputError
from kd_det.gradients import gradient_shares

HEADS = ["HintHead", "SoftTargetHead"]


def scalars(model, inputs, *, iteration=0, times=1):
    """What a step puts into the event storage, with the number of times of each."""
    torch.manual_seed(0)
    with EventStorage(iteration) as storage:
        for _ in range(times):
            losses = model(inputs)
        found = {name: value for name, (value, _) in storage.latest().items() if name.startswith("kd/")}
        counts = {name: len(storage.history(name).values()) for name in found}
    return losses, found, counts


# ---- Weights ----
def test_the_weight_of_each_head(teacher, inputs):
    options = {"KD.HINT.WEIGHT": 8.0, "KD.HINT.SCHEDULE.WARMUP": 3, "KD.SOFT_TARGET.SCHEDULE.START": 2}
    model = build(distilled_cfg(teacher, HEADS, options))
    found = [scalars(model, inputs, iteration=i)[1] for i in (0, 1, 3)]
    assert [x["kd/weight/HintHead"] for x in found] == [2, 4, 8]
    assert [x["kd/weight/SoftTargetHead"] for x in found] == [0, 0, 1]
    assert {len(x) for x in found} == {2}


# ---- Shares ----
def test_shares_are_norms_over_their_sum():
    """Of w = (a, b): 3 a has the gradient (3, 0), a + b with -a has (0, 1); the rest does not depend on w."""
    module = nn.Linear(2, 1, bias=False)
    a, b = module.weight[0]
    other = nn.Parameter(torch.ones(()))
    groups = {"a": [3 * a], "b": [a + b, -a], "other": [2 * other], "constant": [torch.ones(())], "none": []}
    expected = {"a": 0.75, "b": 0.25, "other": 0, "constant": 0, "none": 0}
    assert gradient_shares(module, groups) == pytest.approx(expected)
    assert module.weight.grad is None


def test_small_half_precision_gradients_do_not_vanish():
    """2^-26 is below the least number of float16; the gradients pass through one on their way."""
    module = nn.Linear(1, 1, bias=False)
    passed = module.weight.half().float().sum()
    assert gradient_shares(module, {"a": [3 * 2**-26 * passed], "b": [2**-26 * passed]}) == {"a": 0.75, "b": 0.25}


def test_shares_are_those_of_backward_passes(teacher, inputs):
    options = {"KD.GRADIENT_SHARES": 1, "KD.TASK_WEIGHT": 0.5, "KD.HINT.WEIGHT": 3.0}
    model = build(distilled_cfg(teacher, HEADS, options))
    losses, found, _ = scalars(model, inputs)
    shares = {name.removeprefix("kd/gradient/"): x for name, x in found.items() if "gradient" in name}
    kinds = {"HintHead": "loss_kd_hint", "SoftTargetHead": "loss_kd_soft_target_roi"}
    norms = {}
    for name in ("task", *HEADS):
        own = [x for key, x in losses.items() if (key == kinds.get(name) if name in kinds else "_kd_" not in key)]
        model.zero_grad()
        sum(own).backward(retain_graph=True)
        gradients = [p.grad.flatten() for p in model.student.backbone.parameters() if p.grad is not None]
        norms[name] = torch.cat(gradients).norm().item()
    assert shares == pytest.approx({name: norm / sum(norms.values()) for name, norm in norms.items()}, rel=1e-5)


def test_an_idle_head_has_no_share(teacher, inputs):
    options = {"KD.GRADIENT_SHARES": 1, "KD.HINT.SCHEDULE.START": 5}
    found = scalars(build(distilled_cfg(teacher, HEADS, options)), inputs)[1]
    assert {x for x in found if "gradient" in x} == {"kd/gradient/task", "kd/gradient/SoftTargetHead"}


def test_the_log_tells_the_shares(teacher, inputs, caplog):
    model = build(distilled_cfg(teacher, ["HintHead"], {"KD.GRADIENT_SHARES": 1}))
    with caplog.at_level("INFO", "kd_det.gradients"):
        _, found, _ = scalars(model, inputs, iteration=7)
    task, hint = (found[f"kd/gradient/{name}"] for name in ("task", "HintHead"))
    told = f"Shares of the gradient in the backbone at iteration 7: task {task:.1%}, HintHead {hint:.1%}"
    assert caplog.messages == [told]


def test_measured_every_so_many_iterations_once(teacher, inputs):
    model = build(distilled_cfg(teacher, ["HintHead"], {"KD.GRADIENT_SHARES": 2}))
    counts = [scalars(model, inputs, iteration=i, times=2)[2].get("kd/gradient/task", 0) for i in range(4)]
    assert counts == [1, 0, 1, 0]


def test_not_measured_without_gradients(teacher, inputs):
    """Precise batch norm runs the model in training mode without gradients."""
    model = build(distilled_cfg(teacher, ["HintHead"], {"KD.GRADIENT_SHARES": 1}))
    with torch.no_grad():
        assert "kd/gradient/task" not in scalars(model, inputs)[1]


@pytest.mark.parametrize("turns", [[()], [(0,), (1,)]])
def test_students_that_teach_each_other(tmp_path, inputs, turns):
    options = {"KD.MUTUAL.PEERS": [write_yaml(tmp_path / "peer.yaml", tiny_cfg())], "KD.GRADIENT_SHARES": 1}
    options |= {"MODEL.META_ARCHITECTURE": "MutualStudents", "KD.MUTUAL.METHOD": "ie_dml"}
    model = build(tiny_cfg(options=options | {"KD.INHERIT_EXPLORE.WEIGHT": 0.5}))
    with EventStorage() as storage:
        for turn in turns:
            model(inputs, *turn)
    found = {key: value for key, (value, _) in storage.latest().items() if key.startswith("kd/")}
    assert found.pop("kd/weight/InheritExploreHead") == 0.5
    for i in (1, 2):
        own = [found.pop(f"kd/gradient/{name}_peer_{i}") for name in ("task", "mutual", "InheritExploreHead")]
        assert min(own) > 0
        assert sum(own) == pytest.approx(1)
    assert found == {}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"KD.GRADIENT_SHARES": -1}, r"must be 0 \(never\) or a number of iterations, got -1\.$"),
        (
            {"KD.GRADIENT_SHARES": 5, "MODEL.BACKBONE.FREEZE_AT": 5, "KD.STUDENT_ARCHITECTURE": "ImageClassifier"},
            r"got 5, but a student's backbone is frozen; 0 is allowed\.$",
        ),
    ],
)
def test_bad_periods(options, told):
    cfg = classifier_cfg("detectron2", options=options | {"MODEL.META_ARCHITECTURE": "TeacherStudent"})
    with pytest.raises(InputError, match=f"^KD.GRADIENT_SHARES: {told}"):
        build(cfg)


# ---- Training is what it is without ----
@pytest.fixture
def config(teacher, coco_folder, tmp_path):
    """Two iterations of a detector."""
    cfg = with_data(distilled_cfg(teacher, [*HEADS, "ReviewKDHead"]), coco_folder, tmp_path)
    cfg.DATASETS.TEST = ()
    return write_yaml(tmp_path / "config.yaml", cfg)


@pytest.mark.parametrize("options", [[], ["SOLVER.ACCUMULATE", 2, "SOLVER.AMP.ENABLED", True]])
@pytest.mark.usefixtures("in_process")
def test_training_is_the_same_bit_for_bit(config, tmp_path, options):
    for name, period in (("off", 0), ("on", 1)):
        train_net("--config-file", config, "OUTPUT_DIR", tmp_path / name, "KD.GRADIENT_SHARES", period, *options)
    assert same(final_state(tmp_path / "off"), final_state(tmp_path / "on"))
    lines = [json.loads((tmp_path / x / "metrics.json").read_text().splitlines()[-1]) for x in ("off", "on")]
    assert lines[1].keys() - lines[0].keys() == {f"kd/gradient/{x}" for x in ("task", *HEADS, "ReviewKDHead")}


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), pytest.param("cuda", torch.float16, marks=pytest.mark.gpu)]
)
def test_mixed_precision(teacher, inputs, device, dtype):
    """Close to the shares of float32, and nothing overflows."""
    model = build(distilled_cfg(teacher, HEADS, {"KD.GRADIENT_SHARES": 1, "MODEL.DEVICE": device}))
    whole = scalars(model, inputs, iteration=0)[1]
    with torch.autocast(device, dtype=dtype):
        half = scalars(model, inputs, iteration=1)[1]
    assert half == pytest.approx(whole, abs=0.05)


@pytest.mark.usefixtures("in_process")
def test_two_ranks(config, tmp_path):
    """Each tells the shares of its own images, and what both learn is the same, bit for bit."""
    task = Task(config, tmp_path)
    for name, period in (("off", 0), ("on", 1)):
        ranks = two_ranks()
        assert end(*[task.start(name, "KD.GRADIENT_SHARES", period, prepare=(rank,)) for rank in ranks]) == [0, 0]
    assert same(final_state(tmp_path / "off"), final_state(tmp_path / "on"))
    logs = [(tmp_path / "on" / name).read_text() for name in ("log.txt", "log.txt.rank1")]
    told = [re.findall(r"gradient in the backbone at iteration 1: (task .*)", log) for log in logs]
    assert [len(x) for x in told] == [1, 1]
    assert told[0] != told[1]
