"""Tests termination signals: the iteration is finished and saved, the status is 75, and the run can be resumed."""

import signal
from types import SimpleNamespace

import pytest
import torch
from children import Event, Task, end, final_state, same, two_ranks
from classification.models import classifier_cfg
from helpers import distilled_cfg, run_train_net, save_teacher, with_data, write_yaml

from kd_det.engine import interruption
from kd_det.engine.interruption import FIRST, INTERRUPTED, LONGEST, Interruption
from kd_det.meta_arch import TeacherStudent

STAGE, RUN = "PretrainingTrainer", "Trainer"
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.fixture
def task(teacher, coco_folder, tmp_path):
    """A stage and a main run of six iterations, which save nothing on their own before the end."""
    options = {"SOLVER.MAX_ITER": 6, "KD.PRETRAIN.MAX_ITER": 6}
    cfg = with_data(distilled_cfg(teacher, ["FactorTransferHead"], options), coco_folder, tmp_path)
    cfg.DATASETS.TEST = ()
    return Task(write_yaml(tmp_path / "config.yaml", cfg), tmp_path)


def ask(*signals, trainer=RUN, iteration=2, group=False, phase="backward", folder=""):
    return (Event(trainer, iteration, phase, signals, group=group, folder=folder),)


def last(folder):
    return (folder / "last_checkpoint").read_text()


@pytest.mark.parametrize(
    ("number", "trainer"), [(signal.SIGTERM, STAGE), (signal.SIGTERM, RUN), (signal.SIGINT, RUN), (signal.SIGUSR1, RUN)]
)
def test_signal_finishes_and_saves_the_iteration(task, tmp_path, number, trainer):
    assert task.run("cut", prepare=ask(number, trainer=trainer)) == INTERRUPTED == 75
    assert last(tmp_path / "cut" / ("pretrain" if trainer == STAGE else "")) == "model_0000002.pth"
    printed = (tmp_path / "cut.txt").read_text()
    assert f"{number.name}: the run ends when this iteration is saved.\n" in printed
    assert "Interrupted after iteration 2, which is saved; continue with --resume." in printed
    assert "Traceback" not in printed
    assert task.run("cut", resume=True) == 0
    assert task.run("whole") == 0
    assert same(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))


def test_signal_in_a_generation(tmp_path):
    size = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8}
    options = save_teacher(tmp_path / "teacher", classifier_cfg(options=size))
    options |= {"KD.HEADS": ["BornAgainHead"], "KD.BORN_AGAIN.SOURCE": "cls", "KD.GENERATIONS": 2, "SEED": 4}
    options |= {"SOLVER.MAX_ITER": 4, "KD.STUDENT_ARCHITECTURE": "ImageClassifier"}
    cfg = classifier_cfg(options=size | options | {"MODEL.META_ARCHITECTURE": "TeacherStudent"})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ()
    task = Task(write_yaml(tmp_path / "config.yaml", cfg), tmp_path)
    assert task.run("cut", prepare=ask(signal.SIGTERM, folder="gen_2", iteration=1)) == INTERRUPTED
    assert [last(tmp_path / "cut" / name) for name in ("gen_1", "gen_2")] == ["model_final.pth", "model_0000001.pth"]
    assert task.run("cut", resume=True) == 0
    assert task.run("whole") == 0
    for name in ("gen_1", "gen_2"):
        assert same(final_state(tmp_path / "cut" / name), final_state(tmp_path / "whole" / name))


def test_signal_in_the_last_iteration_lets_the_run_finish(task, tmp_path):
    assert task.run("cut", prepare=ask(signal.SIGTERM, iteration=5)) == 0
    assert last(tmp_path / "cut") == "model_final.pth"


def test_signal_after_the_stage_saves_the_main_run(task, tmp_path):
    assert task.run("cut", prepare=ask(signal.SIGTERM, trainer=STAGE, iteration=5)) == INTERRUPTED
    assert last(tmp_path / "cut") == "model_0000000.pth"


@pytest.mark.parametrize("number", SIGNALS)
def test_loader_workers_ignore_the_signal(task, tmp_path, number):
    """A terminal or a cluster signals them, too; the iteration needs their images."""
    prepare = ask(number, group=True, phase="before", iteration=4)
    assert task.run("cut", "DATALOADER.NUM_WORKERS", 2, prepare=prepare) == INTERRUPTED
    assert last(tmp_path / "cut") == "model_0000004.pth"


def interrupt_evaluation():
    """All are asked to end while the workers load the test images."""
    run, event = TeacherStudent.forward, ask(signal.SIGTERM, group=True)[0]

    def forward(model, images):
        if not model.training:
            event.strike()
        return run(model, images)

    TeacherStudent.forward = forward


def test_signal_lets_an_evaluation_finish(task, tmp_path, coco_folder):
    name = str(coco_folder).strip("/").replace("/", "_").replace(".", "_")
    options = ["DATASETS.TEST", f"('{name}',)", "TEST.EVAL_PERIOD", 3, "DATALOADER.NUM_WORKERS", 1]
    assert task.run("cut", *options, prepare=(interrupt_evaluation,)) == INTERRUPTED
    assert last(tmp_path / "cut") == "model_0000003.pth"
    assert '"bbox/AP"' in (tmp_path / "cut" / "metrics.json").read_text()


def test_second_ctrl_c_ends_at_once(task, tmp_path):
    assert task.run("cut", prepare=ask(signal.SIGINT, signal.SIGINT)) == -signal.SIGINT
    assert not (tmp_path / "cut" / "last_checkpoint").exists()


def test_launcher_may_repeat_other_signals(task, tmp_path):
    again = ask(signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM)
    assert task.run("cut", prepare=again) == INTERRUPTED
    assert last(tmp_path / "cut") == "model_0000002.pth"


# ---- Several processes ----
@pytest.mark.parametrize("told", [0, 1])
def test_signal_to_one_rank_ends_all_after_the_same_iteration(task, tmp_path, told):
    ranks = [(rank,) for rank in two_ranks()]
    ranks[told] += ask(signal.SIGUSR1)
    assert end(*[task.start("cut", prepare=x, log=f"rank_{i}") for i, x in enumerate(ranks)]) == [INTERRUPTED] * 2
    assert last(tmp_path / "cut") == "model_0000002.pth"
    for name in ("cut", "whole"):
        assert end(*[task.start(name, prepare=(x,), resume=True, log="log") for x in two_ranks()]) == [0, 0]
    assert same(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))


class Run:
    """A run of two ranks whose iterations take some seconds; the other rank may be slower and may get a signal."""

    def __init__(self, monkeypatch, seconds, *, slower=1.0, evaluation_period=0, start=0):
        self.now, self.seconds, self.slower, self.start = 0.0, seconds, slower, start
        self.agreed, self.signal_from = [], 10**9
        monkeypatch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(interruption.comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(interruption.comm, "_get_global_gloo_group", lambda: None)
        monkeypatch.setattr(interruption.distributed, "all_reduce", self.all_reduce)
        self.hook = Interruption(evaluation_period)
        self.hook.trainer = SimpleNamespace(iter=start, start_iter=start, max_iter=10**6)

    def all_reduce(self, state, operation, group):
        self.agreed.append(self.hook.trainer.iter)
        other = [float(self.hook.trainer.iter >= self.signal_from), float(state[1]) * self.slower]
        state.copy_(torch.maximum(state, torch.tensor(other)))

    def ends_after(self, iterations):
        self.hook.before_train()
        for i in range(self.start, self.start + iterations):
            self.hook.trainer.iter = i
            self.now += self.seconds
            if self.hook._is_asked_to_end():
                return i
        return None


def test_ranks_agree_about_once_a_second(monkeypatch):
    run = Run(monkeypatch, 1 / 16, start=100)
    run.signal_from = 145
    assert run.ends_after(200) == 158
    assert run.agreed == [*range(100, 100 + FIRST), 110, 126, 142, 158]


def test_ranks_agree_as_often_as_suits_the_slowest(monkeypatch):
    run = Run(monkeypatch, 1 / 16, slower=4)
    assert run.ends_after(40) is None
    assert run.agreed == [*range(FIRST), *range(10, 40, 4)]


@pytest.mark.parametrize(("seconds", "steps"), [(3.0, 1), (0.0, LONGEST)])
def test_slow_and_fast_iterations(monkeypatch, seconds, steps):
    run = Run(monkeypatch, seconds)
    run.ends_after(200)
    assert run.agreed == [*range(FIRST), *range(FIRST, 200, steps)]


def test_ranks_agree_before_each_evaluation(monkeypatch):
    run = Run(monkeypatch, 0.0, evaluation_period=40)
    run.ends_after(130)
    assert run.agreed == [*range(FIRST), 10, 39, 79, 119]


TELL_PARENT = """
import os, signal
from kd_det.engine import Trainer
from kd_det.engine.stages import PretrainingTrainer
from detectron2.utils import comm

step = Trainer.run_step

def run_step(trainer):
    if trainer.iter == 2 and comm.get_rank() == 1 and type(trainer) is Trainer:
        os.kill(os.getppid(), signal.SIGTERM)
    step(trainer)

Trainer.run_step = run_step
"""


@pytest.fixture
def plugin(tmp_path):
    """In the main run's iteration 2, whoever launched rank 1 is asked to end."""
    path = tmp_path / "tell_parent.py"
    path.write_text(TELL_PARENT, encoding="utf-8")
    return path


def saved_before_the_end(folder):
    """The signal makes its way through the launcher while the iterations go on."""
    return 2 <= int(last(folder).removeprefix("model_").removesuffix(".pth")) < 499


@pytest.mark.slow
def test_signal_under_torchrun(task, tmp_path, plugin):
    """The launcher's status is 1, or that of an abort: its thread of heartbeats may run into its own end."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = ["--config-file", task.config, "--plugin", plugin, "OUTPUT_DIR", tmp_path / "output"]
    arguments += ["KD.PRETRAIN.MAX_ITER", 1, "SOLVER.MAX_ITER", 500]
    done = run_train_net(*arguments, launcher=launcher)
    assert done.returncode in (1, -signal.SIGABRT), done.stderr
    assert "Interrupted after iteration" in done.stdout + done.stderr
    assert saved_before_the_end(tmp_path / "output")


KILL_PARENT = TELL_PARENT.replace("signal.SIGTERM", "signal.SIGKILL")


@pytest.mark.slow
def test_ranks_end_if_their_launcher_is_killed(task, tmp_path, plugin):
    """They save, as when they are asked to end."""
    plugin.write_text(KILL_PARENT, encoding="utf-8")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = ["--config-file", task.config, "--plugin", plugin, "OUTPUT_DIR", tmp_path / "output"]
    arguments += ["KD.PRETRAIN.MAX_ITER", 1, "SOLVER.MAX_ITER", 500]
    # Its output comes to an end with the last process that writes there.
    done = run_train_net(*arguments, launcher=launcher)
    assert done.returncode == -signal.SIGKILL
    assert "Interrupted after iteration" in done.stdout + done.stderr
    assert saved_before_the_end(tmp_path / "output")


# As on a machine of two GPUs; the ranks themselves find none and go on with the CPU.
TWO_GPUS = """
import runpy, sys, torch
torch.cuda.device_count = lambda: 2
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "status"), [(TELL_PARENT, INTERRUPTED), (KILL_PARENT, -signal.SIGKILL)], ids=["SIGTERM", "SIGKILL"]
)
def test_signal_under_num_gpus(task, tmp_path, plugin, told, status):
    """The process that launches the ranks passes on what it is told, and ends with their status."""
    plugin.write_text(told, encoding="utf-8")
    arguments = ["--config-file", task.config, "--plugin", plugin, "--num-gpus", 2, "OUTPUT_DIR", tmp_path / "output"]
    arguments += ["KD.PRETRAIN.MAX_ITER", 1, "SOLVER.MAX_ITER", 500]
    (tmp_path / "two_gpus.py").write_text(TWO_GPUS, encoding="utf-8")
    done = run_train_net(*arguments, launcher=(tmp_path / "two_gpus.py",))
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert saved_before_the_end(tmp_path / "output")
