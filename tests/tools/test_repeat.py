"""tools/repeat.py: what each run is told."""

import pytest
from helpers import ROOT

from kd_det.errors import InputError


@pytest.mark.parametrize(
    ("name", "expected"), [("student", False), ("reviewkd", True), ("born_again", True), ("dml", False)]
)
def test_only_students_with_a_teacher_are_told_of_one(name, expected, load_tool):
    config = str(ROOT / f"configs/BCCD/{name}.yaml")
    assert load_tool("repeat").has_teacher(config, ["SOLVER.MAX_ITER", "1"], "--student") is expected


STUDENT = f"a={ROOT}/configs/BCCD/student.yaml"
VALID = ["--teacher", f"{ROOT}/configs/BCCD/teacher.yaml", "--student", STUDENT, "--output", "x"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--student", STUDENT], "--student: a is given twice, and its runs would share a folder"),
        (["--seeds", "1", "2", "1"], "--seeds: 1 is given twice"),
        (["--student", "=x.yaml"], "--student =x.yaml: not of the form NAME=CONFIG"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--teacher-weights", "no.pth"], "--teacher-weights: there is no file no.pth"),
        (["--student", "b=no.yaml"], "--student b: there is no such file"),
        (["SOLVER.MAX_ITER"], "command line: Override list has odd length"),
    ],
)
def test_mistakes_are_found_before_the_first_run(arguments, told, load_tool, monkeypatch, capsys):
    repeat = load_tool("repeat")
    monkeypatch.setattr("sys.argv", ["repeat.py", *VALID, *arguments])
    monkeypatch.setattr(repeat, "call", lambda *_, **__: pytest.fail("a run began"))
    with pytest.raises((InputError, SystemExit)) as error:
        repeat.main()
    assert told in f"{error.value} {capsys.readouterr().err}"
