"""Runs that a signal interrupts: the iteration is finished, a checkpoint saved, and the exit status tells.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, which ``#SBATCH --signal=USR1@120`` sends before SLURM takes the nodes, end a
training after its iteration with status 75; the same command with ``--resume`` goes on. With several processes it is
enough that one of them is told; all end after the same iteration. A second Ctrl-C ends the process at once, and the run
resumes from the last checkpoint.

An evaluation is finished first, and so is a run in its last iteration, which ends with status 0. ``torchrun`` ends with
a status of its own, 1, passes SIGUSR1 on only with ``--signals-to-handle=SIGTERM,SIGINT,SIGUSR1``, and kills what does
not end within ``--shutdown-timeout``, 30 seconds by default.
"""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.engine import HookBase
from detectron2.utils import comm

from kd_det.engine.processes import INTERRUPTED, handled

logger = logging.getLogger(__name__)
# Those that came inside of `interruptible`.
_received: list[int] = []


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the signals are noted for :class:`Interruption`, and do not end the process."""
    with handled(_note):
        try:
            yield
        finally:
            _received.clear()


def _note(number: int, frame: object) -> None:
    if not _received and comm.is_main_process():
        # Not by `logging`, which the signal may have interrupted.
        os.write(2, f"{signal.Signals(number).name}: the run ends when this iteration is saved.\n".encode())
    _received.append(number)
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)


class Interruption(HookBase):
    """Saves a checkpoint and ends the process once it, or another one of the run, was told to end.

    Raises:
        SystemExit: With status 75, in all processes after the same iteration.
    """

    def after_step(self) -> None:
        trainer = self.trainer
        if not any(comm.all_gather(bool(_received))) or trainer.iter == trainer.max_iter - 1:
            return
        trainer.checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
        logger.warning("Interrupted after iteration %d, which is saved; --resume goes on.", trainer.iter)
        comm.synchronize()  # A launcher ends the others when one has ended.
        raise SystemExit(INTERRUPTED)
