"""Processes of a run: under SLURM's srun they find each other; whatever else SLURM starts is a run of one process."""

import os
from dataclasses import dataclass

import pytest
import torch
from children import Task, end, two_ranks
from classification.models import classifier_cfg
from detectron2.utils import comm
from helpers import parse, write_yaml

from kd_det import InputError
from kd_det.engine import launching
from kd_det.engine.launching import launch_workers, rank_of_task

# What srun sets for task 5 of eight tasks on two machines.
SRUN = {"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_PROCID": "5"}
SRUN |= {"SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NTASKS": "8"}
# What a batch script of as many tasks is given, and a shell in an allocation.
BATCH = {"SLURM_JOB_ID": "123456", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where commands are looked for: a folder of its own."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def test_a_task_is_a_rank(path):
    scontrol = path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[03-04]" ] && echo gpu03 && echo gpu04\n')
    scontrol.chmod(0o755)
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert rank_of_task(SRUN) == expected | {"MASTER_ADDR": "gpu03", "MASTER_PORT": "23458"}
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(InputError, match=r"^MASTER_ADDR: not set, and scontrol cannot tell the first machine of gpu"):
        rank_of_task(SRUN)


@pytest.mark.usefixtures("path")
def test_the_meeting_place_may_be_said():
    place = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert place.items() <= rank_of_task(SRUN | place).items()
    with pytest.raises(InputError, match=r"^MASTER_ADDR: not set, .* of gpu\[03-04\]; export its name\.$"):
        rank_of_task(SRUN | {"MASTER_PORT": "29500"})


def test_unequal_machines():
    with pytest.raises(InputError, match=r"^srun: the machines have 4\(x2\),3 tasks; give each the same number"):
        rank_of_task(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"})


@pytest.mark.parametrize("variables", [BATCH, BATCH | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"}])
def test_a_single_task_is_a_plain_run(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = []
    launch_workers(lambda args: found.append((args.config_file, comm.get_world_size())), parse("--config-file", "x"))
    assert found == [("x", 1)]


def test_torchrun_started_by_srun_tells_the_rank(monkeypatch):
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "RANK": "3"}
    for name, value in (SRUN | torchrun).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launching, "run_rank", lambda main, args: main(os.environ["RANK"]))
    found = []
    launch_workers(found.append, parse())
    assert found == ["3"]


def test_more_gpus_than_there_are():
    with pytest.raises(InputError, match=r"^--num-gpus: 99 asked for, but this machine has \d+\.$"):
        launch_workers(lambda args: None, parse("--num-gpus", "99"))


def test_more_processes_than_gpus(monkeypatch):
    """So it is, too, where SLURM shows each task its own GPU alone."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        InputError, match=r"^4 processes of this machine see 1 GPU\(s\); each needs one, .*gpus-per-node"
    ):
        launch_workers(lambda args: None, parse())


@dataclass(frozen=True)
class SrunTask:
    """Makes a training one of two tasks of ``srun``."""

    rank: int
    port: int

    def __call__(self):
        os.environ |= {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}
        os.environ |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NTASKS": "2"}
        os.environ |= {"SLURM_PROCID": str(self.rank), "SLURM_LOCALID": str(self.rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}


def test_two_tasks_of_srun_train_one_model(tmp_path):
    options = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8, "SOLVER.MAX_ITER": 2, "SEED": 1}
    cfg = classifier_cfg(options=options)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ()
    task = Task(write_yaml(tmp_path / "config.yaml", cfg), tmp_path)
    tasks = [SrunTask(x.rank, x.port) for x in two_ranks()]
    assert end(*[task.start("run", prepare=(x,), log=f"task_{x.rank}") for x in tasks]) == [0, 0]
    assert torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["trainer"]["processes"] == 2
    assert (tmp_path / "run" / "log.txt.rank1").is_file()
