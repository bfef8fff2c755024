"""Worker processes of data loaders, which end with the run and not before."""

import multiprocessing
import os
import signal
import sys
import threading
from types import TracebackType


def end_with_the_run(worker: int) -> None:
    """Make a data loader's worker deaf to the signals that ask a run to end: its last iteration needs the images.

    A terminal or a cluster sends them to every process. SIGTERM of its own parent ends the worker, as ever.

    When the run is killed, its worker says nothing of images that it could not hand over.

    Args:
        worker: Its number; ``worker_init_fn`` gets it.
    """
    sys.excepthook = _report
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Not on macOS.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(multiprocessing.parent_process().pid,), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)
