"""Tests kd-det repeat: the arguments of its runs, their interruption, and its messages about their progress."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT

from kd_det.commands import repeat, trainings
from kd_det.commands.calls import Call
from kd_det.engine.arguments import training_parser
from kd_det.engine.processes import INTERRUPTED
from kd_det.errors import InputError


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        (["BCCD/student.yaml"], False),
        (["BCCD/student.yaml", "recipes/reviewkd.yaml"], True),
        (["BCCD/student.yaml", "recipes/born_again.yaml"], True),
        (["BCCD/student.yaml", "recipes/dml.yaml"], False),
        (["quickstart/distilled.yaml"], True),
    ],
)
def test_only_distilled_students_have_a_teacher(configs, expected):
    named = ["KD.TEACHER.CONFIG_FILE", "BCCD/teacher.yaml"]
    assert repeat.has_teacher(configs, [*named, "SOLVER.MAX_ITER", "1"], "--student") is expected


def test_a_student_may_have_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("KD: {HEADS: [HintHead]}")
    students = ["--student", "a=BCCD/student.yaml", str(recipe), "--student", "b=BCCD/student.yaml"]
    args = repeat.parse_args(["--teacher", "t.yaml", *students, "--output", "x", "SEED", "1"])
    configs = ("BCCD/student.yaml", str(recipe))
    assert args.student == [("a", configs), ("b", ("BCCD/student.yaml",))]
    assert args.opts == ["SEED", "1"]
    assert repeat.has_teacher(configs, ["KD.TEACHER.CONFIG_FILE", "BCCD/teacher.yaml"], "--student a")
    call = trainings.Training(configs, tmp_path, ("SEED", "1")).call([], log=False, threads=None)
    trained = training_parser(None).parse_args(call.arguments)
    assert (trained.config_file, trained.resume) == (list(configs), True)
    assert trained.opts == ["OUTPUT_DIR", str(tmp_path), "SEED", "1"]


CONFIGS = ROOT / "configs"
STUDENT = f"a={CONFIGS}/BCCD/student.yaml"
DISTILLED = ["--student", f"b={CONFIGS}/BCCD/student.yaml", f"{CONFIGS}/recipes/reviewkd.yaml"]
PATIENCE = ["TEST.PATIENCE", "3", "TEST.BEST_METRIC", "bbox/AP", "TEST.EVAL_PERIOD", "9"]
VALID = ["--teacher", f"{CONFIGS}/BCCD/teacher.yaml", "--student", STUDENT, "--output", "x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", STUDENT], "--student: a is given twice, and its runs would share a folder"),
        (["--seeds", "1", "2", "1"], "--seeds: 1 is given twice"),
        (["--student", ""], "--student : not of the form NAME=CONFIG"),
        (["--student", "=x.yaml"], "--student =x.yaml: not of the form NAME=CONFIG"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--teacher-weights", "no.pth"], "--teacher-weights: there is no file no.pth"),
        (["--student", "b=no.yaml"], "--student b: there is no such file"),
        (["SOLVER.MAX_ITER"], "command line: Override list has odd length"),
        (["--seeds", "1", "-1"], "--seeds -1: must be at least 0"),
        (["SEED", "5"], "command line: the override SEED would give all runs the same seed; use --seeds"),
        (["--equal-compute"], "--equal-compute: needs a distilled --student and a plain one"),
        (
            ["--equal-compute", *DISTILLED, *PATIENCE],
            "--equal-compute: TEST.PATIENCE must be 0 for a, got 3: a run that may end early has no length to extend.",
        ),
        (
            ["--equal-compute", "--student", f"a_as_long_as_b={CONFIGS}/BCCD/student.yaml", *DISTILLED],
            "--equal-compute: trains a student a_as_long_as_b; give the --student of this name another one",
        ),
    ],
)
def test_mistakes_are_found_before_the_first_run(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(Call, "start", lambda *_: pytest.fail("a run began"))
    with pytest.raises((InputError, SystemExit)) as error:
        repeat.main(repeat.parse_args([*VALID, *arguments]))
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_every_distilled_student_has_the_plain_one_of_its_configs():
    students = {
        "soft": ("narrow.yaml", "recipes/soft.yaml"),
        "narrow": ("narrow.yaml",),
        "wide": ("wide.yaml",),
        "short": ("wide.yaml", "short.yaml"),
        "hint": ("wide.yaml", "recipes/hint.yaml"),
        "short_hint": ("wide.yaml", "short.yaml", "recipes/hint.yaml"),
        "other": ("distilled.yaml",),
    }
    baselines = repeat.find_baselines(list(students.items()), ["narrow", "wide", "short"])
    assert baselines == {"soft": "narrow", "hint": "wide", "short_hint": "short", "other": "narrow"}
    assert repeat.find_baselines(list(students.items()), []) == {}


@pytest.mark.parametrize(
    ("recipe", "plain"), [("recipes/reviewkd.yaml", False), ("recipes/dml.yaml", False), (None, True)]
)
def test_students_of_mutual_learning_are_not_plain(recipe, plain):
    configs = ["BCCD/student.yaml", *([recipe] if recipe else [])]
    assert repeat.is_plain(configs, [], "--student") is plain


# ---- Runs, by a program that stands in for the commands ----
# At its first call a training waits for a signal that asks it to end, at the next one it comes to its end.
STAND_IN = """
import shutil, signal, sys, time
from pathlib import Path
from kd_det.engine.arguments import training_parser
from kd_det.engine.processes import end_with_tool

if sys.argv[1] == "compare":
    sys.exit(print("compared"))
output = Path(sys.argv[sys.argv.index("OUTPUT_DIR") + 1])
output.mkdir(parents=True, exist_ok=True)
received = []
signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
end_with_tool()
if output.name != "teacher" and not (output / "begun").exists():
    (output / "begun").touch()
    while not received:
        time.sleep(0.05)
    (output / "asked").touch()
    sys.exit(75)
shutil.copy(Path(__file__).with_name("model_final.pth"), output)
(output / "last_checkpoint").write_text("model_final.pth")
"""
REPEAT = """
import sys
from kd_det.commands import calls, console

calls.KD_DET = (sys.executable, sys.argv.pop(1))
console.run_command("repeat")
"""


@pytest.fixture
def start_repeat(tmp_path):
    """Start kd-det repeat with two students that train at a time."""
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(STAND_IN)
    torch.save({"model": {}, "iteration": 1}, tmp_path / "model_final.pth")
    students = [x for name in ("a", "b") for x in ("--student", f"{name}={ROOT}/configs/BCCD/student.yaml")]
    command = [sys.executable, "-c", REPEAT, stand_in, "--teacher", ROOT / "configs/BCCD/teacher.yaml", *students]
    command += ["--seeds", "1", "--jobs", "2", "--output", tmp_path / "output"]

    def start():
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def wait_for(*paths):
    limit = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < limit, paths
        time.sleep(0.05)


@pytest.mark.slow
def test_a_signal_reaches_the_trainings_and_the_same_command_goes_on(start_repeat, tmp_path):
    students = [tmp_path / "output" / name for name in ("a_seed1", "b_seed1")]
    process = start_repeat()
    wait_for(*(x / "begun" for x in students))
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == INTERRUPTED
    assert printed.splitlines()[-1] == "Interrupted; the same command goes on."
    assert all((x / "asked").exists() for x in students)
    # The teacher is damaged since.
    final = tmp_path / "output" / "teacher" / "model_final.pth"
    final.write_bytes(final.read_bytes()[:-100])
    process = start_repeat()
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    assert "compared" in printed
    assert final.read_bytes() == (tmp_path / "model_final.pth").read_bytes()


def test_trainings_end_when_repeat_is_killed(start_repeat, tmp_path):
    students = [tmp_path / "output" / name for name in ("a_seed1", "b_seed1")]
    process = start_repeat()
    wait_for(*(x / "begun" for x in students))
    process.kill()
    process.communicate(timeout=120)
    wait_for(*(x / "asked" for x in students))


# ---- Progress ----
def write_metrics(path, *rows, rest=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)


def test_progress_of_a_training(tmp_path):
    training = trainings.Training(("x.yaml",), tmp_path / "a_seed1", ())
    assert training.progress() == "a_seed1 begins"
    write_metrics(tmp_path / "a_seed1/pretrain/metrics.json", {"iteration": 19, "eta_seconds": 61.7})
    assert training.progress() == "a_seed1/pretrain 19 (0:01:01)"
    path = tmp_path / "a_seed1/metrics.json"
    write_metrics(path, {"iteration": 19, "eta_seconds": 90}, {"iteration": 39, "eta_seconds": 60}, rest='{"iter')
    os.utime(path, (time.time() + 9,) * 2)
    assert training.progress() == "a_seed1 39 (0:01:00)"


def test_a_log_file_is_not_flooded(capsys, monkeypatch):
    progress = trainings.Progress()
    now = time.monotonic()
    for second in range(2 * trainings.LINE_PERIOD + 9):
        monkeypatch.setattr(trainings.time, "monotonic", lambda second=second: now + second)
        progress.show(f"after {second} s")
    assert len(capsys.readouterr().out.splitlines()) == 2
