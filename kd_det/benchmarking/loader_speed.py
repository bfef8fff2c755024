"""Measures the speed of a config's data loader alone."""

import time

from kd_det.config import read_config
from kd_det.data import check_files, register_datasets
from kd_det.engine import Trainer, check_run

SECONDS = 10.0


def measure_loader(config: str, overrides: list[str]) -> str:
    """Runs a config's training data loader for a few seconds and describes its speed."""
    cfg = read_config(config, "--loader", options=overrides, options_key="--loader")
    check_run(cfg, config)
    register_datasets(cfg)
    check_files(cfg)
    batches = iter(Trainer.build_train_loader(cfg))
    workers = cfg.DATALOADER.NUM_WORKERS
    # The start of the workers does not count, nor do the batches that they have prepared by now.
    for _ in range(1 + 2 * workers):
        next(batches)
    start, images = time.perf_counter(), 0
    while time.perf_counter() < start + SECONDS:
        images += len(next(batches))
    rate = images / (time.perf_counter() - start)
    return f"{config}: {rate:.0f} images per second with {workers} workers, {cfg.SOLVER.IMS_PER_BATCH} per batch"
