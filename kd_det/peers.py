"""Prepares the students of a mutual run, checks that they match, and saves each as a run of its own in the end."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.layers import ShapeSpec
from torch import nn

from kd_det.checkpoint import KDCheckpointer
from kd_det.config import read_config, save_config, student_config
from kd_det.config_checks import check_network_values
from kd_det.errors import InputError
from kd_det.heads import InheritExploreHead
from kd_det.heads.coders import Feature
from kd_det.signals import SOURCES
from kd_det.taps import BackboneTap, count_classes


def load_peer_configs(cfg: CfgNode) -> list[CfgNode]:
    """Loads the plain configs of all students: the run's own, then those of ``KD.MUTUAL.PEERS``.

    MODEL and INPUT are those of the student. Everything else is taken from the run, except for OUTPUT_DIR, which is
    ``peer_1``, ``peer_2``, ... below the run's.

    Raises:
        InputError: If no peer is named, or a file cannot be read.
    """
    node = cfg.KD.MUTUAL
    if not node.PEERS:
        raise InputError("KD.MUTUAL.PEERS: no peer is named; give the config file of each other student.")
    configs = [student_config(cfg)]
    for name in node.PEERS:
        options = {"options": node.OPTS, "options_key": "KD.MUTUAL.OPTS"}
        peer = student_config(read_config(name, "KD.MUTUAL.PEERS", **options))
        check_network_values(peer, f"{name} with KD.MUTUAL.OPTS")
        peer.MODEL.DEVICE = cfg.MODEL.DEVICE
        configs.append(student_config(cfg))
        configs[-1].MODEL, configs[-1].INPUT = peer.MODEL, peer.INPUT
    for i, config in enumerate(configs, 1):
        config.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR, f"peer_{i}"))
    return configs


def check_classes(source: str, specs: Sequence[Mapping[str, ShapeSpec]], names: Sequence[str]) -> None:
    """Checks that all students have the logits that are compared, for the same number of classes.

    Raises:
        InputError: If a student lacks them, or the numbers of classes differ; the message names the students.
    """
    signal, counts = SOURCES[source].logits, []
    for name, spec in zip(names, specs, strict=True):
        if signal not in spec:
            raise InputError(f"KD.MUTUAL.SOURCE: {source!r} needs {signal}, which the student of {name} does not have.")
        counts.append(count_classes(spec))
        if counts[-1] != counts[0]:
            raise InputError(
                f"KD.MUTUAL.PEERS: all students must know the same classes, but {names[0]} has {counts[0]} and {name} "
                f"has {counts[-1]}."
            )


def build_heads(cfg: CfgNode, taps: Sequence[BackboneTap], names: Sequence[str]) -> list[InheritExploreHead]:
    """Builds a head for each student from KD.INHERIT_EXPLORE; factors have FACTOR_RATE of the fewest channels.

    Raises:
        InputError: If a student does not have a feature in the form that is needed, or an option is wrong.
    """
    specs, parts = [tap.spec() for tap in taps], []
    for name, tap, spec in zip(names, taps, specs, strict=True):
        try:
            parts.append(InheritExploreHead.from_config(cfg, spec, specs[0]))
            tap.check_alignment(taps[0], parts[-1]["features"])
            tap.check_padding(taps[0], parts[-1]["features"])
        except InputError as error:
            raise InputError(f"{name}, beside this config as teacher: {error}") from error
    rate, heads = cfg.KD.INHERIT_EXPLORE.FACTOR_RATE, []
    for student in parts:
        features = {}
        for name, (channels, _, _, stride) in student["features"].items():
            fewest = min(peer["features"][name].student_channels for peer in parts)
            features[name] = Feature(channels, channels, max(round(rate * fewest), 1), stride)
        heads.append(InheritExploreHead(**student | {"features": features}))
    return heads


def load_peer_weights(students: Sequence[nn.Module], configs: Sequence[CfgNode]) -> None:
    """Loads MODEL.WEIGHTS of each student except the first, whose weights the run itself loads.

    Raises:
        InputError: If a file cannot be read, or has no weights for its student.
    """
    for student, cfg in list(zip(students, configs, strict=True))[1:]:
        KDCheckpointer(student).load(cfg.MODEL.WEIGHTS)


class PeerWriter(HookBase):
    """Saves each student as a finished run of its own (``config.yaml``, ``model_final.pth``) at the end of training."""

    def __init__(self, students: Sequence[nn.Module], configs: Sequence[CfgNode]):
        self.students = students
        self.configs = configs

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:  # It was interrupted.
            return
        for student, cfg in zip(self.students, self.configs, strict=True):
            Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
            save_config(cfg)
            KDCheckpointer(student, cfg.OUTPUT_DIR).save("model_final")
