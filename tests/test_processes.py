"""Tests the commands of a tool: signals reach them, and none outlives the tool, however it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from kd_det.engine.processes import INTERRUPTED, running_commands

CHILD = """
import signal, sys, time
from pathlib import Path
from kd_det.engine.processes import end_with_tool

received = []
signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
end_with_tool()
Path("begun").touch()
while not received:
    time.sleep(0.05)
Path("received").write_text(signal.Signals(received[0]).name)
sys.exit(75)
"""
TOOL = f"""
import sys
from kd_det.engine.processes import running_commands

with running_commands() as commands:
    status = commands.wait(commands.start([sys.executable, "-c", {CHILD!r}]))
    sys.exit(f"{{status}} {{commands.interrupted}}")
"""


def wait_for(path, seconds=30):
    limit = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < limit, path
        time.sleep(0.05)


@pytest.fixture
def tool(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", TOOL], cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "begun")
    yield process
    process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_forwarded_once(tool, tmp_path, number):
    """As it comes from a terminal, to all processes of the tool's group."""
    os.killpg(tool.pid, number)
    assert tool.communicate(timeout=30)[1].splitlines()[-1] == f"{INTERRUPTED} True"
    assert (tmp_path / "received").read_text() == number.name


def test_command_ends_if_its_tool_is_killed(tool, tmp_path):
    tool.kill()
    wait_for(tmp_path / "received")
    assert (tmp_path / "received").read_text() == "SIGTERM"


def test_no_command_outlives_an_error_of_the_tool():
    started = []

    def run():
        with running_commands() as commands:
            started.append(commands.start([sys.executable, "-c", "import time; time.sleep(60)"]))
            raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run()
    assert started[0].returncode == -signal.SIGTERM


def test_command_that_ends_on_its_own():
    with running_commands() as commands:
        assert commands.wait(commands.start([sys.executable, "-c", "raise SystemExit(3)"])) == 3
        assert not commands.interrupted
        assert commands.wait(commands.start([sys.executable, "-c", f"raise SystemExit({INTERRUPTED})"])) == 75
        assert commands.interrupted
