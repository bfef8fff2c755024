"""A head is one file: of a user's, trained with nothing else changed; or of this package, with its import line."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, run_train_net, tiny_cfg, with_data, write_yaml

import kd_det.heads
from kd_det import KD_HEAD_REGISTRY
from kd_det.config import default_config

PLUGIN = '''
import torch
from kd_det import KD_HEAD_REGISTRY


@KD_HEAD_REGISTRY.register()
class ChannelMeanHead(torch.nn.Module):
    """The mean over channels of one level, through a scale that is learned."""

    config = {"WEIGHT": 0.5, "FEATURE": "p3", "POWER": 1}

    def __init__(self, cfg, student_spec, teacher_spec):
        super().__init__()
        self.feature, self.power = cfg.KD.CHANNEL_MEAN.FEATURE, cfg.KD.CHANNEL_MEAN.POWER
        self.signals = (self.feature,)
        self.scale = torch.nn.Parameter(torch.ones(teacher_spec[self.feature].stride // 4))

    def forward(self, student, teacher, batch):
        own, other = (x[self.feature].float().mean(dim=1) for x in (student, teacher))
        return {"loss_kd_channel_mean": (self.scale.mean() * own - other).abs().pow(self.power).mean()}
'''

BUILT_IN = '''
import torch
from kd_det import KD_HEAD_REGISTRY
from kd_det.heads.build import check_feature_maps
from kd_det.losses import hint_loss


@KD_HEAD_REGISTRY.register()
class BrightnessHead(torch.nn.Module):
    """Compares the means over channels of one map."""

    config = {
        "WEIGHT": 0.5,
        # The map that is compared.
        "IN_FEATURE": "p3",
    }

    def __init__(self, cfg, student_spec, teacher_spec):
        super().__init__()
        self.signals = (cfg.KD.BRIGHTNESS.IN_FEATURE,)
        check_feature_maps("KD.BRIGHTNESS.IN_FEATURE", self.signals, student_spec, teacher_spec)
        self.stride = student_spec[self.signals[0]].stride

    def forward(self, student, teacher, batch):
        student, teacher = (x[self.signals[0]].mean(dim=1, keepdim=True) for x in (student, teacher))
        return {"loss_kd_brightness": hint_loss(student, teacher, mask=batch.valid_mask(student, self.stride))}
'''


@pytest.mark.slow
def test_a_head_of_ones_own_trains(teacher, coco_folder, tmp_path):
    """A stock config becomes a distillation run by arguments alone."""
    plugin = tmp_path / "my_head.py"
    plugin.write_text(PLUGIN, encoding="utf-8")
    cfg = with_data(tiny_cfg(), coco_folder, tmp_path / "output")
    cfg.DATASETS.TEST = ()
    config = write_yaml(tmp_path / "plain.yaml", cfg)
    arguments = ["--teacher", teacher["KD.TEACHER.CONFIG_FILE"], "--teacher-weights", teacher["KD.TEACHER.WEIGHTS"]]
    arguments += ["--plugin", plugin, "--kd-heads", "ChannelMeanHead", "KD.CHANNEL_MEAN.POWER", "2"]
    done = run_train_net("--config-file", config, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss_kd_channel_mean" in done.stdout
    saved = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    assert saved["kd_heads"]["ChannelMeanHead.scale"].shape == (2,)
    assert not torch.equal(saved["kd_heads"]["ChannelMeanHead.scale"], torch.ones(2))  # it learned
    assert saved["iteration"] == 1
    assert "POWER: 2" in (tmp_path / "output" / "config.yaml").read_text()


@pytest.fixture
def new_head(tmp_path, monkeypatch):
    """The folder of a file that is as good as in the package's folder of heads once ``import_line`` is imported."""
    (tmp_path / "brightness.py").write_text(BUILT_IN, encoding="utf-8")
    lines = f"import kd_det.heads\nkd_det.heads.__path__.append({str(tmp_path)!r})\nimport kd_det.heads.brightness\n"
    (tmp_path / "import_line.py").write_text(lines, encoding="utf-8")
    monkeypatch.setattr(kd_det.heads, "__path__", [*kd_det.heads.__path__])
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    KD_HEAD_REGISTRY._obj_map.pop("BrightnessHead", None)
    for name in ("import_line", "kd_det.heads.brightness"):
        sys.modules.pop(name, None)
    vars(kd_det.heads).pop("brightness", None)


def test_a_new_head_has_its_keys_and_its_entry_in_the_reference(new_head, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "_extensions")
    from config_reference import head_keys

    importlib.import_module("import_line")
    assert default_config().KD.BRIGHTNESS.IN_FEATURE == "p3"
    assert head_keys()["KD.BRIGHTNESS (BrightnessHead)"] == [
        ("KD.BRIGHTNESS.WEIGHT", "0.5", "Weight of the head's losses."),
        ("KD.BRIGHTNESS.IN_FEATURE", "'p3'", "The map that is compared."),
    ]


@pytest.mark.slow
def test_a_new_head_has_its_place_in_the_tests_of_all_heads(new_head):
    """They pass with its defaults, and say where to add another value of each option."""
    command = [sys.executable, "-m", "pytest", "-k", "BrightnessHead", "-p", "import_line", "tests/heads"]
    environment = os.environ | {"PYTHONPATH": f"{new_head}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert re.search(r"^1 failed, 1\d passed", done.stdout, re.MULTILINE), done.stdout
    place = "in VARIANTS of tests/heads/cases.py has another KD.BRIGHTNESS.IN_FEATURE than 'p3'; add one"
    assert f"no variant of BrightnessHead {place}" in done.stdout
