"""Writes ``report.html`` while a run trains, so that a browser left open shows its progress."""

import logging
import os
from collections.abc import Mapping
from datetime import datetime, timedelta

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict

from kd_det.engine.event_writers import metrics_path
from kd_det.engine.results import is_of_class
from kd_det.errors import InputError
from kd_det.reporting import Page, write_page
from kd_det.reporting.charts import RunCurves, chart_groups
from kd_det.reporting.curves import read_curves
from kd_det.reporting.page import Cell, Detail, Section, Table
from kd_det.reporting.versions import describe_versions

logger = logging.getLogger(__name__)
FILE = "report.html"
REFRESH = 30  # A browser loads the page again after this many seconds.


class LiveReport(HookBase):
    """Writes a page with the learning curves and the latest results of a run, atomically.

    The page is written after every n-th evaluation, when it asks browsers to load it again from time to time, and at
    the end of the run, however it ends. It is made of ``metrics.json``, so that a resumed run shows all of its
    iterations. A page that cannot be written is an error in the log, and the run goes on. The hook must follow those
    that evaluate and write; only the main process needs it.

    Args:
        cfg: The run's config.
    """

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg
        self.period = cfg.KD.REPORT_PERIOD * cfg.TEST.EVAL_PERIOD

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done < self.trainer.max_iter:
            self._write("training", done, REFRESH)

    def after_train(self) -> None:
        done = min(self.trainer.iter, self.trainer.max_iter)
        self._write("finished" if done >= self.trainer.max_iter else "stopped", done, 0)

    def _write(self, state: str, done: int, refresh: int) -> None:
        path = os.path.join(self.cfg.OUTPUT_DIR, FILE)
        try:
            write_page(self._describe(f"{state}: iteration {done} of {self.trainer.max_iter}", refresh), path)
        except InputError as error:
            logger.error("The run goes on without its report: %s", error)
        except Exception:
            logger.exception("The run goes on without its report, %s:", path)

    def _describe(self, status: str, refresh: int) -> Page:
        eta = self.trainer.storage.histories().get("eta_seconds") if refresh else None
        if eta is not None:
            status += f", {timedelta(seconds=int(eta.latest()))} left"
        name = self.cfg.OUTPUT_DIR
        results = flatten_results_dict(getattr(self.trainer, "_last_eval_results", {}))
        return Page(
            title=f"Run {name}",
            lead=(
                f"trained on {', '.join(self.cfg.DATASETS.TRAIN)}",
                f"evaluated on {', '.join(self.cfg.DATASETS.TEST) or 'nothing'}",
                f"seed {self.trainer.seed}",
                datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
            ),
            status=status,
            refresh=refresh,
            sections=[latest_results(results)] if results else [],
            charts=chart_groups([RunCurves(name, name, read_curves(metrics_path(self.cfg)))]),
            details=[Detail("Versions", describe_versions()), Detail("Config", self.cfg.dump())],
        )


def latest_results(results: Mapping[str, float]) -> Section:
    """Shows the results of an evaluation: the metrics over all classes, and those of each class.

    Args:
        results: Maps metrics such as ``bbox/AP`` or ``bbox/AP-person`` to their values.
    """
    parts = {
        "All classes": [name for name in results if not is_of_class(name)],
        "By class": [name for name in results if is_of_class(name)],
    }
    tables = [
        Table(caption, ("metric", "value"), [(name, [Cell(f"{results[name]:.2f}")]) for name in names])
        for caption, names in parts.items()
        if names
    ]
    return Section("results", "Latest results", "", tables)
