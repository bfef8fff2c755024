"""Makes the config of a run from the command line, and checks it before anything is built."""

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import detectron2.utils.comm as comm
import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.modeling import META_ARCH_REGISTRY

from kd_det.config import UNNAMED, default_config, has_peers, is_wrapped, merge_list, read_config
from kd_det.config_checks import check_parts, check_run_values
from kd_det.config_files import default_output_dir, find_config
from kd_det.data import (
    check_annotations,
    check_files,
    check_num_classes,
    count_training_images,
    register_datasets,
)
from kd_det.data.mixing import read_shares
from kd_det.engine.cli import import_plugin
from kd_det.engine.determinism import make_deterministic
from kd_det.engine.evaluation import check_evaluation
from kd_det.engine.launching import use_own_gpu
from kd_det.engine.output_folder import claim
from kd_det.engine.run_log import deferring_log, log_again, start_logging
from kd_det.errors import InputError
from kd_det.files import write_whole
from kd_det.lazy_configs import allow_lazy_config, is_lazy_config
from kd_det.registry import KD_HEAD_REGISTRY, config_key
from kd_det.taps import find_tap
from kd_det.teacher_choices import used_teachers

logger = logging.getLogger(__name__)
# The value of --kd-heads that stands for the recipe of this name.
RECOMMENDED = "recommended"


def setup(args: argparse.Namespace) -> CfgNode:
    """Makes the config of a run from the command line, checks its data sets, and starts logging.

    Args:
        args: Arguments of Detectron2's ``default_argument_parser`` with :func:`add_distillation_arguments`.

    Raises:
        InputError: If a file, a key or a data set is wrong, or another run writes into the output folder.
    """
    late = [option for option in args.opts if option.startswith("--")]
    if late:
        raise InputError(f"command line: {late[0]} must come before the overrides, {' '.join(args.opts[:2])} ...")
    for path in args.plugin:
        import_plugin(path)
    cfg, files = make_config(args), config_files(args)
    in_run_folder = (
        args.eval_only and not args.resume and "OUTPUT_DIR" not in args.opts[::2] and write_into_run_folder(cfg)
    )
    check_run(cfg, f"{describe_files(files)} with the overrides")
    make_deterministic(cfg)
    with deferring_log() as messages:
        if torch.device(cfg.MODEL.DEVICE).type == "cuda" and not torch.cuda.is_available():
            logger.warning("MODEL.DEVICE: this machine has no GPU; using cpu instead of %s.", cfg.MODEL.DEVICE)
            cfg.MODEL.DEVICE = "cpu"
        use_own_gpu(cfg.MODEL.DEVICE)
        register_datasets(cfg)
        check_files(cfg, train=not args.eval_only)
        check_num_classes(cfg, train=not args.eval_only)
        check_evaluation(cfg)
        check_annotations(cfg, train=not args.eval_only)
        if not args.eval_only:
            read_shares(cfg)
        if cfg.SOLVER.IN_EPOCHS and not args.eval_only:
            epochs_to_iterations(cfg, count_training_images(cfg))
    cfg.freeze()
    if not args.eval_only:
        claim(cfg.OUTPUT_DIR)
    start_logging(cfg.OUTPUT_DIR)
    log_again(messages)
    with preserve_file(Path(cfg.OUTPUT_DIR, "config.yaml")):
        # Detectron2 logs the text of a single file.
        single = find_config(*files) if len(files) == 1 else ""
        default_setup(cfg, argparse.Namespace(**vars(args) | {"config_file": single}))
    if len(files) > 1:
        logger.info("Config files, each of which overrides those before it: %s", ", ".join(files))
    if in_run_folder:
        logger.info("The evaluation writes into %s, the folder of the run that it evaluates.", cfg.OUTPUT_DIR)
    logger.info("The log with all details, including environment and config: %s", Path(cfg.OUTPUT_DIR, "log.txt"))
    warn_of_idle_heads(cfg)
    return cfg


def write_into_run_folder(cfg: CfgNode) -> bool:
    """Makes an evaluation write into the folder of the run whose checkpoint it evaluates.

    Args:
        cfg: The config, whose OUTPUT_DIR is changed.

    Returns:
        Whether MODEL.WEIGHTS lies in the folder of a run, and that folder is writable.
    """
    folder = os.path.dirname(cfg.MODEL.WEIGHTS) or "."
    if not os.path.isfile(os.path.join(folder, "config.yaml")) or not os.access(folder, os.W_OK):
        return False
    cfg.OUTPUT_DIR = folder
    return True


def check_run(cfg: CfgNode, source: str) -> None:
    """Checks keys whose wrong values Detectron2 would report late, without naming them, or would misinterpret.

    Args:
        source: Source of the config, for messages.

    Raises:
        InputError: If a value is not allowed.
    """
    check_parts(cfg, source)
    check_run_values(cfg)
    if not cfg.OUTPUT_DIR.strip():
        raise InputError(f"OUTPUT_DIR: must name a folder, got {cfg.OUTPUT_DIR!r}.")
    try:
        computes = torch.device(cfg.MODEL.DEVICE).type != "meta"
    except RuntimeError:
        computes = False
    if not computes:
        raise InputError(f"MODEL.DEVICE: {cfg.MODEL.DEVICE!r} is not a device such as cuda, cuda:1 or cpu.")


def warn_of_idle_heads(cfg: CfgNode) -> None:
    """Warns of heads without a teacher and the reverse, and of heads that never reach their full weight in the run."""
    if cfg.KD.HEADS and not is_wrapped(cfg):
        logger.warning(
            "KD.HEADS: the run does not use %s, because MODEL.META_ARCHITECTURE is %s; name a student's config before "
            "the recipe, or a teacher with --teacher.",
            ", ".join(cfg.KD.HEADS),
            cfg.MODEL.META_ARCHITECTURE,
        )
        return
    idle = [name for name in cfg.KD.TEACHERS if name not in used_teachers(cfg)]
    if idle:
        logger.warning(
            "KD.TEACHERS: no head learns from %s; a head's key TEACHERS names its teachers.", ", ".join(idle)
        )
    end = cfg.SOLVER.MAX_ITER
    for name in cfg.KD.HEADS:
        key = config_key(name)
        node = cfg.KD.get(key, CfgNode()).get("SCHEDULE")
        if node is None:
            continue
        if end <= node.START:
            logger.warning("KD.%s.SCHEDULE.START: the head never acts; START is %d, MAX_ITER %d.", key, node.START, end)
        elif end <= node.START + node.WARMUP:
            logger.warning(
                "KD.%s.SCHEDULE.WARMUP: the head never has its full weight; START + WARMUP is %d, MAX_ITER %d.",
                key,
                node.START + node.WARMUP,
                end,
            )


@contextmanager
def preserve_file(path: Path) -> Iterator[None]:
    """Restores an existing file afterwards if the block overwrites it."""
    before = path.read_bytes() if path.is_file() else None
    yield
    if before is not None and comm.is_main_process():
        write_whole(str(path), lambda file: file.write(before))


def make_config(args: argparse.Namespace) -> CfgNode:
    """Makes the config of the command line from its files, its arguments for distillation and its overrides.

    Raises:
        InputError: If a file, a key or a value is wrong, or a student is to be taught without a teacher or heads.
    """
    files, heads = config_files(args), named_heads(args)
    keys = None if heads is None else [config_key(name) for name in heads]
    cfg = read_config(files, output_dir=default_output_dir(files, keys))
    if args.teacher:
        teacher = os.path.expanduser(args.teacher)
        # A resumed run names its LazyConfig again, only to allow it.
        if not is_lazy_config(teacher) or teacher != cfg.KD.TEACHER.CONFIG_FILE:
            cfg.KD.TEACHER.WEIGHTS, cfg.KD.TEACHER.OPTS = "", []
        cfg.KD.TEACHER.CONFIG_FILE = teacher
    if args.teacher_weights:
        cfg.KD.TEACHER.WEIGHTS = os.path.expanduser(args.teacher_weights)
    if heads is not None:
        cfg.KD.HEADS = heads
    merge_list(cfg, args.opts, "command line")
    nodes = {"KD.TEACHER": cfg.KD.TEACHER} | {f"KD.TEACHERS.{name}": node for name, node in cfg.KD.TEACHERS.items()}
    for key, node in nodes.items():
        named = f"{key}.CONFIG_FILE" in args.opts[::2] or (args.teacher and node is cfg.KD.TEACHER)
        if is_lazy_config(node.CONFIG_FILE) and named:
            allow_lazy_config(node.CONFIG_FILE)
    if len(files) > 1 and has_peers(cfg) and not cfg.KD.MUTUAL.PEERS:
        cfg.KD.MUTUAL.PEERS = files[:1]  # A recipe does not know the student, two of which teach each other.
    by_arguments = args.teacher or args.teacher_weights or heads
    by_recipe = (len(files) > 1 and cfg.KD.HEADS) or cfg.KD.INHERIT
    if not is_wrapped(cfg) and (by_arguments or by_recipe):
        add_teacher(cfg, describe_files(files))
    return cfg


def config_files(args: argparse.Namespace) -> list[str]:
    """Returns the names of all config files, with the recipe that ``--kd-heads recommended`` stands for."""
    # Detectron2's own parser gives a single file as a string.
    given = [args.config_file] if isinstance(args.config_file, str) else args.config_file
    recipe = [f"recipes/{RECOMMENDED}.yaml"] if args.kd_heads == RECOMMENDED else []
    return [name for name in [*given, *recipe] if name]


def describe_files(files: Sequence[str]) -> str:
    """Describes the config that the files give together, for messages."""
    return " with ".join(files) or "the config"


def named_heads(args: argparse.Namespace) -> list[str] | None:
    """Returns the heads that ``--kd-heads`` names; None if it is not given, or stands for a recipe."""
    if args.kd_heads in (None, RECOMMENDED):
        return None
    return [name.strip() for name in args.kd_heads.split(",") if name.strip()]


def add_teacher(cfg: CfgNode, source: str) -> None:
    """Turns the config of a plain student into that of a student with a teacher.

    Args:
        cfg: The config, which already names the teacher and the heads.
        source: Source of the config, for messages.

    Raises:
        InputError: If it names no teacher or no head.
    """
    if not (cfg.KD.HEADS or cfg.KD.INHERIT):
        raise InputError(
            f"KD.HEADS: {source} names no distillation heads; name some with --kd-heads, or in a further config file."
        )
    if not cfg.KD.TEACHER.CONFIG_FILE and UNNAMED in used_teachers(cfg):
        raise InputError(
            f"KD.TEACHER.CONFIG_FILE: {source} names no teacher for {', '.join(cfg.KD.HEADS) or 'KD.INHERIT'}; "
            "name one with --teacher."
        )
    check_parts(cfg, source)
    cfg.KD.STUDENT_ARCHITECTURE, cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE, "TeacherStudent"
    default = default_config()
    for name in cfg.KD.HEADS:
        key = config_key(name)
        if key in cfg.KD and key in default.KD:
            adapt_head(cfg, cfg.KD[key], default.KD[key])


def adapt_head(cfg: CfgNode, node: CfgNode, default: CfgNode) -> None:
    """Adapts a head's defaults, which suit an R-CNN with FPN, to the feature maps of the student.

    Args:
        cfg: The run's config.
        node: The head's node, which is changed in place; values other than the defaults stay.
        default: The head's defaults.
    """
    tap = find_tap(META_ARCH_REGISTRY.get(cfg.KD.STUDENT_ARCHITECTURE))
    for key, value in tap.head_defaults(cfg).items():
        if key in node and node[key] == default[key]:
            node[key] = value
    if "IN_FEATURES" not in node or node.IN_FEATURES != default.IN_FEATURES:
        return
    levels = tap.feature_levels(cfg)
    known = {*levels, *tap.box_features, *(cfg.MODEL.FPN.IN_FEATURES or cfg.MODEL.RESNETS.OUT_FEATURES)}
    if not set(default.IN_FEATURES) <= known:
        # Existing stages are kept; otherwise all levels that the model predicts from are used.
        stages = [name for name in default.IN_FEATURES if name.startswith("res") and name in known]
        node.IN_FEATURES = stages or levels


def epochs_to_iterations(cfg: CfgNode, images: int) -> None:
    """Converts a schedule in epochs to iterations; see ``SOLVER.IN_EPOCHS``.

    Args:
        cfg: The config, which is changed in place.
        images: Number of training images.

    Raises:
        InputError: If the run would have no iterations.
    """

    def iterations(epochs: float) -> int:
        # An interval shorter than an iteration is rounded up to one iteration.
        return max(round(epochs * images / solver.IMS_PER_BATCH), 1) if epochs > 0 else int(epochs)

    solver = cfg.SOLVER
    if round(solver.MAX_ITER * images / solver.IMS_PER_BATCH) < 1:
        raise InputError(f"SOLVER.MAX_ITER: {solver.MAX_ITER} epochs of {images} images are less than one iteration.")
    for node, keys in (
        (solver, ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD")),
        (cfg.TEST, ("EVAL_PERIOD",)),
        (cfg.KD.PRETRAIN, ("MAX_ITER",)),
        *((cfg.KD[config_key(name)].SCHEDULE, ("START", "WARMUP", "STOP")) for name, _ in KD_HEAD_REGISTRY),
    ):
        for key in keys:
            node[key] = iterations(node[key])
    solver.STEPS = tuple(map(iterations, solver.STEPS))
    cfg.KD.PRETRAIN.STEPS = list(map(iterations, cfg.KD.PRETRAIN.STEPS))
    # The config that is saved alongside the checkpoints counts in iterations.
    solver.IN_EPOCHS = False
