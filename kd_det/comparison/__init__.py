"""Several trained models side by side, all of them detectors or all of them image classifiers."""

from kd_det.comparison.report import compare
from kd_det.comparison.runs import split_run

__all__ = ["compare", "split_run"]
