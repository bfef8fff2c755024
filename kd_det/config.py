"""Every config key that kd_det adds to Detectron2's, and how configs are read."""

import functools
import os
import re
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, downgrade_config, get_cfg, upgrade_config

from kd_det.config_kinds import check_kinds, show
from kd_det.errors import InputError, reason
from kd_det.fetching import fetch, is_url
from kd_det.files import write_whole
from kd_det.registry import KD_HEAD_REGISTRY, config_key

# Meta-architectures around a student, which is KD.STUDENT_ARCHITECTURE.
DISTILLED = ("TeacherStudent", "MutualStudents")
# Keys that name a file or a folder.
PATHS = ("MODEL.WEIGHTS", "OUTPUT_DIR", "KD.TEACHER.WEIGHTS", "KD.PRETRAIN.WEIGHTS")
# Of a YAML file: with aliases, a few lines can stand for billions.
MOST_VALUES = 10**6
# Characters of an error of another library that a message quotes.
LONGEST = 600


def head_node(**keys) -> CfgNode:
    """Make the config node of a distillation head: its own keys and the two that every head has."""
    # Factor of the head's losses.
    node = CfgNode({"WEIGHT": 1.0} | keys)
    # Iterations. The weight is 0 before START and from STOP on (-1: never); it grows linearly over WARMUP iterations.
    # DECAY "linear" or "cosine" brings it to 0 at STOP (-1: the end of the run); "constant" keeps it.
    node.SCHEDULE = CfgNode({"START": 0, "WARMUP": 0, "STOP": -1, "DECAY": "constant"})
    return node


def default_config() -> CfgNode:
    """A config with Detectron2's keys and kd_det's, all at their defaults."""
    cfg = get_cfg()
    add_kd_config(cfg)
    return cfg


def add_kd_config(cfg: CfgNode) -> None:
    """Add kd_det's keys, with their defaults, to a Detectron2 config.

    Every registered head gets a node, with the keys of its class attribute ``config``.

    Raises:
        InputError: If two heads, or a head and another part of kd_det, would have one node.
    """
    # ---- What to distil ----
    cfg.KD = CfgNode()
    # The student's meta-architecture, where MODEL.META_ARCHITECTURE is TeacherStudent or MutualStudents. All other keys
    # of MODEL describe the student as in any Detectron2 config.
    cfg.KD.STUDENT_ARCHITECTURE = "GeneralizedRCNN"
    # Distillation heads, any number of them; [] trains the plain student, without a teacher.
    cfg.KD.HEADS = []
    # Factor of the student's own losses beside the heads'; Hinton's recipe for classifiers has 0.1 and 0.9.
    cfg.KD.TASK_WEIGHT = 1.0
    # Whether feature losses leave out cells that lie in the zero padding of smaller images.
    cfg.KD.MASK_PADDING = False
    # Every so many iterations (never epochs) measure which share of the gradient in the student's backbone comes from
    # its own losses and which from each head: kd/gradient/... in TensorBoard and metrics.json. 0: never.
    cfg.KD.GRADIENT_SHARES = 0
    # Compile the heads with torch.compile; the first steps take minutes.
    cfg.KD.COMPILE_HEADS = False

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
    # "eval": the teacher's batch norms use the statistics that it was trained with. "train": those of the batch, as in
    # the published code of AB, OFD, and ReviewKD on CIFAR; the statistics it was trained with stay as they are.
    cfg.KD.TEACHER.BATCH_NORM = "eval"
    # Keep the teacher's convolutions with the channels last in memory, which GPUs read faster in half precision.
    cfg.KD.TEACHER.CHANNELS_LAST = False
    # Compile the teacher's backbone (without its FPN) with torch.compile; the first steps take minutes. Not for heads
    # that read its inside: OverhaulHead, ActivationBoundaryHead, ReviewKDHead with TEACHER_PREACT.
    cfg.KD.TEACHER.COMPILE = False
    # Let the teacher run beside the student, on a CUDA stream of its own: faster where small batches leave a GPU idle.
    cfg.KD.TEACHER.SIDE_STREAM = False
    # Before training, evaluate the teacher on so many images of DATASETS.TEST[0], read as its own config says, and warn
    # if it knows nothing. 0: no check.
    cfg.KD.TEACHER.SANITY_CHECK = 0

    # ---- Students that teach each other (MODEL.META_ARCHITECTURE MutualStudents) ----
    cfg.KD.MUTUAL = CfgNode()
    # Config files, or names of model-zoo configs, of the other students; the first one is the student of this config.
    # Their MODEL and INPUT count; images are augmented as this config says. A file may stand here several times.
    cfg.KD.MUTUAL.PEERS = []
    # Overrides on all of these: [KEY, VALUE, KEY, VALUE, ...].
    cfg.KD.MUTUAL.OPTS = []
    # "dml" (Zhang et al., CVPR 2018), or "ie_dml" (Huang et al., CVPR 2021), which further has KD.INHERIT_EXPLORE: each
    # student's auto-encoder is trained together with it.
    cfg.KD.MUTUAL.METHOD = "dml"
    # What is compared: roi (classes of the sampled boxes) or cls (image classifiers).
    cfg.KD.MUTUAL.SOURCE = "roi"
    # Factor of the mean divergence from the peers.
    cfg.KD.MUTUAL.WEIGHT = 1.0
    # In each iteration update one student after the other on the same images, each taught by its peers as they then are
    # (paper), instead of all at once. With n students every forward, and every exchange of gradients, runs n times.
    cfg.KD.MUTUAL.SEQUENTIAL = False

    # ---- The stage before the main run, which some heads need ----
    cfg.KD.PRETRAIN = CfgNode()
    # Its iterations; 0 where no head needs it.
    cfg.KD.PRETRAIN.MAX_ITER = 0
    cfg.KD.PRETRAIN.BASE_LR = 0.1
    # The learning rate is multiplied by SOLVER.GAMMA at these iterations; all else is as in SOLVER, without warm-up.
    cfg.KD.PRETRAIN.STEPS = []
    # A finished stage of another run with the same teacher, its pretrain/model_final.pth, instead.
    cfg.KD.PRETRAIN.WEIGHTS = ""

    # ---- Generations (Born-Again Networks) ----
    # Train so many students in a row, in gen_1, gen_2, ... below OUTPUT_DIR: the first is taught by KD.TEACHER, each
    # other by the one before; SEED grows by 1 with each, the first one's too. 0: one run.
    cfg.KD.GENERATIONS = 0

    # ---- Heads: the keys of each are its class attribute `config` ----
    for name, head in KD_HEAD_REGISTRY:
        key = config_key(name)
        if key in cfg.KD:
            raise InputError(f"KD.{key}: is taken, so {name} cannot have it for its keys; rename the head.")
        cfg.KD[key] = head_node(**getattr(head, "config", {}))

    # ---- Backbones ----
    # Backbones of the timm library below an FPN: MODEL.BACKBONE.NAME build_timm_fpn_backbone.
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = "mobilenetv2_100"
    # Start from timm's ImageNet weights (downloaded on first use). MODEL.WEIGHTS is loaded after that, where set.
    cfg.MODEL.TIMM.PRETRAINED = True
    # FrozenBN, BN or SyncBN.
    cfg.MODEL.TIMM.NORM = "FrozenBN"

    # ---- Classification (META_ARCHITECTURE ImageClassifier) ----
    cfg.MODEL.CLASSIFIER = CfgNode()
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 1000
    # The CIFAR family: MODEL.BACKBONE.NAME build_cifar_backbone.
    cfg.MODEL.CIFAR = CfgNode()
    # resnet8, 14, 20, 32, 44, 56, 110; resnet8x4, resnet32x4; wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2.
    cfg.MODEL.CIFAR.NAME = "resnet20"
    # Where a ResNet's channels grow: "projection" (1x1 convolution, as in distillation papers), or "padding" with
    # zeros, without parameters (He et al., 2016, option A).
    cfg.MODEL.CIFAR.SHORTCUT = "projection"
    cfg.INPUT.CLASSIFICATION = CfgNode()
    # Images that enter the network, in pixels, square.
    cfg.INPUT.CLASSIFICATION.SIZE = 32
    # Training: "padded_crop" (pad by PADDING, crop SIZE, flip: CIFAR), "resized_crop" (random area and aspect ratio,
    # flip: ImageNet), or "none". Flips as INPUT.RANDOM_FLIP says: "horizontal" or "none".
    cfg.INPUT.CLASSIFICATION.AUGMENTATION = "padded_crop"
    cfg.INPUT.CLASSIFICATION.PADDING = 4
    # Test: the short side is resized to this, then SIZE is cropped from the centre. 0: resized to SIZE.
    cfg.INPUT.CLASSIFICATION.RESIZE_TEST = 0

    # ---- Schedule ----
    # Each step's images pass through the model in so many parts, one after the other, for batches that do not fit into
    # memory; IMS_PER_BATCH stays the number of images per step. Batch norms see parts.
    cfg.SOLVER.ACCUMULATE = 1
    # Keep an exponential moving average of the student's weights with this decay, for example 0.999 or 0.9999; 0: none.
    # It is "ema" in checkpoints, is evaluated after the student as ema/bbox/AP and the like, and becomes a checkpoint
    # of its own by tools/export_student.py --ema. At the beginning, and so all through a short run, the decay is lower.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Precision of SOLVER.AMP.ENABLED: float16, with scaled gradients, or bfloat16, which has the range of float32.
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Keep the weights of all that is trained with the channels last in memory; see KD.TEACHER.CHANNELS_LAST.
    cfg.SOLVER.CHANNELS_LAST = False
    # Count in epochs: MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD, TEST.EVAL_PERIOD, every SCHEDULE of KD, and
    # MAX_ITER and STEPS of KD.PRETRAIN. They are turned into iterations when a run begins.
    cfg.SOLVER.IN_EPOCHS = False

    # ---- Checkpoints ----
    # So many of model_0004999.pth and the like stay, the newest ones; 0: all. model_final.pth and model_best.pth stay.
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    # The best of all evaluations by this is kept as model_best.pth: "bbox/AP", "classification/top1", or whatever else
    # an evaluation prints and is better the higher it is; of several test sets "name_of_the_set/bbox/AP";
    # "ema/..." of the averaged weights. "": none.
    cfg.TEST.BEST_METRIC = ""

    # ---- Weights & Biases ----
    cfg.WANDB = CfgNode()
    # The project that the run's scalars, pictures and config go to; "": none. Needs `pip install wandb`, which has
    # its own settings: `wandb login`, and on a machine without network the environment variable WANDB_MODE=offline.
    cfg.WANDB.PROJECT = ""
    # Name of the run; "": OUTPUT_DIR. Stages and generations append the name of their folder.
    cfg.WANDB.NAME = ""

    # ---- Data sets named here need no code ----
    # name: {ROOT: folder with one folder of images per class}. Relative paths as below.
    cfg.DATASETS.IMAGE_FOLDER = CfgNode(new_allowed=True)
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
        _merge_versioned(cfg, _SafeReader(_SafeReader.load_yaml_with_base(path)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name}, line {mark.line + 1}" if mark else path
        raise InputError(
            f"{place}: not a safe YAML file: {getattr(error, 'problem', None) or reason(error)}"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: aliases in it lead back to themselves, or it is nested too deeply.") from error
    except (AttributeError, TypeError) as error:
        raise InputError(f"{path}: something else stands where a mapping of keys belongs: {one_line(error)}") from error
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"{path}: {one_line(error)}") from error
    _check_merged(cfg, path)


def _merge_versioned(cfg: CfgNode, loaded: CfgNode) -> None:
    """Merge a config that was read from a file; as in Detectron2, one of an old VERSION is upgraded."""
    version = loaded.get("VERSION", cfg.VERSION)
    if type(version) is not int or not 1 <= version < cfg.VERSION:
        cfg.merge_from_other_cfg(loaded)
        return
    old = downgrade_config(cfg, to_version=version)
    old.merge_from_other_cfg(loaded)
    new = upgrade_config(old)
    cfg.clear()
    cfg.update(new)


def _check_merged(cfg: CfgNode, source: str) -> None:
    """Check the kinds of all values, and expand ``~`` in paths."""
    check_kinds(cfg, default_config(), source)
    for key in PATHS:
        *parents, name = key.split(".")
        node = functools.reduce(lambda node, parent: node.get(parent, {}), parents, cfg)
        if name in node:
            node[name] = os.path.expanduser(node[name])


class _SafeReader(CfgNode):
    """Reads YAML without running code from it, but for Detectron2's own files: Base-RetinaNet.yaml needs that."""

    # The file that is being read, after those whose base it is.
    _chain: ContextVar[tuple[str, ...]] = ContextVar("chain", default=())

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        if filename.endswith(".py"):
            raise InputError(f"{filename} is a LazyConfig (.py); only YAML configs are read.")
        chain = cls._chain.get()
        place = filename if is_url(filename) else os.path.realpath(filename)
        if place in chain:
            raise InputError(f"its bases (_BASE_) lead back to themselves: {' -> '.join([*chain, place])}.")
        folder = Path(model_zoo.__file__).resolve().parent
        # What a URL names comes from its host, whatever its path looks like.
        installed = not is_url(filename) and folder in Path(place).parents
        token = cls._chain.set((*chain, place))
        try:
            loaded = super().load_yaml_with_base(filename, allow_unsafe=installed)
        finally:
            cls._chain.reset(token)
        if count_values(loaded) > MOST_VALUES:
            raise InputError(f"the aliases of {filename} stand for more than {MOST_VALUES} values.")
        _find_beside(loaded, os.path.dirname(filename))
        return loaded

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        return open(fetch(filename, "_BASE_"), encoding="utf-8")


def count_values(value: Any, counts: dict[int, int] | None = None) -> int:
    """Count the values in nested lists and mappings; one that has several aliases counts as often.

    Args:
        counts: Numbers of those that are counted already, by their id.
    """
    counts = {} if counts is None else counts
    if id(value) not in counts:
        items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        counts[id(value)] = 1 + sum(count_values(item, counts) for item in items)
    return counts[id(value)]


def _find_beside(loaded: Any, folder: str) -> None:
    """Let a config that a file names, and that lies beside the file, be found from every working folder."""

    def find(name: Any) -> Any:
        beside = os.path.join(folder, name) if isinstance(name, str) else ""
        return beside if name and os.path.isfile(beside) and not os.path.isfile(name) else name

    node = loaded.get("KD") if isinstance(loaded, dict) else None
    for key, name in (("TEACHER", "CONFIG_FILE"), ("MUTUAL", "PEERS")):
        part = node.get(key) if isinstance(node, dict) else None
        if isinstance(part, dict) and name in part:
            part[name] = list(map(find, part[name])) if isinstance(part[name], list) else find(part[name])


def merge_list(cfg: CfgNode, options: list, key: str) -> None:
    """Merge [KEY, VALUE, KEY, VALUE, ...] into a config.

    Args:
        key: What the list is called, for messages.

    Raises:
        InputError: If a key is unknown or a value has another type.
    """
    names = list(options)[::2]
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{key}: must be KEY VALUE KEY VALUE ..., got {show(list(options))}.")
    try:
        cfg.merge_from_list(list(options))
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{key}: {one_line(error)}") from error
    except (MemoryError, RecursionError) as error:
        raise InputError(f"{key}: a value is nested too deeply.") from error
    _check_merged(cfg, key)


def find_config(path: str, key: str = "--config-file") -> str:
    """Path of a config file, or of the model zoo's config of that name.

    Args:
        path: A file, a URL, or a name such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml.
        key: What names the file, for messages.

    Raises:
        InputError: If there is none of them, or the URL cannot be fetched.
    """
    path = os.path.expanduser(path)
    if path.endswith(".py"):
        raise InputError(f"{key}: {path} is a LazyConfig (.py); only YAML configs are read.")
    if is_url(path):
        fetch(path, key)
        return path  # Its bases are relative to it.
    if os.path.isfile(path):
        return path
    try:
        return model_zoo.get_config_file(path)
    except RuntimeError as error:
        raise InputError(f"{key}: there is no such file, and {error}") from error


def read_config(
    source: str,
    key: str = "--config-file",
    *,
    options: Sequence = (),
    options_key: str = "command line",
    other_heads: bool = False,
) -> CfgNode:
    """Reads a config: all defaults, then a file with its bases, then overrides.

    Args:
        source: A file, a URL, or a name of Detectron2's model zoo.
        key: What names the source, for messages.
        options: Overrides, [KEY, VALUE, KEY, VALUE, ...].
        options_key: What holds the overrides, for messages.
        other_heads: Accept the keys of heads that are not registered, such as those of a plugin.

    Raises:
        InputError: If the source cannot be read, or a key or a value is wrong.
    """
    cfg = default_config()
    cfg.KD.set_new_allowed(other_heads)
    merge_file(cfg, find_config(source, key))
    merge_list(cfg, options, options_key)
    return cfg


def look_up(cfg: CfgNode, key: str) -> Any:
    """The value of a key such as ``SOLVER.MAX_ITER``."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def save_config(cfg: CfgNode) -> None:
    """Write ``config.yaml`` into the output folder."""
    write_whole(str(Path(cfg.OUTPUT_DIR, "config.yaml")), lambda file: file.write(cfg.dump().encode()))


def one_line(error: Exception) -> str:
    """The message of an error of yacs, which may have several lines, in one; without the node that a value is not."""
    text = " ".join(str(error.args[0] if error.args else type(error).__name__).split())
    found = re.search(r"CfgNode'> vs\. .*vs\. (.*)\) for config key: (\S+)$", text)
    if found:
        return f"{found[2]}: got {found[1]} where a mapping of keys belongs"
    if re.match(r"Type mismatch \(<class '(tuple|list)'> vs\. <class 'str'>\)", text):
        text += "; a list of one is ['x'], or ('x',) with a comma"
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def student_config(cfg: CfgNode) -> CfgNode:
    """The config of the student alone: a plain detector's, with neither teacher nor heads."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE in DISTILLED:
        cfg.MODEL.META_ARCHITECTURE = cfg.KD.STUDENT_ARCHITECTURE
    return cfg


def is_flipped(cfg: CfgNode, other: CfgNode, names: tuple[str, str]) -> bool:
    """Whether another network takes the images of this config's with their channels in the reversed order.

    Args:
        names: Of the two networks, for messages.

    Raises:
        InputError: If the images of one cannot be turned into those of the other.
    """
    formats = cfg.INPUT.FORMAT, other.INPUT.FORMAT
    if formats[0] != formats[1] and set(formats) != {"RGB", "BGR"}:
        raise InputError(
            f"INPUT.FORMAT: {names[0]} reads {formats[0]}, {names[1]} {formats[1]}; only RGB and BGR convert."
        )
    return formats[0] != formats[1]
