"""Lays out line charts, which the page's template draws as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import Locator, LogLocator, MaxNLocator

from kd_det.reporting.curves import GROUPS, Curve, thin

# The sizes are in units of the drawing, which is shown at about one CSS pixel per unit.
WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 328, 10, 166
POINTS = 160  # A line shows about this many points, one for every second unit of the width.
DOTS = 8  # Lines of at most this many points show them.
COLOURS, DASHES = 7, 4  # The style sheet has this many of them. Their numbers share no divisor.
SPAN = 50  # Losses have a logarithmic axis if the largest is at least this many times the smallest.


@dataclass(frozen=True)
class RunCurves:
    """Holds the curves of one run.

    Attributes:
        experiment: Name that the run shares with its other seeds; it decides the look of the lines.
        label: Name of the run itself.
        curves: The curve of each scalar.
    """

    experiment: str
    label: str
    curves: Mapping[str, Curve]


@dataclass(frozen=True)
class Look:
    """Chooses the look of an experiment's lines, as indices of the style sheet's colours and dashes."""

    colour: int
    dash: int


@dataclass(frozen=True)
class Line:
    """Holds a line of a chart: the experiment's index, the look, the title, and SVG paths.

    Attributes:
        path: The line.
        points: Dots at its points; empty if there are too many to be told apart.
    """

    experiment: int
    look: Look
    title: str
    path: str
    points: str


@dataclass(frozen=True)
class Tick:
    """Holds a position on an axis, in units of the drawing, and its label."""

    position: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Describes a chart completely; `summary` puts it into words for those who do not see it."""

    title: str
    summary: str
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    logarithmic: bool


@dataclass(frozen=True)
class ChartGroup:
    """Holds charts that belong together."""

    title: str
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Axis:
    """Maps values between two bounds to positions in a drawing, linearly or by their logarithms."""

    bounds: tuple[float, float]
    positions: tuple[float, float]
    logarithmic: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        bounds = np.array(self.bounds)
        if self.logarithmic:
            values, bounds = np.log10(values), np.log10(bounds)
        share = (values - bounds[0]) / (bounds[1] - bounds[0])
        return self.positions[0] + share * (self.positions[1] - self.positions[0])

    def ticks(self, count: int) -> list[Tick]:
        low, high = self.bounds
        locator: Locator = MaxNLocator(count, steps=[1, 2, 5, 10])
        if self.logarithmic:
            locator = LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=count)
        margin = 1e-9 * (low if self.logarithmic else high - low)
        values = [float(x) for x in locator.tick_values(low, high) if low - margin <= x <= high + margin]
        values = values[:: max(1, math.ceil(len(values) / (count + 1)))]
        return [Tick(round(float(self.place(np.array(value))), 1), short_number(value)) for value in values]


def looks(experiments: Sequence[str]) -> dict[str, Look]:
    """Maps each experiment to the look of its lines; the first 28 of them differ."""
    return {name: Look(i % COLOURS, i % DASHES) for i, name in enumerate(dict.fromkeys(experiments))}


def chart_groups(runs: Sequence[RunCurves]) -> list[ChartGroup]:
    """Lays out a chart for each scalar of the runs, grouped by :data:`kd_det.reporting.curves.GROUPS`."""
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    groups = []
    for title, pattern in GROUPS.items():
        scalars = [name for name in names if pattern.fullmatch(name)]
        if title == "Losses":  # The sum comes first, and then what distils.
            scalars.sort(key=lambda name: (not name.endswith("total_loss"), "loss_kd" not in name))
        charts = [lay_out(name, runs, may_be_logarithmic=title == "Losses") for name in scalars]
        if any(charts):
            groups.append(ChartGroup(title, [chart for chart in charts if chart]))
    return groups


def lay_out(scalar: str, runs: Sequence[RunCurves], *, may_be_logarithmic: bool = False) -> Chart | None:
    """Lays out the chart of one scalar; returns None if no run has a finite value of it.

    Args:
        scalar: Its name.
        runs: The runs, with or without this scalar.
        may_be_logarithmic: Whether the values have a logarithmic axis where they span orders of magnitude.
    """
    styles = looks([run.experiment for run in runs])
    indices = {name: i for i, name in enumerate(styles)}
    drawn = {
        i: thin(run.curves[scalar], POINTS)
        for i, run in enumerate(runs)
        if scalar in run.curves and np.isfinite(run.curves[scalar].values).any()
    }
    if not drawn:
        return None
    values = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in drawn.values()])
    low, high = float(values.min()), float(values.max())
    logarithmic = may_be_logarithmic and low > 0 and high >= SPAN * low
    if not logarithmic and 0 <= low < 0.5 * high:
        low = 0.0  # A chart that begins at zero does not exaggerate.
    if low == high:
        low, high = (low - 0.1 * abs(low), high + 0.1 * abs(high)) if low else (0.0, 1.0)
    last = max(float(curve.iterations[-1]) for curve in drawn.values())
    x_axis = Axis((0, max(last, 1)), (LEFT, RIGHT))
    y_axis = Axis((low, high), (BOTTOM, TOP), logarithmic)
    lines, words = [], []
    for i, curve in drawn.items():
        run, end = runs[i], curve.values[np.isfinite(curve.values)][-1]
        words.append(f"{run.label} ends at {short_number(end)}")
        title = f"{run.label}: {short_number(end)}"
        x, y = x_axis.place(curve.iterations), y_axis.place(curve.values)
        points = draw_points(x, y) if len(curve.values) <= DOTS else ""
        lines.append(Line(indices[run.experiment], styles[run.experiment], title, draw_path(x, y), points))
    summary = f"{scalar} over iterations: {'; '.join(words)}."
    return Chart(scalar, summary, lines, x_axis.ticks(4), y_axis.ticks(4), logarithmic)


def draw_path(x: np.ndarray, y: np.ndarray) -> str:
    """Draws an SVG path through points; NaN interrupts it."""
    parts, is_open = [], False
    for left, top in zip(x, y, strict=True):
        if math.isnan(top):
            is_open = False
            continue
        parts.append(f"{'L' if is_open else 'M'}{left:.1f} {top:.1f}")
        is_open = True
    return "".join(parts)


def draw_points(x: np.ndarray, y: np.ndarray) -> str:
    """Draws an SVG path with a dot, a line of almost no length with round ends, at each point that is not NaN."""
    places = zip(x, y, strict=True)
    return "".join(f"M{left:.1f} {top:.1f}h.01" for left, top in places if not math.isnan(top))


def short_number(value: float) -> str:
    """Formats a number with three significant digits and a suffix for thousands and millions."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"
