"""Logs the results of evaluations: after each evaluation, and side by side at the end of a run."""

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
    """Logs the results of an evaluation, with one table for each data set.

    Args:
        results: Maps task to metric to value; with several data sets, maps the name of each data set to such a mapping.
        datasets: Names of the data sets.
    """
    for name, tasks in ({datasets[0]: results} if len(datasets) == 1 else results).items():
        logger.info("Evaluation on %s:\n%s", name, results_table(tasks))


def results_table(tasks: Mapping[str, Mapping[str, float]]) -> str:
    """Formats a table with a line of metrics per task, followed by a line with the first metric of each class."""
    totals = {
        task: {key: value for key, value in metrics.items() if not is_of_class(key)} for task, metrics in tasks.items()
    }
    columns = list(dict.fromkeys(metric for metrics in totals.values() for metric in metrics))
    rows = [[task, *(metrics.get(metric, "") for metric in columns)] for task, metrics in totals.items()]
    lines = [tabulate(rows, ["", *columns], floatfmt=".2f")]
    for task, metrics in tasks.items():
        of_classes = [key.partition("-") for key in metrics if is_of_class(key)]
        # Semantic segmentation has four metrics of each class.
        shown = [(name, metrics[f"{metric}-{name}"]) for metric, _, name in of_classes if metric == of_classes[0][0]]
        if shown:
            lines.append(f"{task}, classes: {', '.join(f'{name} {value:.2f}' for name, value in shown)}")
    return "\n".join(lines)


def is_of_class(metric: str) -> bool:
    """Checks whether a metric belongs to one class, such as ``AP-person``."""
    return "-" in metric.rpartition("/")[2]


class ClosingTable(HookBase):
    """Logs, at the end of a run, the results of its last and its best evaluation and the files with the weights.

    Args:
        peers: Output folders of the students of mutual learning, from the second student on.
        best: The hook that keeps the best checkpoint, if there is one.
    """

    def __init__(self, peers: list[str], best: BestCheckpointer | None):
        self.peers = peers
        self.best = best

    def after_train(self) -> None:
        results = flatten_results_dict(getattr(self.trainer, "_last_eval_results", {}))
        if self.trainer.iter >= self.trainer.max_iter and results:  # The run was not interrupted.
            logger.info("Results in %s:\n%s", self.trainer.cfg.OUTPUT_DIR, closing_table(self.columns(results)))

    def columns(self, results: Mapping[str, float]) -> dict[str, dict[str, object]]:
        """Maps the title of each model to its metrics, its iteration and its file.

        Args:
            results: Results of the last evaluation.
        """
        last, final = self.trainer.max_iter - 1, "model_final.pth"
        columns = {"student": model_metrics(results, "") | {"iteration": last, "file": final}}
        for i, folder in enumerate(self.peers, 2):
            path = os.path.relpath(os.path.join(folder, final), self.trainer.cfg.OUTPUT_DIR)
            columns[f"student {i}"] = model_metrics(results, f"peer_{i}/") | {"iteration": last, "file": path}
        if model_metrics(results, EMA):
            columns["EMA"] = model_metrics(results, EMA) | {"iteration": last, "file": f"{final} (ema)"}
        if self.best is not None and self.best.results:
            prefix = EMA if self.best.metric.startswith(EMA) else ""
            best = model_metrics(self.best.results, prefix) | {"iteration": self.best.iteration}
            columns[f"best {self.best.metric}"] = best | {"file": "model_best.pth" + (" (ema)" if prefix else "")}
        return columns


def model_metrics(results: Mapping[str, float], prefix: str) -> dict[str, object]:
    """Returns the metrics of one model, without its prefix and without metrics of single classes."""
    others = ("peer_", EMA) if not prefix else ()
    return {
        name.removeprefix(prefix): f"{value:.2f}"
        for name, value in results.items()
        if name.startswith(prefix) and not name.startswith(others) and not is_of_class(name)
    }


def closing_table(columns: Mapping[str, Mapping[str, object]]) -> str:
    """Formats a table with one column per model and one line per metric."""
    last = ["iteration", "file"]
    names = [*dict.fromkeys(name for column in columns.values() for name in column if name not in last), *last]
    rows = [[name, *(column.get(name, "") for column in columns.values())] for name in names]
    return tabulate(rows, ["", *columns], disable_numparse=True, stralign="right", colalign=("left",))
