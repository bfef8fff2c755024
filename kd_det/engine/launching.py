"""The processes of a run: started here, or by ``torchrun`` or SLURM's ``srun``, of which this is one."""

import os
import re
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping

import torch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from kd_det.engine.cli import find_message, plain_errors
from kd_det.engine.processes import INTERRUPTED, end_with_parent, passing_on
from kd_det.errors import InputError


def launch_workers(main: Callable[[Namespace], None], args: Namespace) -> None:
    """Run `main(args)` on each GPU that ``--num-gpus`` asks for, or as one rank of ``torchrun`` or ``srun``.

    A batch script of SLURM and a shell in an allocation run as they would without it, and so does ``srun`` of one task.

    Raises:
        InputError: If the machine has fewer GPUs, or what SLURM tells does not make a rank.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())
        run_rank(main, args)
        return
    # Other variables, such as SLURM_NTASKS and SLURM_PROCID, are in batch scripts and interactive shells, too.
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        os.environ |= rank_of_task(os.environ)
        run_rank(main, args)
        return
    if args.num_gpus > 1 and args.num_gpus > torch.cuda.device_count():
        raise InputError(f"--num-gpus: {args.num_gpus} asked for, but this machine has {torch.cuda.device_count()}.")
    if args.num_gpus * args.num_machines <= 1:
        main(args)
        return
    if args.dist_url == "auto":
        args.dist_url = f"tcp://127.0.0.1:{free_port()}"
    try:
        with passing_on():
            # When this process is killed, torch sends SIGINT to those that it starts here.
            start_processes(run_spawned_rank, args=(main, args), nprocs=args.num_gpus)
    except ProcessExitedException as error:
        if error.exit_code == INTERRUPTED:
            sys.exit(INTERRUPTED)
        raise InputError(f"{error}; what it said before tells why, if a signal did not end it.") from error
    except ProcessRaisedException as error:
        message = find_message(str(error))
        if message is None:
            raise
        raise InputError(message) from error


def run_spawned_rank(local_rank: int, main: Callable[[Namespace], None], args: Namespace) -> None:
    """Run `main(args)` as one of the ranks that ``--num-gpus`` asks for."""
    os.setsid()  # A terminal's Ctrl-C comes by the process that launched it, once.
    rank, size = args.machine_rank * args.num_gpus + local_rank, args.num_machines * args.num_gpus
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(args.num_gpus)}
    with plain_errors():
        run_rank(main, args, args.dist_url)


def run_rank(main: Callable[[Namespace], None], args: Namespace, meeting_place: str = "env://") -> None:
    """Run `main(args)` as the rank that the environment names in ``torchrun``'s variables.

    Tensors on GPUs are exchanged by NCCL, those on CPUs by gloo, whatever this machine has.

    Args:
        main: What to run.
        args: Its arguments.
        meeting_place: URL at which the ranks find each other; by default that of ``torchrun``'s variables.
    """
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        init_method=meeting_place,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=DEFAULT_TIMEOUT,
    )
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        main(args)
    except SystemExit:  # All ranks end together.
        torch.distributed.destroy_process_group()
        raise
    # Not after an error: a rank that fails alone would wait here for the others, and not say why it failed.
    torch.distributed.destroy_process_group()


def use_own_gpu(device: str) -> None:
    """Give a rank, whose model runs on GPUs, the GPU of its number on this machine.

    Args:
        device: MODEL.DEVICE.

    Raises:
        InputError: If the processes of this machine are more than its GPUs.
    """
    if torch.device(device).type != "cuda" or comm.get_world_size() == 1:
        return
    gpus, processes = torch.cuda.device_count(), comm.get_local_size()
    if gpus < processes:
        raise InputError(
            f"{processes} processes of this machine see {gpus} GPU(s); each needs one, and must see those of all "
            "(srun: --gpus-per-node, not --gpus-per-task)."
        )
    torch.cuda.set_device(comm.get_local_rank())


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_of_task(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that ``torchrun`` would set for a task of ``srun``.

    The machine and the port at which ranks meet are MASTER_ADDR and MASTER_PORT where these are set, or else the first
    machine of the tasks and a port that job and step make.

    Args:
        variables: Those of the task.

    Raises:
        InputError: If machines have unequal numbers of tasks, or the first machine cannot be told.
    """
    per_machine = re.fullmatch(r"(\d+)(?:\(x\d+\))?", variables["SLURM_STEP_TASKS_PER_NODE"])
    if not per_machine:
        raise InputError(
            f"srun: the machines have {variables['SLURM_STEP_TASKS_PER_NODE']} tasks; give each the same number "
            "(--ntasks-per-node)."
        )
    port = 20000 + (int(variables["SLURM_JOB_ID"]) + int(variables["SLURM_STEP_ID"])) % 10000
    return {
        "RANK": variables["SLURM_PROCID"],
        "WORLD_SIZE": variables["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": per_machine[1],
        "MASTER_ADDR": variables.get("MASTER_ADDR") or first_machine(variables["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": variables.get("MASTER_PORT") or str(port),
    }


def first_machine(machines: str) -> str:
    """The first one of a list as SLURM writes it, such as ``gpu[03-04]``.

    Raises:
        InputError: If SLURM's ``scontrol`` cannot be asked.
    """
    try:
        asked = subprocess.run(["scontrol", "show", "hostnames", machines], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"MASTER_ADDR: not set, and scontrol cannot tell the first machine of {machines}; export its name."
        ) from error
    return asked.stdout.split()[0]
