"""Analyses trained models: tables, pictures, CKA, visual concepts, relevance, noise and ensembles."""

from kd_det.analysis.report import compare
from kd_det.analysis.run import split_run

__all__ = ["compare", "split_run"]
