"""Show what evaluations found: after each of them, and side by side at the end of a run."""

import logging
import os
from collections.abc import Mapping

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from tabulate import tabulate

from kd_det.engine.hooks import BestCheckpointer

logger = logging.getLogger(__name__)
EMA = "ema/"


def log_results(results: Mapping[str, Mapping], datasets: tuple[str, ...]) -> None:
    """Log the results of an evaluation, a table for each data set.

    Args:
        results: Maps task to metric to value; of several data sets, maps each name to that.
        datasets: Names of the data sets.
    """
    for name, tasks in ({datasets[0]: results} if len(datasets) == 1 else results).items():
        logger.info("Evaluation on %s:\n%s", name, results_table(tasks))


def results_table(tasks: Mapping[str, Mapping[str, float]]) -> str:
    """Format a line of metrics per task and, behind the table, a line with those of each class."""
    totals = {
        task: {key: value for key, value in found.items() if not is_of_class(key)} for task, found in tasks.items()
    }
    columns = list(dict.fromkeys(metric for found in totals.values() for metric in found))
    rows = [[task, *(found.get(metric, "") for metric in columns)] for task, found in totals.items()]
    lines = [tabulate(rows, ["", *columns], floatfmt=".2f")]
    for task, found in tasks.items():
        classes = [f"{key.partition('-')[2]} {value:.2f}" for key, value in found.items() if is_of_class(key)]
        if classes:
            lines.append(f"{task}, classes: {', '.join(classes)}")
    return "\n".join(lines)


def is_of_class(metric: str) -> bool:
    """Whether a metric is that of one class, such as ``AP-person``."""
    return "-" in metric.rpartition("/")[2]


class ClosingTable(HookBase):
    """Logs at the end of a run what its last evaluation and its best one found, and in which files the weights are.

    Args:
        peers: Output folders of students that learn from each other, from the second on.
        best: Keeps the best checkpoint, if one is kept.
    """

    def __init__(self, peers: list[str], best: BestCheckpointer | None):
        self.peers = peers
        self.best = best

    def after_train(self) -> None:
        found = flatten_results_dict(getattr(self.trainer, "_last_eval_results", {}))
        if self.trainer.iter >= self.trainer.max_iter and found:  # Not interrupted.
            logger.info("The results, in %s:\n%s", self.trainer.cfg.OUTPUT_DIR, closing_table(self.columns(found)))

    def columns(self, found: Mapping[str, float]) -> dict[str, dict[str, object]]:
        """Map the title of each model to its metrics, its iteration and its file.

        Args:
            found: Results of the last evaluation.
        """
        last, final = self.trainer.max_iter - 1, "model_final.pth"
        columns = {"student": part(found, "") | {"iteration": last, "file": final}}
        for i, folder in enumerate(self.peers, 2):
            path = os.path.relpath(os.path.join(folder, final), self.trainer.cfg.OUTPUT_DIR)
            columns[f"student {i}"] = part(found, f"peer_{i}/") | {"iteration": last, "file": path}
        if part(found, EMA):
            columns["EMA"] = part(found, EMA) | {"iteration": last, "file": f"{final} (ema)"}
        if self.best is not None and self.best.results:
            prefix = EMA if self.best.metric.startswith(EMA) else ""
            own = part(self.best.results, prefix) | {"iteration": self.best.iteration}
            columns[f"best {self.best.metric}"] = own | {"file": "model_best.pth" + (" (ema)" if prefix else "")}
        return columns


def part(found: Mapping[str, float], prefix: str) -> dict[str, object]:
    """The metrics of one model, without its prefix and without those of each class."""
    others = ("peer_", EMA) if not prefix else ()
    return {
        name.removeprefix(prefix): f"{value:.2f}"
        for name, value in found.items()
        if name.startswith(prefix) and not name.startswith(others) and not is_of_class(name)
    }


def closing_table(columns: Mapping[str, Mapping[str, object]]) -> str:
    """Format models side by side, a line per metric."""
    names = dict.fromkeys(name for found in columns.values() for name in found)
    names = [name for name in names if name not in ("iteration", "file")] + ["iteration", "file"]
    rows = [[name, *(found.get(name, "") for found in columns.values())] for name in names]
    return tabulate(rows, ["", *columns], disable_numparse=True, stralign="right", colalign=("left",))
