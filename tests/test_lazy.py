"""Tests that importing kd_det is quick, and that the first use of one of its names registers everything."""

import subprocess
import sys
from pathlib import Path

import pytest

import kd_det
import kd_det.engine

ALL_REGISTERED = """
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from kd_det.registry import KD_HEAD_REGISTRY, TAP_REGISTRY
for names, registry in (
    ({"TeacherStudent", "MutualStudents", "ImageClassifier"}, META_ARCH_REGISTRY),
    ({"build_timm_fpn_backbone", "build_basic_resnet_fpn_backbone", "build_cifar_backbone"}, BACKBONE_REGISTRY),
    ({"ReviewKDHead", "BornAgainHead"}, KD_HEAD_REGISTRY),
    ({"GeneralizedRCNNTap", "RetinaNetTap", "ImageClassifierTap"}, TAP_REGISTRY),
):
    assert names <= {name for name, _ in registry}
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_packages_import_nothing_heavy():
    run(
        "import sys, kd_det, kd_det.engine.cli\nassert not {'torch', 'detectron2', 'cv2', 'numpy'} & sys.modules.keys()"
    )


@pytest.mark.parametrize(
    "first_use",
    [
        "import kd_det\nkd_det.heads.build_kd_heads",
        "from kd_det.engine import Trainer",
        "from kd_det.config import add_kd_config\nfrom detectron2.config import get_cfg\nadd_kd_config(get_cfg())",
    ],
)
def test_the_first_use_registers_everything(first_use):
    run(f"{first_use}\n{ALL_REGISTERED}")


@pytest.mark.parametrize("package", [kd_det, kd_det.engine])
def test_names_are_listed_without_modules(package):
    """A submodule of the same name would be found in the place of a lazy name."""
    assert set(package.__all__) <= set(dir(package))
    assert not set(package.__all__) & {path.stem for path in Path(package.__file__).parent.iterdir()}
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018
