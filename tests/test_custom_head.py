"""A head in one file of a user's: its options in the config, trained by the tool with nothing else changed."""

import torch
from helpers import run_train_net, tiny_cfg, with_data, write_yaml

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
