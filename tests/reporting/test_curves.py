"""Tests curves: reading damaged files, thinning, and the layout of charts."""

import json
import math
import time

import numpy as np
import pytest

from kd_det.reporting.charts import BOTTOM, LEFT, RIGHT, TOP, RunCurves, chart_groups, lay_out, looks, short_number
from kd_det.reporting.curves import Curve, read_curves, thin


def curve(*values: float) -> Curve:
    return Curve(np.arange(len(values), dtype=float), np.array(values, dtype=float))


def run(name: str, label: str = "", **curves: Curve) -> RunCurves:
    return RunCurves(name, label or name, curves)


def test_lines_that_a_kill_or_a_hand_damaged_are_skipped(tmp_path):
    lines = [
        '{"iteration": 19, "total_loss": 1.5, "lr": 0.1, "time": 3, "kd/gradient/HintHead": 0.25}',
        "[1, 2]",
        '{"iteration": null, "total_loss": 7}',
        '{"total_loss": 7}',
        '{"iteration": 59, "total_loss": null, "lr": "<b>"}',
        '{"iteration": 39, "total_loss": 1e999, "bbox/AP": 20.5, "bbox/AP-cat": 3, "x/bbox/AP50": 1}',
        "[" * 100_000,
        '{"iteration": 79, "total_lo',
    ]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    found = read_curves(tmp_path / "metrics.json")
    assert set(found) == {"total_loss", "lr", "kd/gradient/HintHead", "bbox/AP", "x/bbox/AP50"}
    assert found["total_loss"].iterations.tolist() == [19, 39, 59]  # A resumed run may have appended earlier ones.
    assert np.isnan(found["total_loss"].values[1:]).all()
    assert found["kd/gradient/HintHead"].values.tolist() == [0.25]


def test_a_run_without_metrics_has_no_curves(tmp_path):
    assert read_curves(tmp_path / "metrics.json") == {}


def test_a_thinned_curve_keeps_its_ends_and_its_peaks():
    values = np.sin(np.arange(100_000) / 500)
    values[31_415], values[27_182] = 50, -50
    values[40_000:60_000] = math.nan
    thinned = thin(Curve(np.arange(100_000.0), values), 160)
    assert len(thinned.values) <= 162
    assert {0, 99_999, 31_415, 27_182} <= set(thinned.iterations.tolist())
    assert (np.diff(thinned.iterations) > 0).all()
    assert np.isnan(thinned.values).any()  # The gap stays.
    assert thin(curve(1, 2, 3), 160).values.tolist() == [1, 2, 3]


def test_a_hundred_thousand_lines_become_a_small_chart(tmp_path):
    with open(tmp_path / "metrics.json", "w") as file:
        for i in range(100_000):
            file.write(json.dumps({"iteration": i, "total_loss": 1 + 1 / (i + 1)}) + "\n")
    begin = time.process_time()
    (group,) = chart_groups([RunCurves("a", "a", read_curves(tmp_path / "metrics.json"))])
    assert time.process_time() - begin < 5
    assert len(group.charts[0].lines[0].path) < 3000


def test_a_path_stays_inside_its_chart_and_breaks_at_gaps():
    chart = lay_out("total_loss", [run("a", total_loss=curve(4, math.nan, 2, 3))])
    assert chart.lines[0].path == f"M{LEFT}.0 {TOP}.0M{LEFT + 188}.0 {BOTTOM}.0L{RIGHT}.0 88.0"
    assert chart.lines[0].points.count("M") == 3
    assert chart.summary == "total_loss over iterations: a ends at 3."


@pytest.mark.parametrize("values", [(1.0,), (0, 0), (-3, -3, -3), (1e-30, 1e30), (-1e9, 5, math.nan), (1e-9, 1)])
def test_all_numbers_have_finite_places(values):
    chart = lay_out("loss_x", [run("a", loss_x=curve(*values))], may_be_logarithmic=True)
    assert "nan" not in chart.lines[0].path
    assert "inf" not in chart.lines[0].path
    assert 1 <= len(chart.y_ticks) <= 6
    assert all(TOP - 0.1 <= tick.position <= BOTTOM + 0.1 for tick in chart.y_ticks)


def test_nothing_is_drawn_of_scalars_that_are_never_finite():
    assert lay_out("loss_x", [run("a", loss_x=curve(math.nan, math.nan)), run("b")]) is None
    assert chart_groups([run("a", loss_x=curve(math.nan))]) == []


def test_losses_that_span_orders_of_magnitude_have_a_logarithmic_axis():
    assert lay_out("loss_x", [run("a", loss_x=curve(100, 1))], may_be_logarithmic=True).logarithmic
    assert not lay_out("loss_x", [run("a", loss_x=curve(100, 0))], may_be_logarithmic=True).logarithmic
    assert not lay_out("bbox/AP", [run("a", **{"bbox/AP": curve(0.1, 40)})]).logarithmic


def test_seeds_share_their_look_and_experiments_differ():
    names = [f"student {i}" for i in range(28)]
    assert len(set(looks(names).values())) == 28
    chart = lay_out("lr", [run(name, f"{name}, seed {seed}", lr=curve(1, 2)) for name in "ab" for seed in (1, 2)])
    assert [line.look for line in chart.lines] == [looks("ab")[name] for name in "aabb"]
    assert [line.title for line in chart.lines][:2] == ["a, seed 1: 2", "a, seed 2: 2"]


def test_distillation_comes_first_among_the_losses():
    names = ("loss_cls", "loss_kd_hint", "total_loss")
    (group,) = chart_groups([run("a", **{name: curve(1, 2) for name in names})])
    assert [chart.title for chart in group.charts] == ["total_loss", "loss_kd_hint", "loss_cls"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.25, "0.25"), (1234, "1.23k"), (2_000_000, "2M"), (-0.00012, "-0.00012"), (40, "40")]
)
def test_short_numbers(value, text):
    assert short_number(value) == text
