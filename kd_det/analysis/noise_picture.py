"""Draws curves of several models against the strength of noise."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from kd_det.engine.picture_grid import DPI, FONT_SIZE, printable

SIZE = (5.0, 4.0)  # These are the width and the height of a panel in inches.
# These colours of Okabe and Ito can be distinguished by colour-blind readers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"
BAND_OPACITY = 0.15


def draw_curves(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str], description: str
) -> Figure:
    """Draws a panel for each metric, with one curve per name and a band of one standard deviation around it.

    Args:
        curves: Maps each name to its points: dicts of "strength" and "metrics", which maps metrics to "mean" and "std".
        titles: Maps the metrics to draw to the titles of their panels.
        description: Description of the horizontal axes.
    """
    figure = Figure((SIZE[0] * len(titles), SIZE[1]), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    lines = []
    for panel, metric in zip(panels, titles, strict=True):
        lines = [
            panel.plot(
                *read_points(points, metric, "mean"), color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)]
            )[0]
            for i, points in enumerate(curves.values())
        ]
        for line, points in zip(lines, curves.values(), strict=True):
            strengths, means = read_points(points, metric, "mean")
            deviations = read_points(points, metric, "std")[1]
            band = {"color": line.get_color(), "alpha": BAND_OPACITY, "linewidth": 0}
            panel.fill_between(strengths, means - deviations, means + deviations, **band)
        panel.set_title(titles[metric], fontsize=FONT_SIZE + 2)
        panel.grid(alpha=0.3)
    figure.supxlabel(printable(description), fontsize=FONT_SIZE, parse_math=False)
    # Names are set afterwards, since a legend leaves out labels that begin with an underscore.
    legend = figure.legend(lines, ["name"] * len(lines), loc="outside upper center", ncols=min(len(lines), 6))
    for text, name in zip(legend.get_texts(), curves, strict=True):
        text.set_parse_math(False)
        text.set_text(printable(name))
    return figure


def read_points(points: Sequence[Mapping[str, Any]], metric: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the strengths and the values of a metric; NaN, which is not drawn, where there is none."""
    values = [point["metrics"].get(metric, {}).get(key, np.nan) for point in points]
    return np.array([point["strength"] for point in points]), np.array(values)
