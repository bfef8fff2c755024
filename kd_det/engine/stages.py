"""Trains in several stages: pre-trains heads before the main run, and trains chains of born-again generations."""

import copy
import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.checkpoint import KDCheckpointer, loading_checkpoint
from kd_det.checkpoint_folder import FINAL, TAG, finished_iterations, read_tag
from kd_det.config import UNNAMED, has_teacher, save_config, student_config
from kd_det.construction import naming_config
from kd_det.engine.event_writers import last_iteration, metrics_path
from kd_det.engine.output_folder import claiming
from kd_det.engine.summary import log_summary
from kd_det.engine.teacher_check import check_teacher
from kd_det.engine.trainer import Trainer
from kd_det.errors import InputError, UnreadableError
from kd_det.fetching import find_file
from kd_det.heads.build import has_stage
from kd_det.meta_arch import TeacherStudent, check_finite
from kd_det.signals import Batch
from kd_det.teacher import Teacher, load_teacher_config
from kd_det.teacher_choices import naming_teacher, used_teachers
from kd_det.wrapper import StudentWrapper

logger = logging.getLogger(__name__)


@claiming
def train(cfg: CfgNode, *, resume: bool, begin: Callable[[], None] | None = None) -> None:
    """Trains what a config describes: the stage of its heads, if any, and the main run; or a chain of generations.

    With `resume`, finished parts stay and interrupted parts continue. The content of the output folder is not touched
    before everything has been built and loaded.

    Args:
        begin: Function to call once all is built and loaded; each run of a chain calls it. By default it opens the
            output folder for this run, once.

    Raises:
        InputError: If a head needs a stage that the config gives no iterations, a checkpoint does not fit, or another
            run writes into the output folder.
        FloatingPointError: If a loss is not finite.
    """
    begin = begin or functools.cache(lambda: open_folder(cfg, resume=resume))
    asked = cfg.KD.PRETRAIN.WEIGHTS or cfg.KD.PRETRAIN.MAX_ITER
    if asked and not has_teacher(cfg):
        raise InputError(
            f"KD.PRETRAIN: got {asked}, but MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; only "
            f"{TeacherStudent.__name__} has a pre-training stage."
        )
    if cfg.KD.GENERATIONS:
        train_generations(cfg, resume=resume, begin=begin)
        return
    check_teacher(cfg)
    staged = cfg.KD.PRETRAIN.MAX_ITER > 0 and not cfg.KD.PRETRAIN.WEIGHTS
    weights = pretrain(cfg, resume=resume, begin=begin) if staged else cfg.KD.PRETRAIN.WEIGHTS
    seed(cfg)
    trainer = Trainer(cfg)
    check_stage(cfg, trainer.wrapper.named_heads)
    trainer.resume_or_load(resume=resume)
    if weights:
        load_stage(trainer.wrapper, weights, check_only=trainer.start_iter > 0)
    begin()
    log_summary(trainer, stage=weights)
    trainer.train()


def open_folder(cfg: CfgNode, *, resume: bool) -> None:
    """Writes the config into the output folder and, unless the run is resumed, forgets which checkpoints came last."""
    if not comm.is_main_process():
        return
    if not resume:
        for name in ("", *(f"gen_{i + 1}" for i in range(cfg.KD.GENERATIONS))):
            for path in (Path(cfg.OUTPUT_DIR, name, TAG), Path(cfg.OUTPUT_DIR, name, "pretrain", TAG)):
                path.unlink(missing_ok=True)
    save_config(cfg)


def warn_of_length(cfg: CfgNode, done: int, *, key: str) -> None:
    """Warns that a finished run stays as it is if the config now asks for another number of iterations.

    Args:
        cfg: The run's own config.
        done: Number of iterations that the run has done.
        key: The config key that the number comes from.
    """
    asked = Trainer.auto_scale_workers(cfg, comm.get_world_size()).SOLVER.MAX_ITER
    if asked != done and not (cfg.TEST.PATIENCE and done < asked):  # It may have ended early.
        logger.warning(
            "%s: got %d, but %s is finished after %d iterations and stays as it is; delete the folder to train again.",
            key,
            asked,
            cfg.OUTPUT_DIR,
            done,
        )


def seed(cfg: CfgNode) -> None:
    """Seeds all random generators as Detectron2 does at the start of a run; leaves them alone without a seed."""
    if cfg.SEED >= 0:
        seed_all_rng(cfg.SEED + comm.get_rank())


# ---- Pre-training of the heads ----
class Pretraining(TeacherStudent):
    """Trains the modules that some heads need before the main run, and computes nothing else.

    Only the heads' ``pretrained`` submodules are trained and, for a head that ``pretrains_student``, the part of the
    student's backbone that its loss reaches.
    """

    frozen_adapters = False

    @configurable
    def __init__(self, **parts):
        super().__init__(**parts)
        staged = [head for head in self.heads.values() if has_stage(head)]
        for name, teacher in self.teachers.items():
            with naming_teacher(name):
                teacher.check(self._stage_signals(name))
        self.pretrains_student = any(head.pretrains_student for head in staged)
        self.heads.requires_grad_(False)
        for head in staged:
            for name in head.pretrained:
                head.get_submodule(name).requires_grad_(True)
        if not self.pretrains_student:
            self.student.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        parts = super().from_config(cfg)
        check_stage(cfg, parts["heads"])
        return parts

    def train(self, mode: bool = True) -> "Pretraining":
        super().train(mode)
        if not self.pretrains_student:
            self.student.eval()
        return self

    @property
    def checkpointables(self) -> dict[str, object]:
        return super().checkpointables | teacher_identities(self)

    def _stage_signals(self, teacher: str) -> set[str]:
        """Lists the signals that the stage needs from a teacher."""
        heads = self._heads_of(teacher).values()
        return {name for head in heads if has_stage(head) for name in head.pretrain_teacher_signals}

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """Computes the losses of the stage.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        heads = {name: head for name, head in self.heads.items() if has_stage(head)}
        names = {name for head in heads.values() for name in head.pretrain_signals}
        student = self.tap.compute(batched_inputs, names, {}) if names else {}
        teachers = {
            name: teacher.to(self.device)(batched_inputs, self._stage_signals(name), {})
            for name, teacher in self.stage_teachers.items()
        }
        batch = Batch.from_inputs(batched_inputs, mask_padding=self.mask_padding)
        losses: dict[str, Tensor] = {}
        for name, head in heads.items():
            # What a stage needs from a teacher cannot be averaged, so there is only one.
            losses |= head.pretrain(student, teachers[self.choices[name].names[0]], batch)
        check_finite(losses, get_event_storage().iter)
        return losses


class PretrainingTrainer(Trainer):
    """Runs the stage; its losses may not reach all of the student."""

    find_unused_parameters = True
    rate_key = "KD.PRETRAIN.BASE_LR"

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        with naming_config(cfg, "the config"):
            return Pretraining(cfg).to(cfg.MODEL.DEVICE)


class TeacherIdentity:
    """Identifies the teacher in the stage's checkpoint, so that it is not loaded together with another teacher."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    def state_dict(self) -> dict[str, str]:
        return {"source": self.teacher.source, "sha256": self.teacher.fingerprint()}

    def load_state_dict(self, state: dict[str, str]) -> None:
        if state["sha256"] != self.teacher.fingerprint():
            source, before = self.teacher.source, state["source"]
            but = "whose weights have changed" if source == before else f"not with {source}"
            raise InputError(
                f"KD.PRETRAIN: the stage was trained with another teacher, {before}, {but}; train it again, or use "
                "the previous teacher."
            )


def teacher_identities(model: StudentWrapper) -> dict[str, TeacherIdentity]:
    """Maps the keys of the stage's checkpoint to the identities of the teachers that the stage uses."""
    return {
        "kd_teacher" if name == UNNAMED else f"kd_teacher_{name}": TeacherIdentity(teacher)
        for name, teacher in model.stage_teachers.items()
    }


def check_stage(cfg: CfgNode, heads: Mapping[str, nn.Module]) -> None:
    """Checks that the config asks for the stage if, and only if, a head needs it.

    Raises:
        InputError: If that is not so.
    """
    staged = [name for name, head in heads.items() if has_stage(head)]
    asked = cfg.KD.PRETRAIN.MAX_ITER > 0 or cfg.KD.PRETRAIN.WEIGHTS
    if staged and not asked:
        raise InputError(
            f"KD.PRETRAIN.MAX_ITER: {', '.join(staged)} must be trained before the main run; set it, or "
            "name a finished stage in KD.PRETRAIN.WEIGHTS."
        )
    if asked and not staged:
        raise InputError(
            f"KD.PRETRAIN: got {cfg.KD.PRETRAIN.WEIGHTS or cfg.KD.PRETRAIN.MAX_ITER}, but no head of KD.HEADS, "
            f"{', '.join(cfg.KD.HEADS) or 'none'}, has anything to train before the main run."
        )


def pretrain(cfg: CfgNode, *, resume: bool, begin: Callable[[], None]) -> str:
    """Trains the stage in ``OUTPUT_DIR/pretrain``, unless a resumed run has finished it.

    Args:
        begin: See :func:`train`.

    Returns:
        Path of its final checkpoint.
    """
    folder = Path(cfg.OUTPUT_DIR, "pretrain")
    stage_cfg = stage_config(cfg, folder)
    done = finished_iterations(folder) if resume else 0
    if done:
        logger.info("The pre-training stage is finished: %s", folder / FINAL)
        warn_of_length(stage_cfg, done, key="KD.PRETRAIN.MAX_ITER")
    needed = not (resume and read_tag(cfg.OUTPUT_DIR))
    if done or not (needed or read_tag(folder)):
        return str(folder / FINAL)
    folder.mkdir(parents=True, exist_ok=True)
    seed(cfg)
    trainer = PretrainingTrainer(stage_cfg)
    try:
        trainer.resume_or_load(resume=resume)
    except UnreadableError as error:
        if needed:
            raise
        logger.warning("The main run has begun and continues without its pre-training stage: %s", error)
        return str(folder / FINAL)
    begin()
    logger.info("Pre-training in %s", folder)
    log_summary(trainer)
    trainer.train()
    return str(folder / FINAL)


def stage_config(cfg: CfgNode, folder: Path) -> CfgNode:
    """Derives the stage's config from the run's, with its own schedule and output, without averaging and evaluation."""
    cfg = cfg.clone()
    cfg.defrost()
    node = cfg.KD.PRETRAIN
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS = node.MAX_ITER, node.BASE_LR, tuple(node.STEPS)
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.WARMUP_ITERS = "WarmupMultiStepLR", 0
    cfg.SOLVER.EMA_DECAY = 0.0
    cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD, cfg.TEST.BEST_METRIC, cfg.VIS_PERIOD = (), 0, "", 0
    cfg.TEST.PATIENCE = 0
    cfg.OUTPUT_DIR = str(folder)
    cfg.WANDB.NAME = cfg.WANDB.NAME and f"{cfg.WANDB.NAME}/{folder.name}"
    cfg.freeze()
    return cfg


def load_stage(model: StudentWrapper, path: str, *, check_only: bool = False) -> None:
    """Loads what the stage trained: the heads, and the student if a head trained it.

    Args:
        check_only: Whether to load nothing and only check, if the file is still whole, that it had the same teacher.

    Raises:
        InputError: If the file cannot be read, belongs to another teacher, or lacks keys of a student that it trained.
    """
    student = model.students[0]
    trained = any(getattr(head, "pretrains_student", False) for head in model.named_heads.values()) and not check_only
    try:
        with loading_checkpoint("KD.PRETRAIN.WEIGHTS", path):
            file = find_file(path, "KD.PRETRAIN.WEIGHTS")
            parts = teacher_identities(model) | ({} if check_only else model.checkpointables)
            checkpointer = KDCheckpointer(student if trained else copy.deepcopy(student), **parts)
            checkpointer.load(file)
    except UnreadableError as error:
        if not check_only:
            raise
        state = f"damaged ({error})" if Path(path).is_file() else "gone"
        logger.warning("%s is %s, so it is not checked whether the teacher is still that of the stage.", path, state)
        return
    _, matched, total = checkpointer.loaded
    if trained and matched < total:
        raise InputError(
            f"KD.PRETRAIN.WEIGHTS: {path} was written by a stage with another student: {matched} of the student's "
            f"{total} keys match."
        )


# ---- Generations ----
def train_generations(cfg: CfgNode, *, resume: bool, begin: Callable[[], None]) -> None:
    """Trains a chain of students, each taught by the previous one (Furlanello et al., 2018, 1805.04770).

    Args:
        begin: See :func:`train`.

    Raises:
        InputError: If the config does not describe a student with a teacher.
    """
    if not (has_teacher(cfg) and cfg.KD.HEADS):
        raise InputError(
            f"KD.GENERATIONS: got {cfg.KD.GENERATIONS}, but there is no teacher: MODEL.META_ARCHITECTURE is "
            f"{cfg.MODEL.META_ARCHITECTURE}, KD.HEADS {list(cfg.KD.HEADS)}; TeacherStudent and a head are needed."
        )
    if UNNAMED not in used_teachers(cfg):
        raise InputError(
            f"KD.GENERATIONS: got {cfg.KD.GENERATIONS}, but no head learns from KD.TEACHER, whose place the previous "
            f"generation takes; name it as {UNNAMED!r} in the TEACHERS of a head."
        )
    if cfg.KD.GENERATIONS > 1 and cfg.KD.PRETRAIN.WEIGHTS:
        raise InputError(
            f"KD.PRETRAIN.WEIGHTS: must be empty for KD.GENERATIONS {cfg.KD.GENERATIONS}, got "
            f"{cfg.KD.PRETRAIN.WEIGHTS}: a stage belongs to one teacher, and each generation has another; give "
            "KD.PRETRAIN.MAX_ITER instead."
        )
    student, teacher = student_config(cfg).MODEL, load_teacher_config(cfg)[0].MODEL
    # As text, a list equals a tuple.
    texts = [
        {key: json.dumps(node[key]) for key in node if key not in ("WEIGHTS", "DEVICE")} for node in (student, teacher)
    ]
    different = [key for key in texts[0] if texts[0][key] != texts[1][key]]
    if different:
        logger.warning(
            "KD.GENERATIONS: the first teacher is a different network from the student; they differ in MODEL.%s.",
            ", MODEL.".join(different),
        )
    for generation in range(1, cfg.KD.GENERATIONS + 1):
        generation_cfg = generation_config(cfg, generation)
        done = finished_iterations(generation_cfg.OUTPUT_DIR) if resume else 0
        # The evaluation at the end counts as one more iteration.
        if done and (not generation_cfg.DATASETS.TEST or last_iteration(metrics_path(generation_cfg)) >= done):
            logger.info("Generation %d is finished: %s", generation, generation_cfg.OUTPUT_DIR)
            warn_of_length(generation_cfg, done, key="SOLVER.MAX_ITER")
            continue
        logger.info("Generation %d of %d, in %s", generation, cfg.KD.GENERATIONS, generation_cfg.OUTPUT_DIR)
        Path(generation_cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        try:
            train(generation_cfg, resume=resume, begin=functools.partial(begin_generation, begin, generation_cfg))
        except UnreadableError as error:
            if not (resume and finished_iterations(generation_config(cfg, generation + 1).OUTPUT_DIR)):
                raise
            logger.warning("Generation %d is damaged, but the next one is finished: %s", generation, error)


def begin_generation(begin: Callable[[], None], cfg: CfgNode) -> None:
    """Opens the chain's output folder, once, and writes this generation's config."""
    begin()
    save_config(cfg)


def generation_config(cfg: CfgNode, generation: int) -> CfgNode:
    """Derives the config of one generation, counted from 1.

    Each generation has its own seed, so that the students start from different weights, which also differ from those of
    a teacher that was trained with this config's seed.
    """
    cfg, output = cfg.clone(), Path(cfg.OUTPUT_DIR)
    cfg.defrost()
    cfg.KD.GENERATIONS = 0
    cfg.OUTPUT_DIR = str(output / f"gen_{generation}")
    cfg.WANDB.NAME = cfg.WANDB.NAME and f"{cfg.WANDB.NAME}/gen_{generation}"
    if cfg.SEED >= 0:
        cfg.SEED += generation
    if generation > 1:
        before = output / f"gen_{generation - 1}"
        cfg.KD.TEACHER.CONFIG_FILE = str(before / "config.yaml")
        cfg.KD.TEACHER.WEIGHTS = str(before / FINAL)
        cfg.KD.TEACHER.OPTS = []
        # A student teaches its own classes, and its maps have their own names.
        cfg.KD.TEACHER.CLASSES, cfg.KD.TEACHER.SYNONYMS = [], CfgNode(new_allowed=True)
        cfg.KD.TEACHER.FEATURES = CfgNode(new_allowed=True)
    cfg.freeze()
    return cfg
