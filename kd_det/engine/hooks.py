"""Adds hooks to Detectron2's: for the best checkpoint, for every evaluation, and for exact resuming."""

import logging
import math
import os
from collections.abc import Iterable

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from kd_det.checkpoint_files import read_checkpoint
from kd_det.engine.ema import AveragedStudent, EMAEvaluation
from kd_det.engine.interruption import Interruption
from kd_det.errors import InputError, UnreadableError

logger = logging.getLogger(__name__)


class BestCheckpointer(HookBase):
    """Keeps the checkpoint of the best evaluation so far as ``model_best.pth``, together with its results.

    Args:
        period: Iterations between evaluations; 0 evaluates only at the end.
        metric: Metric of the evaluation, for example ``bbox/AP``; higher is better.

    Attributes:
        results: All results of the best evaluation; empty before the first evaluation.
        iteration: Iteration of the best evaluation.
    """

    def __init__(self, period: int, metric: str):
        self.period = period
        self.metric = metric
        self.best = -math.inf
        self.results: dict[str, float] = {}
        self.iteration = -1

    def before_train(self) -> None:
        path = os.path.join(self.trainer.checkpointer.save_dir, "model_best.pth")
        if not (self.trainer.start_iter and os.path.isfile(path)):
            return
        try:
            data = read_checkpoint(path)
            if data["trainer"]["run"] == self.trainer.run and self.metric in data["best"]:
                self.best, self.iteration = float(data["best"][self.metric]), int(data["iteration"])
                self.results = dict(data.get("results", data["best"]))
        except (UnreadableError, AttributeError, LookupError, TypeError, ValueError) as error:
            logger.warning(
                "The result of the best checkpoint cannot be read (%s: %s), so the next evaluation replaces %s.",
                type(error).__name__,
                error,
                path,
            )

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period and done % self.period == 0 and done != self.trainer.max_iter:
            self._check()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # The run was not interrupted.
            self._check()

    def _check(self) -> None:
        results = flatten_results_dict(self.trainer._last_eval_results)
        if self.metric not in results:
            raise InputError(f"TEST.BEST_METRIC: got {self.metric!r}; the evaluation gives {', '.join(results)}.")
        if math.isnan(results[self.metric]):
            logger.warning(
                "TEST.BEST_METRIC: %s is nan, so this evaluation writes no model_best.pth: the test set has no objects "
                "of this kind, or the model finds nothing.",
                self.metric,
            )
        if results[self.metric] > self.best:
            self.best = float(results[self.metric])
            logger.info("Best so far: %s is %.4f.", self.metric, self.best)
            self.results = {name: float(value) for name, value in results.items()}
            self.iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
            best = {self.metric: self.best}
            self.trainer.checkpointer.write("model_best", iteration=self.iteration, best=best, results=self.results)


class Rewind(HookBase):
    """Restarts the data iterator of PreciseBN, so that it sees the same images in resumed and uninterrupted runs.

    Args:
        hook: Runs before this one.
    """

    def __init__(self, hook: hooks.PreciseBN):
        self.hook = hook

    def after_step(self) -> None:
        self.hook._data_iter = None


class EvaluationWriter(HookBase):
    """Writes the results of an evaluation at once, before the next one replaces them or a kill loses them.

    Args:
        hook: The periodic writer, which runs before this hook and writes at its own iterations.
        period: Iterations between evaluations.
    """

    def __init__(self, hook: hooks.PeriodicWriter, period: int):
        self.hook = hook
        self.period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period == 0 and done % self.hook._period and done != self.trainer.max_iter:
            for writer in self.hook._writers:
                writer.write()


def extend_hooks(stock: Iterable[HookBase | None], cfg: CfgNode, ema: AveragedStudent | None) -> list[HookBase | None]:
    """Inserts the hooks of this package among Detectron2's.

    Args:
        stock: Detectron2's hooks.
        cfg: The whole config.
        ema: The averaged student, if there is one.

    Raises:
        InputError: If TEST.BEST_METRIC is set, but nothing is evaluated.
    """
    metric = cfg.TEST.BEST_METRIC
    if metric and not cfg.DATASETS.TEST:
        raise InputError(f"TEST.BEST_METRIC: got {metric!r}, but DATASETS.TEST names no data set.")
    extended: list[HookBase | None] = []
    for hook in stock:
        if isinstance(hook, hooks.EvalHook):
            # A cluster may not wait as long as an evaluation takes, so this stops for a signal before it.
            extended.append(Interruption(cfg.TEST.EVAL_PERIOD))
        extended.append(hook)
        if isinstance(hook, hooks.PreciseBN):
            extended.append(Rewind(hook))
            if ema is not None:
                # The batch norms of the average also get the statistics of their own weights.
                images, number = hook._data_loader, cfg.TEST.PRECISE_BN.NUM_ITER
                averaged = hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, ema.module, images, number)
                extended += [averaged, Rewind(averaged)]
        if isinstance(hook, hooks.EvalHook) and ema is not None:
            extended.append(EMAEvaluation(cfg, ema))
        if isinstance(hook, hooks.EvalHook) and metric and comm.is_main_process():
            extended.append(BestCheckpointer(cfg.TEST.EVAL_PERIOD, metric))
        if isinstance(hook, hooks.PeriodicWriter) and cfg.TEST.EVAL_PERIOD > 0:
            extended.append(EvaluationWriter(hook, cfg.TEST.EVAL_PERIOD))
    return extended
