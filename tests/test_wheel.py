"""A wheel, installed without the source tree, has all that kd-det needs: the commands, the configs and the recipes."""

import os
import subprocess
import sys
from pathlib import Path

import detectron2
import pytest
import torch
from helpers import ROOT

import kd_det

pytestmark = pytest.mark.slow
BUILD = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
VARIABLES = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DETECTRON2"))}


def run(*command, cwd: Path) -> str:
    """Run a command without this source tree on its path; returns what it prints."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=VARIABLES | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with the wheel of `make dist`; torch, Detectron2 and the like are those of this process."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-c", BUILD, folder, cwd=ROOT)
    (source,) = folder.glob("*.tar.gz")
    run(*PIP, "wheel", "--no-cache-dir", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    # Python looks here after the environment's own packages, and does not read the .pth files here, of which one may
    # lead to this source tree.
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    borrowed = {str(Path(module.__file__).parents[1]) for module in (torch, detectron2)}
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    run(*PIP, "--python", folder / "venv/bin/python", "install", "--no-index", "--no-deps", wheel, cwd=folder)
    imported = run(folder / "venv/bin/python", "-c", "import kd_det; print(kd_det.__file__)", cwd=folder).strip()
    assert imported == str(packages / "kd_det" / "__init__.py") != kd_det.__file__
    return folder / "venv"


def test_it_has_all_configs(environment):
    (installed,) = environment.glob("lib/python*/site-packages/kd_det/configs")
    configs = {path.relative_to(installed) for path in installed.rglob("*.yaml")}
    assert configs == {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}


def test_it_has_the_parts_of_a_report(environment):
    (installed,) = environment.glob("lib/python*/site-packages/kd_det/reporting/templates")
    assert {path.name for path in installed.iterdir()} == {"page.html", "style.css", "script.js"}


def test_a_teacher_and_its_student_train_by_names(environment, tmp_path):
    """The commands are those of a user who has nothing but the wheel."""

    def kd_det(*arguments):
        run(environment / "bin" / "kd-det", *arguments, cwd=tmp_path)

    kd_det("prepare-shapes", "--output", "datasets/shapes", "--train", 4, "--test", 2, "--size", 64)
    kd_det("train", "--config-file", "quickstart/teacher.yaml", "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 1)
    configs = ("quickstart/student.yaml", "recipes/reviewkd.yaml")
    kd_det("train", "--config-file", *configs, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2)
    output = tmp_path / "output/quickstart/student-reviewkd"
    assert "loss_kd_review" in (output / "metrics.json").read_text()
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 1
