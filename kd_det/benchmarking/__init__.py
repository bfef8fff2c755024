"""Measures what a distillation step costs, what makes it faster, and where its time goes."""

from kd_det.benchmarking.cost_table import combinations_table, switches_table
from kd_det.benchmarking.loader_speed import measure_loader
from kd_det.benchmarking.measurement import measure
from kd_det.benchmarking.profiling import profile
from kd_det.benchmarking.rows import Row, Setup, combinations, mixed_precision, switches, with_teacher

__all__ = [
    "Row",
    "Setup",
    "combinations",
    "combinations_table",
    "measure",
    "measure_loader",
    "mixed_precision",
    "profile",
    "switches",
    "switches_table",
    "with_teacher",
]
