"""Renders a report as one HTML page, which needs no network and no other file."""

import base64
import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kd_det.files import write_whole
from kd_det.reporting import charts
from kd_det.reporting.charts import ChartGroup, Look, Tick
from kd_det.reporting.gallery import Attention, Gallery, Picture


@dataclass(frozen=True)
class Cell:
    """Holds a cell of a table.

    Attributes:
        text: Its text.
        kind: Its look: "helps", "hurts", "none", "text", or "" for a number.
        share: Length of the bar behind it, from 0 to 1; None draws no bar.
    """

    text: str
    kind: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """Holds a table: its caption, the headers of its columns, its rows (header and cells), and a note below it."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    note: str = ""


@dataclass(frozen=True)
class Dots:
    """Holds one row of a dot plot: the name, its look, the runs and their mean in percent of the width, and a text."""

    name: str
    look: Look
    runs: Sequence[float]
    mean: float
    text: str


@dataclass(frozen=True)
class DotPlot:
    """Describes a dot plot with one row per experiment; positions of ticks are in percent of the width."""

    metric: str
    rows: Sequence[Dots]
    ticks: Sequence[Tick]


@dataclass(frozen=True)
class Illustration:
    """Holds a picture with the title above it."""

    title: str
    picture: Picture


@dataclass(frozen=True)
class Section:
    """Holds tables and pictures under a title, with the id that links lead to and a sentence that introduces them."""

    id: str
    title: str
    lead: str
    tables: Sequence[Table]
    plot: DotPlot | None = None
    pictures: Sequence[Illustration] = ()


@dataclass(frozen=True)
class Detail:
    """Holds text that is folded away: a config, commands or versions."""

    title: str
    text: str


@dataclass(frozen=True)
class Page:
    """Describes a report; parts that are empty do not appear.

    Attributes:
        title: Title of the page.
        lead: What was compared, on what, where and when.
        status: State of a run that the page describes; empty for a comparison.
        refresh: Seconds after which a browser loads the page again; 0: never.
        sections: Tables and pictures.
        experiments: Name and look of each experiment in the charts.
        charts: Learning curves.
        gallery: Test images.
        attention: Where the models' features are active.
        details: What is needed to do it again.
    """

    title: str
    lead: Sequence[str]
    status: str = ""
    refresh: int = 0
    sections: Sequence[Section] = ()
    experiments: Sequence[tuple[str, Look]] = ()
    charts: Sequence[ChartGroup] = ()
    gallery: Gallery | None = None
    attention: Sequence[Attention] = ()
    details: Sequence[Detail] = ()


def write_page(page: Page, path: str | Path) -> None:
    """Writes a report atomically.

    Raises:
        InputError: If the file cannot be written.
    """
    # Lone surrogates, which names of files may hold, have no encoding.
    content = render(page).encode("utf-8", "backslashreplace")
    write_whole(str(path), lambda file: file.write(content))


def render(page: Page) -> str:
    """Renders a report as HTML; all text is escaped."""
    script = _asset("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = Markup(_asset("style.css"))
    return (
        _environment()
        .get_template("page.html")
        .render(page=page, charts=charts, style=style, script=Markup(script), digest=digest)
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("templates").joinpath(name).read_text(encoding="utf-8")


def _printable(value: Any) -> Any:
    """Replaces control characters, which HTML forbids, by their escape sequences; passes all but plain text on."""
    if type(value) is not str:
        return value
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in value)
