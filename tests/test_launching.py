"""Tests the processes of a run, on several GPUs and under srun; other SLURM jobs are runs of one process."""

import functools
import os
import signal
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from children import Task, end, two_ranks
from classification.models import classifier_cfg
from detectron2.utils import comm
from helpers import parse, write_yaml
from torch.multiprocessing import start_processes

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


def test_each_srun_task_is_a_rank(path):
    scontrol = path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[03-04]" ] && echo gpu03 && echo gpu04\n')
    scontrol.chmod(0o755)
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert rank_of_task(SRUN) == expected | {"MASTER_ADDR": "gpu03", "MASTER_PORT": "23458"}
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(InputError, match=r"^MASTER_ADDR: not set, and scontrol cannot find the first machine of gpu"):
        rank_of_task(SRUN)


@pytest.mark.usefixtures("path")
def test_meeting_place_can_be_given():
    place = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert place.items() <= rank_of_task(SRUN | place).items()
    with pytest.raises(InputError, match=r"^MASTER_ADDR: not set, .* of gpu\[03-04\]; export its name\.$"):
        rank_of_task(SRUN | {"MASTER_PORT": "29500"})


def test_unequal_machines_are_refused():
    with pytest.raises(InputError, match=r"^srun: the machines have 4\(x2\),3 tasks; give each the same number"):
        rank_of_task(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"})


@pytest.mark.parametrize("variables", [BATCH, BATCH | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"}])
def test_single_task_is_a_plain_run(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = []
    launch_workers(lambda args: found.append((args.config_file, comm.get_world_size())), parse("--config-file", "x"))
    assert found == [(["x"], 1)]


def test_torchrun_inside_srun_sets_the_rank(monkeypatch):
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "RANK": "3"}
    for name, value in (SRUN | torchrun).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launching, "run_rank", lambda main, args: main(os.environ["RANK"]))
    found = []
    launch_workers(found.append, parse())
    assert found == ["3"]


def test_more_gpus_than_available_are_refused():
    with pytest.raises(InputError, match=r"^--num-gpus: got 99, but this machine has \d+ GPUs\.$"):
        launch_workers(lambda args: None, parse("--num-gpus", "99"))


def pretend_gpus(monkeypatch, *, gpus, processes, rank=0):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    monkeypatch.setattr(comm, "get_local_size", lambda: processes)
    monkeypatch.setattr(comm, "get_local_rank", lambda: rank)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """SLURM may show each task only its own GPU."""
    pretend_gpus(monkeypatch, gpus=1, processes=4)
    with pytest.raises(
        InputError, match=r"^4 processes of this machine see 1 GPU\(s\); each needs one, .*gpus-per-node"
    ):
        launching.use_own_gpu("cuda")


def test_gpus_are_not_needed_for_a_model_on_the_cpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    pretend_gpus(monkeypatch, gpus=1, processes=4)
    launching.use_own_gpu("cpu")
    pretend_gpus(monkeypatch, gpus=1, processes=1)
    launching.use_own_gpu("cuda")
    assert chosen == []
    pretend_gpus(monkeypatch, gpus=4, processes=4, rank=2)
    launching.use_own_gpu("cuda")
    assert chosen == [2]


@dataclass(frozen=True)
class PretendOneGpu:
    """Shows a rank one GPU, to whose backend gloo stands in."""

    def __call__(self):
        init = torch.distributed.init_process_group
        torch.cuda.device_count = lambda: 1

        def pretend(backend, **options):
            assert backend == "gloo"  # There is no GPU but in `device_count`.
            init("cpu:gloo,cuda:gloo", **options)

        torch.distributed.init_process_group = pretend


@pytest.mark.parametrize(("available", "backends"), [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_backend_follows_the_device_of_the_tensors(monkeypatch, available, backends):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: asked.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: asked.append("end"))
    monkeypatch.setattr(comm, "create_local_process_group", asked.append)
    launching.run_rank(lambda args: asked.append(args), parse("--config-file", "x"))
    assert asked[:2] + asked[3:] == [backends, 2, "end"]


@pytest.mark.parametrize(
    ("error", "together"), [(None, True), (SystemExit(75), True), (InputError("KD.X: wrong"), False)]
)
def test_failing_rank_does_not_wait_for_the_others(monkeypatch, error, together):
    """They may wait for it in turn, in an exchange of tensors; its error must be told."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    ended = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(True))
    monkeypatch.setattr(comm, "create_local_process_group", lambda size: None)

    def main(args):
        if error is not None:
            raise error

    with pytest.raises(type(error)) if error is not None else nullcontext():
        launching.run_rank(main, parse())
    assert bool(ended) is together


def refuse(args):
    raise InputError("KD.HEADS: this rank cannot")


def break_down(args):
    raise KeyError("a defect")


def be_killed(args):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("main", "error", "message"),
    [
        (refuse, InputError, r"^KD.HEADS: this rank cannot$"),
        (break_down, torch.multiprocessing.ProcessRaisedException, "a defect"),
        (be_killed, InputError, r"^process \d terminated with signal SIGKILL; its earlier output says why"),
    ],
)
def test_errors_of_spawned_ranks(monkeypatch, main, error, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    forks = functools.partial(start_processes, start_method="forkserver")
    monkeypatch.setattr(launching, "start_processes", forks)
    with pytest.raises(error, match=message):
        launch_workers(main, parse("--num-gpus", "2", "--dist-url", "auto"))


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
    """On CPUs, of a machine with a single GPU."""
    options = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8, "SOLVER.MAX_ITER": 2, "SEED": 1}
    cfg = classifier_cfg(options=options)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ()
    task = Task(write_yaml(tmp_path / "config.yaml", cfg), tmp_path)
    tasks = [SrunTask(x.rank, x.port) for x in two_ranks()]
    prepare = [(PretendOneGpu(), x) for x in tasks]
    assert end(*[task.start("run", prepare=x, log=f"task_{i}") for i, x in enumerate(prepare)]) == [0, 0]
    assert torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["trainer"]["processes"] == 2
    assert (tmp_path / "run" / "log.txt.rank1").is_file()
