"""Runs that are resumed: finished ones have their final checkpoint, and the config's options hold from there on."""

import json

import pytest
import torch
from children import same
from classification.models import classifier_cfg
from helpers import interrupted_at, save_teacher, write_yaml

from kd_det import InputError
from kd_det.data import register_datasets
from kd_det.engine import Trainer
from kd_det.engine.stages import train

pytestmark = pytest.mark.usefixtures("in_process")
FINAL, LAST = "model_final.pth", "model_0000003.pth"
SIZE = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8}
RUN = SIZE | {"SEED": 4, "SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2, "SOLVER.WARMUP_ITERS": 0}
DISTILLED = {"MODEL.META_ARCHITECTURE": "TeacherStudent", "KD.STUDENT_ARCHITECTURE": "ImageClassifier"}
STAGED = {"KD.HEADS": ["HintHead"], "KD.HINT.STAGES": 2, "KD.HINT.IN_FEATURES": ["res3"], "KD.PRETRAIN.MAX_ITER": 4}


@pytest.fixture
def make(tmp_path):
    """Makes the config of a run of four iterations on digits, with checkpoints of iterations 1 and 3."""

    def make(kind="plain", **options):
        chain = {"KD.HEADS": ["BornAgainHead"], "KD.BORN_AGAIN.SOURCE": "cls", "KD.GENERATIONS": 2}
        mutual = {"MODEL.META_ARCHITECTURE": "MutualStudents", "KD.STUDENT_ARCHITECTURE": "ImageClassifier"}
        kinds = {
            "plain": {"SOLVER.EMA_DECAY": 0.9},
            "stage": DISTILLED | STAGED,
            "generations": DISTILLED | chain,
            "mutual": mutual | {"KD.MUTUAL.SOURCE": "cls"},
        }
        cfg = classifier_cfg(options=RUN | kinds[kind] | {"OUTPUT_DIR": str(tmp_path / "run")} | options)
        if kind == "mutual":
            cfg.KD.MUTUAL.PEERS = [write_yaml(tmp_path / "peer.yaml", classifier_cfg(options=SIZE))]
        elif kind != "plain":
            teacher = save_teacher(tmp_path / "teacher", classifier_cfg(teacher=True, options=SIZE))
            cfg.merge_from_list([part for pair in teacher.items() for part in pair])
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ()
        register_datasets(cfg)
        return cfg

    return make


def load(path):
    return torch.load(path, weights_only=True)


def lines(folder):
    return [json.loads(line)["iteration"] for line in (folder / "metrics.json").read_text().splitlines()]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose(path, how):
    """Leave what a kill between the last two checkpoints leaves, or damage the final one."""
    if how == "damaged":
        flip(path)
        return
    path.unlink()
    tag = path.with_name("last_checkpoint")
    if path.with_name(LAST).is_file():
        tag.write_text(LAST)
    else:
        tag.unlink()  # A peer's folder, in which nothing else is.


# ---- The final checkpoint ----
@pytest.mark.parametrize("how", ["lost", "damaged"])
@pytest.mark.parametrize("kind", ["plain", "stage", "generations", "mutual"])
def test_a_finished_run_has_its_final_checkpoint(make, tmp_path, kind, how):
    """All of it is what an uninterrupted run writes, trainer state included."""
    cfg = make(kind)
    train(cfg, resume=False)
    finals = {path: load(path) for path in (tmp_path / "run").rglob(FINAL)}
    assert len(finals) == {"plain": 1, "stage": 2, "generations": 2, "mutual": 3}[kind]
    for path in finals:
        lose(path, how)
    train(cfg, resume=True)
    for path, whole in finals.items():
        assert same(load(path), whole), path
        assert path.with_name("last_checkpoint").read_text() == FINAL


def test_a_stage_that_was_killed_at_its_end(make, tmp_path):
    cfg = make("stage")
    with interrupted_at(0):
        train(cfg, resume=False)
    final = tmp_path / "run" / "pretrain" / FINAL
    whole = load(final)
    lose(final, "lost")
    train(cfg, resume=True)
    assert same(load(final), whole)
    assert (tmp_path / "run" / FINAL).is_file()


def test_a_final_checkpoint_without_one_before_it(make, tmp_path):
    """It is resumed from, and stays."""
    cfg = make(**{"SOLVER.CHECKPOINT_PERIOD": 100})
    train(cfg, resume=False)
    written = (tmp_path / "run" / FINAL).stat().st_mtime_ns
    train(cfg, resume=True)
    assert (tmp_path / "run" / FINAL).stat().st_mtime_ns == written
    flip(tmp_path / "run" / FINAL)
    with pytest.raises(
        InputError, match=r"^--resume: .*model_final.pth: not .* No checkpoint of this run is left; wit"
    ):
        train(cfg, resume=True)


def test_a_final_evaluation_is_made_up_for_and_not_repeated_as_another_iteration(make, tmp_path, monkeypatch):
    cfg, evaluate = make(), Trainer.test
    cfg.DATASETS.TEST = ("digits_test",)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "test", stop)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, resume=False)
    assert lines(tmp_path / "run") == [3]
    monkeypatch.setattr(Trainer, "test", evaluate)
    for _ in range(2):
        train(cfg, resume=True)
        assert lines(tmp_path / "run") == [3, 4]
    cfg.DATASETS.TEST = ()
    train(cfg, resume=True)
    assert lines(tmp_path / "run") == [3, 4]


def test_a_final_evaluation_of_a_generation_is_made_up_for(make, tmp_path, monkeypatch):
    cfg = make("generations")
    cfg.DATASETS.TEST = ("digits_test",)
    train(cfg, resume=False)
    metrics = tmp_path / "run" / "gen_1" / "metrics.json"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    train(cfg, resume=True)
    assert lines(tmp_path / "run" / "gen_1") == lines(tmp_path / "run" / "gen_2") == [3, 4]


@pytest.mark.parametrize("ended", [True, False])
def test_fewer_iterations_than_are_done(make, tmp_path, caplog, ended):
    """The run is as if it ended where it is; what it ended with before, with so few, stays."""
    if ended:
        train(make(**{"SOLVER.MAX_ITER": 2}), resume=False)
    before = load(tmp_path / "run" / FINAL) if ended else None
    with interrupted_at(5):
        train(make(**{"SOLVER.MAX_ITER": 8}), resume=ended)
    train(make(**{"SOLVER.MAX_ITER": 2}), resume=True)
    assert f"SOLVER.MAX_ITER: got 2, but the run in {tmp_path}/run has done 4 iterations" in caplog.text
    expected = before or load(tmp_path / "run" / LAST)
    assert same(load(tmp_path / "run" / FINAL), expected)
    train(make(**{"SOLVER.MAX_ITER": 8}), resume=True)
    assert load(tmp_path / "run" / FINAL)["iteration"] == 7


# ---- Stages and generations that are not needed, or stay as they are ----
@pytest.mark.parametrize("left", ["earlier", "none"])
def test_a_damaged_stage_does_not_stop_the_run_after_it(make, tmp_path, caplog, left):
    cfg = make("stage")
    with interrupted_at(3):
        train(cfg, resume=False)
    for path in (tmp_path / "run" / "pretrain").glob("*.pth"):
        if left == "none" or path.name == FINAL:
            path.write_bytes(path.read_bytes()[:3000])
    train(cfg, resume=True)
    assert (tmp_path / "run" / FINAL).is_file()
    unchecked = "it is not checked whether the teacher is still that of the stage"
    assert (unchecked in caplog.text) == (left == "none")


def test_a_damaged_stage_goes_on_from_its_own_checkpoints(make, tmp_path):
    cfg = make("stage")
    with interrupted_at(0):
        train(cfg, resume=False)
    whole = load(tmp_path / "run" / "pretrain" / FINAL)
    for name in (FINAL, LAST):
        flip(tmp_path / "run" / "pretrain" / name)
    train(cfg, resume=True)
    assert same(load(tmp_path / "run" / "pretrain" / FINAL), whole)


def test_a_damaged_generation_does_not_stop_those_after_it(make, tmp_path, caplog):
    cfg = make("generations")
    train(cfg, resume=False)
    for path in (tmp_path / "run" / "gen_1").glob("*.pth"):
        flip(path)
    train(cfg, resume=True)
    assert "Generation 1 is damaged, but the next one is finished: --resume: " in caplog.text
    flip(tmp_path / "run" / "gen_2" / FINAL)
    with pytest.raises(InputError, match=r"^--resume: .*gen_1/model_final.pth: not a checkpoint"):
        train(cfg, resume=True)


@pytest.mark.parametrize(
    ("kind", "key", "folder"),
    [("stage", "KD.PRETRAIN.MAX_ITER", "pretrain"), ("generations", "SOLVER.MAX_ITER", "gen_2")],
)
def test_a_finished_part_says_that_it_stays_as_long_as_it_is(make, tmp_path, caplog, kind, key, folder):
    train(make(kind), resume=False)
    caplog.clear()
    train(make(kind), resume=True)
    assert "is finished after" not in caplog.text
    train(make(kind, **{key: 6}), resume=True)
    warning = f"{key}: got 6, but {tmp_path}/run/{folder} is finished after 4 iterations and stays as it is; delete"
    assert warning in caplog.text
    assert load(tmp_path / "run" / folder / FINAL)["iteration"] == 3


# ---- Options that are others ----
def test_the_options_of_the_config_hold(make, caplog):
    """They are those of a run that has had them from the start; the momentum is that of the one before."""
    options = {"BASE_LR": 0.003, "MOMENTUM": 0.5, "WEIGHT_DECAY": 0.01, "WEIGHT_DECAY_NORM": 0.02, "NESTEROV": True}
    options |= {"WEIGHT_DECAY_BIAS": 0.04, "BIAS_LR_FACTOR": 2.0, "STEPS": (3,), "GAMMA": 0.5}
    changed = {f"SOLVER.{key}": value for key, value in options.items()}
    with interrupted_at(2):
        train(make("stage"), resume=False)
    old, new = Trainer(make("stage")), Trainer(make("stage", **changed))
    old.resume_or_load(resume=True)
    new.resume_or_load(resume=True)
    assert "learning rate: 0.003 instead of 0.001 from here on" in caplog.text
    assert "momentum: 0.5 instead of 0.9 from here on" in caplog.text
    groups = {len(trainer.optimizer.param_groups) for trainer in (old, new)}
    assert len(groups) == 2, "the parameters are grouped in another way"
    for name, parameter in new.plain_model.named_parameters():
        before = old.optimizer.state.get(dict(old.plain_model.named_parameters())[name], {})
        assert same(new.optimizer.state.get(parameter, {}), before), name
    assert any(new.optimizer.state.values())
    expected = Trainer(make("stage", **changed))
    for _ in range(2):
        expected.optimizer.step()
        expected.scheduler.step()
    for own, other in zip(new.optimizer.param_groups, expected.optimizer.param_groups, strict=True):
        assert {**own, "params": None} == {**other, "params": None}
    assert new.scheduler.base_lrs == expected.scheduler.base_lrs


def test_a_run_that_is_resumed_with_the_same_options_says_nothing_of_them(make, tmp_path, caplog):
    train(make(), resume=False)
    train(make(**{"SOLVER.MAX_ITER": 6}), resume=True)
    assert "from here on" not in caplog.text
    train(make(**{"SOLVER.MAX_ITER": 8, "SEED": 5}), resume=True)
    assert "SEED: 5 instead of 4 from here on, as the config says." in caplog.text
    assert load(tmp_path / "run" / FINAL)["trainer"]["seed"] == 5


def test_a_checkpoint_without_the_names_of_the_parameters(make, tmp_path):
    """As earlier versions wrote it: their order is that of the config, whose groups must be the same."""
    train(make(**{"SOLVER.MAX_ITER": 2}), resume=False)
    path = tmp_path / "run" / FINAL
    data = load(path)
    del data["trainer"]["parameters"]
    torch.save(data, path)
    trainer = Trainer(make(**{"SOLVER.BASE_LR": 0.5}))
    trainer.resume_or_load(resume=True)
    assert same(trainer.optimizer.state_dict()["state"], data["trainer"]["_trainer"]["optimizer"]["state"])
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.5}
    with pytest.raises(
        InputError, match=r"^--resume: .* another config \(.*its optimizer has other groups of parameters"
    ):
        Trainer(make(**{"SOLVER.WEIGHT_DECAY_BIAS": 0.5})).resume_or_load(resume=True)


# ---- Odd contents ----
@pytest.mark.parametrize(
    "change",
    [
        {"trainer": 5},
        {"trainer": {}},
        {"ema": 5},
        {"ema": {"module.x": 1}},
        *(
            {"trainer": {key: value}}
            for key in ("hooks", "processes", "seed", "iteration", "run")
            for value in ([1], None)
        ),
        {"trainer": {"iteration": -3}},
        {"trainer": {"iteration": 1.5}},
        {"trainer": {"hooks": {"LRScheduler": 5}}},
        {"trainer": {"_trainer": 5}},
        {"trainer": {"_trainer": {"optimizer": 5}}},
        {"trainer": {"_trainer": {"optimizer": {"state": 5, "param_groups": 5}}}},
        {"trainer": {"parameters": 5}},
        {"trainer": {"parameters": ["a"]}},
    ],
    ids=str,
)
def test_a_state_of_another_shape(make, tmp_path, change):
    cfg = make(**{"SOLVER.MAX_ITER": 1})
    trainer = Trainer(cfg)
    trainer.checkpointer.save("model_final", iteration=0)
    data = load(tmp_path / "run" / FINAL)
    ((key, value),) = change.items()
    data[key] = data[key] | value if key == "trainer" and value and isinstance(value, dict) else value
    torch.save(data, tmp_path / "run" / FINAL)
    with pytest.raises(InputError, match=r"^--resume: .*run was written by a run with another config \(") as error:
        Trainer(cfg).resume_or_load(resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.flatten,
        torch.Tensor.tolist,
        torch.Tensor.int,
        torch.Tensor.to_sparse,
        lambda momentum: momentum.to(torch.complex64),
        lambda momentum: momentum.to("meta"),
    ],
)
def test_momentum_of_another_shape_or_kind(make, tmp_path, change):
    train(make(**{"SOLVER.MAX_ITER": 1}), resume=False)
    data = load(tmp_path / "run" / FINAL)
    entry = next(
        x for x in data["trainer"]["_trainer"]["optimizer"]["state"].values() if x["momentum_buffer"].dim() > 1
    )
    entry["momentum_buffer"] = change(entry["momentum_buffer"])
    torch.save(data, tmp_path / "run" / FINAL)
    with pytest.raises(
        InputError, match=r"^--resume: .* another config \(ValueError: its optimizer's momentum_buffer of "
    ):
        Trainer(make(**{"SOLVER.MAX_ITER": 1})).resume_or_load(resume=True)


@pytest.mark.parametrize("value", [5, {"HintHead": 5}, None])
def test_heads_of_another_shape(make, tmp_path, value):
    cfg = make("stage")
    Trainer(cfg).checkpointer.save("model_final", iteration=0)
    data = load(tmp_path / "run" / FINAL)
    torch.save(data | {"kd_heads": value}, tmp_path / "run" / FINAL)
    with pytest.raises(InputError, match=r"^--resume: .*run was written by a run with another config \("):
        Trainer(cfg).resume_or_load(resume=True)


def test_a_random_encoder_stays_that_of_the_first_iteration(make, tmp_path):
    """Through the stage, the run and an interruption, after which noise in the teacher's place is the same, too."""
    node = {"ENCODER": "random", "EXPLORE_TARGET": "noise", "IN_FEATURES": ["res4"]}
    options = {"KD.HEADS": ["InheritExploreHead"]} | {f"KD.INHERIT_EXPLORE.{key}": x for key, x in node.items()}
    cfg, final = make("stage", **options), tmp_path / "run" / FINAL
    train(cfg, resume=False)
    whole, stage = load(final), load(tmp_path / "run" / "pretrain" / FINAL)
    frozen = {key: x for key, x in whole["kd_heads"].items() if ".encoders.explore." in key}
    assert frozen
    assert all(torch.equal(x, stage["kd_heads"][key]) for key, x in frozen.items())
    final.unlink()
    with interrupted_at(2):
        train(cfg, resume=False)
    assert not final.exists()
    train(cfg, resume=True)
    resumed = load(final)
    assert all(same(resumed[part], whole[part]) for part in ("model", "kd_heads"))
