"""Defines the config keys that kd_det adds to Detectron2's, and reads configs."""

import functools
import os
import re
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, downgrade_config, get_cfg, upgrade_config

from kd_det.config_files import default_output_dir, find_config
from kd_det.config_kinds import check_kinds, show
from kd_det.errors import InputError, one_line, reason
from kd_det.fetching import fetch, is_url
from kd_det.files import write_whole
from kd_det.registry import KD_HEAD_REGISTRY, WRAPPER_REGISTRY, config_key

# Name of the teacher that KD.TEACHER describes, among those of KD.TEACHERS.
UNNAMED = "teacher"
# Keys that name a file or a folder.
PATHS = ("MODEL.WEIGHTS", "OUTPUT_DIR", "KD.TEACHER.WEIGHTS", "KD.PRETRAIN.WEIGHTS")
# Largest number of values in a YAML file: with aliases, a few lines can stand for billions.
MOST_VALUES = 10**6
# Maps the types of a default and of a value that does not fit it to advice on what to write instead.
REMEDIES = {
    ("tuple|list", "str|int|float"): "a list of one is ['x'], or ('x',) with a comma",
    ("bool", ".*"): "write True or False",
    ("float", "int"): "write it with a point, such as 1.0",
    ("int", "float"): "write a whole number without a point or an exponent",
}
# Maps keys that were removed to the only value that files may still give them, which asks for nothing, and to advice.
REMOVED = {
    "KD.SOFT_TARGET.BOX_REGRESSION": (
        False,
        "was removed; write KD.HEADS: [..., BoxTargetHead] instead and, with the WEIGHT that KD.SOFT_TARGET has, "
        "KD.BOX_TARGET: {WEIGHT: ...}",
    )
}
# Longest error of another library, in characters, that a message quotes in full.
LONGEST = 600
# Keys that the node of every distillation head has; a head may have other defaults.
HEAD_KEYS = {
    # Weight of the head's losses.
    "WEIGHT": 1.0,
    # Names of the teachers in KD.TEACHERS that the head learns from; "teacher" is that of KD.TEACHER. The class
    # probabilities of several are averaged, at the head's temperature; features cannot be. []: KD.TEACHER.
    "TEACHERS": [],
    # Mean of the probabilities of several teachers: "arithmetic" or "geometric".
    "AVERAGE": "arithmetic",
    # Schedule of the weight, in iterations. It is 0 before START, grows linearly over WARMUP iterations, and is 0 again
    # from STOP on (-1: never). DECAY "linear" or "cosine" lowers it to 0 at STOP (-1: at the end of the run);
    # "constant" keeps it. With a GRADIENT_SHARE above 0 and below 1, the weight is steered so that this share of the
    # gradient in the student's backbone comes from the head; the schedule multiplies the share, and WEIGHT is what the
    # head has until its gradient can be measured. It is measured every KD.GRADIENT_SHARES iterations. 0: WEIGHT holds.
    "SCHEDULE": {"START": 0, "WARMUP": 0, "STOP": -1, "DECAY": "constant", "GRADIENT_SHARE": 0.0},
}


def default_config(teachers: Iterable[str] = ()) -> CfgNode:
    """Makes a config with Detectron2's keys and kd_det's, all at their defaults.

    Args:
        teachers: Names of teachers in ``KD.TEACHERS``, each of which has the keys of ``KD.TEACHER``.
    """
    cfg = get_cfg()
    add_kd_config(cfg)
    for name in teachers:
        cfg.KD.TEACHERS[name] = cfg.KD.TEACHER.clone()
    return cfg


def add_kd_config(cfg: CfgNode) -> None:
    """Adds kd_det's keys, with their defaults, to a Detectron2 config.

    Every registered head gets a node, with the keys of its class attribute ``config``.

    Raises:
        InputError: If two heads, or a head and another part of kd_det, would share a node.
    """
    # ---- What to distil ----
    cfg.KD = CfgNode()
    # The student's meta-architecture when MODEL.META_ARCHITECTURE is TeacherStudent or MutualStudents. All other keys
    # of MODEL describe the student, as in any Detectron2 config.
    cfg.KD.STUDENT_ARCHITECTURE = "GeneralizedRCNN"
    # Names of any number of distillation heads; [] trains the plain student, without a teacher.
    cfg.KD.HEADS = []
    # Weight of the student's own losses, which are added to the heads' losses. Hinton's recipe for classifiers uses 0.1
    # here and 0.9 for the head.
    cfg.KD.TASK_WEIGHT = 1.0
    # Leave cells that lie in the zero padding of smaller images out of the feature losses.
    cfg.KD.MASK_PADDING = False
    # Begin with the teacher's FPN, proposal network and heads wherever their shapes are the student's, after
    # MODEL.WEIGHTS has been loaded; layers of classes only where both train on the same class names. A resumed run goes
    # on with its own weights. With HEADS [] this is all that the teacher is used for.
    cfg.KD.INHERIT = False
    # Every this many iterations (never epochs), measure how much of the gradient in the student's backbone comes from
    # its own losses and how much from each head, and log the shares as kd/gradient/... in TensorBoard and metrics.json.
    # 0: never, or every 50 iterations if a head has a SCHEDULE.GRADIENT_SHARE.
    cfg.KD.GRADIENT_SHARES = 0
    # Compile the heads with torch.compile; the first steps take minutes.
    cfg.KD.COMPILE_HEADS = False
    # Make equal runs equal bit for bit on a GPU as well, as they are on a CPU: PyTorch then uses deterministic
    # algorithms alone, which are slower and need more memory for boxes (roi_align). On a GPU the losses of semantic
    # segmentations have no such algorithm, and PyTorch ends the run with an error that names the operation.
    cfg.KD.DETERMINISTIC = False
    # Write OUTPUT_DIR/report.html, a page for a browser with curves and the latest results, after every this many
    # evaluations (see TEST.EVAL_PERIOD); a browser left open follows the run. 0: at the end of the run only.
    cfg.KD.REPORT_PERIOD = 0

    # ---- Teacher ----
    cfg.KD.TEACHER = CfgNode()
    # The teacher's config: a file, or the name of a config of the model zoo or of kd_det, such as
    # COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml or BCCD/teacher.yaml. It may be a LazyConfig of the model zoo, such
    # as new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py; any other .py file must be named on the command line, since
    # its code is run. "timm:" before a name of the timm library, such as timm:vit_small_patch14_dinov2, makes that
    # network a teacher of feature maps.
    cfg.KD.TEACHER.CONFIG_FILE = ""
    # The teacher's checkpoint. "": the zoo's trained model for a zoo config; for other YAML configs model_final.pth in
    # the OUTPUT_DIR of that config, if it is there, else MODEL.WEIGHTS of that config; timm's own for timm:...
    cfg.KD.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config: [KEY, VALUE, KEY, VALUE, ...]; for a LazyConfig [key=value, key=value, ...];
    # for a network of timm whose weights have a classifier of N classes [num_classes, N].
    cfg.KD.TEACHER.OPTS = []
    # Names of the teacher's classes, in the order of its indices. Class predictions are then compared for the classes
    # that the student's data sets name alike, and everything else as one class. []: the names in the data sets of the
    # teacher's config, or COCO's for a zoo config, if it has another number of classes than the student; with equally
    # many, class is compared with class by index.
    cfg.KD.TEACHER.CLASSES = []
    # Maps the teacher's names of classes to those in the student's data sets where they differ, in a file only:
    # {bike: bicycle} if the student's is bicycle. With any, classes are compared by name.
    cfg.KD.TEACHER.SYNONYMS = CfgNode(new_allowed=True)
    # Maps feature maps of the student to the teacher's that stand for them, where the names differ, such as
    # {p3: res3, p4: res4, p5: res5} for a teacher without an FPN. Maps of another stride are resampled onto the
    # student's grid. For a network of timm, maps that are not listed have the teacher's deepest map of the nearest
    # stride.
    cfg.KD.TEACHER.FEATURES = CfgNode(new_allowed=True)
    # Enlarge the images by this factor for the teacher, which often sees small objects better then; 1.0: as they are.
    # Boxes are scaled, and maps are brought back to the student's grid; predictions for anchors (rpn, dense) cannot be
    # compared.
    cfg.KD.TEACHER.SCALE = 1.0
    # Precision of the teacher's forward pass, in which its weights are stored, too: float32, float16, bfloat16, or
    # auto, which is SOLVER.AMP.DTYPE if SOLVER.AMP.ENABLED is True, and float32 otherwise.
    cfg.KD.TEACHER.DTYPE = "auto"
    # Statistics that the teacher's batch norms use. "eval": those it was trained with. "train": those of the batch, as
    # in the published code of AB, OFD, and ReviewKD on CIFAR; the stored statistics do not change.
    cfg.KD.TEACHER.BATCH_NORM = "eval"
    # Fold the teacher's batch norms into the convolutions before them, for a faster forward pass; results differ by
    # rounding. Only Detectron2's convolutions carry their norm, so that it can be folded. Do not use it with BATCH_NORM
    # train, nor with OverhaulHead whose MARGIN is read from the batch norms.
    cfg.KD.TEACHER.FOLD_NORM = False
    # Store the teacher's convolution weights with the channels last, which GPUs read faster in half precision.
    cfg.KD.TEACHER.CHANNELS_LAST = False
    # Compile the teacher's backbone (without its FPN) with torch.compile; the first steps take minutes. Do not use it
    # with heads that read the backbone's internals: OverhaulHead, ActivationBoundaryHead, ReviewKDHead with
    # TEACHER_PREACT.
    cfg.KD.TEACHER.COMPILE = False
    # Run the teacher in parallel with the student, on its own CUDA stream: True, False, or None (auto), which does so
    # wherever MODEL.DEVICE is a GPU. The teacher then fills the gaps in which the student leaves the GPU idle; the
    # student cannot reuse its memory, and the log says how much that is.
    cfg.KD.TEACHER.SIDE_STREAM = None
    # Before training, evaluate the teacher on this many images of DATASETS.TEST[0], loaded as its own config says, and
    # warn if it has learned nothing. 0: no check.
    cfg.KD.TEACHER.SANITY_CHECK = 0

    # More teachers, by names of your choice, each with all keys of KD.TEACHER; they are defined in a file, as in
    # {small: {CONFIG_FILE: a.yaml}, large: {CONFIG_FILE: b.yaml}}. A head's key TEACHERS names those that teach it.
    cfg.KD.TEACHERS = CfgNode(new_allowed=True)

    # ---- Students that teach each other (MODEL.META_ARCHITECTURE MutualStudents) ----
    cfg.KD.MUTUAL = CfgNode()
    # Config files of the other students, or names of configs of the model zoo or of kd_det; the first student is that
    # of this config. Only their MODEL and INPUT matter; this config sets the augmentation of images. A file may be
    # listed several times. []: where a recipe comes after the student's file, another student of that file.
    cfg.KD.MUTUAL.PEERS = []
    # Overrides of all these configs: [KEY, VALUE, KEY, VALUE, ...].
    cfg.KD.MUTUAL.OPTS = []
    # Method: "dml" (Zhang et al., CVPR 2018), or "ie_dml" (Huang et al., CVPR 2021), which also uses the keys of
    # KD.INHERIT_EXPLORE and trains each student's auto-encoder together with the student.
    cfg.KD.MUTUAL.METHOD = "dml"
    # Predictions to compare: "roi" (classes of the sampled boxes) or "cls" (image classifiers).
    cfg.KD.MUTUAL.SOURCE = "roi"
    # Weight of the mean divergence from the peers.
    cfg.KD.MUTUAL.WEIGHT = 1.0
    # Update the students in turn on the same batch, each taught by its peers' current weights (as in the paper),
    # instead of all at once. With n students, every forward pass and every gradient synchronisation runs n times.
    cfg.KD.MUTUAL.SEQUENTIAL = False

    # ---- The stage before the main run, which some heads need ----
    cfg.KD.PRETRAIN = CfgNode()
    # Number of iterations of this stage; 0 if no head needs it.
    cfg.KD.PRETRAIN.MAX_ITER = 0
    # Learning rate of this stage.
    cfg.KD.PRETRAIN.BASE_LR = 0.1
    # Multiply the learning rate by SOLVER.GAMMA at these iterations. All other settings are those of SOLVER, but there
    # is no warm-up.
    cfg.KD.PRETRAIN.STEPS = []
    # Reuse the finished stage of another run with the same teacher instead: the path of its pretrain/model_final.pth.
    cfg.KD.PRETRAIN.WEIGHTS = ""

    # ---- Generations (Born-Again Networks) ----
    # Number of students to train in sequence, in OUTPUT_DIR/gen_1, gen_2, ... KD.TEACHER teaches the first one, and
    # each student teaches the next. Each generation uses the previous seed plus 1, the first included. 0: a single run.
    cfg.KD.GENERATIONS = 0

    # ---- Heads: the keys of each are its class attribute `config` ----
    for name, head in KD_HEAD_REGISTRY:
        key = config_key(name)
        if key in cfg.KD:
            raise InputError(f"KD.{key}: is taken, so {name} cannot have it for its keys; rename the head.")
        cfg.KD[key] = CfgNode(HEAD_KEYS | getattr(head, "config", {}))

    # ---- Backbones ----
    cfg.MODEL.TIMM = CfgNode()
    # timm's name of the network, for MODEL.BACKBONE.NAME build_timm_fpn_backbone (with an FPN) or
    # build_timm_classifier_backbone.
    cfg.MODEL.TIMM.NAME = "mobilenetv2_100"
    # Start from timm's ImageNet weights, which are downloaded on first use. If MODEL.WEIGHTS is set, it is loaded after
    # them.
    cfg.MODEL.TIMM.PRETRAINED = True
    # Normalisation of the network: FrozenBN, BN or SyncBN.
    cfg.MODEL.TIMM.NORM = "FrozenBN"

    # ---- Classification (META_ARCHITECTURE ImageClassifier) ----
    cfg.MODEL.CLASSIFIER = CfgNode()
    # Number of classes that the classifier predicts.
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 1000
    cfg.MODEL.CIFAR = CfgNode()
    # Name of the network, for MODEL.BACKBONE.NAME build_cifar_backbone: resnet8, 14, 20, 32, 44, 56, 110; resnet8x4,
    # resnet32x4; wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2, wrn_10_1, wrn_10_4, wrn_16_4, wrn_22_4; nin_thin, nin_wide;
    # densenet_112_33, densenet_90_60, densenet_80_80, densenet_80_120.
    cfg.MODEL.CIFAR.NAME = "resnet20"
    # Shortcut of a ResNet where the number of channels grows: "projection" (1x1 convolution, as in the distillation
    # papers), or "padding" with zeros, without parameters (He et al., 2016, option A).
    cfg.MODEL.CIFAR.SHORTCUT = "projection"
    # Probability with which a network in a network (nin_thin, nin_wide) drops a value between its stages, below 1.
    cfg.MODEL.CIFAR.DROPOUT = 0.5
    cfg.MODEL.FULLY_CONNECTED = CfgNode()
    # Name of the network, for MODEL.BACKBONE.NAME build_fully_connected_backbone: vgg11, vgg16, vgg19, alexnet
    # (torchvision's), or perceptron.
    cfg.MODEL.FULLY_CONNECTED.NAME = "vgg16"
    # Number of units of each hidden layer of a perceptron.
    cfg.MODEL.FULLY_CONNECTED.UNITS = [1200, 1200]
    # Probability with which these networks drop a hidden unit, below 1.
    cfg.MODEL.FULLY_CONNECTED.DROPOUT = 0.5
    # Probability with which a perceptron drops a pixel, below 1.
    cfg.MODEL.FULLY_CONNECTED.INPUT_DROPOUT = 0.0
    cfg.INPUT.CLASSIFICATION = CfgNode()
    # Side of the square images that enter the network, in pixels.
    cfg.INPUT.CLASSIFICATION.SIZE = 32
    # Augmentation in training: "padded_crop" (pad by PADDING, crop to SIZE, flip; for CIFAR), "resized_crop" (crop a
    # random area with a random aspect ratio, flip; for ImageNet), or "none". INPUT.RANDOM_FLIP sets the flip:
    # "horizontal" or "none".
    cfg.INPUT.CLASSIFICATION.AUGMENTATION = "padded_crop"
    # Padding of "padded_crop" on each side, in pixels.
    cfg.INPUT.CLASSIFICATION.PADDING = 4
    # In tests, resize the short side to this and crop SIZE from the centre. 0: resize the image to SIZE.
    cfg.INPUT.CLASSIFICATION.RESIZE_TEST = 0

    # ---- Schedule ----
    # Split each batch into this many micro-batches and accumulate their gradients, for batches that do not fit into
    # memory. IMS_PER_BATCH is still the number of images per step; batch norms see micro-batches.
    cfg.SOLVER.ACCUMULATE = 1
    # Keep an exponential moving average of the student's weights with this decay, for example 0.999 or 0.9999; 0: none.
    # Checkpoints store it as "ema", it is evaluated after the student as ema/bbox/AP and the like, and
    # tools/export_student.py --ema writes it as a separate checkpoint. The decay is lower at the beginning, and
    # therefore throughout a short run.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Precision of mixed-precision training (SOLVER.AMP.ENABLED): float16, which scales gradients, or bfloat16, which
    # has the range of float32.
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Store the weights of everything that is trained with the channels last; see KD.TEACHER.CHANNELS_LAST.
    cfg.SOLVER.CHANNELS_LAST = False
    # Read these keys as numbers of epochs: MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD, TEST.EVAL_PERIOD, every
    # SCHEDULE of KD, and MAX_ITER and STEPS of KD.PRETRAIN. They are converted to iterations when a run begins.
    cfg.SOLVER.IN_EPOCHS = False

    # ---- Checkpoints ----
    # Keep only this many of the newest model_0004999.pth and the like; 0 keeps all. model_final.pth and model_best.pth
    # are always kept.
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    # Keep the checkpoint with the best value of this metric as model_best.pth: "bbox/AP", "classification/top1", or any
    # other metric that an evaluation prints and for which higher is better. With several test sets, write
    # "name_of_the_set/bbox/AP"; for the averaged weights, "ema/...". "": no such checkpoint.
    cfg.TEST.BEST_METRIC = ""
    # End the run as if finished once this many evaluations in a row (every TEST.EVAL_PERIOD iterations) have found no
    # better value of TEST.BEST_METRIC; NaN is not better. model_final.pth then has the last weights and model_best.pth
    # the best ones. The learning-rate schedule and the schedules of KD still follow SOLVER.MAX_ITER. 0: never.
    cfg.TEST.PATIENCE = 0

    # ---- Weights & Biases ----
    cfg.WANDB = CfgNode()
    # Log the run's scalars, pictures and config to this project; "": do not log. This needs `pip install wandb`, which
    # is set up by `wandb login`, or on a machine without network by the environment variable WANDB_MODE=offline.
    cfg.WANDB.PROJECT = ""
    # Name of the run; "": OUTPUT_DIR. Stages and generations append the name of their folder.
    cfg.WANDB.NAME = ""

    # Share of the images of DATASETS.TRAIN that are trained on, above 0. They are drawn once, by TRAIN_SHARE_SEED; an
    # epoch is a pass over them.
    cfg.DATASETS.TRAIN_SHARE = 1.0
    # Seed of the draw, 0 or more. It does not depend on SEED, so that runs with different seeds share their images.
    cfg.DATASETS.TRAIN_SHARE_SEED = 0

    # ---- Data sets named here need no code ----
    # Image folders, each as name: {ROOT: folder with one folder of images per class}. Relative paths lie under
    # $DETECTRON2_DATASETS, or datasets/.
    cfg.DATASETS.IMAGE_FOLDER = CfgNode(new_allowed=True)
    # COCO files, each as name: {JSON: annotation file, IMAGE_ROOT: folder; FLIP_PAIRS: pairs of keypoints that swap in
    # mirrored images, [[left_eye, right_eye], ...], if their names do not show it; SCORES: "weight" multiplies what a
    # box adds to the classification losses of an R-CNN by its score, from 0 to 1, which kd-det label writes; "ignore"
    # (default)}. Relative paths lie under $DETECTRON2_DATASETS, or datasets/.
    cfg.DATASETS.COCO_FORMAT = CfgNode(new_allowed=True)
    # Pascal VOC folders, each as name: {ROOT: folder with Annotations, ImageSets/Main, JPEGImages; SPLIT: a file in
    # ImageSets/Main; CLASSES: [...]; YEAR: 2007 for the 11-point AP, 2012 (default) for the area under the curve}.
    cfg.DATASETS.VOC_FORMAT = CfgNode(new_allowed=True)
    # Share of each data set of DATASETS.TRAIN in every batch, relative to their sum, in a file only: {labelled: 1,
    # by_teacher: 3}. Images are then drawn without regard to DATALOADER.ASPECT_RATIO_GROUPING. {}: all images are drawn
    # equally often.
    cfg.DATASETS.MIX = CfgNode(new_allowed=True)


def merge_file(cfg: CfgNode, path: str) -> None:
    """Merges a YAML file, with its bases, into a config; refuses tags that would run Python code.

    Raises:
        InputError: If the file does not exist, is not YAML, or has a key or a value that the config does not accept.
    """
    try:
        loaded = _SafeReader(_SafeReader.load_yaml_with_base(path))
        _drop_removed(loaded, check=not cfg.get("KD", CfgNode()).is_new_allowed())
        _merge_versioned(cfg, loaded)
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
        raise InputError(
            f"{path}: something else stands where a mapping of keys belongs: {yacs_message(error)}"
        ) from error
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"{path}: {yacs_message(error)}") from error
    _check_merged(cfg, path)


def _merge_versioned(cfg: CfgNode, loaded: CfgNode) -> None:
    """Merges a config that was read from a file; upgrades an old VERSION, as Detectron2 does."""
    version = loaded.get("VERSION", cfg.VERSION)
    if type(version) is not int or not 1 <= version < cfg.VERSION:
        cfg.merge_from_other_cfg(loaded)
        return
    old = downgrade_config(cfg, to_version=version)
    old.merge_from_other_cfg(loaded)
    new = upgrade_config(old)
    cfg.clear()
    cfg.update(new)


def _drop_removed(loaded: CfgNode, *, check: bool) -> None:
    """Deletes the keys of a file that were removed.

    Args:
        check: Refuse values that asked for something.

    Raises:
        InputError: If one has such a value.
    """
    for key, (value, advice) in REMOVED.items():
        *parents, name = key.split(".")
        node = functools.reduce(
            lambda node, parent: node.get(parent) if isinstance(node, dict) else None, parents, loaded
        )
        if isinstance(node, dict) and node.pop(name, value) != value and check:
            raise InputError(f"{key} {advice}.")


def _check_merged(cfg: CfgNode, source: str) -> None:
    """Completes the named teachers, checks the kinds of all values and expands ``~`` in paths."""
    named = cfg.get("KD", {}).get("TEACHERS", {})
    complete_teachers(named, source)
    check_kinds(cfg, default_config(named), source)
    for key in (*PATHS, *(f"KD.TEACHERS.{name}.WEIGHTS" for name in named)):
        *parents, name = key.split(".")
        node = functools.reduce(lambda node, parent: node.get(parent, {}), parents, cfg)
        if name in node:
            node[name] = os.path.expanduser(node[name])


def complete_teachers(named: dict[str, CfgNode], source: str) -> None:
    """Gives each teacher of ``KD.TEACHERS`` all keys of ``KD.TEACHER``.

    Args:
        named: The node, which is changed in place.
        source: Origin of the config, for messages.

    Raises:
        InputError: If a name is not allowed, or a teacher has a key or a value that ``KD.TEACHER`` does not accept.
    """
    for name, node in named.items():
        if name == UNNAMED:
            raise InputError(
                f"{source}: KD.TEACHERS: two teachers have one name: {UNNAMED!r} is the one that KD.TEACHER describes."
            )
        if not (isinstance(name, str) and re.fullmatch(r"[\w-]+", name)):
            raise InputError(f"{source}: KD.TEACHERS: a name has letters, digits, - and _ alone, got {show(name)}.")
        if not isinstance(node, dict):
            raise InputError(
                f"{source}: KD.TEACHERS.{name}: must be a mapping of keys of KD.TEACHER, got {show(node)}."
            )
        complete = default_config().KD.TEACHER
        try:
            complete.merge_from_other_cfg(node)
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source}: KD.TEACHERS.{name}: {yacs_message(error)}") from error
        named[name] = complete


class _SafeReader(CfgNode):
    """Reads YAML without running its code, except in Detectron2's own files: Base-RetinaNet.yaml needs it."""

    # The files that are being read: each one is a base of the file before it.
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
        # A URL is never trusted: its host decides what it returns, even if its path looks like that of an installed
        # file.
        installed = not is_url(filename) and folder in Path(place).parents
        token = cls._chain.set((*chain, place))
        try:
            loaded = super().load_yaml_with_base(filename, allow_unsafe=installed)
        finally:
            cls._chain.reset(token)
        check_repeated_teachers(cls._open_cfg(filename))
        if count_values(loaded) > MOST_VALUES:
            raise InputError(f"the aliases of {filename} stand for more than {MOST_VALUES} values.")
        _find_beside(loaded, os.path.dirname(filename))
        return loaded

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        return open(fetch(filename, "_BASE_"), encoding="utf-8")


def count_values(value: Any, counts: dict[int, int] | None = None) -> int:
    """Counts the values in nested lists and mappings; a value with several aliases counts once for each.

    Args:
        counts: Maps the ids of lists and mappings that have been counted to their numbers of values.
    """
    counts = {} if counts is None else counts
    if id(value) not in counts:
        items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        counts[id(value)] = 1 + sum(count_values(item, counts) for item in items)
    return counts[id(value)]


def check_repeated_teachers(file: IO[str]) -> None:
    """Checks that a YAML file names no teacher of ``KD.TEACHERS`` twice, of which YAML would keep the last.

    Raises:
        InputError: If it does.
    """
    with file:
        text = file.read()
    if "TEACHERS" not in text:
        return
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    for part in ("KD", "TEACHERS"):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((value for key, value in pairs if key.value == part), None)
    names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"KD.TEACHERS: two teachers have one name, {twice!r}.")


def _find_beside(loaded: Any, folder: str) -> None:
    """Makes configs that a file names relative to its own folder findable from every working folder."""

    def find(name: Any) -> Any:
        beside = os.path.join(folder, name) if isinstance(name, str) else ""
        return beside if name and os.path.isfile(beside) and not os.path.isfile(name) else name

    node = loaded.get("KD") if isinstance(loaded, dict) else None
    node = node if isinstance(node, dict) else {}
    teachers = node.get("TEACHERS")
    named = list(teachers.values()) if isinstance(teachers, dict) else []
    parts = [(part, "CONFIG_FILE") for part in (node.get("TEACHER"), *named)]
    for part, name in (*parts, (node.get("MUTUAL"), "PEERS")):
        if isinstance(part, dict) and name in part:
            part[name] = list(map(find, part[name])) if isinstance(part[name], list) else find(part[name])


def merge_list(cfg: CfgNode, options: Sequence, key: str) -> None:
    """Merges [KEY, VALUE, KEY, VALUE, ...] into a config.

    Args:
        key: Name of the list, for messages.

    Raises:
        InputError: If a key is unknown or a value has another type.
    """
    names = list(options)[::2]
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{key}: must be KEY VALUE KEY VALUE ..., got {show(list(options))}.")
    for name in REMOVED.keys() & set(names):
        raise InputError(f"{key}: {name} {REMOVED[name][1]}.")
    try:
        cfg.merge_from_list(list(options))
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{key}: {yacs_message(error)}") from error
    except (MemoryError, RecursionError) as error:
        raise InputError(f"{key}: a value is nested too deeply.") from error
    _check_merged(cfg, key)


def read_config(
    source: str | Sequence[str],
    key: str = "--config-file",
    *,
    options: Sequence = (),
    options_key: str = "command line",
    other_heads: bool = False,
    output_dir: str = "",
) -> CfgNode:
    """Reads a config: all defaults, then files with their bases, one after the other, then overrides.

    A file after the first one, such as a recipe, may set MODEL.META_ARCHITECTURE to TeacherStudent or MutualStudents:
    the architecture before it is then the student's.

    Args:
        source: A file, a URL, or a name of a config of Detectron2's model zoo or of kd_det; or several, of which later
            ones win.
        key: The key or argument that names the source, for messages.
        options: Overrides, [KEY, VALUE, KEY, VALUE, ...].
        options_key: The key or argument that holds the overrides, for messages.
        other_heads: Accept the keys of heads that are not registered, such as those of a plugin.
        output_dir: OUTPUT_DIR if neither a file nor an override sets it; "": :func:`default_output_dir`.

    Raises:
        InputError: If a source cannot be read, or a key or a value is wrong.
    """
    paths = [find_config(path, key) for path in ([source] if isinstance(source, str) else source)]
    cfg = default_config()
    if other_heads:
        cfg.KD.set_new_allowed(True)
    cfg.OUTPUT_DIR = output_dir or default_output_dir(paths)
    for i, path in enumerate(paths):
        if i > 0 and not is_wrapped(cfg):
            cfg.KD.STUDENT_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
        merge_file(cfg, path)
    merge_list(cfg, options, options_key)
    return cfg


def look_up(cfg: CfgNode, key: str) -> Any:
    """Returns the value of a key such as ``SOLVER.MAX_ITER``."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def save_config(cfg: CfgNode) -> None:
    """Writes ``config.yaml`` into the output folder."""
    write_whole(str(Path(cfg.OUTPUT_DIR, "config.yaml")), lambda file: file.write(cfg.dump().encode()))


def yacs_message(error: Exception) -> str:
    """Returns a yacs error message on one line, without its dump of the config node."""
    text = one_line(str(error.args[0] if error.args else type(error).__name__))
    mismatch = re.search(r"CfgNode'> vs\. .*vs\. (.*)\) for config key: (\S+)$", text)
    if mismatch:
        return f"{mismatch[2]}: got {mismatch[1]} where a mapping of keys belongs"
    for (expected, given), remedy in REMEDIES.items():
        if re.match(rf"Type mismatch \(<class '({expected})'> vs\. <class '({given})'>\)", text):
            text += f"; {remedy}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def is_wrapped(cfg: CfgNode) -> bool:
    """Returns whether a config describes a wrapper of students, such as ``TeacherStudent``, not a plain model."""
    return cfg.MODEL.META_ARCHITECTURE in WRAPPER_REGISTRY


def has_teacher(cfg: CfgNode) -> bool:
    """Returns whether a config describes a student that may have a teacher."""
    return is_wrapped(cfg) and WRAPPER_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE).has_teacher


def has_peers(cfg: CfgNode) -> bool:
    """Returns whether a config describes several students."""
    return is_wrapped(cfg) and WRAPPER_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE).has_peers


def student_config(cfg: CfgNode) -> CfgNode:
    """Returns the config of the student alone: that of a plain detector, without a teacher or heads."""
    cfg = cfg.clone()
    cfg.defrost()
    if is_wrapped(cfg):
        cfg.MODEL.META_ARCHITECTURE = cfg.KD.STUDENT_ARCHITECTURE
    return cfg


def is_flipped(cfg: CfgNode, other: CfgNode, names: tuple[str, str]) -> bool:
    """Returns whether `other` expects the opposite channel order: RGB instead of BGR, or the reverse.

    Args:
        names: Names of the two networks, for messages.

    Raises:
        InputError: If the images of one cannot be turned into those of the other.
    """
    formats = cfg.INPUT.FORMAT, other.INPUT.FORMAT
    if formats[0] != formats[1] and set(formats) != {"RGB", "BGR"}:
        raise InputError(
            f"INPUT.FORMAT: {names[0]} reads {formats[0]}, {names[1]} {formats[1]}; only RGB and BGR convert."
        )
    return formats[0] != formats[1]
