"""Damaged configs, annotations and checkpoints: no traceback, and nothing that hangs; see fuzz.py."""

import os

import pytest
from fuzz import run_cases


@pytest.mark.slow
def test_damaged_input_is_told_in_one_line():
    seed, seconds = (
        int(os.environ.get(f"KD_DET_FUZZ_{key}", default)) for key, default in (("SEED", 0), ("SECONDS", 60))
    )
    outcomes = run_cases(seed, count=10**9, seconds=seconds)
    assert outcomes
    assert not [str(outcome) for outcome in outcomes if outcome.failed]
