"""What looks at trained models: tables and pictures of several side by side, CKA, visual concepts, ensembles."""

from kd_det.analysis.report import compare
from kd_det.analysis.runs import split_run

__all__ = ["compare", "split_run"]
