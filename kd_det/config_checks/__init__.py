"""Checks config values that Detectron2 would reject late or never: bounds, names, and keys that must fit together."""

from kd_det.config_checks.parts import check_parts, registered_parts
from kd_det.config_checks.values import check_network_values, check_run_values

__all__ = ["check_network_values", "check_parts", "check_run_values", "registered_parts"]
