# The README's commands. Each first builds .venv where it is missing or older than what it is built from; a build that
# was interrupted goes on at the next call. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
PIP := .venv/bin/python -m pip install --disable-pip-version-check --no-warn-conflicts -c constraints.txt
fail = { echo "setup: $(1)" >&2; exit 1; }
RETRY := pip failed for the reason above. It needs network access and room for 6 GB and the downloads. Run make again \
to go on; if that does not help, delete .venv first

.PHONY: quickstart test test-slow test-all gpu-check lint docs dist

quickstart: .venv/.ready
	.venv/bin/python tools/quickstart.py

# One thread in each of two processes: on two cores, two processes of two threads are 30 times slower.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal tests

test: .venv/.ready
	$(PYTEST) -m 'not slow'

# What kills, launches, or trains for long.
test-slow: .venv/.ready
	$(PYTEST) -m slow

test-all: test test-slow

# The tests that need a GPU, and checks and times on it: a table to paste into an issue, after about eight minutes.
# Without a GPU: make gpu-check GPU_CHECK=--rehearse
GPU_CHECK ?=
gpu-check: .venv/.ready
	.venv/bin/python -m pytest -q -m 'gpu and not slow' tests
	.venv/bin/python -W ignore tools/gpu_check.py $(GPU_CHECK)

lint: .venv/.ready
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

# Warnings, such as a link that leads nowhere, are errors.
docs: .venv/.ready
	.venv/bin/python -W ignore -m sphinx -q -W --keep-going -b html docs docs/_build
	@echo "docs: docs/_build/index.html"

# The wheel is built from the source distribution, so that both have all they need. pip's cache would know an older one.
dist: .venv/.ready
	rm -rf dist
	.venv/bin/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' >/dev/null
	.venv/bin/python -m pip wheel --disable-pip-version-check -q --no-cache-dir --no-deps --no-build-isolation \
	  -w dist dist/kd_det-*.tar.gz
	@ls dist/*

# Without build isolation, fvcore and kd_det are built with the setuptools of constraints.txt, not with the newest.
.venv/.ready: constraints.txt setup.py tools/install_detectron2.py
	@echo "setup: building .venv; it takes 6 GB and the first time some minutes"
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || $(call fail,$(PYTHON) is not Python 3.10 or newer; name one that is: make $(MAKECMDGOALS) PYTHON=python3.12); \
	  $(PYTHON) -c 'import ensurepip; import venv' 2>/dev/null \
	    || $(call fail,this Python has no venv module. On Debian and Ubuntu: apt install python3-venv); \
	  $(PYTHON) -m venv .venv || $(call fail,could not create .venv; delete it and run make again); }
	@$(PIP) 'pip>=23.1' setuptools || $(call fail,$(RETRY))
	@$(PIP) --no-build-isolation -e '.[dev]' || $(call fail,$(RETRY))
	@.venv/bin/python tools/install_detectron2.py
	@touch $@
	@echo "setup: .venv is ready"
