"""Tests that every command parses its arguments at once, before slow imports and warnings."""

import subprocess
import sys

import pytest
from detectron2.engine import default_argument_parser
from helpers import ROOT

from kd_det.commands.console import COMMANDS
from kd_det.engine.arguments import training_parser

TOOLS = sorted([*ROOT.glob("tools/*.py"), *ROOT.glob("datasets/prepare_*.py")])
KD_DET = ROOT / "kd_det" / "__main__.py"
CALLS = [(tool,) for tool in TOOLS] + [(KD_DET, command) for command in COMMANDS]
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", *sorted({"torch", "detectron2", "timm"} & sys.modules.keys()))
"""


def run(tool, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", RUN, tool, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("call", [*CALLS, (KD_DET,)], ids=lambda call: " ".join(getattr(x, "stem", x) for x in call))
def test_help_and_wrong_arguments_are_quick(call):
    for arguments, status in ((["--help"], 0), (["--no-such-option"], 2)):
        done = run(*call, *arguments)
        assert done.returncode == status, done.stderr
        assert done.stdout.endswith("imported:\n")
        assert "usage: " in (done.stdout if status == 0 else done.stderr)
        assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("export_student", ["--output", "x"], "error: give either --run, or --config-file and --weights."),
        ("concepts", ["--run", "a=b", "--feature", "res4", "--grid", "0"], "error: --grid: must be above 0, got 0."),
        ("benchmark", ["--size", "32"], "error: --size: must be 64 or more, got 32."),
    ],
)
def test_wrong_values_are_quick(tool, arguments, message):
    done = run(ROOT / f"tools/{tool}.py", *arguments)
    assert (done.returncode, done.stderr) == (1, f"{message}\n")
    assert done.stdout == "imported:\n"


@pytest.mark.parametrize(("tool", "command"), [("train_net", "train"), ("export_student", "export")])
def test_a_tool_takes_what_its_command_takes(tool, command):
    """Their help differs in nothing but the name of the program in the usage."""
    of_tool, of_command = (
        " ".join(done.stdout.split()).replace(f"usage: {name} ", "usage: ")
        for done, name in [
            (run(ROOT / f"tools/{tool}.py", "--help"), f"{tool}.py"),
            (run(KD_DET, command, "--help"), f"kd-det {command}"),
        ]
    )
    assert of_tool == of_command


def test_kd_det_lists_its_commands():
    lines = [line.split() for line in run(KD_DET, "--help").stdout.splitlines()]
    assert [line[0] for line in lines if line and line[0] in COMMANDS] == list(COMMANDS)


def test_an_unknown_command_ends_in_one_line():
    done = run(KD_DET, "trian", "--help")
    assert (done.returncode, done.stdout) == (1, "imported:\n")
    assert done.stderr == f"error: kd-det: 'trian' is not one of {', '.join(COMMANDS)}.\n"


def test_training_takes_the_arguments_of_detectron2():
    stock = vars(default_argument_parser().parse_args(["OUTPUT_DIR", "x"]))
    own = vars(training_parser("").parse_args(["OUTPUT_DIR", "x"]))
    assert own.items() >= (stock | {"config_file": []}).items()
