"""Every config key that kd_det adds to Detectron2's, and how configs are read."""

from pathlib import Path

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode

from kd_det.errors import InputError
from kd_det.registry import KD_HEAD_REGISTRY, config_key


def head_node(weight: float = 1.0, **keys) -> CfgNode:
    """Node of a distillation head: its own keys beside the two that every head has."""
    node = CfgNode(keys)
    # The head's losses are multiplied by this.
    node.WEIGHT = weight
    # Iterations. The weight is 0 before START and from STOP on (-1: never); it grows linearly over WARMUP iterations.
    # DECAY "linear" or "cosine" brings it to 0 at STOP (-1: the end of the run); "constant" keeps it.
    node.SCHEDULE = CfgNode({"START": 0, "WARMUP": 0, "STOP": -1, "DECAY": "constant"})
    return node


def add_kd_config(cfg: CfgNode) -> None:
    """Add kd_det's keys, with their defaults, to a Detectron2 config.

    Every registered head gets a node, those registered outside this package from their class attribute ``config``.
    """
    # ---- What to distil ----
    cfg.KD = CfgNode()
    # The student's meta-architecture, where MODEL.META_ARCHITECTURE is TeacherStudent. All other keys of MODEL describe
    # the student as in any Detectron2 config.
    cfg.KD.STUDENT_ARCHITECTURE = "GeneralizedRCNN"
    # Distillation heads, any number of them; [] trains the plain student, without a teacher.
    cfg.KD.HEADS = []
    # Whether feature losses leave out cells that lie in the zero padding of smaller images.
    cfg.KD.MASK_PADDING = False

    # ---- Teacher ----
    cfg.KD.TEACHER = CfgNode()
    # A config file of its own, or the name of a model-zoo config such as COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml.
    cfg.KD.TEACHER.CONFIG_FILE = ""
    # Checkpoint; "" takes the trained model of the zoo, or MODEL.WEIGHTS of the teacher's config file.
    cfg.KD.TEACHER.WEIGHTS = ""
    # Overrides on the teacher's config: [KEY, VALUE, KEY, VALUE, ...].
    cfg.KD.TEACHER.OPTS = []
    # float32, float16 or bfloat16: precision of the teacher's forward alone.
    cfg.KD.TEACHER.DTYPE = "float32"

    # ---- Heads ----
    # ReviewKD (Chen et al., CVPR 2021).
    cfg.KD.REVIEW = head_node(
        weight=1.0,
        # From the finest level to the coarsest.
        IN_FEATURES=["p2", "p3", "p4", "p5", "p6"],
        # Channels inside the fusion modules.
        MID_CHANNELS=256,
        # Normalisation of the fusion modules: BN, SyncBN or GN.
        NORM="BN",
    )
    # Attention transfer (Zagoruyko & Komodakis, ICLR 2017).
    cfg.KD.ATTENTION_TRANSFER = head_node(
        weight=15.0,
        IN_FEATURES=["p2", "p3", "p4", "p5"],
        # Exponent of the activations in the attention map.
        POWER=2,
        # "sum_hw": summed over cells, the same strength at every map size. "mean": the published code, whose strength
        # falls with the number of cells (its weight is 1000 on CIFAR).
        REDUCTION="sum_hw",
    )
    # Hints (FitNets, Romero et al., ICLR 2015), trained together with the task.
    cfg.KD.HINT = head_node(
        weight=1.0,
        IN_FEATURES=["p2", "p3", "p4", "p5"],
    )
    # Soft targets (Hinton et al., 2015) on class, objectness and mask predictions.
    cfg.KD.SOFT_TARGET = head_node(
        weight=1.0,
        # Any of roi (classes of the sampled boxes), rpn (objectness), mask (of foreground boxes), dense (RetinaNet).
        SOURCES=["roi"],
        # Of the softmax over ROI classes; sigmoid outputs are compared at temperature 1.
        TEMPERATURE=1.0,
        # Boxes whose classes are compared: all or foreground.
        ROIS="all",
        # Weight of the boxes that are labelled background.
        BACKGROUND_WEIGHT=1.0,
        # Also compare the box deltas of the labelled class on foreground boxes (smooth L1).
        BOX_REGRESSION=False,
    )
    for name, head in KD_HEAD_REGISTRY:
        if config_key(name) not in cfg.KD:
            keys = dict(getattr(head, "config", {}))
            cfg.KD[config_key(name)] = head_node(keys.pop("WEIGHT", 1.0), **keys)

    # ---- Backbones ----
    # Backbones of the timm library below an FPN: MODEL.BACKBONE.NAME build_timm_fpn_backbone.
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = "mobilenetv2_100"
    # Start from timm's ImageNet weights (downloaded on first use). MODEL.WEIGHTS is loaded after that, where set.
    cfg.MODEL.TIMM.PRETRAINED = True
    # FrozenBN, BN or SyncBN.
    cfg.MODEL.TIMM.NORM = "FrozenBN"

    # ---- Data sets named here need no code ----
    # name: {JSON: annotation file, IMAGE_ROOT: folder}. Relative paths lie under $DETECTRON2_DATASETS, or datasets/.
    cfg.DATASETS.COCO_FORMAT = CfgNode(new_allowed=True)
    # name: {ROOT: folder with Annotations, ImageSets/Main, JPEGImages; SPLIT: a file in ImageSets/Main; CLASSES: [...];
    # YEAR: 2007 for the 11-point AP, 2012 (default) for the area under the curve}.
    cfg.DATASETS.VOC_FORMAT = CfgNode(new_allowed=True)


def merge_file(cfg: CfgNode, path: str) -> None:
    """Merge a YAML file, with its bases, into a config; tags that would run Python code are refused.

    Raises:
        InputError: If the file does not exist, is no YAML, or has a key or a value that the config does not know.
    """
    try:
        cfg.merge_from_other_cfg(_SafeReader(_SafeReader.load_yaml_with_base(path)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name}, line {mark.line + 1}" if mark else path
        raise InputError(f"{place}: not a safe YAML file: {getattr(error, 'problem', error)}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except (AttributeError, TypeError) as error:
        raise InputError(f"{path}: something else stands where a mapping of keys belongs: {one_line(error)}") from error
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"{path}: {one_line(error)}") from error


class _SafeReader(CfgNode):
    """Reads YAML without running code from it, but for Detectron2's own files: Base-RetinaNet.yaml needs that."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        installed = Path(model_zoo.__file__).resolve().parent in Path(filename).resolve().parents
        return super().load_yaml_with_base(filename, allow_unsafe=installed)


def merge_list(cfg: CfgNode, options: list, key: str) -> None:
    """Merge [KEY, VALUE, KEY, VALUE, ...] into a config.

    Args:
        key: What the list is called, for messages.

    Raises:
        InputError: If a key is unknown or a value has another type.
    """
    try:
        cfg.merge_from_list(list(options))
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"{key}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """The message of an error of yacs, which may have several lines."""
    return " ".join(str(error.args[0] if error.args else type(error).__name__).split())


def student_config(cfg: CfgNode) -> CfgNode:
    """The config of the student alone: a plain detector's, with neither teacher nor heads."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE == "TeacherStudent":
        cfg.MODEL.META_ARCHITECTURE = cfg.KD.STUDENT_ARCHITECTURE
    return cfg
