"""Tests TEST.PATIENCE: where a run ends, with which files, and that a run that was killed ends there too."""

import json
import math
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from children import Event, Task, end, final_state, same, two_ranks
from classification.models import classifier_cfg
from helpers import save_teacher, write_yaml

from kd_det import InputError
from kd_det.checkpoint_folder import finished_iterations
from kd_det.config_checks import check_run_values
from kd_det.data import register_datasets
from kd_det.engine import Trainer, stages, summary
from kd_det.engine.early_stopping import EarlyStopping
from kd_det.engine.hooks import BestCheckpointer
from kd_det.engine.processes import INTERRUPTED
from kd_det.engine.stages import train

pytestmark = pytest.mark.usefixtures("in_process")
METRIC = "classification/top1"
DIGITS = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8}
# Accuracies after each iteration of a run: the best one, which stays the best, and one that comes too late.
VALUES = [1.0, 3.0, 2.0, 3.0, 2.5, 9.0, 9.0, 9.0]
LAST = 4  # With a patience of three, the run ends after this iteration.


def make(folder, **options):
    """A classifier of digits, evaluated after each of eight iterations, with a patience of three."""
    run = {"SEED": 4, "SOLVER.MAX_ITER": 8, "SOLVER.CHECKPOINT_PERIOD": 1, "OUTPUT_DIR": str(folder)}
    run |= {"TEST.EVAL_PERIOD": 1, "TEST.BEST_METRIC": METRIC, "TEST.PATIENCE": 3, "SOLVER.WARMUP_ITERS": 0}
    cfg = classifier_cfg(options=DIGITS | run | options)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ("digits_test",)
    return cfg


@pytest.fixture
def run(tmp_path, evaluations, monkeypatch):
    """Trains in a folder and returns it."""
    monkeypatch.setattr(stages, "log_summary", lambda *_, **__: None)  # It takes a third of such a training's time.

    def run(name="run", *, resume=False, **options):
        cfg = make(tmp_path / name, **options)
        register_datasets(cfg)
        with Cut.inside(evaluations):
            train(cfg, resume=resume)
        return Path(cfg.OUTPUT_DIR)

    return run


class Evaluations:
    """Stands for the evaluation: its accuracy depends on the iteration alone.

    Attributes:
        values: Maps iterations to accuracies.
        averaged: The same for averaged weights.
        made: The iterations whose weights were evaluated.
        cut: The iteration in whose evaluation the run is killed; None for no kill.
    """

    def __init__(self):
        self.values = dict(enumerate(VALUES))
        self.averaged = self.values
        self.made = []
        self.cut = None


class Cut(BaseException):
    """Ends a run as a kill does."""

    @staticmethod
    @contextmanager
    def inside(evaluations):
        """Inside, a run may be killed; it is not killed again."""
        with suppress(Cut):
            yield
        evaluations.cut = None


@pytest.fixture
def evaluations(monkeypatch):
    evaluations = Evaluations()
    before_train, holder = Trainer.before_train, []

    def begin(trainer):
        holder[:] = [trainer]
        before_train(trainer)

    def evaluate(cls, cfg, model, evaluators=None):
        trainer = holder[0]
        iteration = min(trainer.iter, trainer.max_iter - 1)
        if iteration == evaluations.cut:
            raise Cut
        evaluations.made.append(iteration)
        values = evaluations.averaged if cfg.OUTPUT_DIR.endswith("/ema") else evaluations.values
        return {"classification": {"top1": values[iteration], "error": 1.0}}

    monkeypatch.setattr(Trainer, "before_train", begin)
    monkeypatch.setattr(Trainer, "test", classmethod(evaluate))
    return evaluations


def logged(folder, metric=METRIC):
    """Pairs of iteration and value, as ``metrics.json`` has them."""
    rows = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [(row["iteration"], row[metric]) for row in rows if metric in row]


def best(folder):
    data = torch.load(folder / "model_best.pth", weights_only=True)
    data["trainer"].pop("run")
    return data


def check_same(folder, other):
    assert same(final_state(folder), final_state(other))
    assert same(best(folder), best(other))
    assert logged(folder) == logged(other)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


# ---- The end ----
def test_run_ends_when_its_patience_does(run, evaluations, caplog):
    caplog.set_level("INFO")
    folder = run()
    assert finished_iterations(folder) == LAST + 1
    assert best(folder)["iteration"] == 1
    assert evaluations.made == list(range(LAST + 1)), "the last evaluation is also that of the end"
    assert logged(folder) == [*enumerate(VALUES[: LAST + 1]), (LAST + 1, VALUES[LAST])]
    told = (
        "The run ends early, after iteration 4 of 8: in 3 evaluations (TEST.PATIENCE 3) classification/top1 was not "
        "better than 3.0000, of iteration 1: see model_best.pth."
    )
    assert caplog.messages.count(told) == 1
    assert "Exception during training" not in caplog.text
    table = next(message for message in caplog.messages if message.startswith("Results in "))
    assert table.split()[-6:] == ["iteration", "4", "1", "file", "model_final.pth", "model_best.pth"]
    assert "finished: iteration 5 of 5" in (folder / "report.html").read_text()


def test_weights_are_those_of_a_run_of_this_length(run):
    weights = [
        final_state(run(name, **options))["model"]
        for name, options in (("early", {}), ("whole", {"TEST.PATIENCE": 0, "SOLVER.MAX_ITER": LAST + 1}))
    ]
    assert same(*weights)


@pytest.mark.parametrize(
    ("values", "patience", "last"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 1, 7),
        ([2, 2, 9, 9, 9, 9, 9, 9], 1, 1),
        ([1, math.nan, 2, math.nan, math.nan, 3, 3, 3], 2, 4),
        ([math.nan] * 8, 3, 2),
        ([math.nan, math.nan, 0, 0, 0, 0, 0, 0], 3, 5),
        ([5, 4, 4, 4, 4, 4, 4, 4], 7, 7),
    ],
)
def test_patience_counts_evaluations_without_a_better_value(run, evaluations, values, patience, last):
    evaluations.values = dict(enumerate(map(float, values)))
    assert finished_iterations(run(**{"TEST.PATIENCE": patience})) == last + 1


def test_metric_that_is_never_a_number_is_reported(run, evaluations, caplog):
    caplog.set_level("INFO")
    evaluations.values = dict.fromkeys(range(8), math.nan)
    folder = run()
    assert "in 3 evaluations (TEST.PATIENCE 3) classification/top1 was not a number." in caplog.text
    assert not (folder / "model_best.pth").exists()


def test_patience_counts_evaluations_not_iterations(run, evaluations):
    evaluations.values = dict.fromkeys(range(8), 1.0)
    assert finished_iterations(run(**{"TEST.EVAL_PERIOD": 2, "TEST.PATIENCE": 2})) == 6


def test_summary_mentions_patience(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(summary, "network_table", lambda *_: "")
    cfg = make(tmp_path)
    register_datasets(cfg)
    summary.log_summary(Trainer(cfg))
    assert "evaluated on digits_test; ends after 3 evaluations without a better classification/top1." in caplog.text


def test_expected_results_are_checked(run):
    expected = {"TEST.EXPECTED_RESULTS": [["classification", "top1", 9.0, 0.1]]}
    with pytest.raises(SystemExit):
        run(**expected)


# ---- Resuming ----
@pytest.mark.parametrize(("cut", "period"), [(0, 1), (1, 1), (1, 2), (3, 3), (LAST, 1), (LAST, 3)])
def test_run_killed_in_an_evaluation_ends_as_if_it_was_not(run, evaluations, cut, period):
    whole = run("whole", **{"SOLVER.CHECKPOINT_PERIOD": period})
    evaluations.cut = cut
    run("cut", **{"SOLVER.CHECKPOINT_PERIOD": period})
    check_same(run("cut", resume=True, **{"SOLVER.CHECKPOINT_PERIOD": period}), whole)


@pytest.mark.parametrize(("kind", "before"), [(BestCheckpointer, True), (EarlyStopping, True), (EarlyStopping, False)])
@pytest.mark.parametrize("cut", [1, LAST])
def test_run_killed_around_the_decision_ends_as_if_it_was_not(run, monkeypatch, kind, before, cut):
    whole = run("whole")
    step = kind.after_step

    def after_step(hook):
        if before and hook.trainer.iter == cut:
            raise Cut
        step(hook)
        if hook.trainer.iter == cut:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(kind, "after_step", after_step)
        run("cut")
    check_same(run("cut", resume=True), whole)


def test_run_killed_before_it_has_written_its_end(run, monkeypatch, evaluations):
    """Its last evaluation is in ``metrics.json``, and its last checkpoint is one of an iteration."""
    whole = run("whole")
    folder = run("cut")
    (folder / "model_final.pth").unlink()
    (folder / "last_checkpoint").write_text(f"model_{LAST:07d}.pth")
    evaluations.made.clear()
    check_same(run("cut", resume=True), whole)
    assert evaluations.made == [LAST], "once, for the results at the end"


def test_missing_final_checkpoint_is_written_again(run):
    whole = run("whole")
    (run("cut") / "model_final.pth").unlink()
    check_same(run("cut", resume=True), whole)


@pytest.mark.parametrize("options", [{}, {"SOLVER.MAX_ITER": 20}])
def test_run_that_ended_early_stays_finished(run, evaluations, options):
    folder = run()
    before = final_state(folder), best(folder), logged(folder)
    evaluations.made.clear()
    run(resume=True, **options)
    assert same(before, (final_state(folder), best(folder), logged(folder)))
    assert evaluations.made == [LAST]


@pytest.mark.parametrize("patience", [0, 4])
def test_more_patience_goes_on(run, patience):
    """The run ends as one that had this patience from the start, but for the count that a run without it lacks."""
    whole = run("whole", **{"TEST.PATIENCE": patience})
    run("more")
    folder = run("more", resume=True, **{"TEST.PATIENCE": patience})
    assert finished_iterations(folder) == finished_iterations(whole) == 8
    assert same(final_state(folder), final_state(whole))
    if patience:
        assert logged(folder) == logged(whole)


def test_longer_run_counts_the_evaluation_at_the_former_end(run, evaluations):
    """It ended after iteration 2, whose evaluation an uninterrupted run counts as well."""
    whole = run("whole")
    run("more", **{"SOLVER.MAX_ITER": 3})
    check_same(run("more", resume=True), whole)


def test_earlier_run_counts_from_where_it_is_resumed(run, evaluations):
    evaluations.cut = 2
    run(**{"TEST.PATIENCE": 0})
    evaluations.values = dict.fromkeys(range(8), 1.0)
    assert finished_iterations(run(resume=True)) == 2 + 1 + 3


def test_another_metric_counts_anew(run, evaluations):
    """The error is always the same, so the run ends three evaluations after the first one that is counted."""
    evaluations.cut = 3
    run()
    assert finished_iterations(run(resume=True, **{"TEST.BEST_METRIC": "classification/error"})) == 3 + 1 + 3


# ---- Kinds of runs ----
@pytest.mark.parametrize("cut", [1, LAST])
def test_averaged_weights_decide(run, evaluations, cut):
    """The student itself gets better and better."""
    evaluations.values = dict(enumerate(map(float, range(8))))
    options = {"TEST.BEST_METRIC": f"ema/{METRIC}", "SOLVER.EMA_DECAY": 0.5}
    whole = run("whole", **options)
    assert finished_iterations(whole) == LAST + 1
    assert logged(whole, f"ema/{METRIC}")[-2:] == [(LAST, VALUES[LAST]), (LAST + 1, VALUES[LAST])]
    evaluations.cut = cut
    run("cut", **options)
    check_same(run("cut", resume=True, **options), whole)


def test_generations_end_each_on_its_own(run, evaluations, tmp_path, caplog):
    options = save_teacher(tmp_path / "teacher", classifier_cfg(options=DIGITS))
    options |= {"MODEL.META_ARCHITECTURE": "TeacherStudent", "KD.STUDENT_ARCHITECTURE": "ImageClassifier"}
    options |= {"KD.HEADS": ["BornAgainHead"], "KD.BORN_AGAIN.SOURCE": "cls", "KD.GENERATIONS": 2}
    (tmp_path / "run").mkdir()
    folder = run(**options)
    assert [finished_iterations(folder / f"gen_{i}") for i in (1, 2)] == [LAST + 1, LAST + 1]
    evaluations.made.clear()
    run(resume=True, **options)
    assert not evaluations.made
    assert "stays as it is" not in caplog.text


def test_stage_of_heads_does_not_end_early(tmp_path):
    assert stages.stage_config(make(tmp_path), tmp_path / "pretrain").TEST.PATIENCE == 0


def test_students_that_teach_each_other(tmp_path, evaluations):
    peer = write_yaml(tmp_path / "peer.yaml", classifier_cfg(options=DIGITS))
    options = {"KD.MUTUAL.PEERS": [peer], "KD.MUTUAL.SOURCE": "cls", "MODEL.META_ARCHITECTURE": "MutualStudents"}
    cfg = make(tmp_path / "run", **options | {"KD.STUDENT_ARCHITECTURE": "ImageClassifier"})
    register_datasets(cfg)
    train(cfg, resume=False)
    assert finished_iterations(tmp_path / "run") == LAST + 1
    assert sorted(path.parent.name for path in tmp_path.glob("run/*/model_final.pth")) == ["peer_1", "peer_2"]


@pytest.mark.slow
def test_two_ranks_killed_and_resumed(tmp_path):
    """A signal ends both before the evaluation of an iteration; the second process makes up for it."""
    task = Task(write_yaml(tmp_path / "config.yaml", make(tmp_path / "run", **{"SOLVER.BASE_LR": 1e-9})), tmp_path)
    event = Event("Trainer", 1, signals=(signal.SIGTERM,))
    for name, events, status in (("whole", (), 0), ("cut", (event,), INTERRUPTED)):
        ranks = [(rank, *events) for rank in two_ranks()]
        assert end(*[task.start(name, prepare=x, log=f"{name}_{i}") for i, x in enumerate(ranks)]) == [status, status]
    ranks = [(rank,) for rank in two_ranks()]
    assert end(*[task.start("cut", prepare=x, resume=True, log=f"l_{i}") for i, x in enumerate(ranks)]) == [0, 0]
    check_same(tmp_path / "cut", tmp_path / "whole")
    assert finished_iterations(tmp_path / "cut") < 8


# ---- Mistakes ----
@pytest.mark.parametrize("options", [{"TEST.BEST_METRIC": ""}, {"TEST.EVAL_PERIOD": 0}])
def test_patience_without_metric_or_evaluations_is_refused(tmp_path, options):
    told = r"^TEST.PATIENCE: must be 0 without TEST.BEST_METRIC and TEST.EVAL_PERIOD, got 3 with BEST_METRIC '.*' and "
    for check in (check_run_values, Trainer):
        cfg = make(tmp_path, **options)
        register_datasets(cfg)
        with pytest.raises(InputError, match=told + r"EVAL_PERIOD \d\.$"):
            check(cfg)


def test_negative_patience_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^TEST.PATIENCE: must be 0 or more, got -1\.$"):
        check_run_values(make(tmp_path, **{"TEST.PATIENCE": -1}))
