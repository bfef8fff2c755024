"""The trainer, and the set-up that every tool shares."""

import argparse
import errno
import importlib.util
import logging
import math
import os
import re
import sys
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import detectron2.utils.comm as comm
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.engine import (
    DefaultTrainer,
    TrainerBase,
    create_ddp_model,
    default_setup,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

from kd_det.accumulation import build_step_trainer
from kd_det.checkpoint import KDCheckpointer, fits
from kd_det.classification import (
    ImageClassifier,
    build_classification_test_loader,
    build_classification_train_loader,
)
from kd_det.classification.mapper import ClassificationMapper
from kd_det.config import (
    DISTILLED,
    add_kd_config,
    check_parts,
    find_config,
    look_up,
    merge_file,
    merge_list,
    student_config,
)
from kd_det.data import DetectionMapper, check_files, check_num_classes, count_training_images, register_datasets
from kd_det.data.loader import build_detection_training_loader, seed_everything
from kd_det.data.workers import end_with_the_run
from kd_det.ema import build_ema
from kd_det.errors import InputError
from kd_det.evaluation import build_evaluator, share_buffers
from kd_det.files import write_whole
from kd_det.hooks import with_own_hooks
from kd_det.interruption import INTERRUPTED
from kd_det.meta_arch import TeacherStudent
from kd_det.mutual import MutualStudents
from kd_det.peers import PeerWriter, load_peer_weights
from kd_det.registry import KD_HEAD_REGISTRY, config_key
from kd_det.visualization import build_visualization
from kd_det.writers import build_writers, drop_lines, metrics_path

logger = logging.getLogger(__name__)
# The least value of keys that take numbers.
LEAST = {
    "KD.PRETRAIN.MAX_ITER": 0,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.CHECKPOINT_KEEP": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "KD.GENERATIONS": 0,
}
# Those of Detectron2.
WARMUP_METHODS = ("linear", "constant")
LR_SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
# How an error that is no defect begins in the traceback of another process.
TOLD = re.compile(
    r"^(?:kd_det\.errors\.\w+|FloatingPointError|(?:FileExists|IsADirectory|NotADirectory|Permission)Error"
    r"|OSError(?=: \[Errno (?:28|122)\])): ",
    re.MULTILINE,
)


class Trainer(DefaultTrainer):
    """Detectron2's trainer, for plain and for distilled students.

    ``"model"`` in its checkpoints is the plain student; the heads' weights lie beside it as ``kd_heads``, and the
    average of the student's, where one is kept, as ``ema``.

    Args:
        cfg: The whole config, of a plain detector, a ``TeacherStudent`` or ``MutualStudents``.
    """

    find_unused_parameters = False

    def __init__(self, cfg: CfgNode):
        # As DefaultTrainer.__init__, but for the checkpointer, which is the student's, and DDP, which may be on CPUs.
        TrainerBase.__init__(self)
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        # Tells the files of this run, resumed or not, from those of another one in the same folder.
        self.run = uuid.uuid4().hex
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        if cfg.SOLVER.CHANNELS_LAST:
            model.to(memory_format=torch.channels_last)
        distilled = isinstance(model, TeacherStudent | MutualStudents)
        self.student, parts = (model.student, model.checkpointables) if distilled else (model, {})
        self.ema = build_ema(cfg, self.student)
        if self.ema is not None:
            parts |= {"ema": self.ema}
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        loader.batch_sampler.seed = self.seed
        devices = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        turns = model.turns if isinstance(model, MutualStudents) else 1
        unused = self.find_unused_parameters or turns > 1
        wrapped = create_ddp_model(model, broadcast_buffers=False, find_unused_parameters=unused, **devices)
        self._trainer = build_step_trainer(cfg, wrapped, loader, optimizer, turns=turns)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # Without DDP around it.
        self.plain_model = model
        self.checkpointer = KDCheckpointer(self.student, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), **parts)
        self.checkpointer.keep = cfg.SOLVER.CHECKPOINT_KEEP
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def train(self) -> dict | None:
        try:
            return super().train()
        finally:
            # Here, because a data loader's iterator that garbage collection finds waits five seconds for each worker.
            loader = self._trainer.data_loader
            self._trainer.reset_data_loader(lambda: loader)

    def run_step(self) -> None:
        # An iteration draws the same random numbers whether or not the run was interrupted before it.
        seed_everything(self.seed, self.iter, comm.get_rank())
        super().run_step()
        if self.ema is not None:
            self.ema.update_parameters(self.student)

    def resume_or_load(self, resume: bool = True) -> None:
        with fits("--resume", self.cfg.OUTPUT_DIR) if resume else nullcontext():
            super().resume_or_load(resume)
        if len(set(comm.all_gather(self.start_iter))) > 1:
            raise InputError(f"--resume: the processes find different checkpoints in {self.cfg.OUTPUT_DIR}; share it.")
        if isinstance(self.plain_model, MutualStudents) and self.start_iter == 0:
            load_peer_weights(self.plain_model.students, self.plain_model.configs)
        batches = self._trainer.data_loader.batch_sampler
        batches.seed, batches.start = self.seed, self.start_iter
        if resume and comm.is_main_process():
            finished = self.start_iter > 0 and self.checkpointer.get_checkpoint_file().endswith("model_final.pth")
            # The evaluation at the end of a run counts as one more iteration.
            drop_lines(metrics_path(self.cfg), self.start_iter + finished)

    def build_writers(self) -> list[EventWriter]:
        return build_writers(self.cfg, weakref.proxy(self))

    def build_hooks(self) -> list:
        found = super().build_hooks()
        if comm.is_main_process():
            found[-1:-1] = build_visualization(self.cfg, self.plain_model)  # The last one writes what is there.
        hooks = with_own_hooks(found, self.cfg, self.ema)
        if isinstance(self.plain_model, MutualStudents) and comm.is_main_process():
            hooks.insert(0, PeerWriter(self.plain_model.students, self.plain_model.configs))
        return hooks

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict:
        """See Detectron2. Each of ``MutualStudents`` is evaluated; from the second on under ``peer_2``, and so on."""
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        share_buffers(plain)
        if not isinstance(plain, MutualStudents):
            return super().test(cfg, model, evaluators)
        results = {}
        for i, (student, own) in enumerate(zip(plain.students, plain.configs, strict=True), 1):
            logger.info("Student %d of %d:", i, len(plain.students))
            found = super().test(own, student, evaluators)
            results |= found if i == 1 else {f"peer_{i}": found}
        return results

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "run": self.run,
            "seed": self.seed,
            "processes": comm.get_world_size(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.run, self.seed = state_dict["run"], state_dict["seed"]
        if state_dict["processes"] != comm.get_world_size():
            logger.warning(
                "Resumed by %d process(es) instead of %d: the order of the images and the random numbers are others.",
                comm.get_world_size(),
                state_dict["processes"],
            )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        if is_classifier(cfg):
            return build_classification_train_loader(cfg)
        return build_detection_training_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        if is_classifier(cfg):
            return build_classification_test_loader(cfg, dataset_name)
        loader = build_detection_test_loader(cfg, dataset_name, mapper=DetectionMapper(cfg, is_train=False))
        loader.worker_init_fn = end_with_the_run
        return loader


def is_classifier(cfg: CfgNode) -> bool:
    """Whether a config's student is an image classifier."""
    return ImageClassifier.__name__ == student_config(cfg).MODEL.META_ARCHITECTURE


def build_test_mapper(cfg: CfgNode) -> Callable[[dict], dict]:
    """What reads the image of a data set's record as the evaluation of the student does."""
    return (ClassificationMapper if is_classifier(cfg) else DetectionMapper)(cfg, is_train=False)


def add_distillation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that turn any Detectron2 config into a distillation run."""
    group = parser.add_argument_group("distillation")
    group.add_argument("--teacher", metavar="CONFIG", help="the teacher's config: a file, or a name of the model zoo")
    group.add_argument(
        "--teacher-weights", metavar="FILE", help="the teacher's checkpoint, if its config names another"
    )
    group.add_argument(
        "--kd-heads", metavar="HEAD,...", help="distillation heads, for example ReviewKDHead,SoftTargetHead"
    )
    group.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file to import first: registers heads of yours",
    )


def setup(args: argparse.Namespace) -> CfgNode:
    """Make the config of a run from the command line, check its data sets, and start logging.

    Args:
        args: Of Detectron2's ``default_argument_parser`` with :func:`add_distillation_arguments`.

    Raises:
        InputError: If a file, a key or a data set is wrong.
    """
    late = [option for option in args.opts if option.startswith("--")]
    if late:
        raise InputError(f"command line: {late[0]} must come before the overrides, {' '.join(args.opts[:2])} ...")
    for path in args.plugin:
        import_plugin(path)
    cfg = get_cfg()
    add_kd_config(cfg)
    if args.config_file:
        args.config_file = find_config(args.config_file)
        merge_file(cfg, args.config_file)
    apply_distillation_arguments(cfg, args)
    merge_list(cfg, args.opts, "command line")
    check_run(cfg, f"{args.config_file or 'the config'} with the overrides")
    if torch.device(cfg.MODEL.DEVICE).type == "cuda" and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE: this machine has no GPU, going on with cpu instead of %s.", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    register_datasets(cfg)
    check_files(cfg, train=not args.eval_only)
    check_num_classes(cfg, train=not args.eval_only)
    if cfg.SOLVER.IN_EPOCHS and not args.eval_only:
        epochs_to_iterations(cfg, count_training_images(cfg))
    cfg.freeze()
    with kept(Path(cfg.OUTPUT_DIR, "config.yaml")):
        default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="kd_det")
    return cfg


def check_run(cfg: CfgNode, source: str) -> None:
    """Check keys with which Detectron2 would stop late, without naming them, or do something else.

    Args:
        source: What the config was read from, for messages.

    Raises:
        InputError: If a value is not allowed.
    """
    check_parts(cfg, source)
    for key, least in LEAST.items():
        value = look_up(cfg, key)
        if value < least:
            raise InputError(f"{key}: must be {least} or more, got {value}.")
    for key, rate in (("SOLVER.BASE_LR", cfg.SOLVER.BASE_LR), ("KD.PRETRAIN.BASE_LR", cfg.KD.PRETRAIN.BASE_LR)):
        if not 0 < rate < math.inf:
            raise InputError(f"{key}: must be finite and above 0, got {rate}.")
    for key, steps in (("SOLVER.STEPS", cfg.SOLVER.STEPS), ("KD.PRETRAIN.STEPS", cfg.KD.PRETRAIN.STEPS)):
        if list(steps) != sorted(steps):
            raise InputError(f"{key}: must be in increasing order, got {list(steps)}.")
    for key, allowed in (("LR_SCHEDULER_NAME", LR_SCHEDULERS), ("WARMUP_METHOD", WARMUP_METHODS)):
        if cfg.SOLVER[key] not in allowed:
            raise InputError(f"SOLVER.{key}: {cfg.SOLVER[key]!r} is not one of {', '.join(allowed)}.")
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise InputError(f"MODEL.DEVICE: {cfg.MODEL.DEVICE!r} is no device, such as cuda, cuda:1 or cpu.") from error


@contextmanager
def kept(path: Path) -> Iterator[None]:
    """Around what overwrites a file that shall stay as it is, if it is there."""
    before = path.read_bytes() if path.is_file() else None
    yield
    if before is not None and comm.is_main_process():
        write_whole(str(path), lambda file: file.write(before))


def apply_distillation_arguments(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Turn a config into that of a distillation run, as ``--teacher``, ``--teacher-weights`` and ``--kd-heads`` say."""
    if args.teacher:
        cfg.KD.TEACHER.CONFIG_FILE = args.teacher
        cfg.KD.TEACHER.WEIGHTS = ""
    if args.teacher_weights:
        cfg.KD.TEACHER.WEIGHTS = args.teacher_weights
    if args.kd_heads is not None:
        cfg.KD.HEADS = [name for name in args.kd_heads.split(",") if name]
    if cfg.MODEL.META_ARCHITECTURE in DISTILLED or not (args.teacher or args.teacher_weights or args.kd_heads):
        return
    if not (cfg.KD.TEACHER.CONFIG_FILE and cfg.KD.HEADS):
        raise InputError(
            "--teacher and --kd-heads: a config that names neither teacher nor heads needs both arguments."
        )
    cfg.KD.STUDENT_ARCHITECTURE, cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE, "TeacherStudent"
    default = get_cfg()
    add_kd_config(default)
    for name in cfg.KD.HEADS:
        key = config_key(name)
        if key in cfg.KD and key in default.KD:
            adapt_head(cfg, cfg.KD[key], default.KD[key])


def adapt_head(cfg: CfgNode, node: CfgNode, default: CfgNode) -> None:
    """Let a head's defaults name what the student has: they are those of an R-CNN with FPN.

    Args:
        cfg: The run's config.
        node: The head's, which is changed; what is not the default stays.
        default: The head's defaults.
    """
    stages = cfg.MODEL.FPN.IN_FEATURES or cfg.MODEL.RESNETS.OUT_FEATURES
    if ImageClassifier.__name__ == cfg.KD.STUDENT_ARCHITECTURE:
        levels, known = ["res2", "res3", "res4"], {"res2", "res3", "res4", *stages}
        others = {"SOURCES": ["cls"], "SOURCE": "cls", "IN_FEATURE": max(known)}
    elif cfg.KD.STUDENT_ARCHITECTURE == "RetinaNet":
        levels, others = cfg.MODEL.RETINANET.IN_FEATURES, {"SOURCES": ["dense"]}
        known = {*levels, *stages}
    else:
        levels, others = cfg.MODEL.RPN.IN_FEATURES, {}
        known = {*levels, *stages, "roi_features"}
    for key, value in others.items():
        if key in node and node[key] == default[key]:
            node[key] = value
    if "IN_FEATURES" in node and node.IN_FEATURES == default.IN_FEATURES and not set(default.IN_FEATURES) <= known:
        # Of the stages those that there are; other maps give way to all that the model predicts from.
        found = [name for name in default.IN_FEATURES if name.startswith("res") and name in known]
        node.IN_FEATURES = found or list(levels)


def epochs_to_iterations(cfg: CfgNode, images: int) -> None:
    """Turn a schedule in epochs into one in iterations; see ``SOLVER.IN_EPOCHS``.

    Args:
        cfg: The config, which is changed.
        images: Number of training images.

    Raises:
        InputError: If the run would have no iteration.
    """

    def iterations(epochs: float) -> int:
        # What shall happen after a part of an iteration happens after each one.
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
    # What is saved beside the checkpoints counts in iterations.
    solver.IN_EPOCHS = False


def import_plugin(path: str) -> None:
    """Import a Python file for what it registers.

    Raises:
        InputError: If there is no such file, or its name does not end in ``.py``.
    """
    if not os.path.isfile(path):
        raise InputError(f"--plugin: there is no file {path}.")
    name = f"kd_det_plugin_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise InputError(f"--plugin: {path} is no Python file; its name must end in .py.")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool; what is no defect ends it with one line and status 1, without a traceback.

    That is a user's mistake, a path that cannot be what it is used for, a diverged loss or a full disk. For an
    interruption see :mod:`kd_det.interruption`.
    """
    logging.getLogger("detectron2.engine.train_loop").addFilter(is_defect)
    try:
        main()
    except ProcessExitedException as error:
        if error.exit_code != INTERRUPTED:
            raise
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not is_told(error):
            raise
        sys.exit(f"error: {tell(str(error))}")


def tell(message: str) -> str:
    """The message of an error in one line; from another process it comes behind that one's traceback."""
    return " ".join(TOLD.split(message)[-1].split())


def is_told(error: BaseException) -> bool:
    """Whether :func:`run_tool` tells an error in one line."""
    if isinstance(error, OSError):
        wrong_place = FileExistsError | IsADirectoryError | NotADirectoryError | PermissionError
        return isinstance(error, wrong_place) or error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, ProcessRaisedException):
        return bool(TOLD.search(str(error)))
    return isinstance(error, InputError | FloatingPointError)


def is_defect(record: logging.LogRecord) -> bool:
    """Whether a log record tells of anything but what :func:`run_tool` tells itself."""
    return not (record.exc_info and is_told(record.exc_info[1]))
