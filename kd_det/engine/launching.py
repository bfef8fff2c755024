"""Starts the processes of a run, or joins those that ``torchrun`` or SLURM's ``srun`` has started."""

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
from kd_det.engine.processes import INTERRUPTED, end_with_parent, forwarding_signals
from kd_det.errors import InputError


def launch_workers(main: Callable[[Namespace], None], args: Namespace) -> None:
    """Runs `main(args)` on each GPU that ``--num-gpus`` asks for, or as one rank of ``torchrun`` or ``srun``.

    A SLURM batch script, a shell in an allocation and ``srun`` with one task behave as if SLURM were absent.

    Raises:
        InputError: If the machine has fewer GPUs, or SLURM's variables do not describe a rank.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())
        run_rank(main, args)
        return
    # Other variables, such as SLURM_NTASKS and SLURM_PROCID, are also set in batch scripts and interactive shells.
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        os.environ |= rank_of_task(os.environ)
        run_rank(main, args)
        return
    if args.num_gpus > 1 and args.num_gpus > torch.cuda.device_count():
        raise InputError(f"--num-gpus: got {args.num_gpus}, but this machine has {torch.cuda.device_count()} GPUs.")
    if args.num_gpus * args.num_machines <= 1:
        main(args)
        return
    if args.dist_url == "auto":
        args.dist_url = f"tcp://127.0.0.1:{free_port()}"
    try:
        with forwarding_signals():
            # If this process is killed, torch sends SIGINT to the processes that it has started here.
            start_processes(run_spawned_rank, args=(main, args), nprocs=args.num_gpus)
    except ProcessExitedException as error:
        if error.exit_code == INTERRUPTED:
            sys.exit(INTERRUPTED)
        raise InputError(f"{error}; its earlier output says why, unless a signal ended it.") from error
    except ProcessRaisedException as error:
        message = find_message(str(error))
        if message is None:
            raise
        raise InputError(message) from error


def run_spawned_rank(local_rank: int, main: Callable[[Namespace], None], args: Namespace) -> None:
    """Runs `main(args)` as one of the ranks that ``--num-gpus`` asks for."""
    os.setsid()  # A Ctrl-C then reaches this process only once, through its launcher.
    rank, size = args.machine_rank * args.num_gpus + local_rank, args.num_machines * args.num_gpus
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(args.num_gpus)}
    with plain_errors():
        run_rank(main, args, args.dist_url)


def run_rank(main: Callable[[Namespace], None], args: Namespace, meeting_place: str = "env://") -> None:
    """Runs `main(args)` as the rank that the environment names in ``torchrun``'s variables.

    GPU tensors are exchanged by NCCL and CPU tensors by gloo, whatever hardware this machine has.

    Args:
        main: The function to run.
        args: Its arguments.
        meeting_place: URL at which the ranks find each other; by default taken from ``torchrun``'s variables.
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
    except SystemExit:  # All ranks exit together here.
        torch.distributed.destroy_process_group()
        raise
    # Skip this after an error: a rank that fails alone would wait here for the others and never report its error.
    torch.distributed.destroy_process_group()


def use_own_gpu(device: str) -> None:
    """Selects the GPU with the rank's local number, if its model runs on a GPU.

    Args:
        device: MODEL.DEVICE.

    Raises:
        InputError: If this machine has more processes than GPUs.
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
    """Finds a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_of_task(variables: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that ``torchrun`` would set for a task of ``srun``.

    The ranks meet at MASTER_ADDR and MASTER_PORT if these are set, and otherwise on the first machine of the tasks, at
    a port computed from the numbers of the job and the step.

    Args:
        variables: Environment variables of the task.

    Raises:
        InputError: If machines have unequal numbers of tasks, or the first machine cannot be determined.
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
    """Returns the first machine of a list in SLURM's notation, such as ``gpu[03-04]``.

    Raises:
        InputError: If SLURM's ``scontrol`` cannot be run.
    """
    try:
        asked = subprocess.run(["scontrol", "show", "hostnames", machines], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"MASTER_ADDR: not set, and scontrol cannot find the first machine of {machines}; export its name."
        ) from error
    return asked.stdout.split()[0]
