"""Runs that are killed at random, again and again, end with the weights of an uninterrupted one.

By default each kind of run is killed a few times, which takes a minute. A long soak prints what it did:

    pytest tests/test_soak.py --kills 200 --kill-seed 1
"""

import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from children import TIME_LIMIT, Task, end, final_state, same, two_ranks
from classification.models import classifier_cfg
from helpers import WIDE, distilled_cfg, save_teacher, tiny_cfg, with_data, write_yaml

from kd_det.checkpoint_files import check_damage
from kd_det.checkpoint_folder import FINAL, read_tag
from kd_det.engine import Trainer
from kd_det.engine.processes import INTERRUPTED

pytestmark = pytest.mark.slow
PER_CHAIN = 5
OPTIONS = {"SOLVER.MAX_ITER": 6, "SOLVER.CHECKPOINT_PERIOD": 2, "SOLVER.CHECKPOINT_KEEP": 2, "SEED": 3}
DIGITS = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8}
SOFT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


# ---- Kinds of runs ----
def detection(coco_folder, folder):
    """A stage, an average of the weights, accumulated gradients, and evaluations."""
    options = OPTIONS | {"KD.PRETRAIN.MAX_ITER": 6, "SOLVER.EMA_DECAY": 0.9, "SOLVER.ACCUMULATE": 2}
    options |= {"TEST.EVAL_PERIOD": 3, "TEST.BEST_METRIC": "bbox/AP"}
    return staged(coco_folder, folder, options)


def two_processes(coco_folder, folder):
    """A stage and an average of the weights, of two ranks."""
    return staged(coco_folder, folder, OPTIONS | {"KD.PRETRAIN.MAX_ITER": 4, "SOLVER.EMA_DECAY": 0.9})


def staged(coco_folder, folder, options):
    teacher = save_teacher(folder / "teacher", tiny_cfg(options=WIDE))
    cfg = distilled_cfg(teacher, ["ReviewKDHead", "FactorTransferHead"], options)
    return Task(write_yaml(folder / "config.yaml", with_data(cfg, coco_folder, folder)), folder)


def generations(_, folder):
    """Two students in a row, each with a stage and an average of the weights."""
    options = OPTIONS | save_teacher(folder / "teacher", classifier_cfg(options=DIGITS))
    options |= {"KD.HEADS": ["BornAgainHead", "HintHead"], "KD.BORN_AGAIN.SOURCE": "cls", "KD.GENERATIONS": 2}
    options |= {"KD.HINT.STAGES": 2, "KD.HINT.IN_FEATURES": ["res3"], "KD.PRETRAIN.MAX_ITER": 4}
    return classifier(folder, options | {"SOLVER.EMA_DECAY": 0.9, "MODEL.META_ARCHITECTURE": "TeacherStudent"})


def mutual(_, folder):
    """Two students that teach each other, updated in turn."""
    peer = write_yaml(folder / "peer.yaml", classifier_cfg(options=DIGITS))
    options = OPTIONS | {"KD.MUTUAL.PEERS": [peer], "KD.MUTUAL.SOURCE": "cls", "KD.MUTUAL.SEQUENTIAL": True}
    return classifier(folder, options | {"TEST.EVAL_PERIOD": 3, "MODEL.META_ARCHITECTURE": "MutualStudents"})


def classifier(folder, options):
    cfg = classifier_cfg(options=DIGITS | options | {"KD.STUDENT_ARCHITECTURE": "ImageClassifier"})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ("digits_test",)
    return Task(write_yaml(folder / "config.yaml", cfg), folder)


# ---- Kinds of kills ----
@dataclass(frozen=True)
class InWrite:
    """Kills a run when it has written half of a checkpoint.

    Attributes:
        number: The how many-th checkpoint of this process, from 1.
    """

    number: int

    def __call__(self):
        save, numbers = torch.save, iter(range(1, 10**9))

        def save_half(data, file):
            save(data, file)
            if next(numbers) == self.number:
                file.truncate(file.tell() // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = save_half


@dataclass(frozen=True)
class InEvaluation:
    """Kills a run soon after an evaluation has begun.

    Attributes:
        number: The how many-th evaluation of this process, from 1.
        delay: Seconds from its beginning.
    """

    number: int
    delay: float

    def __call__(self):
        test, numbers = Trainer.test.__func__, iter(range(1, 10**9))

        def evaluate(cls, *arguments):
            if next(numbers) == self.number:
                threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return test(cls, *arguments)

        Trainer.test = classmethod(evaluate)


@dataclass
class Kill:
    """A kill of a run.

    Attributes:
        mode: Its name.
        prepare: Functions to call in the run's processes before.
        signals: What is sent to the run at some time, in this order.
        group: Whether to all processes of a rank, or to its main process alone.
        rank: To which rank; None: to all.
    """

    mode: str
    prepare: tuple = ()
    signals: tuple[int, ...] = ()
    group: bool = False
    rank: int | None = None

    @classmethod
    def draw(cls, rng, ranks):
        """Draw one of all kinds."""
        rank = rng.randrange(ranks) if ranks > 1 else 0
        soft = rng.choice(SOFT)
        kills = [
            cls("SIGKILL of the group", signals=(signal.SIGKILL,), group=True),
            cls("SIGKILL of the main process", signals=(signal.SIGKILL,), rank=rank),
            cls("SIGKILL within a write", prepare=(InWrite(rng.randint(1, 4)),)),
            cls("SIGKILL within an evaluation", prepare=(InEvaluation(rng.randint(1, 2), rng.uniform(0, 0.2)),)),
            cls(f"{soft.name} to the group", signals=(soft,), group=True),
            cls(f"{soft.name} to one process", signals=(soft,), rank=rank),
            cls("SIGINT twice", signals=(signal.SIGINT, signal.SIGINT), rank=rank),
        ]
        return rng.choice(kills)

    def strike(self, processes):
        for number in self.signals:
            for i, process in enumerate(processes):
                if self.rank in (None, i) and process.is_alive():
                    with suppress(ProcessLookupError):  # Its group is not there yet, or not any more.
                        (os.killpg if self.group else os.kill)(process.pid, number)
            time.sleep(0.02)

    def expected(self, status):
        """Whether a process may end with a status: 0 if it was not hit, or 1 beside a rank that was."""
        if signal.SIGKILL in self.signals or self.prepare:
            return status in (0, 1, -signal.SIGKILL)
        # Before the training has begun the signal ends the process, or Python raises KeyboardInterrupt; and a launcher
        # kills the rank that waits for one which ended so.
        return status in (0, 1, INTERRUPTED, -signal.SIGKILL, *(-number for number in self.signals))


# ---- What is found ----
@dataclass
class Figures:
    """What a soak did."""

    kills: Counter = field(default_factory=Counter)
    statuses: Counter = field(default_factory=Counter)
    chains: Counter = field(default_factory=Counter)
    differences: list = field(default_factory=list)

    def __str__(self):
        def told(counts):
            return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))

        return (
            f"{self.kills.total()} kills: {told(self.kills)}\n"
            f"statuses: {told({str(key): count for key, count in self.statuses.items()})}\n"
            f"{self.chains.total()} chains: {told(self.chains)}\n"
            f"files with other contents: {', '.join(self.differences) or 'none'}"
        )


@pytest.fixture(scope="module")
def figures(pytestconfig):
    found = Figures()
    yield found
    if pytestconfig.getoption("--kills") is not None:
        with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{found}")


def processes_of(sessions):
    """The processes that are left of some sessions."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                found.append(path.parent.name)
    return found


def check_no_process_is_left(processes):
    limit = time.monotonic() + 30  # A worker sees within five seconds that its run is dead.
    sessions = {process.pid for process in processes}
    while left := processes_of(sessions):
        assert time.monotonic() < limit, f"orphans: {left}"
        time.sleep(0.1)


def end_as_a_launcher_does(processes):
    """Exit statuses; once a rank has failed, the others have some seconds."""
    limit = time.monotonic() + TIME_LIMIT
    while {process.exitcode for process in processes} <= {None, 0} and any(x.is_alive() for x in processes):
        assert time.monotonic() < limit, "hangs"
        wait([process.sentinel for process in processes if process.is_alive()], timeout=1)
    for process in processes:
        process.join(10)
        process.kill()
    return end(*processes)


def check_tags(folder):
    """What the next run would go on from is whole."""
    for path in folder.rglob("last_checkpoint"):
        check_damage(path.parent / read_tag(path.parent))


def finals(folder):
    return {path.parent.relative_to(folder) for path in folder.rglob(FINAL)}


# ---- The soak ----
@dataclass
class Chain:
    """A run that is killed, and resumed until it has ended."""

    task: Task
    name: str
    ranks: int
    seconds: float
    rng: random.Random
    figures: Figures

    def start(self, prepare=()):
        workers = ("DATALOADER.NUM_WORKERS", self.rng.randrange(2))
        ranks = [(x,) for x in two_ranks()] if self.ranks > 1 else [()]
        return [
            self.task.start(self.name, *workers, prepare=(*rank, *prepare), resume=True, log=f"{self.name}_{i}")
            for i, rank in enumerate(ranks)
        ]

    def kill(self):
        """Start the run and kill it once; returns whether it had ended before."""
        kill = Kill.draw(self.rng, self.ranks)
        processes = self.start(kill.prepare)
        if kill.signals:
            processes[0].join(self.rng.uniform(0, self.seconds))
            kill.strike(processes)
        statuses = end_as_a_launcher_does(processes)
        check_no_process_is_left(processes)
        assert all(map(kill.expected, statuses)), (kill, statuses)
        check_tags(self.task.folder / self.name)
        if any(statuses):
            self.figures.kills[kill.mode] += 1
        self.figures.statuses[tuple(statuses)] += 1
        return not any(statuses)

    def finish(self):
        processes = self.start()
        assert end(*processes) == [0] * self.ranks
        check_no_process_is_left(processes)


@pytest.mark.parametrize("make", [detection, generations, mutual, two_processes])
def test_killed_at_random_a_run_ends_with_the_same_weights(make, coco_folder, tmp_path, pytestconfig, figures):
    kills = pytestconfig.getoption("--kills")
    kills = 2 if kills is None else kills // 4
    rng = random.Random(f"{make.__name__} {pytestconfig.getoption('--kill-seed')}")
    ranks = 2 if make is two_processes else 1
    task = make(coco_folder, tmp_path)
    begin = time.monotonic()
    Chain(task, "whole", ranks, 0, rng, figures).finish()
    seconds = time.monotonic() - begin
    done, before = 0, figures.kills.total()
    while (done := figures.kills.total() - before) < kills:
        chain = Chain(task, f"cut_{figures.chains.total()}", ranks, seconds, rng, figures)
        for _ in range(min(PER_CHAIN, kills - done)):
            if chain.kill():
                break
        chain.finish()
        figures.chains[make.__name__] += 1
        whole, cut = tmp_path / "whole", tmp_path / chain.name
        assert finals(cut) == finals(whole)
        different = [
            str(cut / folder)
            for folder in sorted(finals(whole))
            if not same(final_state(cut / folder), final_state(whole / folder))
        ]
        figures.differences += different
        assert not different
        assert not list(cut.rglob("*.partial"))
