"""MutualStudents: stock students that learn from each other's predictions, on the same boxes, and end as plain ones."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from children import run_processes, same
from classification.models import classifier_cfg, classifier_inputs
from detectron2.engine import create_ddp_model
from detectron2.modeling import Backbone, build_model
from detectron2.utils.events import EventStorage
from helpers import (
    WIDE,
    attached,
    build,
    interrupted_at,
    save_teacher,
    step,
    tiny_cfg,
    tiny_inputs,
    train_net,
    with_data,
    write_yaml,
)

from kd_det import ImageClassifier, InputError, MutualStudents
from kd_det.config import student_config
from kd_det.data import register_datasets
from kd_det.engine import Trainer
from kd_det.engine import trainer as trainers
from kd_det.engine.stages import FINAL, train
from kd_det.engine.step_trainer import AccumulatingTrainer
from kd_det.export import find_run, load_student, read_student_config
from kd_det.losses import exploration_loss, inheritance_loss, mutual_loss

IE = {"KD.MUTUAL.METHOD": "ie_dml"}


@pytest.fixture
def mutual(tmp_path):
    """Makes a config of students that teach each other; of each peer the options that it differs by are given."""

    def make(peers=({},), options=None, family="mask_rcnn"):
        def plain(options=None):
            return classifier_cfg(options=options) if family == "classifier" else tiny_cfg(family, options)

        cfg = plain(options)
        cfg.KD.STUDENT_ARCHITECTURE, cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE, "MutualStudents"
        cfg.KD.MUTUAL.SOURCE = "cls" if family == "classifier" else "roi"
        if family == "classifier":
            cfg.KD.INHERIT_EXPLORE.IN_FEATURES = ["res4"]
        files = [tmp_path / f"peer_{i}.yaml" for i in range(2, len(peers) + 2)]
        cfg.KD.MUTUAL.PEERS = [write_yaml(file, plain(x)) for file, x in zip(files, peers, strict=True)]
        return cfg

    return make


def of_peer(losses, i):
    """One student's losses, under their plain names."""
    return {key.removesuffix(f"_peer_{i}"): loss for key, loss in losses.items() if key.endswith(f"_peer_{i}")}


def reached(loss, model):
    """First words of the names of the parameters that a loss has a gradient for, as far as the student's or head's."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {".".join(n.split(".")[:2]) for n, g in zip(names, gradients, strict=True) if g is not None and g.any()}


# ---- Deep mutual learning: numbers ----
class Given(Backbone):
    """Gives the same pooled feature, whatever the images are."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, images):
        return {"pooled": self.values}

    def output_shape(self):
        return {}


def classifier_of(logits):
    linear = torch.nn.Linear(3, 3, bias=False, dtype=torch.float64)
    linear.weight.data = torch.eye(3, dtype=torch.float64)
    return ImageClassifier(backbone=Given(logits), linear=linear, pixel_mean=(0, 0, 0), pixel_std=(1, 1, 1))


LOGITS = [[1.0, 2.0, 0.5], [0.2, -0.3, 0.9]], [[2.0, 1.0, 0.1], [0.0, 0.5, 1.5]], [[0.3, 0.3, 1.2], [1.0, -1.0, 0.5]]


@pytest.mark.parametrize(
    ("count", "expected"), [(2, {1: 1.2658172274210762, 2: 0.6763759548257915}), (3, {1: 1.324243471475548})]
)
def test_losses_are_those_of_the_paper(count, expected):
    """Cross-entropy and KL(peer || own), mean over the peers; computed by hand in float64."""
    model = MutualStudents(students=[classifier_of(x) for x in LOGITS[:count]], source="cls").train()
    losses = step(model, [{"image": torch.zeros(3, 4, 4), "label": label} for label in (0, 2)])
    for i, value in expected.items():
        assert sum(of_peer(losses, i).values()).item() == pytest.approx(value, rel=1e-6)


def test_weights_scale_the_losses(mutual):
    inputs = classifier_inputs()
    once = step(build(mutual(family="classifier")), inputs)
    options = {"KD.MUTUAL.WEIGHT": 0.5, "KD.TASK_WEIGHT": 2.0}
    scaled = step(build(mutual(family="classifier", options=options)), inputs)
    for i in (1, 2):
        assert torch.equal(scaled[f"loss_kd_mutual_peer_{i}"], 0.5 * once[f"loss_kd_mutual_peer_{i}"])
        assert torch.equal(scaled[f"loss_cls_peer_{i}"], 2 * once[f"loss_cls_peer_{i}"])


def gradient_step(logits, peer):
    """By gradient descent with rate 1 on cross-entropy and KL(peer || own)."""
    loss = F.cross_entropy(logits, torch.tensor([0, 2])) + mutual_loss(logits, peer)
    return (logits - torch.autograd.grad(loss, logits)[0]).detach()


@pytest.mark.parametrize("sequential", [False, True])
def test_one_after_the_other_each_is_taught_by_peers_that_were_updated_before_it(sequential):
    model = MutualStudents(students=[classifier_of(x) for x in LOGITS], source="cls", sequential=sequential)
    learned = [student.backbone.values for student in model.students]
    before = [x.detach().clone().requires_grad_() for x in learned]
    optimizer = torch.optim.SGD(learned, lr=1.0)
    batch = [{"image": torch.zeros(3, 4, 4), "label": label} for label in (0, 2)]
    trainer = AccumulatingTrainer(model, [batch], optimizer, parts=1, turns=model.turns)
    with EventStorage() as storage:
        trainer.run_step()
    assert {f"{name}_peer_{i}" for name in ("loss_cls", "loss_kd_mutual") for i in (1, 2, 3)} < storage.latest().keys()
    after = []
    for i, own in enumerate(before):
        peers = [x for j, x in enumerate([*after, *before[i:]] if sequential else before) if j != i]
        steps = [gradient_step(own, peer) for peer in peers]  # The mean over peers of what they ask for.
        after.append(sum(steps) / len(steps))
    for found, expected in zip(learned, after, strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=0)


# ---- Each student is a stock one, and learns for itself ----
@pytest.mark.parametrize("family", ["mask_rcnn", "classifier"])
def test_a_turn_is_one_students(mutual, family):
    """The others run without gradients, and are not updated."""
    model = build(mutual(({}, {}), IE | {"KD.MUTUAL.SEQUENTIAL": True}, family))
    assert model.turns == 3
    with EventStorage() as storage:
        losses = model(classifier_inputs() if family == "classifier" else tiny_inputs(), 1)
    assert {key[-len("_peer_2") :] for key in losses} == {"_peer_2"}
    assert {"loss_cls_peer_2", "loss_kd_mutual_peer_2", "loss_kd_inherit_explore_inherit_peer_2"} < losses.keys()
    assert {key.split("/")[0] for key in storage.latest()} <= {"peer_2", "kd"}, "scalars of its own turn alone"
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(("students.1.", "heads.1.")), name


@pytest.mark.parametrize("family", ["mask_rcnn", "classifier"])
def test_a_students_losses_reach_that_student_alone(mutual, family):
    model = build(mutual(({}, {}), family=family))
    losses = step(model, classifier_inputs() if family == "classifier" else tiny_inputs())
    for i in (1, 2, 3):
        own = of_peer(losses, i)
        assert own["loss_kd_mutual"] > 0
        for loss in own.values():
            assert reached(loss, model) == {f"students.{i - 1}"}


def test_the_first_student_is_the_stock_model_bit_for_bit(mutual, inputs):
    """Its weights, and its losses, as if it trained alone."""
    stock, model = build(tiny_cfg()), build(mutual())
    assert all(torch.equal(x, model.student.state_dict()[key]) for key, x in stock.state_dict().items())
    own, alone = of_peer(step(model, inputs), 1), step(stock, inputs)
    del own["loss_kd_mutual"]
    assert own.keys() == alone.keys()
    assert all(torch.equal(own[key], alone[key]) for key in alone)


def test_peers_of_one_file_begin_from_other_weights(mutual):
    model = build(mutual(({}, {}), family="classifier"))
    first, second, third = (student.linear.weight for student in model.students)
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(second, third)


def test_inference_is_the_first_students(mutual, inputs):
    model = build(mutual()).eval()
    own, stock = model(inputs), model.student(inputs)
    assert all(
        torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        for a, b in zip(own, stock, strict=True)
    )


def test_a_peer_sees_the_channels_that_it_knows(mutual):
    """A BGR peer of an RGB student, with the weights and the mean of the RGB one in the other order, gives the same."""
    inputs = classifier_inputs()
    mean = {"MODEL.PIXEL_MEAN": [10.0, 20.0, 30.0], "MODEL.PIXEL_STD": [50.0, 60.0, 70.0]}
    turned = {key: value[::-1] for key, value in mean.items()} | {"INPUT.FORMAT": "BGR"}
    model = build(mutual((turned,), family="classifier", options=mean))
    state = model.students[0].state_dict()
    state["backbone.stem.conv1.weight"] = state["backbone.stem.conv1.weight"].flip(1)
    model.students[1].load_state_dict(state)
    losses = step(model, inputs)
    assert losses["loss_cls_peer_2"].item() == pytest.approx(losses["loss_cls_peer_1"].item(), rel=1e-5)
    assert losses["loss_kd_mutual_peer_1"].item() == pytest.approx(0, abs=1e-6)


# ---- The same boxes ----
@pytest.mark.parametrize("family", ["mask_rcnn", "c4", "cascade"])
def test_copies_of_one_detector_agree(mutual, inputs, family):
    """Though each samples its own boxes: what the peer says of these is what the student says itself."""
    frozen = {"MODEL.RESNETS.NORM": "FrozenBN"}
    model = build(mutual((frozen,), frozen, family))
    others = step(model, inputs)
    model.students[1].load_state_dict(model.students[0].state_dict())
    same = step(model, inputs)
    own = [sum(loss for key, loss in of_peer(same, i).items() if key.startswith("loss_cls")) for i in (1, 2)]
    assert own[0] != own[1]  # other boxes
    for i in (1, 2):
        assert others[f"loss_kd_mutual_peer_{i}"] > 1e-5
        assert same[f"loss_kd_mutual_peer_{i}"].item() == pytest.approx(0, abs=1e-7)


def test_no_backbone_runs_twice(mutual, inputs):
    model = build(mutual((WIDE, {})))
    runs = []
    for i, student in enumerate(model.students):
        student.backbone.register_forward_hook(lambda *_, i=i: runs.append(f"backbone {i}"))
        student.roi_heads.box_predictor.register_forward_hook(lambda *_, i=i: runs.append(f"boxes {i}"))
    step(model, inputs)
    # each predictor sees its own boxes and those of the two others
    assert sorted(runs) == [f"backbone {i}" for i in range(3)] + [f"boxes {i}" for i in range(3) for _ in range(3)]


@pytest.mark.parametrize("turn", [(), (1,)])
def test_precise_batch_norm_builds_no_graph(mutual, turn):
    """It runs the model in training mode without gradients."""
    model = build(mutual(options=IE, family="classifier"))
    with torch.no_grad(), EventStorage():
        losses = model(classifier_inputs(), *turn)
    assert not any(loss.requires_grad for loss in losses.values())


def test_a_peers_second_pass_leaves_no_trace(mutual, inputs):
    """Nothing stays attached or in evaluation mode, and batch norms have counted the student's own boxes alone."""
    model = build(mutual(family="c4"))
    model.students[1].backbone.stem.eval()
    modes = [module.training for module in model.modules()]
    step(model, inputs)
    assert attached(model) == {}
    assert [module.training for module in model.modules()] == modes
    counts = {key: x for key, x in model.state_dict().items() if ".roi_heads.res5" in key and "num_batches" in key}
    assert counts
    assert set(map(int, counts.values())) == {1}


def test_images_without_objects_train_on(mutual):
    model = build(mutual(options=IE))
    losses = step(model, tiny_inputs(empty=(0, 1)))
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_loss_that_is_not_finite_stops_the_run(mutual):
    model = build(mutual(family="classifier"))
    model.students[1].linear.bias.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"^iteration 41: loss_cls_peer_2 is nan, loss_kd_mutual_peer_1 "):
        step(model, classifier_inputs(), iteration=41)


# ---- Inherit and explore ----
def test_attention_maps_of_the_halves_are_compared_with_the_peers(mutual):
    """The kind that needs no encoders, from the signals themselves."""
    options = IE | {"KD.INHERIT_EXPLORE.KIND": "at", "KD.INHERIT_EXPLORE.SCALE": "code"}
    options |= {"KD.INHERIT_EXPLORE.INHERIT_WEIGHT": 3.0, "KD.INHERIT_EXPLORE.WEIGHT": 2.0}
    model = build(mutual(({"MODEL.CIFAR.NAME": "resnet8x4"}, {}), options, "classifier"))
    maps = []
    for student in model.students:
        student.backbone.register_forward_hook(lambda *args: maps.append(args[-1]["res4"]))
    losses = step(model, classifier_inputs())
    for i in (1, 2, 3):
        halves = maps[i - 1].chunk(2, dim=1)
        peers = [x for j, x in enumerate(maps, 1) if j != i]
        inherit = [inheritance_loss(halves[0], peer, kind="at").item() for peer in peers]
        explore = [exploration_loss(halves[1], peer, kind="at").item() for peer in peers]
        own = of_peer(losses, i)
        assert own["loss_kd_inherit_explore_inherit"].item() == pytest.approx(2 * 3 * sum(inherit) / 2, rel=1e-5)
        assert own["loss_kd_inherit_explore_explore"].item() == pytest.approx(2 * sum(explore) / 2, rel=1e-5)
        assert own.keys() == {"loss_cls", "loss_kd_mutual", *(f"loss_kd_inherit_explore_{x}" for x in PARTS[:2])}


PARTS = "inherit", "explore", "reconstruct"


@pytest.mark.parametrize("family", ["mask_rcnn", "classifier"])
@pytest.mark.parametrize("kind", ["ft", "od"])
def test_factors_are_compared_with_those_of_a_wider_peer(mutual, family, kind):
    wider = {"MODEL.CIFAR.NAME": "resnet8x4"} if family == "classifier" else WIDE
    model = build(mutual((wider,), IE | {"KD.INHERIT_EXPLORE.KIND": kind}, family))
    losses = step(model, classifier_inputs() if family == "classifier" else tiny_inputs())
    for i, head in enumerate(model.heads, 1):
        own = of_peer(losses, i)
        inherit, explore, reconstruct = (own[f"loss_kd_inherit_explore_{part}"] for part in PARTS)
        assert inherit > 0 > explore
        assert reconstruct > 0
        for loss in (inherit, explore):
            assert reached(loss, model) == {f"students.{i - 1}", f"heads.{i - 1}"}
            assert torch.autograd.grad(loss, list(head.encoders.parameters()), retain_graph=True, allow_unused=True)
            auto = torch.autograd.grad(
                loss, list(head.auto_encoders.parameters()), retain_graph=True, allow_unused=True
            )
            assert set(auto) == {None}, "a factor is no student's to change"
        assert reached(reconstruct, model) == {f"heads.{i - 1}"}, "its input is detached"
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("family", ["mask_rcnn", "classifier"])
def test_every_parameter_learns_under_autocast(mutual, family):
    """Whose copies of the weights in lower precision must not be those that a pass without gradients made."""
    model = build(mutual(({}, {}), IE, family))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(model, classifier_inputs() if family == "classifier" else tiny_inputs())
    assert {loss.dtype for key, loss in losses.items() if key.startswith("loss_kd_")} == {torch.float32}
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_schedule_of_inherit_and_explore(mutual):
    """Outside of its span it is zero, and every parameter still has its place in the graph."""
    model = build(mutual(options=IE | {"KD.INHERIT_EXPLORE.SCHEDULE.START": 5}, family="classifier"))
    values = [step(model, classifier_inputs(), iteration=i)["loss_kd_inherit_explore_inherit_peer_1"] for i in (4, 5)]
    assert values[0] == 0 < values[1]
    sum(step(model, classifier_inputs()).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# ---- Runs ----
@pytest.fixture
def run(mutual, coco_folder, tmp_path):
    """Makes the config of a run, of two iterations where nothing else is asked for."""

    def make(output="output", options=IE, peer=None):
        cfg = with_data(mutual((peer or {},), options), coco_folder, tmp_path / output)
        register_datasets(cfg)
        Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
        return cfg

    return make


def checkpoint(cfg):
    return torch.load(Path(cfg.OUTPUT_DIR, FINAL), weights_only=True)


@pytest.mark.usefixtures("in_process")
def test_each_student_ends_as_a_plain_run(run, tmp_path):
    cfg = run(peer=WIDE)
    train_net("--config-file", write_yaml(tmp_path / "config.yaml", cfg))
    whole = checkpoint(cfg)
    assert whole.keys() == {"model", "peer_2", "kd_heads", "trainer", "iteration"}
    build_model(student_config(cfg)).load_state_dict(whole["model"])
    for i, key in enumerate(("model", "peer_2"), 1):
        folder = Path(cfg.OUTPUT_DIR, f"peer_{i}")
        config, weights = find_run(str(folder))
        plain = read_student_config(config)
        assert plain.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
        assert plain.DATASETS.TEST == cfg.DATASETS.TEST
        assert same(load_student(plain, weights, "cpu").state_dict(), whole[key])
        assert (folder / "inference" / "coco_instances_results.json").is_file()
    rows = map(json.loads, Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines())
    metrics = {key for row in rows for key in row}
    assert {"bbox/AP", "segm/AP", "peer_2/bbox/AP", "peer_2/segm/AP"} <= metrics
    assert {"loss_cls_peer_1", "loss_kd_mutual_peer_2", "peer_2/fast_rcnn/cls_accuracy"} <= metrics
    # The folder of the whole run is that of its first student.
    config, weights = find_run(cfg.OUTPUT_DIR)
    assert same(load_student(read_student_config(config), weights, "cpu").state_dict(), whole["model"])
    train_net("--config-file", config, "--eval-only", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path / "evaluated")
    assert (tmp_path / "evaluated" / "inference" / "coco_instances_results.json").is_file()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    "others",
    [
        {},
        {"KD.MUTUAL.SEQUENTIAL": True, "SOLVER.ACCUMULATE": 2},
        {"KD.MUTUAL.SEQUENTIAL": True, "SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "bfloat16"},
    ],
)
def test_interrupted_and_resumed_gives_the_weights_of_an_uninterrupted_run(run, others):
    options = IE | {"SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2} | others
    train(whole := run("whole", options), resume=False)
    cut = run("cut", options)
    with interrupted_at(3):
        train(cut, resume=False)
    assert not Path(cut.OUTPUT_DIR, "peer_1", FINAL).exists()
    train(cut, resume=True)
    for part in ("model", "peer_2", "kd_heads"):
        assert same(checkpoint(whole)[part], checkpoint(cut)[part]), part
    assert Path(cut.OUTPUT_DIR, "peer_2", FINAL).is_file()


@pytest.mark.usefixtures("in_process")
def test_a_peer_begins_from_the_weights_that_its_config_names(run, tmp_path):
    saved = [save_teacher(tmp_path / name, tiny_cfg(), seed=i)["KD.TEACHER.WEIGHTS"] for i, name in enumerate("ab")]
    trainer = Trainer(run(options={"MODEL.WEIGHTS": saved[0]}, peer={"MODEL.WEIGHTS": saved[1]}))
    trainer.resume_or_load(resume=False)
    for student, path in zip(trainer.plain_model.students, saved, strict=True):
        assert same(student.state_dict(), torch.load(path, weights_only=True)["model"])


@pytest.mark.parametrize("sequential", [False, True])
def test_turns_need_weights_that_a_loss_does_not_reach(mutual, tmp_path, monkeypatch, sequential):
    found, wrap = [], trainers.create_ddp_model
    monkeypatch.setattr(trainers, "create_ddp_model", lambda *args, **options: found.append(options) or wrap(*args))
    size = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8, "KD.MUTUAL.SEQUENTIAL": sequential}
    cfg = mutual(({"MODEL.CLASSIFIER.NUM_CLASSES": 10},), size | {"OUTPUT_DIR": str(tmp_path)}, "classifier")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ()
    trainer = Trainer(cfg)
    assert found[0]["find_unused_parameters"] is sequential
    assert len(getattr(trainer._trainer, "turns", [()])) == (2 if sequential else 1)


# ---- Two ranks ----
def check_turn(model, inputs):
    """The gradients of the others stay None, not 0: momentum and weight decay would go on moving them."""
    with EventStorage():
        losses = model(inputs, 0)
    sum(losses.values()).backward()
    for name, parameter in model.module.named_parameters():
        assert (parameter.grad is not None) == name.startswith(("students.0.", "heads.0.")), name


def train_rank(rank, cfg, folder):
    """Three steps on a rank's own data, from its own random weights; DDP hands out those of rank 0."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/init", world_size=2, rank=rank)
    plain, sequential = build(cfg, seed=rank), cfg.KD.MUTUAL.SEQUENTIAL
    model = create_ddp_model(plain, broadcast_buffers=False, device_ids=None, find_unused_parameters=sequential)
    batches = [tiny_inputs(seed=10 * rank + i, empty=(0, 1) if (rank, i) == (1, 1) else ()) for i in range(3)]
    if sequential:
        check_turn(model, batches[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = AccumulatingTrainer(model, batches, optimizer, parts=1, turns=plain.turns)
    for trainer.iter in range(3):
        with EventStorage(trainer.iter):
            trainer.run_step()
    losses = step(plain, batches[0], iteration=3)
    torch.save({"losses": losses, **dict(plain.named_parameters())}, f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sequential", [False, True])
def test_two_ranks_stay_in_sync(mutual, tmp_path, sequential):
    cfg = mutual(options=IE | {"KD.INHERIT_EXPLORE.SCHEDULE.START": 1, "KD.MUTUAL.SEQUENTIAL": sequential})
    run_processes(train_rank, cfg, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2))
    losses = first.pop("losses"), second.pop("losses")
    assert losses[0]["loss_kd_mutual_peer_1"] != losses[1]["loss_kd_mutual_peer_1"]
    assert same(first, second)
    start = dict(build(cfg, seed=0).named_parameters())
    for part in ("students.0.", "students.1.", "heads.0.", "heads.1."):
        assert any(not torch.equal(first[key], start[key]) for key in first if key.startswith(part)), part


# ---- A user's mistakes ----
@pytest.mark.parametrize(
    ("options", "peer", "told"),
    [
        (
            {"KD.MUTUAL.PEERS": []},
            {},
            r"KD.MUTUAL.PEERS: no peer is named; give the config file of each .*",
        ),
        (
            {"KD.MUTUAL.PEERS": ["no/such.yaml"]},
            {},
            r"KD.MUTUAL.PEERS: there is no such file, and no/such.yaml is not .*",
        ),
        ({"KD.MUTUAL.METHOD": "DML"}, {}, r"KD.MUTUAL.METHOD: 'DML' is not one of dml, ie_dml\."),
        ({"KD.MUTUAL.SOURCE": "rpn"}, {}, r"KD.MUTUAL.SOURCE: 'rpn' is not one of roi, cls\."),
        ({"KD.MUTUAL.WEIGHT": -1.0}, {}, r"KD.MUTUAL.WEIGHT: must be finite and 0 or more, got -1.0\."),
        ({"KD.MUTUAL.OPTS": ["MODEL.DEPTH", 1]}, {}, r"KD.MUTUAL.OPTS: Non-existent .*MODEL.DEPTH.*"),
        ({"KD.HEADS": ["HintHead"]}, {}, r"KD.HEADS and KD.TEACHER: must be empty for MutualStudents, .*"),
        ({"KD.TEACHER.CONFIG_FILE": "t"}, {}, r"KD.HEADS and KD.TEACHER: must be empty for MutualStudents, .*"),
        ({"KD.STUDENT_ARCHITECTURE": "MutualStudents"}, {}, r"KD.STUDENT_ARCHITECTURE: 'MutualStudents' is not a .*"),
        (
            {},
            {"MODEL.ROI_HEADS.NUM_CLASSES": 5},
            r"KD.MUTUAL.PEERS: all students must know the same classes, but this config has 3 and .*peer_2.yaml has 5.",
        ),
        (
            {},
            {"MODEL.META_ARCHITECTURE": "RetinaNet"},
            r"KD.MUTUAL.SOURCE: 'roi' needs roi_logits, which the student of .*peer_2.yaml does not have\.",
        ),
        (
            {},
            {"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True},
            r"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE: must be False in all networks whose .*",
        ),
        (
            {},
            {"INPUT.FORMAT": "L"},
            r"INPUT.FORMAT: this config reads BGR, .*peer_2.yaml L; only .*",
        ),
        (
            IE | {"KD.INHERIT_EXPLORE.IN_FEATURES": ["p9"]},
            {},
            r"this config, .*: KD.INHERIT_EXPLORE.IN_FEATURES: 'p9' is not a signal of the student, which has .*",
        ),
        (
            IE,
            {"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 5},
            r".*peer_2.yaml, beside this config as teacher: KD.INHERIT_EXPLORE.IN_FEATURES: roi_features have .*",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(mutual, options, peer, told):
    cfg = mutual((peer,))
    cfg.merge_from_list([part for pair in options.items() for part in pair])
    with pytest.raises(InputError, match=f"^{told}$"):
        build(cfg)


def test_of_a_peers_distilled_config_its_student_counts(mutual, teacher):
    distilled = {"MODEL.META_ARCHITECTURE": "TeacherStudent", "KD.HEADS": ["HintHead"], **teacher}
    model = build(mutual((distilled,)))
    assert type(model.students[1]).__name__ == "GeneralizedRCNN"
