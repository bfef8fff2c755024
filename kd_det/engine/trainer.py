"""Trains plain students, distilled students, and students that teach each other."""

import logging
import uuid
import weakref
from contextlib import nullcontext
from pathlib import Path

import detectron2.utils.comm as comm
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model
from detectron2.engine.hooks import PeriodicWriter
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils.events import EventWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kd_det.checkpoint import KDCheckpointer, loading_checkpoint
from kd_det.checkpoint_folder import FINAL, read_whole_header
from kd_det.config_checks.training import check_patience
from kd_det.construction import naming_config
from kd_det.data.loader import seed_everything
from kd_det.engine.divergence import explaining_divergence
from kd_det.engine.early_stopping import EarlyStop, EarlyStopping
from kd_det.engine.ema import build_ema
from kd_det.engine.evaluation import build_evaluator, share_buffers
from kd_det.engine.event_writers import build_writers, drop_lines, metrics_path
from kd_det.engine.hooks import BestCheckpointer, extend_hooks
from kd_det.engine.live_report import LiveReport
from kd_det.engine.loaders import build_test_loader, build_train_loader
from kd_det.engine.optimizer_state import adapt_state, parameter_names
from kd_det.engine.results import ClosingTable, log_results
from kd_det.engine.run_log import printed_to_log
from kd_det.engine.step_trainer import build_step_trainer
from kd_det.engine.teacher_check import check_class_order, have_same_classes
from kd_det.engine.tta import TTAEvaluation
from kd_det.engine.visualization import build_visualization
from kd_det.errors import InputError
from kd_det.inherit import Inheritance, inherit
from kd_det.peers import PeerWriter, load_peer_weights
from kd_det.score_weights import weigh_by_scores, weighted_datasets
from kd_det.taps import build_tap
from kd_det.wrapper import as_wrapper

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Extends Detectron2's trainer to plain and distilled students.

    In its checkpoints ``"model"`` is the plain student, ``kd_heads`` are the weights of the heads, and ``ema`` is the
    average of the student's weights, if one is kept.

    Args:
        cfg: The whole config of a plain detector or of a wrapper; see :class:`kd_det.StudentWrapper`.
    """

    iter: int
    find_unused_parameters = False
    # The learning rate comes from this config key.
    rate_key = "SOLVER.BASE_LR"
    # What the student has taken over from its teacher; None without KD.INHERIT, and in a resumed run.
    inheritance: Inheritance | None = None

    def __init__(self, cfg: CfgNode):
        # This follows DefaultTrainer.__init__, but the checkpointer is the student's, and DDP may run on CPUs.
        TrainerBase.__init__(self)
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        # This id distinguishes the files of this run, resumed or not, from those of another run in the same folder.
        self.run = uuid.uuid4().hex
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        self.wrapper = as_wrapper(model)
        check_class_order(cfg, self.wrapper.named_heads)
        if datasets := weighted_datasets(cfg):
            for student in self.wrapper.students:
                weigh_by_scores(student, datasets)
        if cfg.SOLVER.CHANNELS_LAST:
            model.to(memory_format=torch.channels_last)
        self.student, parts = self.wrapper.students[0], self.wrapper.checkpointables
        self.ema = build_ema(cfg, self.student)
        if self.ema is not None:
            parts |= {"ema": self.ema}
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        loader.batch_sampler.seed = self.seed
        turns = self.wrapper.turns
        unused = self.find_unused_parameters or turns > 1
        wrapped = create_ddp_model(
            model,
            broadcast_buffers=False,
            find_unused_parameters=unused,
            # With a device, DDP would move each image of a batch to it on its own before the model does it at once.
            device_ids=None,
            gradient_as_bucket_view=True,
        )
        self._trainer = build_step_trainer(cfg, wrapped, loader, optimizer, turns=turns)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # This is the model without DDP around it.
        self.plain_model = model
        self.checkpointer = KDCheckpointer(self.student, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), **parts)
        self.checkpointer.keep, self.checkpointer.run = cfg.SOLVER.CHECKPOINT_KEEP, self.run
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def train(self) -> dict | None:
        if self.start_iter >= self.max_iter:
            self.complete()
        try:
            return super().train()
        except EarlyStop:
            if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
                verify_results(self.cfg, self._last_eval_results)
            return None
        finally:
            # Drop the loader's iterator here: if garbage collection does it, it waits five seconds for each worker.
            loader = self._trainer.data_loader
            self._trainer.reset_data_loader(lambda: loader)

    def complete(self) -> None:
        """Writes the final checkpoint of a run that has nothing left to train, unless it already exists."""
        resumed = Path(self.checkpointer.loaded[0])
        final = resumed.with_name(FINAL)
        logger.info("%d iterations are done: nothing is left to train.", self.start_iter)
        # A run that was trained beyond MAX_ITER keeps its final checkpoint.
        header = self.start_iter > self.max_iter and final.is_file() and read_whole_header(final)
        if resumed != final and not (header and header.run == self.run):
            self.checkpointer.save(final.stem, iteration=self.iter)
        self.max_iter = self.start_iter

    def before_step(self) -> None:
        if self.iter >= self.max_iter:  # A hook has ended the run early.
            raise EarlyStop
        super().before_step()

    def run_step(self) -> None:
        # An iteration draws the same random numbers whether or not the run was interrupted before it.
        seed_everything(self.seed, self.iter, comm.get_rank())
        with explaining_divergence(self):
            super().run_step()
        if self.ema is not None:
            self.ema.update_parameters(self.student)

    def after_step(self) -> None:
        with explaining_divergence(self):
            super().after_step()

    def after_train(self) -> None:
        # If nothing was left to train, Detectron2's loop counts one iteration too many.
        self.iter = min(self.iter, self.max_iter)
        super().after_train()

    def resume_or_load(self, resume: bool = True) -> None:
        with loading_checkpoint("--resume", self.cfg.OUTPUT_DIR) if resume else nullcontext():
            super().resume_or_load(resume)
        if len(set(comm.all_gather(self.start_iter))) > 1:
            raise InputError(
                f"--resume: the processes find different checkpoints in {self.cfg.OUTPUT_DIR}; they must share it."
            )
        if self.start_iter == 0:
            load_peer_weights(list(self.wrapper.students), self.wrapper.student_configs(self.cfg))
            if self.cfg.KD.INHERIT and self.wrapper.teacher is not None:
                taps = build_tap(self.student), self.wrapper.teacher.tap
                self.inheritance = inherit(*taps, same_classes=have_same_classes(self.cfg))
        batches = self._trainer.data_loader.batch_sampler
        batches.seed, batches.start = self.seed, self.start_iter
        if self.start_iter > self.max_iter:
            logger.warning(
                "SOLVER.MAX_ITER: got %d, but the run in %s has done %d iterations; all of them stay.",
                self.max_iter,
                self.cfg.OUTPUT_DIR,
                self.start_iter,
            )
        if resume and comm.is_main_process():
            drop_lines(metrics_path(self.cfg), self.start_iter + self._keeps_evaluation())

    def _keeps_evaluation(self) -> bool:
        """Checks whether the evaluation that counts as the first iteration stays, because it will not be repeated."""
        if self.start_iter == 0 or Path(self.checkpointer.loaded[0]).name != FINAL:
            return False
        return self.start_iter < self.max_iter or not self.cfg.DATASETS.TEST

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        with naming_config(cfg, "the config"):
            return super().build_model(cfg)

    def build_writers(self) -> list[EventWriter]:
        return build_writers(self.cfg, weakref.proxy(self))

    def build_hooks(self) -> list:
        hooks = super().build_hooks()
        if comm.is_main_process():
            hooks[-1:-1] = build_visualization(self.cfg, self.wrapper)  # The last hook writes the pictures.
        hooks = extend_hooks(hooks, self.cfg, self.ema)
        students, configs = list(self.wrapper.students), self.wrapper.student_configs(self.cfg)
        if len(students) > 1 and comm.is_main_process():
            hooks.insert(0, PeerWriter(students, configs))
        before_writers = next((i for i, hook in enumerate(hooks) if isinstance(hook, PeriodicWriter)), len(hooks))
        if self.cfg.TEST.AUG.ENABLED and self.cfg.DATASETS.TEST:
            hooks.insert(before_writers, TTAEvaluation(self.cfg, self.student))
        if self.cfg.TEST.PATIENCE:
            check_patience(self.cfg)
            hooks.insert(before_writers, EarlyStopping(self.cfg))
        if comm.is_main_process():
            best = next((hook for hook in hooks if isinstance(hook, BestCheckpointer)), None)
            hooks.append(ClosingTable([config.OUTPUT_DIR for config in configs[1:]], best))
            hooks.append(LiveReport(self.cfg))
        return hooks

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict:
        """Evaluates a model as Detectron2 does; of several students the later ones as ``peer_2`` and so on."""
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        share_buffers(plain)
        wrapper = as_wrapper(plain)
        if len(wrapper.students) == 1:
            return cls._test_one(cfg, model, evaluators)
        results: dict = {}
        for i, (student, student_cfg) in enumerate(zip(wrapper.students, wrapper.student_configs(cfg), strict=True), 1):
            logger.info("Student %d of %d:", i, len(wrapper.students))
            metrics = cls._test_one(student_cfg, student, evaluators)
            results |= metrics if i == 1 else {f"peer_{i}": metrics}
        return results

    @classmethod
    def _test_one(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None) -> dict:
        with printed_to_log(logger):
            results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            log_results(results, cfg.DATASETS.TEST)
        return results

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "run": self.run,
            "seed": self.seed,
            "processes": comm.get_world_size(),
            "parameters": parameter_names(self.plain_model, self.optimizer),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        for key in ("iteration", "seed", "processes"):
            if not isinstance(state_dict[key], int) or state_dict[key] < 0:
                raise ValueError(f"the trainer's {key} is {state_dict[key]!r}")
        if not isinstance(state_dict["run"], str):
            raise ValueError(f"the trainer's run is {state_dict['run']!r}")
        saved, rates = state_dict["_trainer"], self.scheduler.base_lrs
        names = parameter_names(self.plain_model, self.optimizer)
        optimizer, rates_differ = adapt_state(saved["optimizer"], self.optimizer, names, state_dict.get("parameters"))
        super().load_state_dict(state_dict | {"_trainer": saved | {"optimizer": optimizer}})
        # The schedule follows from the config and the iteration alone.
        self.scheduler.base_lrs, self.scheduler.last_epoch = rates, self.iter + 1
        if rates_differ:
            for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
                group["lr"] = rate
        self.run = self.checkpointer.run = state_dict["run"]
        if self.cfg.SEED < 0:
            self.seed = state_dict["seed"]
        elif self.seed != state_dict["seed"]:
            logger.warning("SEED: %d instead of %d from here on, as the config says.", self.seed, state_dict["seed"])
        if state_dict["processes"] != comm.get_world_size():
            logger.warning(
                "Resumed by %d process(es) instead of %d: the order of the images and the random numbers differ.",
                comm.get_world_size(),
                state_dict["processes"],
            )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_test_loader(cfg, dataset_name)
