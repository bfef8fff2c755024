"""Tests the page without a browser: escaping, self-containment, and what a table or an image needs to be read aloud."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from kd_det.errors import InputError
from kd_det.reporting import Page, write_page
from kd_det.reporting.gallery import Mark, embed, place_labels
from kd_det.reporting.page import render
from reporting.pages import hostile_page


class Elements(HTMLParser):
    """Collects the elements of a page, with their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.mark.parametrize("classifiers", [False, True])
def test_no_text_becomes_an_element_or_an_attribute(classifiers):
    """Neither in HTML nor inside SVG."""
    elements = Elements(render(hostile_page(classifiers=classifiers)))
    assert elements.named("script") == [{}]
    assert not [(tag, name) for tag, attributes in elements.found for name in attributes if name.startswith("on")]
    assert all(image["src"].startswith("data:image/webp;base64,") for image in elements.named("img"))
    harmless = {
        "class",
        "id",
        "style",
        "href",
        "hidden",
        "checked",
        "value",
        "type",
        "role",
        "tabindex",
        "content",
        "name",
    }
    harmless |= {
        "lang",
        "charset",
        "http-equiv",
        "scope",
        "alt",
        "src",
        "width",
        "height",
        "x",
        "y",
        "d",
        "for",
        "viewbox",
    }
    harmless |= {"text-anchor", "preserveaspectratio"}
    names = {name for _, attributes in elements.found for name in attributes}
    assert {name for name in names if not name.startswith(("aria-", "data-"))} <= harmless


def test_the_page_needs_no_other_file_and_runs_no_other_script():
    text = render(hostile_page())
    elements = Elements(text)
    links = [x[key] for _, x in elements.found for key in ("src", "href") if key in x]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not elements.named("link")
    (policy,) = (x["content"] for x in elements.named("meta") if x.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")
    assert "url(" not in text
    assert "@import" not in text


def test_only_a_page_of_a_running_run_is_loaded_again():
    def refreshes(page: Page) -> list[str]:
        return [x["content"] for x in Elements(render(page)).named("meta") if x.get("http-equiv") == "refresh"]

    assert refreshes(hostile_page(refresh=30)) == ["30"]
    assert refreshes(hostile_page()) == []


def test_tables_have_headers_and_pictures_have_words():
    elements = Elements(render(hostile_page()))
    assert {x["scope"] for x in elements.named("th")} == {"col", "row"}
    assert all(x["alt"] for x in elements.named("img"))
    pictures = [x for x in elements.named("svg") if x.get("aria-hidden") != "true"]
    assert pictures
    assert all(x["role"] == "img" and x["aria-label"] for x in pictures)
    assert len({x["id"] for _, x in elements.found if "id" in x}) == len([x for _, x in elements.found if "id" in x])


def test_control_characters_are_shown_and_surrogates_can_be_written(tmp_path):
    write_page(hostile_page(), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)
    assert "\\x00\\x1b[2J \\ud800" in text
    assert "日本" in text


def test_parts_that_are_empty_do_not_appear():
    elements = Elements(render(Page("title", ())))
    assert not elements.named("section")
    assert not elements.named("a")


def test_a_page_that_cannot_be_written_is_reported_and_the_last_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_page(Page("first", ()), path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        write_page(Page("second", ()), path)
    assert "first" in path.read_text()
    assert [x.name for x in tmp_path.iterdir()] == ["report.html"]


def test_large_images_are_reduced_and_tiny_ones_stay_exact():
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
    large = embed(noise)
    assert (large.width, large.height, large.is_tiny) == (1200, 900, False)
    assert len(large.uri) < 400_000
    assert embed(noise[:32, :32]).is_tiny


def test_labels_do_not_cover_each_other_and_stay_on_the_image():
    picture = embed(np.zeros((100, 200, 3), np.uint8))
    boxes = [(10.0, 30.0, 60.0, 60.0), (12.0, 31.0, 62.0, 60.0), (11.0, 30.0, 62.0, 60.0), (190.0, 0.0, 200.0, 99.0)]
    placed = place_labels([Mark("hit", 0, box, "✓ name 50%") for box in boxes], picture)
    above, below, hidden, nowhere = (mark.corner for mark in placed)
    assert above[1] < 30 < 60 < below[1]
    assert hidden is None
    assert nowhere is None
