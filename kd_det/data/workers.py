"""Prepares worker processes of data loaders so that they end with the run and not before."""

import multiprocessing
import os
import signal
import sys
import threading
from types import TracebackType


def ignore_signals(worker: int) -> None:
    """Ignores termination signals in a data-loader worker, so that the run's current iteration can finish.

    A terminal or a cluster sends these signals to every process. A SIGTERM from the worker's own parent still ends it.

    If the run is killed, the worker does not report that it could not hand over its images.

    Args:
        worker: Number of the worker, which ``worker_init_fn`` receives.
    """
    sys.excepthook = _report
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent and hasattr(signal, "sigwaitinfo"):  # This is missing on macOS.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(parent.pid,), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)
