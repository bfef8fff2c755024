"""The notebook of the tutorial from Python runs as it is, and is kept without outputs."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

CELLS = json.loads((ROOT / "docs/tutorials/python.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
CHECKS = """
import math
import torch
assert losses and all(0 < row["loss_kd_channel_mean"] < math.inf for row in losses)
assert losses[-1]["iteration"] == student.SOLVER.MAX_ITER - 1
assert [run["name"] for run in results["runs"]] == ["teacher", "student"]
checkpoint = torch.load(plain.MODEL.WEIGHTS, weights_only=True)
assert checkpoint["model"].keys() == DefaultPredictor(plain).model.state_dict().keys()
"""


def test_it_is_kept_without_outputs():
    assert CODE
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


@pytest.mark.slow
def test_it_runs(tmp_path):
    code = "\n\n".join("".join(cell["source"]) for cell in CODE)
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", f"{code}\n{CHECKS}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
