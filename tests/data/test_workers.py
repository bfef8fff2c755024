"""Workers of data loaders: what they say when their run is killed."""

import sys

import pytest

from kd_det.data.workers import ignore_signals


@pytest.mark.parametrize(
    ("error", "said"), [(ConnectionResetError(104, "reset"), ""), (EOFError(), ""), (KeyError("a defect"), "KeyError")]
)
def test_a_run_that_is_gone_is_no_news(error, said, monkeypatch, capfd):
    """Threads of multiprocessing report by `sys.excepthook` that the other end of a connection is closed."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    for name in ("signal.signal", "signal.pthread_sigmask", "threading.Thread.start"):
        monkeypatch.setattr(f"kd_det.data.workers.{name}", lambda *_: None)
    monkeypatch.setattr("multiprocessing.parent_process", lambda: type("Parent", (), {"pid": 1}))
    ignore_signals(0)
    sys.excepthook(type(error), error, None)
    assert capfd.readouterr().err.strip().split(":")[0] == said
