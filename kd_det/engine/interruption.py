"""Ends an interrupted run cleanly: it finishes its iteration, saves a checkpoint and exits with a status of its own.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, which ``#SBATCH --signal=USR1@120`` sends before SLURM takes the nodes, end a
training after its iteration with status 75; the same command with ``--resume`` continues it. With several processes it
is enough that one of them receives the signal; all end after the same iteration. A second Ctrl-C ends the process at
once, and the run resumes from the last checkpoint.

An evaluation is finished first, and so is a run in its last iteration, which ends with status 0. ``torchrun`` ends
with its own status, 1, forwards SIGUSR1 only with ``--signals-to-handle=SIGTERM,SIGINT,SIGUSR1``, and kills processes
that do not end within ``--shutdown-timeout``, 30 seconds by default.
"""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.engine import HookBase
from detectron2.utils import comm

from kd_det.engine.processes import INTERRUPTED, handling_signals

logger = logging.getLogger(__name__)
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

    Raises:
        SystemExit: With status 75, in all processes after the same iteration.
    """

    def after_step(self) -> None:
        trainer = self.trainer
        if not any(comm.all_gather(bool(_received))) or trainer.iter == trainer.max_iter - 1:
            return
        trainer.checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
        logger.warning("Interrupted after iteration %d, which is saved; continue with --resume.", trainer.iter)
        comm.synchronize()  # A launcher kills the other processes when one has ended.
        raise SystemExit(INTERRUPTED)
