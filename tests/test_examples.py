"""The examples in docstrings give what they say."""

import doctest
from importlib import import_module

import pytest
from helpers import ROOT

from kd_det import losses

SOURCES = [path for path in sorted((ROOT / "kd_det").rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]


@pytest.mark.parametrize("module", MODULES)
def test_examples_give_what_they_say(module):
    failed, attempted = doctest.testmod(import_module(module))
    assert attempted > 0
    assert not failed


@pytest.mark.parametrize("name", losses.__all__)
def test_every_loss_has_an_example(name):
    assert ">>> " in getattr(losses, name).__doc__
