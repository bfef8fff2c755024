"""Tests that kd-det gpu-check runs its checks, here without a GPU and with tiny networks, and reports what is wrong."""

import re
from subprocess import CompletedProcess

import pytest
import torch
from children import run_processes
from helpers import measured_cfg

from kd_det.benchmarking import case, gpu_checks
from kd_det.benchmarking.gpu_checks import REHEARSAL, Finding
from kd_det.commands import gpu_check

# These start processes, or compile for minutes.
ALONE = {"races", "processes", "compilation"}


@pytest.fixture
def check(run_tool, tiny_networks):
    return lambda *arguments: run_tool("gpu-check", "--rehearse", *arguments)


def rows(table):
    """Maps the check of each row to its result; of several rows the last one counts."""
    cells = [[x.strip() for x in line.split("|")] for line in table.splitlines() if line.startswith("| ")]
    return {row[1]: row[2] for row in cells[1:]}


def test_the_command_names_all_checks():
    assert tuple(gpu_checks.CHECKS) == gpu_check.CHECKS


def test_heads_and_average(check, capsys, tmp_path):
    check("--only", "heads", "average", "--output", tmp_path / "out")
    table = (tmp_path / "out" / "gpu_check.md").read_text()
    assert table in capsys.readouterr().out
    assert rows(table) == {"heads": "ok", "average": "ok"}
    assert int(re.search(r"(\d+) heads like on the CPU: largest relative difference 0", table)[1]) > 12
    assert "Rehearsal on a CPU" in table


@pytest.mark.slow
def test_rehearsal(check, capsys):
    check("--only", *(name for name in gpu_check.CHECKS if name not in ALONE))
    table = capsys.readouterr().out
    found = rows(table)
    measured = {"waits", "speed", "memory"}
    assert found == {name: "measured" if name in measured else "ok" for name in gpu_check.CHECKS if name not in ALONE}
    assert "KD.DETERMINISTIC False: 0 of" in table
    assert "KD.TEACHER.FOLD_NORM True: " in table


def train_tiny_rank(*arguments):
    case.detector_config = measured_cfg
    gpu_checks.train_rank(*arguments)


@pytest.mark.slow
def test_two_processes(check, capsys, monkeypatch):
    monkeypatch.setattr(
        gpu_checks, "start_processes", lambda _, args, nprocs: run_processes(train_tiny_rank, *args, number=nprocs)
    )
    check("--only", "processes")
    assert "weights of two processes are equal: True" in capsys.readouterr().out


@pytest.mark.parametrize(("races", "status", "result"), [(0, 0, "ok"), (2, 0, "WRONG"), (0, 1, "WRONG")])
def test_races(check, capsys, monkeypatch, races, status, result):
    told = "CSAN detected a possible data race\n" * races
    monkeypatch.setattr(gpu_checks.subprocess, "run", lambda command, **_: CompletedProcess(command, status, "", told))
    if result == "ok":
        check("--only", "races")
    else:
        with pytest.raises(SystemExit, match=r"^1$"):
            check("--only", "races")
    table = capsys.readouterr().out
    assert rows(table) == {"races": result}
    assert f"{races} races" in table


def test_a_failure_does_not_stop_other_checks(check, capsys, monkeypatch):
    def fail(scale):
        raise RuntimeError("CUDA error:\nout of memory")

    monkeypatch.setitem(gpu_checks.CHECKS, "waits", fail)
    monkeypatch.setitem(gpu_checks.CHECKS, "memory", lambda scale: [Finding("a", good=True), Finding("b")])
    with pytest.raises(SystemExit, match=r"^1$"):
        check("--only", "waits", "memory")
    table = capsys.readouterr().out
    assert rows(table) == {"waits": "WRONG", "memory": "measured"}
    assert "RuntimeError: CUDA error: out of memory" in table


def test_time_that_is_up(check, capsys, monkeypatch):
    monkeypatch.setitem(gpu_checks.CHECKS, "waits", lambda scale: [Finding("a")])
    clock = iter([0.0, 0.0, 500.0, 500.0])
    monkeypatch.setattr(gpu_checks.time, "monotonic", lambda: next(clock))
    check("--only", "waits", "memory")
    assert rows(capsys.readouterr().out) == {"waits": "measured", "memory": "not run"}


def test_a_head_that_differs_is_named(tiny_networks, monkeypatch):
    run = gpu_checks.run_head

    def run_head(head, *arguments):
        results = run(head, *arguments)
        is_last = type(head).__name__ == "HintHead" and next(calls) == 1
        return [1.1 * x for x in results] if is_last else results

    calls = iter(range(2))
    monkeypatch.setattr(gpu_checks, "run_head", run_head)
    (finding,) = gpu_checks.check_heads(REHEARSAL)
    assert finding.good is False
    assert finding.text.endswith("too far: HintHead 1.0e-01")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "gpu-check: PyTorch finds no GPU; --rehearse runs the checks on the CPU"),
        (["--only", "header"], "--only: 'header' is not one of heads, waits"),
        (["--minutes", 0], "--minutes: must be above 0, got 0.0."),
    ],
)
def test_mistakes_end_in_one_line(run_tool, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=f"^error: {re.escape(message)}"):
        run_tool("gpu-check", *arguments)
