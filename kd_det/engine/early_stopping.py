"""Ends a run early once its evaluations stop improving, at the iteration at which an uninterrupted run would end."""

import json
import logging
import math
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, PeriodicWriter
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from kd_det.checkpoint_folder import FINAL
from kd_det.engine.event_writers import drop_lines, logged_iteration, metrics_path
from kd_det.engine.hooks import BestCheckpointer, EvaluationWriter

logger = logging.getLogger(__name__)


class EarlyStop(BaseException):
    """Leaves Detectron2's training loop, which would log any ``Exception`` as a failure."""


class EarlyStopping(HookBase):
    """Ends a run once TEST.PATIENCE evaluations in a row have found no better value of TEST.BEST_METRIC.

    The count belongs to every checkpoint, so that a resumed run ends where an uninterrupted one does. A checkpoint is
    written before the evaluation of its iteration, which a resumed run therefore counts first: it takes the value from
    ``metrics.json``, or evaluates if the run was killed before it wrote the value.

    The main process decides for all. The hook is needed in each of them; it must follow the hooks that evaluate and
    precede those that write.

    Args:
        cfg: The whole config.

    Attributes:
        best: Best value so far; -inf before the first value that is not NaN.
        best_iteration: Iteration of the best value; -1 before there is one.
        waited: Number of evaluations since then.
        counted_iteration: Iteration of the last evaluation that was counted; -1 before there is one.
    """

    def __init__(self, cfg: CfgNode):
        self.metric, self.patience, self.period = cfg.TEST.BEST_METRIC, cfg.TEST.PATIENCE, cfg.TEST.EVAL_PERIOD
        self.path = metrics_path(cfg)
        self.best, self.best_iteration = -math.inf, -1
        self.waited = 0
        self.counted_iteration = -1
        self._reports = False

    def state_dict(self) -> dict:
        return {
            "metric": self.metric,
            "best": self.best,
            "best_iteration": self.best_iteration,
            "waited": self.waited,
            "counted_iteration": self.counted_iteration,
        }

    def load_state_dict(self, state: dict) -> None:
        if state["metric"] == self.metric:
            self.best, self.best_iteration = float(state["best"]), int(state["best_iteration"])
            self.waited, self.counted_iteration = int(state["waited"]), int(state["counted_iteration"])

    def before_train(self) -> None:
        trainer, done = self.trainer, self.trainer.start_iter
        if not done or done % self.period or done >= trainer.max_iter:
            return
        trainer.iter = trainer.storage.iter = done - 1
        # Only the final checkpoint of a run that ended early is written after its last evaluation is counted.
        is_counted = self.counted_iteration == done - 1
        value = None
        if comm.is_main_process():
            # A final evaluation is logged one iteration later. It is made again, at the new end of the run.
            drop_lines(self.path, done)
            value = None if is_counted else self._recorded_value()
        if is_counted or any(comm.all_gather(value is not None)):
            if value is not None:
                self._count(value)
            self._end_if_due(save=not is_counted)
        else:
            logger.info("The evaluation after iteration %d was not completed, so it is made now.", done - 1)
            for hook in trainer._hooks:
                if isinstance(hook, EvalHook | BestCheckpointer | EarlyStopping | PeriodicWriter | EvaluationWriter):
                    hook.after_step()
        trainer.iter = trainer.storage.iter = done

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period or done == self.trainer.max_iter:
            return
        if comm.is_main_process():
            self._count(float(flatten_results_dict(self.trainer._last_eval_results)[self.metric]))
        if self._end_if_due(save=True):
            # These results are also those of the end, so nothing is evaluated twice.
            self._reports = True
            for hook in self.trainer._hooks:
                if isinstance(hook, EvalHook) and hook._period > 0:
                    hook._eval_after_train = False

    def after_train(self) -> None:
        if self._reports:
            results = flatten_results_dict(self.trainer._last_eval_results)
            self.trainer.storage.put_scalars(**results, smoothing_hint=False)

    def _recorded_value(self) -> float | None:
        """Finds the value of the current iteration in ``metrics.json``; returns None if the run must evaluate again."""
        value = recorded_value(self.path, self.metric, self.trainer.iter)
        best = next(hook.best for hook in self.trainer._hooks if isinstance(hook, BestCheckpointer))
        if value is not None and value > best:  # The evaluation was logged, but model_best.pth could not be written.
            drop_lines(self.path, self.trainer.iter)
            return None
        return value

    def _count(self, value: float) -> None:
        """Counts the evaluation of the current iteration; NaN is no better value."""
        self.counted_iteration = self.trainer.iter
        if value > self.best:
            self.best, self.best_iteration, self.waited = value, self.counted_iteration, 0
        else:
            self.waited += 1

    def _end_if_due(self, *, save: bool) -> bool:
        """Makes the current iteration the last one of all processes if the main process has waited long enough.

        Args:
            save: Whether the final checkpoint has yet to be written.
        """
        if not any(comm.all_gather(comm.is_main_process() and self.waited >= self.patience)):
            return False
        trainer = self.trainer
        if comm.is_main_process():
            since = f"better than {self.best:.4f}, of iteration {self.best_iteration}: see model_best.pth"
            logger.info(
                "The run ends early, after iteration %d of %d: in %d evaluations (TEST.PATIENCE %d) %s was not %s.",
                trainer.iter,
                trainer.max_iter,
                self.waited,
                self.patience,
                self.metric,
                since if self.best_iteration >= 0 else "a number",
            )
            if save:
                trainer.checkpointer.save(Path(FINAL).stem, iteration=trainer.iter)
        trainer.max_iter = trainer.iter + 1
        return True


def recorded_value(path: str, metric: str, iteration: int) -> float | None:
    """Reads a metric from the lines of one iteration in ``metrics.json``; returns None if it is not there."""
    if not Path(path).is_file():
        return None
    for line in reversed(Path(path).read_bytes().splitlines()):
        if logged_iteration(line) < iteration:
            return None
        value = json.loads(line).get(metric, "")
        if value != "":
            return math.nan if value is None else float(value)
    return None
