"""tools/repeat.py: what each run is told."""

import pytest
from helpers import ROOT


@pytest.mark.parametrize(
    ("name", "expected"), [("student", False), ("reviewkd", True), ("born_again", True), ("dml", False)]
)
def test_only_students_with_a_teacher_are_told_of_one(name, expected, load_tool):
    assert load_tool("repeat").has_teacher(str(ROOT / f"configs/BCCD/{name}.yaml")) is expected
