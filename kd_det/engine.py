"""The trainer, and the set-up that every tool shares."""

import argparse
import importlib.util
import logging
import os
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import detectron2.utils.comm as comm
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    default_setup,
    launch,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessRaisedException

from kd_det.checkpoint import KDCheckpointer
from kd_det.classification import (
    ImageClassifier,
    build_classification_test_loader,
    build_classification_train_loader,
)
from kd_det.config import add_kd_config, merge_file, merge_list, student_config
from kd_det.data import DetectionMapper, check_files, check_num_classes, count_training_images, register_datasets
from kd_det.data.loader import build_detection_training_loader, seed_everything
from kd_det.errors import InputError
from kd_det.evaluation import build_evaluator
from kd_det.meta_arch import TeacherStudent
from kd_det.registry import KD_HEAD_REGISTRY, config_key

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Detectron2's trainer, for plain and for distilled students.

    ``"model"`` in its checkpoints is the plain student; the heads' weights lie beside it as ``kd_heads``.

    Args:
        cfg: The whole config, of a plain detector or of a ``TeacherStudent``.
    """

    find_unused_parameters = False

    def __init__(self, cfg: CfgNode):
        # As DefaultTrainer.__init__, but for the checkpointer, which is the student's, and DDP, which may be on CPUs.
        TrainerBase.__init__(self)
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        loader.batch_sampler.seed = self.seed
        devices = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        wrapped = create_ddp_model(
            model, broadcast_buffers=False, find_unused_parameters=self.find_unused_parameters, **devices
        )
        self._trainer = (AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(wrapped, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # Without DDP around it.
        self.plain_model = model
        student, parts = (model.student, model.checkpointables) if isinstance(model, TeacherStudent) else (model, {})
        self.checkpointer = KDCheckpointer(student, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), **parts)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def run_step(self) -> None:
        # An iteration draws the same random numbers whether or not the run was interrupted before it.
        seed_everything(self.seed, self.iter, comm.get_rank())
        super().run_step()

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        batches = self._trainer.data_loader.batch_sampler
        batches.seed, batches.start = self.seed, self.start_iter

    def state_dict(self) -> dict:
        return super().state_dict() | {"seed": self.seed, "processes": comm.get_world_size()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.seed = state_dict["seed"]
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
        return build_detection_test_loader(cfg, dataset_name, mapper=DetectionMapper(cfg, is_train=False))


def is_classifier(cfg: CfgNode) -> bool:
    """Whether a config's student is an image classifier."""
    return ImageClassifier.__name__ == student_config(cfg).MODEL.META_ARCHITECTURE


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
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE: this machine has no GPU, going on with cpu instead of cuda.")
        cfg.MODEL.DEVICE = "cpu"
    register_datasets(cfg)
    check_files(cfg, train=not args.eval_only)
    check_num_classes(cfg, train=not args.eval_only)
    if cfg.SOLVER.IN_EPOCHS and not args.eval_only:
        epochs_to_iterations(cfg, count_training_images(cfg))
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="kd_det")
    return cfg


def apply_distillation_arguments(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Turn a config into that of a distillation run, as ``--teacher``, ``--teacher-weights`` and ``--kd-heads`` say."""
    if args.teacher:
        cfg.KD.TEACHER.CONFIG_FILE = args.teacher
        cfg.KD.TEACHER.WEIGHTS = ""
    if args.teacher_weights:
        cfg.KD.TEACHER.WEIGHTS = args.teacher_weights
    if args.kd_heads is not None:
        cfg.KD.HEADS = [name for name in args.kd_heads.split(",") if name]
    if cfg.MODEL.META_ARCHITECTURE == "TeacherStudent" or not (args.teacher or args.teacher_weights or args.kd_heads):
        return
    if not (cfg.KD.TEACHER.CONFIG_FILE and cfg.KD.HEADS):
        raise InputError(
            "--teacher and --kd-heads: a config that names neither teacher nor heads needs both arguments."
        )
    cfg.KD.STUDENT_ARCHITECTURE, cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE, "TeacherStudent"
    # A model other than an R-CNN with FPN has other levels and predictions than the heads' defaults.
    levels, source = {
        "RetinaNet": (cfg.MODEL.RETINANET.IN_FEATURES, "dense"),
        "ImageClassifier": (["res2", "res3", "res4"], "cls"),
    }.get(cfg.KD.STUDENT_ARCHITECTURE, (cfg.MODEL.RPN.IN_FEATURES, "roi"))
    for name in cfg.KD.HEADS:
        node = cfg.KD.get(config_key(name), {})
        if "IN_FEATURES" in node and not set(node.IN_FEATURES) <= set(levels):
            node.IN_FEATURES = list(levels)
        if source != "roi" and "SOURCES" in node:
            node.SOURCES = [source]


def epochs_to_iterations(cfg: CfgNode, images: int) -> None:
    """Turn a schedule in epochs into one in iterations; see ``SOLVER.IN_EPOCHS``.

    Args:
        cfg: The config, which is changed.
        images: Number of training images.

    Raises:
        InputError: If the run would have no iteration.
    """

    def iterations(epochs: float) -> int:
        return round(epochs * images / cfg.SOLVER.IMS_PER_BATCH) if epochs > 0 else int(epochs)

    solver = cfg.SOLVER
    if iterations(solver.MAX_ITER) < 1:
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


def find_config(path: str) -> str:
    """Path of a config file, or of the model zoo's config of that name.

    Raises:
        InputError: If there is neither.
    """
    if os.path.isfile(path):
        return path
    try:
        return model_zoo.get_config_file(path)
    except RuntimeError as error:
        raise InputError(f"--config-file: there is no such file, and {error}") from error


def import_plugin(path: str) -> None:
    """Import a Python file for what it registers.

    Raises:
        InputError: If there is no such file.
    """
    if not os.path.isfile(path):
        raise InputError(f"--plugin: there is no file {path}.")
    name = f"kd_det_plugin_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool; a user's mistake or a diverged loss ends it with one line and status 1, without a traceback."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(is_defect)
    try:
        main()
    except (InputError, FloatingPointError) as error:
        sys.exit(f"error: {tell(str(error))}")
    except ProcessRaisedException as error:
        if not re.search(r"^(kd_det\.errors\.InputError|FloatingPointError): ", str(error), re.MULTILINE):
            raise
        sys.exit(f"error: {tell(str(error))}")


def tell(message: str) -> str:
    """The message of an error in one line; from another process it comes behind that one's traceback."""
    own = re.split(r"^(?:kd_det\.errors\.InputError|FloatingPointError): ", message, flags=re.MULTILINE)[-1]
    return " ".join(own.split())


def is_defect(record: logging.LogRecord) -> bool:
    """Whether a log record tells of anything but what :func:`run_tool` tells itself."""
    return not (record.exc_info and isinstance(record.exc_info[1], InputError | FloatingPointError))


def launch_workers(main: Callable, args: argparse.Namespace) -> None:
    """Run `main(args)` on each GPU that ``--num-gpus`` asks for, or as one rank of ``torchrun``.

    Raises:
        InputError: If the machine has fewer GPUs.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(local_rank)
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
        comm.create_local_process_group(local_size)
        try:
            main(args)
        finally:
            torch.distributed.destroy_process_group()
        return
    if args.num_gpus > 1 and args.num_gpus > torch.cuda.device_count():
        raise InputError(f"--num-gpus: {args.num_gpus} asked for, but this machine has {torch.cuda.device_count()}.")
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
