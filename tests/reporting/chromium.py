"""Opens pages in a headless Chromium; tests that need it are skipped where there is none."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")
# Lines of the browser's log that come from a page, not from the browser itself.
CONSOLE = re.compile(r"^.*:CONSOLE.*$", re.MULTILINE)


def browse(folder: Path, page: Path, *options: str, fragment: str = "") -> str:
    """Opens a page; returns what the browser prints, after a check that the page has logged nothing to the console.

    Args:
        folder: Folder for the browser's profile.
        page: The file.
        options: Options of Chromium, such as ``--dump-dom``.
        fragment: What follows the # of the address.
    """
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", *options]
    done = subprocess.run(
        [*command, f"{page.as_uri()}#{fragment}"], capture_output=True, text=True, errors="replace", timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not CONSOLE.findall(done.stderr)
    return done.stdout


class Shown(HTMLParser):
    """Reads the state of a page from its elements as the browser dumps them.

    Attributes:
        titles: Texts of the page's title elements outside pictures.
        examples: Whether each test image is shown.
        marks: Class and state of each mark: whether it is shown.
        count: The text that says how many images are shown.
        filters_work: Whether the script has made the filters appear.
    """

    def __init__(self, text: str):
        super().__init__()
        self.titles, self.examples, self.marks, self.count, self.filters_work = [], [], [], "", False
        self.scripts = 0
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self._inside.append(tag)
        self.scripts += tag == "script"
        classes = (attributes.get("class") or "").split()
        if tag == "article":
            self.examples.append("hidden" not in attributes)
        if "mark" in classes:
            self.marks.append((attributes["data-class"], "off" not in classes))
        if attributes.get("id") == "filters":
            self.filters_work = "hidden" not in attributes

    def handle_endtag(self, tag):
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass

    def handle_data(self, data):
        if self._inside[-1:] == ["title"] and "svg" not in self._inside:
            self.titles.append(data)
        if self._inside[-1:] == ["output"]:
            self.count += data
