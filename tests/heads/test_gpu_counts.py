"""Numbers of kernels and of waits of the host that each head asks of a GPU, which is pretended.

``gpu_counts.csv`` holds them for every variant of every head, with and without masks of padding. A head asks for just
as many waits, and at most for as many kernels; ``pytest tests/heads/test_gpu_counts.py --write-gpu-counts`` writes the
table anew. A variant that the table lacks waits at most once.
"""

import csv
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage
from pretended_gpu import PretendedGPU, to_gpu

from kd_det import Batch
from kd_det.heads.build import freeze_pretrained

from .cases import CASES, STUDENT, TEACHER, make_head
from .signals import BOXES, make_input, make_signals

TABLE = Path(__file__).with_name("gpu_counts.csv")
KEYS, NUMBERS = ("head", "variant", "padding"), ("waits", "forward", "backward")
PADDINGS = "compared", "masked"
INPUTS = [make_input(64, 128, [3, 9, 50, 33], [70, 2, 75, 60]), make_input(40, 96, [0, 0, 20, 30])]
ON_THE_CPU = {f"{kind}_{what}" for kind in ("roi", "rpn", "dense") for what in ("counts", "scales")}
# Detectron2 writes scalars after every 20th iteration; this one is between two of them.
ITERATION = 30


@pytest.fixture(scope="module")
def signals():
    """Signals of student and teacher as taps give them; those on the device do not change."""
    counts = {"roi_counts": torch.tensor([BOXES // 2, BOXES // 2])}
    return [make_signals(spec, seed=seed) | counts for seed, spec in enumerate((STUDENT, TEACHER))]


def on_gpu(signals: dict, *, learns: bool) -> dict:
    """The signals on the device, but for those that stay on the CPU."""
    moved = {name: x if name in ON_THE_CPU else to_gpu(x) for name, x in signals.items()}
    return {
        name: x.requires_grad_() if learns and x.is_floating_point() and name not in ON_THE_CPU else x
        for name, x in moved.items()
    }


def count(name: str, options: dict, signals: list[dict], *, padding: bool) -> dict[str, int]:
    """Waits, and kernels of forward and backward, of a step that is not the first one."""
    head = make_head(name, options)
    freeze_pretrained(head)
    head.train()
    with PretendedGPU() as gpu, EventStorage(ITERATION):
        to_gpu(head)
        student, teacher = on_gpu(signals[0], learns=True), on_gpu(signals[1], learns=False)
        head(student, teacher, Batch.from_inputs(INPUTS, mask_padding=padding))
        gpu.clear()
        with gpu.part("forward"):
            losses = head(student, teacher, Batch.from_inputs(INPUTS, mask_padding=padding))
        total = sum(losses.values())
        with gpu.part("backward"):
            total.backward()
    return {"waits": gpu.waits_in("forward", "backward"), **{x: gpu.kernels[x] for x in ("forward", "backward")}}


@pytest.fixture(scope="module")
def table(request):
    """Maps head, variant and padding to the row of the table, which is written at the end if that is asked for."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = {tuple(row[key] for key in KEYS): row for row in csv.DictReader(file)}
    yield rows
    if request.config.getoption("--write-gpu-counts"):
        known = [(name, variant, padding) for name, variant, _ in CASES for padding in PADDINGS]
        with TABLE.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [*KEYS, *NUMBERS], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[key] for key in known if key in rows)


@pytest.mark.parametrize(("name", "variant", "options"), CASES, ids=[f"{name}-{variant}" for name, variant, _ in CASES])
def test_counts(name, variant, options, signals, table, request):
    of_maps = any(STUDENT[signal].stride for signal in make_head(name, options).signals)
    for padding in PADDINGS if of_maps else PADDINGS[:1]:
        key = name, variant, padding
        found = count(name, options, signals, padding=padding == "masked")
        if request.config.getoption("--write-gpu-counts"):
            table[key] = dict(zip(KEYS, key, strict=True)) | found
        if key not in table:
            assert found["waits"] <= 1, key
            continue
        expected = {number: int(table[key][number]) for number in NUMBERS}
        assert found["waits"] == expected["waits"], key
        assert all(found[number] <= expected[number] for number in NUMBERS), (key, found, expected)


def test_heads_wait_at_most_once(table):
    assert {key: row["waits"] for key, row in table.items() if int(row["waits"]) > 1} == {}


def test_the_table_has_rows_of_these_heads_only(table):
    assert {key[:2] for key in table} <= {(name, variant) for name, variant, _ in CASES}
