"""Tests the page in a real browser: nothing in the console, filters by the address, a picture that is not blank."""

from urllib.parse import quote

import cv2
import pytest

from kd_det.reporting import write_page
from reporting.chromium import Shown, browse, needs_browser
from reporting.pages import HOSTILE, hostile_page

pytestmark = needs_browser


@pytest.mark.parametrize(
    ("classifiers", "fragment", "examples"),
    [
        (False, "results", [True, True, True]),
        (True, "differ=1", [False, True, True]),
        (False, f"class={quote(HOSTILE[1])}&differ=1", [False, False, True]),
    ],
)
def test_filters_follow_the_address_and_hostile_text_does_nothing(tmp_path, fragment, examples, classifiers):
    page = tmp_path / "a report.html"
    write_page(hostile_page(classifiers=classifiers), page)
    shown = Shown(browse(tmp_path, page, "--dump-dom", fragment=fragment))
    assert shown.titles == [HOSTILE[0]]
    assert shown.scripts == 1
    assert shown.filters_work
    assert shown.examples == examples
    assert shown.count == f"{sum(examples)} of 3 images"
    assert bool(shown.marks) is not classifiers
    if "class" in fragment:
        assert all(is_shown is (number == "1") for number, is_shown in shown.marks)


@pytest.mark.parametrize("options", [("--window-size=1280,900",), ("--window-size=390,844", "--force-dark-mode")])
def test_a_screenshot_is_not_blank(tmp_path, options):
    page, picture = tmp_path / "report.html", tmp_path / "picture.png"
    write_page(hostile_page(), page)
    browse(tmp_path, page, f"--screenshot={picture}", *options)
    pixels = cv2.imread(str(picture))
    assert pixels.std() > 5
