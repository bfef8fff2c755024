"""The processes of a run: started here, or by ``torchrun`` or SLURM's ``srun``, of which this is one."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from kd_det.engine.interruption import INTERRUPTED, in_own_session, passing_on
from kd_det.errors import InputError


def launch_workers(main: Callable[[Namespace], None], args: Namespace) -> None:
    """Run `main(args)` on each GPU that ``--num-gpus`` asks for, or as one rank of ``torchrun`` or ``srun``.

    A batch script of SLURM and a shell in an allocation run as they would without it, and so does ``srun`` of one task.

    Raises:
        InputError: If the machine has fewer GPUs, or what SLURM tells does not make a rank.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
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
    try:
        with passing_on():
            launch(
                in_own_session,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args),
            )
    except ProcessExitedException as error:
        if error.exit_code != INTERRUPTED:
            raise
        sys.exit(INTERRUPTED)


def run_rank(main: Callable[[Namespace], None], args: Namespace) -> None:
    """Run `main(args)` as the rank that the environment names in ``torchrun``'s variables.

    Raises:
        InputError: If the processes of this machine are more than its GPUs.
    """
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    if 0 < gpus < local_size:
        raise InputError(
            f"{local_size} processes of this machine see {gpus} GPU(s); each needs one, and must see those of all "
            "(srun: --gpus-per-node, not --gpus-per-task)."
        )
    if gpus:
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group("nccl" if gpus else "gloo")
    comm.create_local_process_group(local_size)
    try:
        main(args)
    finally:
        torch.distributed.destroy_process_group()


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
