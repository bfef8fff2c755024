"""Several trained models side by side, all of them detectors or all of them image classifiers."""

from kd_det.comparison.report import compare

__all__ = ["compare"]
