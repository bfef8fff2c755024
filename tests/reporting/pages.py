"""A report whose every text is hostile, made without any model."""

import numpy as np

from kd_det.reporting.charts import RunCurves, chart_groups, looks
from kd_det.reporting.curves import Curve
from kd_det.reporting.gallery import Answer, Attention, Example, Gallery, Kind, Mark, View, embed, place_labels
from kd_det.reporting.page import Cell, Detail, DotPlot, Dots, Illustration, Page, Section, Table

ATTACK = "document.title='hacked';console.error('hacked')"
HOSTILE = (
    f"<script>{ATTACK}</script>",
    f'"><img src=x onerror="{ATTACK}">',
    f"' onmouseover='{ATTACK}' x='",
    f"]]></style></title></textarea><svg onload={ATTACK}>",
    "{{ 7 * 7 }} {% raw %} ${1} `x` \\u003c --> <!--",
    "日本 é \u202e \x00\x1b[2J \ud800 & &lt; &#0;",
)


def hostile_page(*, classifiers: bool = False, refresh: int = 0) -> Page:
    """A report with all sections: three images, of which the models differ in the second and in the third."""
    looked = looks(HOSTILE)
    runs = [
        RunCurves(
            name, name, {scalar: Curve(np.arange(5.0), np.arange(5.0) * i) for scalar in ("total_loss", f"loss_{name}")}
        )
        for i, name in enumerate(HOSTILE)
    ]
    cells = [
        Cell(text, kind, 0.5) for text, kind in zip(HOSTILE, ("helps", "hurts", "none", "text", "", ""), strict=True)
    ]
    table = Table(HOSTILE[0], HOSTILE, [(name, cells) for name in HOSTILE], HOSTILE[1])
    plot = DotPlot(HOSTILE[2], [Dots(name, look, [10, 20], 15, name) for name, look in looked.items()], [])
    picture = embed(np.full((60, 120, 3), 90, np.uint8))
    examples = []
    for i, differing in enumerate(((), (0,), (0, 1))):
        marks = [
            Mark(kind, i, (10.0 + 20 * i, 10.0, 50.0 + 20 * i, 40.0), HOSTILE[i], "M10 10L50 10L50 40Z")
            for i, kind in enumerate(("hit", "missed"))
        ]
        views = [View(name, name, name, place_labels(marks, picture)) for name in HOSTILE]
        answers = [Answer(name, name, 0.5, is_right=bool(i)) for name in HOSTILE]
        shown = {"answers": answers} if classifiers else {"views": views}
        examples.append(Example(HOSTILE[i], picture, HOSTILE[3], (0, 1), differing, **shown))
    kinds = (
        () if classifiers else (Kind("hit", "#009E73", "✓", "true positive"), Kind("missed", "#E69F00", "○", "missed"))
    )
    return Page(
        title=HOSTILE[0],
        lead=HOSTILE,
        status=HOSTILE[3],
        refresh=refresh,
        sections=[Section("results", HOSTILE[0], HOSTILE[1], [table], plot, [Illustration(HOSTILE[1], picture)])],
        experiments=list(looked.items()),
        charts=chart_groups(runs),
        gallery=Gallery(HOSTILE[4], examples, dict(enumerate(HOSTILE)), kinds),
        attention=[Attention(HOSTILE[0], HOSTILE, [(HOSTILE[5], [picture] * len(HOSTILE))])],
        details=[Detail(name, name) for name in HOSTILE],
    )
