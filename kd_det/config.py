"""Every config key that kd_det adds to Detectron2's, and how configs are read."""

import re
from pathlib import Path
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import Registry

from kd_det.errors import InputError
from kd_det.files import write_whole
from kd_det.registry import KD_HEAD_REGISTRY, config_key

# Meta-architectures around a student, which is KD.STUDENT_ARCHITECTURE.
DISTILLED = ("TeacherStudent", "MutualStudents")


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

    # ---- Heads ----
    # ReviewKD (Chen et al., CVPR 2021).
    cfg.KD.REVIEW = head_node(
        weight=1.0,
        # From the finest level to the coarsest; of classifiers the last may be "pooled".
        IN_FEATURES=["p2", "p3", "p4", "p5", "p6"],
        # Channels inside the fusion modules.
        MID_CHANNELS=256,
        # Normalisation of the fusion modules: BN (published), SyncBN, GN or LN. SyncBN needs GPUs.
        NORM="BN",
        # Compare with the teacher's features before the ReLU at the end of each stage (published for classifiers).
        TEACHER_PREACT=False,
    )
    # Attention transfer (Zagoruyko & Komodakis, ICLR 2017).
    cfg.KD.ATTENTION_TRANSFER = head_node(
        weight=15.0,
        # "activation", or "gradient": input gradients, of classifiers only; IN_FEATURES, POWER, REDUCTION have no part.
        KIND="activation",
        IN_FEATURES=["p2", "p3", "p4", "p5"],
        # Exponent of the activations in the attention map.
        POWER=2,
        # "sum_hw": summed over cells, the same strength at every map size. "mean": the published code, whose strength
        # falls with the number of cells (its weight is 1000 on CIFAR). "norm": the paper's unsquared distance.
        REDUCTION="sum_hw",
    )
    # Hints (FitNets, Romero et al., ICLR 2015). With two stages WEIGHT is of the first one, and SCHEDULE has no part.
    cfg.KD.HINT = head_node(
        weight=1.0,
        IN_FEATURES=["p2", "p3", "p4", "p5"],
        # From student to teacher: "linear", a 1x1 convolution, or "rectified", with batch norm and ReLU behind it, for
        # features behind a ReLU; published weights on CIFAR are for that one.
        REGRESSOR="linear",
        # In place of that batch norm: SyncBN, GN or LN.
        NORM="BN",
        # 1: together with the task. 2: in a stage before the run, the student's features on the hint alone (paper).
        STAGES=1,
    )
    # Factor transfer (Kim et al., NeurIPS 2018). A stage before the run trains the paraphraser.
    cfg.KD.FACTOR_TRANSFER = head_node(
        weight=11.0,
        # Feature maps of the backbone, and roi_features: those of the sampled boxes.
        IN_FEATURES=["roi_features"],
        # Of so many of an image's sampled boxes roi_features are compared, objects first; 0: of all. Encoders of all
        # would cost as much as a small student.
        BOXES=48,
        # Channels of the factor over those of the teacher's feature.
        FACTOR_RATE=0.5,
        # Normalisation in paraphraser and translator: "" (published code), BN, SyncBN, GN or LN.
        NORM="",
        # "map_invariant": the same strength at every map size. "code": the published mean, whose strength falls with
        # the square root of the factor's elements (its weight is 500 on CIFAR).
        SCALE="map_invariant",
        # How the paraphraser reconstructs: "l1" (published code) or "l2" (paper).
        RECONSTRUCTION="l1",
    )
    # Inherit and explore (IE-KD, Huang et al., CVPR 2021). A stage before the run trains the teacher's encoder.
    cfg.KD.INHERIT_EXPLORE = head_node(
        weight=1.1,
        # "ft" (factors), "at" (attention maps, which need no stage) or "od" (rectified factors).
        KIND="ft",
        # Of "ft" and "at": "l1" and "l2", the mean of absolute differences or the root of the mean of squared ones, or
        # "cosine" (published code's alternative; SCALE has no part). The paper found l1 best; WEIGHT is for that.
        DISTANCE="l1",
        # Feature maps of the backbone, and roi_features: those of the sampled boxes.
        IN_FEATURES=["roi_features"],
        # As above.
        BOXES=48,
        # Which of the student's channels inherit: "natural" (the first half) or "random" (a half drawn by SEED).
        DIVIDE="natural",
        # Factors of the two halves' losses; 0 leaves a half out. The sign of exploration is in its loss.
        INHERIT_WEIGHT=1.0,
        EXPLORE_WEIGHT=1.0,
        # Channels of the factors over those of the teacher's feature.
        FACTOR_RATE=0.5,
        # Normalisation in the encoders and decoders: BN (published), SyncBN, GN or LN.
        NORM="BN",
        # "map_invariant": the same strength at every map size; the default weight is that of "ft" on CIFAR, where "at"
        # would have 6.25. "code": the published mean, whose best weight on CIFAR is 50.
        SCALE="map_invariant",
        # How the auto-encoder reconstructs: "l2" (paper) or "l1" (published code).
        RECONSTRUCTION="l2",
    )
    # Overhaul of feature distillation (OFD, Heo et al., ICCV 2019), on what enters the ReLU at the end of each stage.
    cfg.KD.OVERHAUL = head_node(
        weight=0.001,
        # From the finest stage to the coarsest.
        IN_FEATURES=["res2", "res3", "res4", "res5"],
        # Normalisation in the connectors: BN (published), SyncBN, GN or LN.
        NORM="BN",
        # Where margins come from: "estimate", the teacher's first MARGIN_BATCHES batches; "batch_norm", its last batch
        # norm of each stage (published; wrong where statistics were folded into it, as in converted ImageNet weights).
        MARGIN="estimate",
        MARGIN_BATCHES=200,
        # "map_invariant": the strength it has on CIFAR, at every map size. "code": the published sum over cells.
        SCALE="map_invariant",
    )
    # Activation boundaries (AB, Heo et al., AAAI 2019): a stage before the run trains the student on them alone. WEIGHT
    # is of that stage, and SCHEDULE has no part.
    cfg.KD.ACTIVATION_BOUNDARY = head_node(
        weight=0.003,
        # From the finest stage of the network to the coarsest.
        IN_FEATURES=["res2", "res3", "res4", "res5"],
        # Normalisation in the connectors, where the channels differ: BN (published), SyncBN, GN or LN.
        NORM="BN",
        # "map_invariant": the strength it has on CIFAR, at every map size. "code": the published sum over cells.
        SCALE="map_invariant",
    )
    # Soft targets (Hinton et al., 2015) on class, objectness and mask predictions.
    cfg.KD.SOFT_TARGET = head_node(
        weight=1.0,
        # Any of roi (classes of the sampled boxes), rpn (objectness), mask (of foreground boxes), dense (RetinaNet),
        # cls (image classifiers).
        SOURCES=["roi"],
        # Of the softmax over classes; sigmoid outputs are compared at temperature 1.
        TEMPERATURE=1.0,
        # Whether the divergence of the softmaxes is multiplied by T^2, which keeps its gradient's size when T changes.
        SQUARED_TEMPERATURE=True,
        # Boxes whose classes are compared: all or foreground.
        ROIS="all",
        # Weight of the boxes that are labelled background.
        BACKGROUND_WEIGHT=1.0,
        # Also compare the box deltas of the labelled class on foreground boxes (smooth L1).
        BOX_REGRESSION=False,
        # What becomes of the teacher's mistakes, in roi (foreground boxes) and cls (Wen et al., 2019): "none" leaves
        # them, "probability_shift" swaps its answer's probability with the label's, "label_smoothing" puts a smoothed
        # label in their place.
        ADJUST="none",
        # Probability of the label in a smoothed one.
        CORRECT_PROB=0.9,
        # A temperature for each row, lower for the confusing ones (Wen et al., 2019): "none"; "flsw", those where
        # student and teacher disagree; "cwsm", those of which the student is unsure. On boxes of the foreground.
        DYNAMIC_TEMPERATURE="none",
        # How far from TEMPERATURE: BETA times a row's distance from the mean; it stays within min(1, T / 2) and 2 T.
        BETA=1.0,
        # Exponent of flsw.
        GAMMA=2.0,
    )
    # Softmax regression (SRRL, Yang et al., ICLR 2021).
    cfg.KD.SOFTMAX_REGRESSION = head_node(
        weight=1.0,
        # The student's feature: roi_box_features of an R-CNN; of an image classifier its last map, such as res5.
        IN_FEATURE="roi_box_features",
        # Normalisation between the student's feature and the teacher's classifier: BN (published), SyncBN, GN or LN.
        NORM="BN",
        # How logits are compared: "mse" (published code), or "ce", cross-entropy with the teacher's probabilities.
        KIND="mse",
        # Of "ce" alone: both sides' logits are divided by it.
        TEMPERATURE=1.0,
        # Factors of the two parts: the features before the teacher's classifier, and the logits behind it.
        FEATURE_WEIGHT=1.0,
        LOGIT_WEIGHT=1.0,
    )
    # Born-again networks (Furlanello et al., ICML 2018): the teacher is the previous generation.
    cfg.KD.BORN_AGAIN = head_node(
        weight=1.0,
        # "ban": cross-entropy with the teacher's probabilities; "dkpp": all but its most probable class permuted;
        # "cwtm": cross-entropy with the labels, weighted by the teacher's confidence.
        KIND="ban",
        # roi (classes of the sampled boxes) or cls (image classifiers).
        SOURCE="roi",
        # Whether the student's own loss_cls stays; where it does not, this loss takes its place.
        LABELS=False,
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
        cfg.merge_from_other_cfg(_SafeReader(_SafeReader.load_yaml_with_base(path)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name}, line {mark.line + 1}" if mark else path
        raise InputError(f"{place}: not a safe YAML file: {getattr(error, 'problem', error)}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: its bases (_BASE_), or aliases in it, lead back to themselves.") from error
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
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{key}: {one_line(error)}") from error


def find_config(path: str, key: str = "--config-file") -> str:
    """Path of a config file, or of the model zoo's config of that name.

    Args:
        path: A file, or a name such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml.
        key: What names the file, for messages.

    Raises:
        InputError: If there is neither.
    """
    if PathManager.isfile(path):
        return path
    try:
        return model_zoo.get_config_file(path)
    except RuntimeError as error:
        raise InputError(f"{key}: there is no such file, and {error}") from error


def look_up(cfg: CfgNode, key: str) -> Any:
    """The value of a key such as ``SOLVER.MAX_ITER``."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def registered_parts(cfg: CfgNode) -> dict[str, tuple[Registry, str]]:
    """The keys that name a registered class or function, to its registry and its name there."""
    return {
        "MODEL.META_ARCHITECTURE": (META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE),
        "MODEL.BACKBONE.NAME": (BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME),
    }


def check_parts(cfg: CfgNode, source: str) -> None:
    """Check that all of :func:`registered_parts` are registered.

    Args:
        source: What the config was read from, for messages.

    Raises:
        InputError: If one is not.
    """
    for key, (registry, name) in registered_parts(cfg).items():
        if name not in registry:
            known = ", ".join(sorted(known for known, _ in registry))
            raise InputError(
                f"{source}: {key} is {name!r}, which nothing registers (--plugin FILE imports what does); there are "
                f"{known}."
            )


def save_config(cfg: CfgNode) -> None:
    """Write ``config.yaml`` into the output folder."""
    write_whole(str(Path(cfg.OUTPUT_DIR, "config.yaml")), lambda file: file.write(cfg.dump().encode()))


def one_line(error: Exception) -> str:
    """The message of an error of yacs, which may have several lines, in one; without the node that a value is not."""
    text = " ".join(str(error.args[0] if error.args else type(error).__name__).split())
    found = re.search(r"CfgNode'> vs\. .*vs\. (.*)\) for config key: (\S+)$", text)
    return f"{found[2]}: got {found[1]} where a mapping of keys belongs" if found else text


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
