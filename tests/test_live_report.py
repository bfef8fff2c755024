"""Tests the report of a run: when it is written, what it shows after a resume, and that its failures do no harm."""

import logging

import pytest
from classification.models import classifier_cfg
from helpers import interrupted_at

from kd_det import InputError
from kd_det.data import register_datasets
from kd_det.engine import Trainer, live_report
from kd_det.engine.stages import train

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """A classifier of digits that is evaluated after each of six iterations; each evaluation finds another accuracy."""
    options = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8, "SEED": 4, "SOLVER.MAX_ITER": 6}
    options |= {"OUTPUT_DIR": str(tmp_path), "TEST.EVAL_PERIOD": 1, "SOLVER.CHECKPOINT_PERIOD": 1}
    cfg = classifier_cfg(options=options | {"KD.REPORT_PERIOD": 2})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ("digits_test",)
    register_datasets(cfg)
    accuracies = iter(range(1, 100))
    results = lambda *_: {"classification": {"top1": float(next(accuracies)), "top1-<b>": 2.0}}  # noqa: E731
    monkeypatch.setattr(Trainer, "test", classmethod(results))
    return cfg


@pytest.fixture
def written(monkeypatch):
    """The status and the period of refreshing of each page that is written, and the page."""
    pages = []

    def write(page, path):
        pages.append((page.status.partition(",")[0], page.refresh, page))
        write_page(page, path)

    write_page = live_report.write_page
    monkeypatch.setattr(live_report, "write_page", write)
    return pages


def states(pages) -> list[tuple[str, int]]:
    return [(status, refresh) for status, refresh, _ in pages]


def test_every_second_evaluation_and_the_end_write_it(cfg, written, tmp_path):
    train(cfg, resume=False)
    assert states(written) == [
        ("training: iteration 2 of 6", live_report.REFRESH),
        ("training: iteration 4 of 6", live_report.REFRESH),
        ("finished: iteration 6 of 6", 0),
    ]
    text = (tmp_path / "report.html").read_text()
    assert 'http-equiv="refresh"' not in text
    assert "classification/top1-&lt;b&gt;" in text
    chart = next(x for group in written[-1][2].charts for x in group.charts if x.title == "classification/top1")
    assert chart.summary.endswith("ends at 6.")


def test_without_a_period_only_the_end_writes_it(cfg, written):
    cfg.KD.REPORT_PERIOD = 0
    train(cfg, resume=False)
    assert states(written) == [("finished: iteration 6 of 6", 0)]


def test_a_run_that_was_cut_off_says_so_and_goes_on_in_its_curves(cfg, written):
    with interrupted_at(3):
        train(cfg, resume=False)
    assert states(written) == [("training: iteration 2 of 6", live_report.REFRESH), ("stopped: iteration 3 of 6", 0)]
    written.clear()
    train(cfg, resume=True)
    assert states(written) == [("training: iteration 4 of 6", live_report.REFRESH), ("finished: iteration 6 of 6", 0)]
    charts = {chart.title: chart for group in written[-1][2].charts for chart in group.charts}
    assert charts["classification/top1"].lines[0].path.count("L") == 5  # Six evaluations, each once.


@pytest.mark.parametrize("error", [InputError("report.html: cannot be written: full."), ZeroDivisionError("a defect")])
def test_a_failure_is_an_error_in_the_log_and_the_run_goes_on(cfg, monkeypatch, caplog, tmp_path, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(live_report, "write_page", fail)
    train(cfg, resume=False)
    assert (tmp_path / "model_final.pth").is_file()
    records = [x for x in caplog.records if x.name == live_report.__name__]
    assert [x.levelno for x in records] == [logging.ERROR] * 3
    assert bool(records[0].exc_info) is isinstance(error, ZeroDivisionError)
