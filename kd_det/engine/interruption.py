"""Ends an interrupted run cleanly: it finishes its iteration, saves a checkpoint and exits with a status of its own.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, which ``#SBATCH --signal=USR1@120`` sends before SLURM takes the nodes, end a
training after its iteration with status 75; the same command with ``--resume`` continues it. With several processes it
is enough that one of them receives the signal; all end after the same iteration, which may be a second later. A second
Ctrl-C ends the process at once, and the run resumes from the last checkpoint.

An evaluation is finished first, and so is a run in its last iteration, which ends with status 0. ``torchrun`` ends
with its own status, 1, forwards SIGUSR1 only with ``--signals-to-handle=SIGTERM,SIGINT,SIGUSR1``, and kills processes
that do not end within ``--shutdown-timeout``, 30 seconds by default.
"""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import distributed

from kd_det.engine.processes import INTERRUPTED, handling_signals

logger = logging.getLogger(__name__)
# Processes agree on an interruption about every PERIOD seconds, at the latest after LONGEST iterations. They do so
# after each of the first iterations of a process, whose times say little about those of later ones.
PERIOD = 1.0
LONGEST = 50
FIRST = 10
# These are the signals that arrived inside `interruptible`.
_received: list[int] = []


@contextmanager
def interruptible() -> Iterator[None]:
    """Records the signals inside the block for :class:`Interruption`, instead of ending the process."""
    with handling_signals(_note):
        try:
            yield
        finally:
            _received.clear()


def _note(number: int, frame: object) -> None:
    if not _received and comm.is_main_process():
        # Do not use `logging` here, because the signal may have interrupted it.
        os.write(2, f"{signal.Signals(number).name}: the run ends when this iteration is saved.\n".encode())
    _received.append(number)
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)


class Interruption(HookBase):
    """Saves a checkpoint and ends the process after a signal to it or to another process of the run.

    Args:
        evaluation_period: Iterations between evaluations, before each of which processes agree; 0 if there are none.

    Raises:
        SystemExit: With status 75, in all processes after the same iteration.
    """

    def __init__(self, evaluation_period: int = 0):
        self.evaluation_period = evaluation_period

    def before_train(self) -> None:
        self._agreed_iter, self._agreed_at = self.trainer.start_iter - 1, time.monotonic()
        # The next iteration after which processes agree is the same in all of them.
        self._next_iter = self.trainer.start_iter

    def after_step(self) -> None:
        trainer = self.trainer
        if not self._is_asked_to_end() or trainer.iter == trainer.max_iter - 1:
            return
        trainer.checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
        logger.warning("Interrupted after iteration %d, which is saved; continue with --resume.", trainer.iter)
        comm.synchronize()  # A launcher kills the other processes when one has ended.
        raise SystemExit(INTERRUPTED)

    def _is_asked_to_end(self) -> bool:
        """Returns whether this process, or one that it agrees with after this iteration, has received a signal."""
        if comm.get_world_size() == 1:
            return bool(_received)
        iteration = self.trainer.iter
        evaluates = self.evaluation_period > 0 and (iteration + 1) % self.evaluation_period == 0
        if iteration < self._next_iter and not evaluates:
            return False
        now = time.monotonic()
        seconds = (now - self._agreed_at) / (iteration - self._agreed_iter)
        # These two numbers stay on the CPU, so that no process waits for its GPU.
        state = torch.tensor([float(bool(_received)), seconds])
        distributed.all_reduce(state, distributed.ReduceOp.MAX, group=comm._get_global_gloo_group())
        asked, seconds = state.tolist()
        self._agreed_iter, self._agreed_at = iteration, now
        steps = 1 if iteration - self.trainer.start_iter < FIRST else int(PERIOD / max(seconds, 1e-3))
        self._next_iter = iteration + min(max(steps, 1), LONGEST)
        return asked > 0
