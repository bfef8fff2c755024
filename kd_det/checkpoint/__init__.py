"""Saves and loads checkpoints: no code in a file is run, damaged files are skipped, and strict loading is available."""

from kd_det.checkpoint.keys import counted_keys
from kd_det.checkpoint.run_checkpointer import KDCheckpointer
from kd_det.checkpoint.safe_loading import loading_checkpoint
from kd_det.checkpoint.strict_loading import load_strictly

__all__ = ["KDCheckpointer", "counted_keys", "load_strictly", "loading_checkpoint"]
